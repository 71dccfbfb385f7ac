"""Checkpoints and Hugging Face directories: the architecture that each has, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slime_opd.config import Config
from slime_opd.config.check_machine import architecture_flags
from slime_opd.preflight.findings import Findings, attempt


def read_json(directory: str | None, name: str) -> dict:
    try:
        return json.loads((Path(directory or "") / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def look_at_checkpoints(config: Config, architecture: dict, found: Findings) -> None:
    """The numbers of the architecture as flags, --hf-checkpoint and each checkpoint have them; those that differ, in one table."""
    from slime_opd.megatron.checkpoint import shapes_at

    options = config.checkpoint
    places: dict[str, dict[str, Any]] = {}
    if config.model.megatron_to_hf_mode == "raw":
        places["flags"] = architecture_flags(config)
    places["--hf-checkpoint"] = architecture
    for name, path in (
        ("--load", options.load),
        ("--ref-load", options.ref_load),
        ("--opd-teacher-load", config.opd.opd_teacher_load),
    ):
        if path is None or not Path(path).is_dir() or not architecture:
            continue
        shapes = attempt(found, lambda path=path: shapes_at(path))
        if not shapes:
            continue
        places[name] = shapes
        differing = [
            f"{key} {shapes[key]} there, {architecture[key]} here"
            for key in shapes
            if architecture.get(key) not in (None, shapes[key])
        ]
        if differing:
            found.problems.append(f"{name} {path} is not of --hf-checkpoint's architecture: {'; '.join(differing)}")
        else:
            found.fine.append(f"{name} {path}: {', '.join(f'{key} {value}' for key, value in shapes.items())}")
    found.differences += _differences(places)


def _differences(places: dict[str, dict[str, Any]]) -> list[str]:
    """A table of the names whose values differ between places, as lines; none where nothing does."""
    names = dict.fromkeys(name for place in places.values() for name in place)
    rows = [[name, *(place.get(name) for place in places.values())] for name in names]
    # A place that says nothing of a name agrees with all.
    rows = [row for row in rows if len({value for value in row[1:] if isinstance(value, int | float | str)}) > 1]
    if not rows:
        return []
    words = [["", *places], *([str("–" if value is None else value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in words]
