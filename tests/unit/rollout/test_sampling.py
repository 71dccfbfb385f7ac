"""Requests to the engine: lengths, stops, seeds."""

import asyncio
import json

import pytest
from rollout_fakes import EOS, FakeClient, LetterTokenizer, config, generation, prompts

from slime_opd.config.lengths import context_length
from slime_opd.config.stages import EvaluationConfig, ModelConfig
from slime_opd.errors import ConfigError
from slime_opd.rollout import single_turn
from slime_opd.rollout.generation import sampling_seed
from slime_opd.rollout.sampling import eos_token_ids, evaluation_sampler, response_text, training_sampler


def request(length=2, number=0, index=0, **rollout):
    """The engine's request for one sample: token ids and sampling parameters."""
    client = FakeClient(lambda _: generation([2]))
    sampler = training_sampler(client, LetterTokenizer(), config(**rollout))
    asyncio.run(sampler.sample(single_turn.generate, prompts(index + 1, length)[index], number))
    [sent] = client.requests
    return sent


def test_the_prompt_goes_out_as_its_tokens_with_the_options_of_the_rollout():
    tokens, params = request(
        rollout_temperature=0.7, rollout_top_p=0.9, rollout_top_k=5, rollout_stop=("x",), rollout_stop_token_ids=(9, 4)
    )
    assert tokens == (1, 2)
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.9, 5)
    assert (params.stop, params.stop_token_ids) == (("x",), (EOS, 4, 9))


@pytest.mark.parametrize(("length", "expected"), [(2, 8), (12, 8), (13, 7), (19, 1)])
def test_a_response_is_limited_by_its_own_limit_and_the_rest_of_the_context(length, expected):
    assert request(length, rollout_max_context_len=20)[1].max_new_tokens == expected


@pytest.mark.parametrize("length", [20, 25])
def test_a_prompt_longer_than_the_context_is_an_error_in_the_program(length):
    with pytest.raises(RuntimeError, match=f"prompt 0 has {length} tokens, the context 20: it was read without"):
        request(length, rollout_max_context_len=20)


def test_the_context_is_the_flags_else_the_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    flat = ModelConfig(hf_checkpoint=str(tmp_path))
    assert context_length(config(rollout_max_context_len=32, model=flat)) == 32
    assert context_length(config(rollout_max_context_len=None, model=flat)) == 64
    from_flags = ModelConfig(hf_checkpoint=str(tmp_path), max_position_embeddings=48)
    assert context_length(config(rollout_max_context_len=None, model=from_flags)) == 48
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 16}}))
    assert context_length(config(rollout_max_context_len=None, model=flat)) == 16
    assert context_length(config(rollout_max_context_len=None)) is None


def test_without_a_response_limit_a_response_may_fill_the_context_and_without_both_it_is_an_error():
    assert request(rollout_max_response_len=None)[1].max_new_tokens == 98
    with pytest.raises(ConfigError, match="--rollout-max-response-len is missing"):
        request(rollout_max_response_len=None, rollout_max_context_len=None)


def test_every_end_of_sequence_token_of_tokenizer_and_generation_config_stops(tmp_path):
    assert eos_token_ids(LetterTokenizer(), None) == {EOS}
    for named, expected in ((7, {EOS, 7}), ([7, 8], {EOS, 7, 8}), (None, {EOS})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert eos_token_ids(LetterTokenizer(), str(tmp_path)) == expected
    assert eos_token_ids(object(), None) == frozenset()
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--hf-checkpoint: .*generation_config\.json is not JSON"):
        eos_token_ids(LetterTokenizer(), str(tmp_path))


def test_only_a_last_end_of_sequence_token_is_cut_from_the_text():
    text = {
        tokens: response_text(LetterTokenizer(), tokens, frozenset({EOS}))
        for tokens in ((2, EOS), (EOS, 2), (), (EOS,))
    }
    assert text == {(2, EOS): "b", (EOS, 2): "<eos>b", (): "", (EOS,): ""}


def test_seeds_repeat_and_differ_between_samples_prompts_purposes_and_runs():
    assert request(index=1, number=2)[1].seed == request(index=1, number=2)[1].seed == sampling_seed(5, "rollout", 1, 2)
    seeds = {
        sampling_seed(seed, purpose, index, number)
        for seed in (1, 2)
        for purpose in ("rollout", "eval/a", "eval/b")
        for index in range(10)
        for number in range(10)
    }
    assert len(seeds) == 600
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_evaluation_is_greedy_by_default_with_its_own_limit_or_the_rollouts():
    def params(**evaluation):
        client = FakeClient(lambda _: generation([2]))
        sampler = evaluation_sampler(client, LetterTokenizer(), config(EvaluationConfig(**evaluation)), "small")
        asyncio.run(sampler.sample(single_turn.generate, prompts(1)[0], 0))
        return client.requests[0][1]

    assert (params().temperature, params().max_new_tokens) == (0.0, 8)
    assert params().seed == sampling_seed(5, "eval/small", 0, 0)
    chosen = params(eval_temperature=0.6, eval_top_p=0.95, eval_top_k=20, eval_max_response_len=30)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.max_new_tokens) == (0.6, 0.95, 20, 30)
