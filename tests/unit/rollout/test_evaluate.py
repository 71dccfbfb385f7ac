"""Evaluation: means per set, sharing the rollout's sampling."""

import asyncio

import pytest
from rollout_fakes import EOS, FakeClient, FirstLetterReward, LetterTokenizer, config, generation, prompts

from slime_opd.config.stages import EvaluationConfig
from slime_opd.errors import DataError
from slime_opd.rollout.evaluate import EvalSet, evaluate


def evaluated(client, sizes, reward=None, on_sample=None, **evaluation):
    sets = [EvalSet(name, prompts(size)) for name, size in sizes.items()]
    settings = config(EvaluationConfig(**evaluation))
    return asyncio.run(evaluate(client, LetterTokenizer(), settings, sets, reward or FirstLetterReward(), on_sample))


def test_each_set_has_its_mean_reward_length_and_share_of_truncated():
    answers = [
        generation([2, EOS]),  # right: the label is b
        generation([3, 3, 3, EOS]),
        generation([2, 2, 2], "length"),  # right and truncated
        generation([3], "length"),
    ]
    metrics = evaluated(FakeClient(answers.__getitem__), {"one": 3, "two": 1})
    assert {name: (mean.total, mean.count) for name, mean in metrics.items()} == {
        "eval/one/accuracy": (2.0, 3),
        "eval/one/response_length": (9.0, 3),
        "eval/one/truncated_ratio": (1.0, 3),
        "eval/two/accuracy": (0.0, 1),
        "eval/two/response_length": (1.0, 1),
        "eval/two/truncated_ratio": (1.0, 1),
    }


def test_every_prompt_gets_the_requested_number_of_greedy_responses():
    client, seen = FakeClient(lambda _: generation([2])), []
    metrics = evaluated(client, {"one": 2}, on_sample=seen.append, n_samples_per_eval_prompt=3)
    assert metrics["eval/one/accuracy"].count == len(client.requests) == len(seen) == 6
    assert {params.temperature for _, params in client.requests} == {0.0}


def test_an_error_in_one_set_cancels_the_others():
    class Broken(FirstLetterReward):
        async def __call__(self, sample):
            raise ValueError("no")

    client = FakeClient(lambda number: generation([2]) if number == 0 else asyncio.Event().wait())
    with pytest.raises(DataError, match="reward first_letter failed"):
        evaluated(client, {"one": 1, "two": 2}, reward=Broken())
    assert client.cancelled == 2


def test_no_sets_give_no_metrics():
    assert evaluated(FakeClient(lambda _: generation([2])), {}) == {}
