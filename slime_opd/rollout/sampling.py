"""One response to one prompt: tokens in, tokens out. Training and evaluation share it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

import numpy as np

from slime_opd.config import Config
from slime_opd.config.check_lengths import context_length
from slime_opd.config.hf_config import end_token_ids, token_ids
from slime_opd.engine.client import EngineClient
from slime_opd.engine.protocol import SamplingParams
from slime_opd.engine.rows import SMALLEST_FLOAT32
from slime_opd.engine.top_k import parse_rows
from slime_opd.errors import ConfigError, EngineError
from slime_opd.types import Prompt, Sample, Status

Result = TypeVar("Result")

_STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED}


class Sampler:
    """Draws responses from the engines, under the length limits of the run.

    `params.max_new_tokens` is the longest response; a prompt that leaves fewer tokens of
    `max_context` (prompt and response together; None: no limit) gets a shorter one. `purpose` keeps the
    seeds of training and evaluation apart. `most_likely`: the model's most likely tokens that each sample keeps.
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
        most_likely: int = 0,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._params = params
        self._max_context = max_context
        self._eos = eos
        self._seed = seed
        self._purpose = purpose
        self._most_likely = most_likely

    async def sample(self, prompt: Prompt, number: int) -> Sample:
        """Response `number` to `prompt`, with loss_mask, rollout_log_probs, truncated, group, and student_top_ids if kept.

        The response text leaves special tokens out. Raises EngineError for a response that ended
        in any other way than stop or length.
        """
        params = dataclasses.replace(
            self._params,
            max_new_tokens=self.max_response_tokens(prompt),
            # SGLang heeds it with --sglang-enable-deterministic-inference only, and would else
            # draw all samples of a prompt from one default seed.
            seed=sampling_seed(self._seed, self._purpose, prompt.index, number),
        )
        generation = await self._client.generate(prompt.tokens, params, self._most_likely)
        if generation.finish_reason not in _STATUS:
            raise EngineError(
                f"the engine ended a response to prompt {prompt.index} with {generation.finish_reason!r}; expected stop or length"
            )
        tokens = tuple(int(token) for token in generation.token_ids)
        sample = self.finished(prompt, tokens, _STATUS[generation.finish_reason])
        sample.set("rollout_log_probs", generation.log_probs)
        if self._most_likely:
            # SGLang writes the log-prob of a probability that is 0 at a low temperature as the smallest float32.
            top = parse_rows(generation.top_rows, len(tokens), self._most_likely, smallest=SMALLEST_FLOAT32)
            sample.set("student_top_ids", top.ids)
        return sample

    def finished(self, prompt: Prompt, tokens: tuple[int, ...], status: Status) -> Sample:
        """A response of these tokens, with loss_mask, truncated and group set."""
        sample = Sample(prompt, tokens, response_text(self._tokenizer, tokens, self._eos), status)
        sample.set("loss_mask", np.ones(len(tokens)))
        sample.set("truncated", float(status is Status.TRUNCATED))
        sample.set("group", prompt.index)
        return sample

    def max_response_tokens(self, prompt: Prompt) -> int:
        """Tokens that a response to `prompt` may have, at least 1.

        Prompts without space for one were refused or dropped when they were read (`data.lengths`).
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
    client: EngineClient, tokenizer: Any, config: Config, *, purpose: str = "rollout", most_likely: int = 0
) -> Sampler:
    """The sampler of `--rollout-temperature` and its kin."""
    rollout = config.rollout
    return _sampler(
        client,
        tokenizer,
        config,
        purpose=purpose,
        most_likely=most_likely,
        max_new_tokens=_longest_response(config, rollout.rollout_max_response_len),
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
    )


def evaluation_sampler(client: EngineClient, tokenizer: Any, config: Config, set_name: str) -> Sampler:
    """The sampler of `--eval-temperature` and its kin, for one evaluation set."""
    evaluation = config.evaluation
    longest = evaluation.eval_max_response_len or config.rollout.rollout_max_response_len
    return _sampler(
        client,
        tokenizer,
        config,
        purpose=f"eval/{set_name}",
        max_new_tokens=_longest_response(config, longest),
        temperature=evaluation.eval_temperature,
        top_p=evaluation.eval_top_p,
        top_k=evaluation.eval_top_k,
    )


def _sampler(
    client: EngineClient, tokenizer: Any, config: Config, *, purpose: str, most_likely: int = 0, **params: Any
) -> Sampler:
    eos = eos_token_ids(tokenizer, config.model.hf_checkpoint)
    return Sampler(
        client,
        tokenizer,
        SamplingParams(
            stop=config.rollout.rollout_stop,
            stop_token_ids=tuple(sorted(eos | set(config.rollout.rollout_stop_token_ids))),
            **params,
        ),
        max_context=context_length(config),
        eos=eos,
        seed=config.data.rollout_seed,
        purpose=purpose,
        most_likely=most_likely,
    )


def _longest_response(config: Config, limit: int | None) -> int:
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


def sampling_seed(seed: int, purpose: str, prompt_index: int, number: int) -> int:
    """A seed in [0, 2^31) for one response, the same in a run that is repeated or resumed."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{prompt_index}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


async def gather(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order. The first error cancels the others, waits for them, and is raised alone."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
