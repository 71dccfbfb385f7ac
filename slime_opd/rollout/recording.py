"""A rollout in one Parquet file: all that training reads of it, a row per sample.

Written with --save-debug-rollout-data, replayed with --load-debug-rollout-data, and open to any
reader of Parquet. Reading one runs no code. The columns:

    group                the samples of one prompt have one number
    prompt_*, response*  texts, token ids and how the response ended, as in `types.Prompt` and `types.Sample`
    one per field        of slime_opd/fields.py that a sample carries: a list over its response tokens (of lists of K
                         where the field is wide), or one value; null for a sample without it

What concerns the whole rollout is in the file's metadata.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slime_opd import fields
from slime_opd.config import Config
from slime_opd.errors import ConfigError, DataError
from slime_opd.types import Prompt, Rollout, Sample, SampleGroup, Status

# Raised when the meaning of a column or of the metadata changes.
FORMAT = 1

_METADATA = b"slime_opd"
_IDS = pa.list_(pa.int32())
_SCHEMA = {
    "group_index": pa.int64(),
    "prompt_index": pa.int64(),
    "prompt_text": pa.string(),
    "prompt_tokens": _IDS,
    "prompt_label": pa.string(),
    "prompt_metadata": pa.string(),
    "prompt_response_tokens": _IDS,
    "response_text": pa.string(),
    "response_tokens": _IDS,
    "status": pa.string(),
}


@dataclass(frozen=True)
class Recordings:
    """The files of a run: PATH with `{rollout_id}`, which counts the rollouts from 1, as the step lines do.

    `vocabulary_size`: of the student; a recording with another is of another model family.
    """

    path: str
    vocabulary_size: int

    def file(self, rollout_id: int) -> Path:
        """Where a rollout is recorded."""
        return Path(self.path.format(rollout_id=rollout_id))

    def require_all(self, rollout_ids: range) -> None:
        """Raise ConfigError where one of the files that a run will read is missing."""
        if not rollout_ids:
            return
        missing = next((number for number in rollout_ids if not self.file(number).is_file()), None)
        if missing == rollout_ids[0]:
            raise ConfigError(
                f"--load-debug-rollout-data: found no file {self.file(missing)}, expected rollout {missing}, the run's first"
            )
        if missing is not None:
            raise ConfigError(
                f"--load-debug-rollout-data: found rollouts {rollout_ids[0]} to {missing - 1} of {self.path}, expected {rollout_ids[0]} to {rollout_ids[-1]}: give --num-rollout {missing - 1} (and --lr-decay-iters, where the learning rate decays)"
            )

    def write(self, rollout_id: int, rollout: Rollout) -> Path:
        """Record a rollout, over an earlier recording of the same number; returns the file.

        It gets its name when it is complete. Raises DataError where it cannot be written.
        """
        table = _table(rollout.groups)
        about = {
            "format": FORMAT,
            "rollout_id": rollout_id,
            "vocabulary_size": self.vocabulary_size,
            "weights_version": rollout.weights_version,
            "prompts": dict(rollout.prompts),
        }
        file = self.file(rollout_id)
        partial = file.with_name(f"{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.replace_schema_metadata({_METADATA: json.dumps(about)}), partial, compression="zstd")
            os.replace(partial, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise DataError(
                f"--save-debug-rollout-data: {file} cannot be written: {error.strerror or error}"
            ) from error
        return file

    def read(self, rollout_id: int) -> Rollout:
        """A recorded rollout, equal to the one that was written in everything that training reads.

        Raises DataError, with the file's name, where it is missing, damaged, or of another format or vocabulary.
        """
        file = self.file(rollout_id)
        try:
            table = pq.read_table(file)
        except FileNotFoundError as error:
            raise DataError(f"--load-debug-rollout-data: found no file {file} for rollout {rollout_id}") from error
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"--load-debug-rollout-data: {file} is no complete Parquet file ({str(error).splitlines()[0]})"
            ) from error
        about = _about(table, file)
        if about["vocabulary_size"] != self.vocabulary_size:
            raise DataError(
                f"--load-debug-rollout-data: {file} was recorded with a vocabulary of {about['vocabulary_size']} tokens, --hf-checkpoint has {self.vocabulary_size}: replay it with a model of the same vocabulary"
            )
        try:
            groups = _groups(table, self.vocabulary_size)
        except (DataError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"--load-debug-rollout-data: {file} is damaged: {error}") from error
        return Rollout(groups, weights_version=about["weights_version"], prompts=about["prompts"])


def require_trainable(rollout: Rollout, config: Config) -> None:
    """Raise DataError where a replayed rollout lacks what the run's options train on."""
    samples, expected = rollout.samples, config.samples_per_rollout
    per_prompt = 1 if config.is_sft else config.rollout.n_samples_per_prompt
    sizes = {len(group.samples) for group in rollout.groups}
    if len(samples) != expected or sizes != {per_prompt}:
        raise DataError(
            f"--load-debug-rollout-data: found {len(samples)} samples in groups of {', '.join(map(str, sorted(sizes)))}, expected {expected} (--rollout-batch-size × --n-samples-per-prompt) in groups of {per_prompt}"
        )
    needed = {
        "reward": config.has_reward and not config.is_sft,
        "teacher_log_probs": config.teacher.scores_rollouts,
        "teacher_top_ids": config.teacher_top_k > 0,
        "student_top_ids": config.student_top_k > 0,
        "rollout_log_probs": config.algorithm.use_rollout_logprobs,
    }
    for name, is_needed in needed.items():
        if is_needed and not any(name in sample.values for sample in samples):
            raise DataError(
                f"--load-debug-rollout-data: the recorded rollout has no {name}, which these options train on: record it with the same options of the reward and the teacher"
            )
    for name, number in {"teacher_top_ids": config.teacher_top_k, "student_top_ids": config.student_top_k}.items():
        widths = {sample.values[name].shape[1] for sample in samples if number and name in sample.values}
        if widths - {number}:
            raise DataError(
                f"--load-debug-rollout-data: the recorded {name} are of the top {widths.pop()} tokens, these options ask for {number}: set --opd-log-prob-top-k back, or record the rollout again"
            )


