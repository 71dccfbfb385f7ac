"""One typed carrier per hop of the data.

    Prompt ──► Sample ──► SampleGroup ──► Rollout ──► RolloutBatch ──► TrainBatch
    a row      a response  the n          the groups   columns, ready   one data-parallel
    of data    and its     responses of   of one step, to split and     rank's share, in the
               fields      one prompt     metrics,     to send          order it trains on
                                          timings,
                                          cursor

Notation of the shapes: N samples, R response tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slime_opd import fields
from slime_opd.errors import DataError
from slime_opd.metrics import Metric


class Status(enum.Enum):
    """How a response ended."""

    COMPLETED = "completed"  # the model ended it: end-of-sequence or a stop condition
    TRUNCATED = "truncated"  # it reached the length limit


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt set, rendered and tokenised once.

    index: its position in the order of the run; it keeps growing across epochs.
    response_tokens: the data set's own response, where the run reads one (fine-tuning, off-policy distillation).
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    label: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    response_tokens: tuple[int, ...] | None = None


@dataclass
class Sample:
    """One response to a prompt, with the arrays of the field table that it carries."""

    prompt: Prompt
    response_tokens: tuple[int, ...]
    response: str
    status: Status
    values: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and response token ids."""
        return self.prompt.tokens + self.response_tokens

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return len(self.response_tokens)

    def set(self, name: str, values: object) -> None:
        """Attach a field. Raises DataError for an unknown name or a wrong length."""
        row = fields.field(name)
        array = row.array(values)
        expected = self.response_length if row.level == fields.RESPONSE else 1
        if not _fits(row, array, expected):
            raise DataError(
                f"sample of prompt {self.prompt.index}: field {name!r} has shape {array.shape}, expected {_expected(row, expected)} (one {'row' if row.wide else 'value'} per {row.level}{' token' if row.level == fields.RESPONSE else ''})"
            )
        self.values[name] = array

    @property
    def reward(self) -> float | None:
        """Task reward, or None for a sample without one."""
        value = self.values.get("reward")
        return None if value is None or np.isnan(value[0]) else float(value[0])


@dataclass
class SampleGroup:
    """The samples of one prompt; group normalisation compares them with each other."""

    prompt: Prompt
    samples: list[Sample]


@dataclass(frozen=True)
class Rollout:
    """The rewarded and scored samples that are trained on together, with everything that the driver keeps about them.

    weights_version: version of the student's weights that generated it, from 1; 0: no weights were sent to the engines.
    prompt_cursor: `PromptSource.state()` after its prompts were taken; a checkpoint after its training resumes there.
    metrics: of the generation, by name, each with its own reduction.
    timings: seconds of each stage so far, by name: "update_weights", "rollout".
    """

    groups: list[SampleGroup]
    weights_version: int = 0
    prompt_cursor: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        """All samples, group by group."""
        return [sample for group in self.groups for sample in group.samples]


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's log-probs of one response. Shapes: R response tokens, K top-k tokens at each of them.

    log_probs: float32 [R], of the response's own tokens.
    failure: why the teacher did not score the response, whose log-probs are then NaN; None on success.
    top_ids, top_log_probs: int32 and float [R, K], the teacher's top-k tokens; None unless they were requested.
    student_log_probs: float [R, K], of the student's top-k tokens; None unless they were requested.
    The top-k log-probs are float32 or float16.
    """

    log_probs: np.ndarray
    failure: str | None = None
    top_ids: np.ndarray | None = None
    top_log_probs: np.ndarray | None = None
    student_log_probs: np.ndarray | None = None


@dataclass(frozen=True)
class RolloutBatch:
    """Samples as columns: ragged arrays laid end to end, in sample order.

    tokens: int64 [sum of total lengths], prompt then response of each sample.
    prompt_lengths, response_lengths: int64 [N].
    columns: the arrays of the field table; a response-level one is [sum of response
    lengths], or [that, K] where it is wide; a sample-level one is [N].
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if len(self.tokens) != int(self.total_lengths.sum()):
            raise DataError(f"batch has {len(self.tokens)} tokens, its lengths sum to {int(self.total_lengths.sum())}")
        for name, values in self.columns.items():
            row, length = fields.field(name), self._length_of(name)
            if not _fits(row, values, length):
                raise DataError(f"column {name!r} has shape {values.shape}, expected {_expected(row, length)}")

    def _length_of(self, name: str) -> int:
        if fields.field(name).level == fields.SAMPLE:
            return len(self.response_lengths)
        return int(self.response_lengths.sum())

    def __len__(self) -> int:
        return len(self.response_lengths)

    @property
    def total_lengths(self) -> np.ndarray:
        """Prompt plus response length of each sample, int64 [N]."""
        return self.prompt_lengths + self.response_lengths

    def with_column(self, name: str, values: object) -> RolloutBatch:
        """The same batch with one column added or replaced."""
        row = fields.field(name)
        return RolloutBatch(
            self.tokens, self.prompt_lengths, self.response_lengths, {**self.columns, name: row.array(values)}
        )

    def with_columns(self, columns: Mapping[str, object]) -> RolloutBatch:
        """The same batch with columns added or replaced."""
        batch = self
        for name, values in columns.items():
            batch = batch.with_column(name, values)
        return batch

    def select(self, indices: Sequence[int] | np.ndarray) -> RolloutBatch:
        """The samples at `indices`, in that order, with every column they carry."""
        chosen = np.asarray(indices, dtype=np.int64)
        of_tokens = _ragged_rows(self.total_lengths, chosen)
        of_response = _ragged_rows(self.response_lengths, chosen)
        return RolloutBatch(
            tokens=self.tokens[of_tokens],
            prompt_lengths=self.prompt_lengths[chosen],
            response_lengths=self.response_lengths[chosen],
            columns={
                name: values[chosen if fields.field(name).level == fields.SAMPLE else of_response]
                for name, values in self.columns.items()
            },
        )

    @staticmethod
    def from_samples(samples: Sequence[Sample]) -> RolloutBatch:
        """Lay samples end to end.

        A field that some samples lack is filled with its `missing` value; one that has
        none raises DataError with the samples that lack it.
        """
        names = [row.name for row in fields.TABLE if any(row.name in sample.values for sample in samples)]
        return RolloutBatch(
            tokens=np.concatenate([np.asarray(s.tokens, dtype=np.int64) for s in samples] or [np.empty(0, np.int64)]),
            prompt_lengths=np.asarray([len(s.prompt.tokens) for s in samples], dtype=np.int64),
            response_lengths=np.asarray([s.response_length for s in samples], dtype=np.int64),
            columns={name: _column(fields.field(name), samples) for name in names},
        )


