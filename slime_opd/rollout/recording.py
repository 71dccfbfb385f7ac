"""A rollout in one Parquet file, one row per sample.

Written with --save-debug-rollout-data and replayed with --load-debug-rollout-data. Reading a file runs no code, and any
reader of Parquet opens it. The columns:

    group_index          samples of one prompt have the same number
    prompt_*, response*  texts and token ids, as in `types.Prompt` and `types.Sample`; status: how the response ended
    one per field        of slime_opd/fields.py that a sample carries: a list over its response tokens (of lists of K
                         for a top-k field), or one value; null for a sample without it

The file's metadata has the rest of `types.Rollout`, as JSON.
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
from slime_opd.metrics import from_json, to_json
from slime_opd.types import Prompt, Rollout, Sample, SampleGroup, Status

# Increased when the meaning of a column or of the metadata changes. Format 1 had no metrics and no timings.
FORMAT = 2
_READABLE = (1, 2)

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
    """The recorded rollouts of a run.

    path: of a file, with `{rollout_id}` in it, which counts rollouts from 1, as the step lines do.
    vocabulary_size: of the student; a recording with another one is of another model family.
    """

    path: str
    vocabulary_size: int

    def file(self, rollout_id: int) -> Path:
        """The file of a rollout."""
        return Path(self.path.format(rollout_id=rollout_id))

    def require_all(self, rollout_ids: range) -> None:
        """Raise ConfigError if a file of these rollouts is missing."""
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
        """Record a rollout, replacing an earlier recording of the same number; returns the file.

        The file gets its name once it is complete. Raises DataError where it cannot be written.
        """
        table = _table(rollout.groups)
        metadata = {
            "format": FORMAT,
            "rollout_id": rollout_id,
            "vocabulary_size": self.vocabulary_size,
            "weights_version": rollout.weights_version,
            "prompts": dict(rollout.prompt_cursor),
            "metrics": to_json(rollout.metrics),
            "timings": dict(rollout.timings),
        }
        file = self.file(rollout_id)
        partial = file.with_name(f"{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(
                table.replace_schema_metadata({_METADATA: json.dumps(metadata)}), partial, compression="zstd"
            )
            os.replace(partial, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise DataError(
                f"--save-debug-rollout-data: {file} cannot be written: {error.strerror or error}"
            ) from error
        return file

    def read(self, rollout_id: int) -> Rollout:
        """The rollout as it was written.

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
        metadata = _read_metadata(table, file)
        if metadata["vocabulary_size"] != self.vocabulary_size:
            raise DataError(
                f"--load-debug-rollout-data: {file} was recorded with a vocabulary of {metadata['vocabulary_size']} tokens, --hf-checkpoint has {self.vocabulary_size}: replay it with a model of the same vocabulary"
            )
        try:
            return Rollout(
                _groups(table, self.vocabulary_size),
                weights_version=metadata["weights_version"],
                prompt_cursor=metadata["prompts"],
                metrics=from_json(metadata.get("metrics", {})),
                timings=metadata.get("timings", {}),
            )
        except (DataError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"--load-debug-rollout-data: {file} is damaged: {error}") from error


def require_trainable(rollout: Rollout, config: Config) -> None:
    """Raise DataError if a replayed rollout lacks samples or fields that the run's options train on."""
    samples, expected = rollout.samples, config.samples_per_rollout
    per_prompt = 1 if config.is_sft else config.rollout.n_samples_per_prompt
    sizes = {len(group.samples) for group in rollout.groups}
    if len(samples) != expected or sizes != {per_prompt}:
        raise DataError(
            f"--load-debug-rollout-data: found {len(samples)} samples in groups of {', '.join(map(str, sorted(sizes)))}, expected {expected} (--rollout-batch-size × --n-samples-per-prompt) in groups of {per_prompt}"
        )
    is_needed = {
        "reward": config.has_reward and not config.is_sft,
        "teacher_log_probs": config.teacher.scores_rollouts,
        "teacher_top_ids": config.teacher_top_k > 0,
        "student_top_ids": config.student_top_k > 0,
        "rollout_log_probs": config.algorithm.use_rollout_logprobs,
    }
    for name, needed in is_needed.items():
        if needed and not any(name in sample.values for sample in samples):
            raise DataError(
                f"--load-debug-rollout-data: the recorded rollout has no {name}, which these options train on: record it with the same options of the reward and the teacher"
            )
    for name, number in {"teacher_top_ids": config.teacher_top_k, "student_top_ids": config.student_top_k}.items():
        widths = {sample.values[name].shape[1] for sample in samples if number and name in sample.values}
        if widths - {number}:
            raise DataError(
                f"--load-debug-rollout-data: the recorded {name} are of the top {widths.pop()} tokens, these options ask for {number}: set --opd-log-prob-top-k back, or record the rollout again"
            )


def _read_metadata(table: pa.Table, file: Path) -> dict[str, Any]:
    """The file's metadata. Raises DataError for a file that is no recording, or of an unknown format."""
    types = {"format": int, "rollout_id": int, "vocabulary_size": int, "weights_version": int, "prompts": dict}
    try:
        metadata = json.loads((table.schema.metadata or {})[_METADATA])
        is_complete = all(isinstance(metadata[name], kind) for name, kind in types.items())
    except (KeyError, TypeError, ValueError):
        is_complete = False
    if not is_complete:
        raise DataError(
            f"--load-debug-rollout-data: {file} is no recorded rollout, expected a file that --save-debug-rollout-data wrote"
        )
    if metadata["format"] not in _READABLE:
        raise DataError(
            f"--load-debug-rollout-data: {file} has format {metadata['format']}, this version reads {' and '.join(map(str, _READABLE))}: record the rollout again"
        )
    return metadata


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