def _about(table: pa.Table, file: Path) -> dict[str, Any]:
    """What the metadata says of the whole rollout."""
    needed = {"format": int, "rollout_id": int, "vocabulary_size": int, "weights_version": int, "prompts": dict}
    try:
        about = json.loads((table.schema.metadata or {})[_METADATA])
        is_whole = all(isinstance(about[name], kind) for name, kind in needed.items())
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise DataError(
            f"--load-debug-rollout-data: {file} is no recorded rollout, expected a file that --save-debug-rollout-data wrote"
        )
    if about["format"] != FORMAT:
        raise DataError(
            f"--load-debug-rollout-data: {file} has format {about['format']}, this version reads {FORMAT}: record the rollout again"
        )
    return about


def _table(groups: list[SampleGroup]) -> pa.Table:
    rows = [(index, sample) for index, group in enumerate(groups) for sample in group.samples]
    samples = [sample for _, sample in rows]
    prompts = [sample.prompt for sample in samples]
    columns = {
        "group_index": [index for index, _ in rows],
        "prompt_index": [prompt.index for prompt in prompts],
        "prompt_text": [prompt.text for prompt in prompts],
        "prompt_tokens": [prompt.tokens for prompt in prompts],
        "prompt_label": [prompt.label for prompt in prompts],
        "prompt_metadata": [json.dumps(prompt.metadata, default=str) for prompt in prompts],
        "prompt_response_tokens": [prompt.response_tokens for prompt in prompts],
        "response_text": [sample.response for sample in samples],
        "response_tokens": [sample.response_tokens for sample in samples],
        "status": [sample.status.value for sample in samples],
    }
    arrays = {name: pa.array(values, _SCHEMA[name]) for name, values in columns.items()}
    for row in fields.TABLE:
        values = [sample.values.get(row.name) for sample in samples]
        if any(value is not None for value in values):
            arrays[row.name] = _field_column(row, values)
    return pa.table(arrays)


def _field_column(row: fields.Field, values: list[np.ndarray | None]) -> pa.Array:
    dtype = pa.from_numpy_dtype(next(value.dtype for value in values if value is not None))
    if row.level == fields.SAMPLE:
        return pa.array([None if value is None else value[0] for value in values], dtype)
    if row.wide:
        width = next(value.shape[1] for value in values if value is not None)
        kind = pa.list_(pa.list_(dtype, width))
        return pa.array([None if value is None else list(value) for value in values], kind)
    return pa.array(values, pa.list_(dtype))


def _groups(table: pa.Table, vocabulary_size: int) -> list[SampleGroup]:
    if missing := [name for name in _SCHEMA if name not in table.column_names]:
        raise DataError(f"it lacks the columns {', '.join(missing)}")
    base = table.select(list(_SCHEMA)).to_pylist()
    carried = {row: table.column(row.name).combine_chunks() for row in fields.TABLE if row.name in table.column_names}
    groups: dict[int, SampleGroup] = {}
    for index, entry in enumerate(base):
        group = groups.get(entry["group_index"])
        if group is None:
            group = groups[entry["group_index"]] = SampleGroup(_prompt(entry), [])
        sample = Sample(group.prompt, tuple(entry["response_tokens"]), entry["response_text"], Status(entry["status"]))
        if not all(0 <= token < vocabulary_size for token in sample.tokens):
            raise DataError(f"sample {index} has token ids outside the vocabulary of {vocabulary_size}")
        for name, values in _values(carried, index):
            sample.set(name, values)
        group.samples.append(sample)
    return list(groups.values())


def _prompt(entry: Mapping[str, Any]) -> Prompt:
    response = entry["prompt_response_tokens"]
    return Prompt(
        index=entry["prompt_index"],
        tokens=tuple(entry["prompt_tokens"]),
        text=entry["prompt_text"],
        label=entry["prompt_label"],
        metadata=json.loads(entry["prompt_metadata"]),
        response_tokens=None if response is None else tuple(response),
    )


def _values(carried: Mapping[fields.Field, pa.Array], index: int) -> Iterator[tuple[str, np.ndarray]]:
    """The fields of one sample."""
    for row, column in carried.items():
        value = column[index]
        if not value.is_valid:
            continue
        if row.level == fields.SAMPLE:
            yield row.name, np.asarray([value.as_py()])
            continue
        entries = value.values
        if row.wide:
            width = column.type.value_type.list_size
            yield row.name, entries.flatten().to_numpy(zero_copy_only=False).reshape(len(entries), width)
        else:
            yield row.name, entries.to_numpy(zero_copy_only=False)
