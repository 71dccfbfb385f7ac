"""From the run's options to responses: sampling parameters, length limits and seeds, for training and evaluation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from slime_opd.config import Config
from slime_opd.config.hf_config import end_token_ids, token_ids
from slime_opd.config.lengths import context_length
from slime_opd.engine.client import EngineClient
from slime_opd.engine.protocol import SamplingParams
from slime_opd.errors import ConfigError
from slime_opd.rollout.generation import (
    GenerateContext,
    GenerateFunction,
    generate_row,
    make_sample,
    sampling_seed,
)
from slime_opd.types import Prompt, Sample


class Sampler:
    """Generates responses with one model's engines, under one set of sampling options and length limits.

    params: `max_new_tokens` is the largest response length.
    max_context: largest length of prompt and response together, which may leave fewer tokens; None: no limit.
    eos: ids that end a response and are not part of its text.
    purpose: keeps the seeds of training, of each evaluation set and of a teacher's responses apart.
    num_top_logprobs: the model's most likely tokens that samples keep at each position; 0: none.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Any,
        params: SamplingParams,
        *,
        max_context: int | None,
        eos: frozenset[int],
        seed: int,
        purpose: str,
        is_evaluation: bool = False,
        num_top_logprobs: int = 0,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._params = params
        self._max_context = max_context
        self._eos = eos
        self._seed = seed
        self._purpose = purpose
        self._is_evaluation = is_evaluation
        self._num_top_logprobs = num_top_logprobs

    async def sample(self, generate: GenerateFunction, prompt: Prompt, sample_index: int) -> Sample:
        """Response `sample_index` to `prompt` by `generate`, with the fields that `make_sample` sets.

        Its text leaves special tokens out. Raises EngineError where an engine fails.
        """
        row = await generate_row(generate, prompt, self._context(prompt, sample_index))
        return make_sample(prompt, row, response_text(self._tokenizer, row.token_ids, self._eos))

    def _context(self, prompt: Prompt, sample_index: int) -> GenerateContext:
        return GenerateContext(
            self._client,
            self._tokenizer,
            self._params,
            prompt,
            sample_index,
            self._is_evaluation,
            self._max_response_tokens(prompt),
            self._max_context,
            partial(sampling_seed, self._seed, self._purpose, prompt.index, sample_index),
            self._num_top_logprobs,
        )

    def _max_response_tokens(self, prompt: Prompt) -> int:
        """Largest length of a response to `prompt`, at least 1.

        Prompts that leave no token for a response were refused or dropped when they were read (`data.lengths`).
        """
        limit = self._params.max_new_tokens
        if self._max_context is None:
            return limit
        available = self._max_context - len(prompt.tokens)
        if available < 1:
            raise RuntimeError(
                f"prompt {prompt.index} has {len(prompt.tokens)} tokens, the context {self._max_context}: it was read without this run's limits"
            )
        return min(limit, available)


def training_sampler(
    client: EngineClient, tokenizer: Any, config: Config, *, purpose: str = "rollout", num_top_logprobs: int = 0
) -> Sampler:
    """The sampler of the `--rollout-*` options."""
    rollout = config.rollout
    params = SamplingParams(
        rollout.rollout_temperature,
        rollout.rollout_top_p,
        rollout.rollout_top_k,
        _max_new_tokens(config, rollout.rollout_max_response_len),
    )
    return _sampler(client, tokenizer, config, params, purpose=purpose, num_top_logprobs=num_top_logprobs)


def evaluation_sampler(client: EngineClient, tokenizer: Any, config: Config, set_name: str) -> Sampler:
    """The sampler of the `--eval-*` options, for one evaluation set."""
    evaluation = config.evaluation
    params = SamplingParams(
        evaluation.eval_temperature,
        evaluation.eval_top_p,
        evaluation.eval_top_k,
        _max_new_tokens(config, evaluation.eval_max_response_len or config.rollout.rollout_max_response_len),
    )
    return _sampler(client, tokenizer, config, params, purpose=f"eval/{set_name}", is_evaluation=True)


def _sampler(client: EngineClient, tokenizer: Any, config: Config, params: SamplingParams, **options: Any) -> Sampler:
    eos, rollout = eos_token_ids(tokenizer, config.model.hf_checkpoint), config.rollout
    stop_token_ids = tuple(sorted(eos | set(rollout.rollout_stop_token_ids)))
    return Sampler(
        client,
        tokenizer,
        replace(params, stop=rollout.rollout_stop, stop_token_ids=stop_token_ids),
        max_context=context_length(config),
        eos=eos,
        seed=config.data.rollout_seed,
        **options,
    )


def _max_new_tokens(config: Config, limit: int | None) -> int:
    """The largest response length: `limit`, or without one the model's context length."""
    longest = limit or context_length(config)
    if longest is None:
        raise ConfigError(
            "--rollout-max-response-len is missing, and the model's config.json names no context length: set it"
        )
    return longest


def eos_token_ids(tokenizer: Any, hf_checkpoint: str | None) -> frozenset[int]:
    """Every token that ends a response: the tokenizer's and those of generation_config.json.

    Chat models often end a turn with a token that is not the tokenizer's end of sequence.
    """
    try:
        named = end_token_ids(hf_checkpoint)
    except ValueError as error:
        raise ConfigError(f"--hf-checkpoint: {error}") from error
    return named | token_ids(getattr(tokenizer, "eos_token_id", None))


def response_text(tokenizer: Any, tokens: tuple[int, ...], eos: frozenset[int]) -> str:
    """The text of a response, without its end-of-sequence token and without special tokens."""
    if tokens and tokens[-1] in eos:  # a tokenizer may not count every one of them as special
        tokens = tokens[:-1]
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
