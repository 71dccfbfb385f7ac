"""One checkpoint on disk, and the names of the files in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUN_STATE = "run_state.json"
# The tokenizer and configuration of the model, beside the weights of a torch_dist checkpoint.
TOKENIZER = "tokenizer"
# A checkpoint that is written again keeps its old contents under this name until the new ones are complete.
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


def iterations(root: Path) -> list[Location]:
    """The checkpoints of runs in `root`, by step, complete or not. `iter_N.replaced` counts only where `iter_N` is gone."""
    found: dict[int, Location] = {}
    for path in sorted(root.glob("iter_*")):
        step = iteration_of(path.name)
        if step is not None and path.is_dir():
            found.setdefault(step, Location(path, step))
    return [found[step] for step in sorted(found)]