@dataclass(frozen=True)
class TrainBatch:
    """One data-parallel rank's share of a rollout.

    `samples` lie in the order they train; `steps` cuts them up: for each optimizer step, the number of samples in
    each of its micro-batches. Every rank has as many micro-batches in a step as every other.
    """

    samples: RolloutBatch
    steps: tuple[tuple[int, ...], ...]

    def with_columns(self, columns: Mapping[str, object]) -> TrainBatch:
        """The same share with columns added or replaced."""
        return TrainBatch(self.samples.with_columns(columns), self.steps)


@dataclass(frozen=True)
class StartReport:
    """What a trainer started from: for the log, and for the driver to continue from.

    `run_state` is what the checkpoint's run had saved beside its weights; {} for a run that starts afresh.
    """

    loaded_from: str
    run_state: dict[str, Any]
    warnings: tuple[str, ...]


def _column(row: fields.Field, samples: Sequence[Sample]) -> np.ndarray:
    lacking = [sample.prompt.index for sample in samples if row.name not in sample.values]
    if lacking and row.missing is None:
        raise DataError(
            f"field {row.name!r} is missing in {len(lacking)} of {len(samples)} samples (prompts {lacking[:5]})"
        )
    length = (lambda sample: sample.response_length) if row.level == fields.RESPONSE else (lambda _: 1)
    carried = [sample.values[row.name] for sample in samples if row.name in sample.values]
    widths = {array.shape[1:] for array in carried}
    if len(widths) > 1:
        raise DataError(
            f"field {row.name!r} has {sorted(width[0] for width in widths)} values per token in samples of one batch, expected one number"
        )
    shape, dtype = widths.pop(), carried[0].dtype
    return np.concatenate(
        [
            sample.values[row.name]
            if row.name in sample.values
            else np.full((length(sample), *shape), row.missing, dtype=dtype)
            for sample in samples
        ]
    )


def _fits(row: fields.Field, array: np.ndarray, length: int) -> bool:
    return array.ndim == 1 + row.wide and len(array) == length


def _expected(row: fields.Field, length: int) -> str:
    return f"({length}, K)" if row.wide else f"({length},)"


def _ragged_rows(lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Flat positions of the segments `chosen` in an array of segments of `lengths`."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0, np.int64)
    counts = lengths[chosen]
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    within = np.arange(total) - np.repeat(ends - counts, counts)
    return np.repeat(starts[chosen], counts) + within
