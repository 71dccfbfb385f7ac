"""The location of one checkpoint on disk, and the names of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUN_STATE = "run_state.json"
# Directory of the model's tokenizer and config, beside the weights of a torch_dist checkpoint.
TOKENIZER = "tokenizer"
# Suffix of a checkpoint's old contents while the same step is written again.
REPLACED = ".replaced"


@dataclass(frozen=True)
class Location:
    """One checkpoint on disk. `iteration` is None for a release or a Hugging Face directory."""

    directory: Path
    iteration: int | None
    is_hugging_face: bool = False


def iteration_of(name: str) -> int | None:
    """The step in `iter_0000010`; None for any other name, `iter_0000010.partial` included."""
    digits = name.removeprefix("iter_").removesuffix(REPLACED)
    return int(digits) if name.startswith("iter_") and digits.isascii() and digits.isdigit() else None


def iterations(root: Path) -> dict[int, Location]:
    """Checkpoints in `root` by step, in ascending order, complete or not.

    `iter_N.replaced` stands for step N if `iter_N` is gone.
    """
    locations: dict[int, Location] = {}
    for path in sorted(root.glob("iter_*")):
        step = iteration_of(path.name)
        if step is not None and path.is_dir():
            locations.setdefault(step, Location(path, step))
    return dict(sorted(locations.items()))
