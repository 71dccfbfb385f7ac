"""Checkpoints and Hugging Face directories: the architecture that each has, side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slime_opd.checkpoint import directory
from slime_opd.checkpoint.whole import problems_of
from slime_opd.config import Config
from slime_opd.config.hf_config import language_model, read_hf_config
from slime_opd.errors import CheckpointError
from slime_opd.preflight.check_architecture import architecture_flags
from slime_opd.preflight.findings import Findings, attempt
from slime_opd.preflight.hf_weights import weight_problems


def inspect_weights(config: Config, found: Findings) -> None:
    """The headers of every Hugging Face directory that weights are loaded from. Reads no tensor."""
    flags_of: dict[Path, list[str]] = {}
    for flag, path in _weight_directories(config):
        flags_of.setdefault(Path(path), []).append(flag)
    for path, flags in flags_of.items():
        name = f"{' and '.join(flags)} {path}"
        problems, summary = weight_problems(path)
        found.problems += [f"{name}: {problem}" for problem in problems]
        if not problems:
            found.ok.append(f"{name}: {summary}")


def _weight_directories(config: Config) -> Iterator[tuple[str, str]]:
    """Flags and Hugging Face directories whose weights a run loads."""
    checkpoint = config.checkpoint
    directories = {
        "--hf-checkpoint": (config.model.hf_checkpoint, None),
        "--load": (checkpoint.load, checkpoint.ckpt_step),
        "--ref-load": (checkpoint.ref_load, checkpoint.ref_ckpt_step),
        "--opd-teacher-load": (config.opd.opd_teacher_load, config.opd.opd_teacher_ckpt_step),
    }
    for flag, (path, step) in directories.items():
        if path is None or not os.path.isdir(path) or (flag == "--hf-checkpoint" and not _reads_hf_weights(config)):
            continue
        location = _find(path, step)
        if location is not None and location.is_hugging_face:
            yield flag, path


def _reads_hf_weights(config: Config) -> bool:
    """Whether an engine, or a trainer without another checkpoint, loads the weights of --hf-checkpoint."""
    if config.needs_engines and config.sglang.get("load-format") != ("dummy",):
        return True
    checkpoint = config.checkpoint
    return checkpoint.ref_load is None and (
        checkpoint.load is None or _find(checkpoint.load, checkpoint.ckpt_step) is None
    )


def _find(path: str, step: int | None) -> directory.Location | None:
    """`directory.find`; None for what it refuses, which `directory.problems` reports."""
    try:
        return directory.find(path, step)
    except CheckpointError:
        return None


def inspect_checkpoints(config: Config, architecture: dict, found: Findings) -> None:
    """Compare the architecture of the flags, --hf-checkpoint and each checkpoint; differences go in one table."""
    options = config.checkpoint
    columns: dict[str, dict[str, Any]] = {}
    if config.model.megatron_to_hf_mode == "raw":
        columns["flags"] = architecture_flags(config)
    columns["--hf-checkpoint"] = architecture
    for name, path, step in (
        ("--load", options.load, options.ckpt_step),
        ("--ref-load", options.ref_load, options.ref_ckpt_step),
        ("--opd-teacher-load", config.opd.opd_teacher_load, config.opd.opd_teacher_ckpt_step),
    ):
        location = _find(path, step) if path is not None and architecture else None
        if location is None or problems_of(location):  # `directory.problems` reports them
            continue
        shapes = attempt(found, lambda location=location: _shapes_of(location))
        if not shapes:
            continue
        columns[name] = shapes
        differing = [
            f"{key} {shapes[key]} there, {architecture[key]} here"
            for key in shapes
            if architecture.get(key) not in (None, shapes[key])
        ]
        if differing:
            found.problems.append(f"{name} {path} is not of --hf-checkpoint's architecture: {'; '.join(differing)}")
        else:
            found.ok.append(f"{name} {path}: {', '.join(f'{key} {value}' for key, value in shapes.items())}")
    found.differences += _differences(columns)


# What the trainer compares of two Hugging Face directories, and what is printed of one.
_COMPARED = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")


def _shapes_of(location: directory.Location) -> dict[str, Any]:
    if location.is_hugging_face:
        try:
            architecture = language_model(read_hf_config(str(location.directory)))
        except ValueError:
            return {}  # inspect_weights reports it
        return {name: architecture[name] for name in _COMPARED if name in architecture}
    # Imports Megatron: seconds.
    from slime_opd.checkpoint.formats.architecture import sizes_at

    return sizes_at(str(location.directory))


def _differences(columns: dict[str, dict[str, Any]]) -> list[str]:
    """A table, as lines, of the names whose values differ between columns; empty if none does."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name) for column in columns.values())] for name in names]
    # A column without a value agrees with all.
    rows = [row for row in rows if len({value for value in row[1:] if isinstance(value, int | float | str)}) > 1]
    if not rows:
        return []
    cells = [["", *columns], *([str("–" if value is None else value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
