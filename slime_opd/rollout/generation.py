"""How a response is generated: a function from a prompt to rows of token spans.

    generate(prompt, context) ──► rows ──► samples

Training and evaluation call the same function; `single_turn.generate` is the default. A function of several turns calls
`context.complete` once per turn with all token ids so far, and adds what a tool or an environment returned as a span
that is not trained. Spans hold token ids: generated text is never tokenised again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from slime_opd.engine.client import EngineClient
from slime_opd.engine.protocol import SamplingParams
from slime_opd.engine.rows import SMALLEST_FLOAT32
from slime_opd.engine.top_k import parse_rows
from slime_opd.errors import DataError, EngineError
from slime_opd.types import Prompt, Sample, Status

_STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED}


@dataclass(frozen=True, eq=False)
class Span:
    """Consecutive response tokens from one source. Shapes: T tokens, K top-k tokens at each of them.

    is_trained: whether the tokens are in the loss; False for those of a tool or an environment.
    log_probs: float32 [T], with which the student sampled the tokens; None if it did not sample them.
    top_ids: int32 [T, K], the student's most likely tokens at each position; None if they are not known.
    Raises DataError where the lengths differ.
    """

    token_ids: tuple[int, ...]
    log_probs: np.ndarray | None = None
    is_trained: bool = True
    top_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, values in (("log_probs", self.log_probs), ("top_ids", self.top_ids)):
            if values is not None and len(values) != len(self.token_ids):
                raise DataError(f"a generated span has {len(self.token_ids)} tokens and {len(values)} {name}")


@dataclass(frozen=True, eq=False)
class Row:
    """One response to a prompt: its spans in order, and how it ended."""

    spans: tuple[Span, ...]
    status: Status

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The response's token ids, without the prompt's."""
        return tuple(token for span in self.spans for token in span.token_ids)


@dataclass
class GenerateContext:
    """What a generate function works with, for one response: the engines, the tokenizer and the length limits.

    sample_index: which of the prompt's responses this is, from 0.
    max_response_tokens: largest length of the response, all its spans together; at least 1.
    max_context: largest length of prompt and response together; None: no limit.
    params: sampling options of the run. turn_seed: the seed of each turn, from 0.
    num_top_logprobs: K of the spans' `top_ids`; 0: none.
    """

    client: EngineClient
    tokenizer: Any
    params: SamplingParams
    prompt: Prompt
    sample_index: int
    is_evaluation: bool
    max_response_tokens: int
    max_context: int | None
    turn_seed: Callable[[int], int]
    num_top_logprobs: int = 0
    num_turns: int = 0

    async def complete(self, token_ids: Sequence[int], *, stop: tuple[str, ...] = ()) -> Row:
        """Sample a continuation of `token_ids`: the prompt's and all response tokens so far.

        Returns a row of one trained span. `stop`: strings that end this turn, beside the run's own. Where the length
        limits leave no token, the row is empty and truncated, and no request is sent. Raises EngineError for a response
        that ended in any other way than stop or length.
        """
        num_tokens = self.num_tokens_left(token_ids)
        if num_tokens < 1:
            return Row((), Status.TRUNCATED)
        params = dataclasses.replace(
            self.params,
            max_new_tokens=num_tokens,
            stop=(*self.params.stop, *stop),
            # SGLang reads it in its deterministic mode (--sglang-enable-deterministic-inference), which would otherwise
            # draw all samples of a prompt from one default seed.
            seed=self.turn_seed(self.num_turns),
        )
        self.num_turns += 1
        generation = await self.client.generate(token_ids, params, self.num_top_logprobs)
        if generation.finish_reason not in _STATUS:
            raise EngineError(
                f"the engine ended a response to prompt {self.prompt.index} with {generation.finish_reason!r}; expected stop or length"
            )
        tokens, top_ids = tuple(map(int, generation.token_ids)), None
        if self.num_top_logprobs:
            # SGLang writes the log-prob of a probability that is 0 at a low temperature as the smallest float32.
            top = parse_rows(generation.top_rows, len(tokens), self.num_top_logprobs, smallest=SMALLEST_FLOAT32)
            top_ids = top.ids
        return Row((Span(tokens, generation.log_probs, top_ids=top_ids),), _STATUS[generation.finish_reason])

    def num_tokens_left(self, token_ids: Sequence[int]) -> int:
        """How many tokens may follow `token_ids`, the prompt's and all response tokens so far."""
        left = self.max_response_tokens - (len(token_ids) - len(self.prompt.tokens))
        return left if self.max_context is None else min(left, self.max_context - len(token_ids))


class GenerateFunction(Protocol):
    """Generates one response to a prompt. Raises EngineError where an engine fails.

    Returns the response's rows: one. Several, of a conversation that branches, are refused so far.
    """

    async def __call__(self, prompt: Prompt, context: GenerateContext, /) -> Sequence[Row]: ...


async def generate_row(generate: GenerateFunction, prompt: Prompt, context: GenerateContext) -> Row:
    """The row that `generate` returns. Raises DataError for any other number of rows, and for one that is too long."""
    rows = await generate(prompt, context)
    if len(rows) != 1:
        raise DataError(f"the generate function returned {len(rows)} rows for prompt {prompt.index}, expected 1")
    (row,) = rows
    if len(row.token_ids) > context.max_response_tokens:
        raise DataError(
            f"the generate function returned {len(row.token_ids)} response tokens for prompt {prompt.index}, "
            f"expected at most {context.max_response_tokens} (context.max_response_tokens)"
        )
    return row


def make_sample(prompt: Prompt, row: Row, text: str) -> Sample:
    """The sample of a row, with loss_mask, truncated and group set.

    It has rollout_log_probs if a span has log-probs (NaN in the other spans), and student_top_ids if all trained spans
    have them (0 in the other spans).
    """
    sample = Sample(prompt, row.token_ids, text, row.status)
    spans = row.spans
    sample.set("loss_mask", np.array([float(span.is_trained) for span in spans for _ in span.token_ids]))
    sample.set("truncated", float(row.status is Status.TRUNCATED))
    sample.set("group", prompt.index)
    lengths = [len(span.token_ids) for span in spans]
    if any(span.log_probs is not None for span in spans):
        sample.set("rollout_log_probs", _concatenate([span.log_probs for span in spans], lengths, np.nan))
    trained = [span for span in spans if span.is_trained]
    if trained and all(span.top_ids is not None for span in trained):
        sample.set("student_top_ids", _concatenate([span.top_ids for span in spans], lengths, 0))
    return sample


def sampling_seed(seed: int, purpose: str, prompt_index: int, sample_index: int, turn: int = 0) -> int:
    """A seed in [0, 2^31) for one turn of one response, the same in a run that is repeated or resumed."""
    name = f"{seed}/{purpose}/{prompt_index}/{sample_index}" + (f"/{turn}" if turn else "")
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def _concatenate(parts: Sequence[np.ndarray | None], lengths: Sequence[int], fill: float) -> np.ndarray:
    """The parts end to end; one that is None is filled with `fill`."""
    known = next(part for part in parts if part is not None)
    return np.concatenate(
        [
            np.full((length, *known.shape[1:]), fill, known.dtype) if part is None else part
            for part, length in zip(parts, lengths, strict=True)
        ]
    )
