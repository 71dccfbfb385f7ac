"""A real torch_dist checkpoint of a few kilobytes, written by torch.distributed.checkpoint in this process."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from slime_opd.checkpoint import manifest
from slime_opd.checkpoint.formats import torch_dist
from slime_opd.checkpoint.formats.torch_dist import Piece

TENSORS = {"embedding.word_embeddings.weight": (16, 8), "decoder.final_layernorm.weight": (8,)}


def write_checkpoint(directory: Path, step: int | None = None, *, with_manifest: bool = True) -> Path:
    """Write one checkpoint to `directory`, with a run state if `step` is given."""
    directory.mkdir(parents=True)
    pieces = [Piece(key, (0,) * len(shape), shape, shape, torch.float32) for key, shape in TENSORS.items()]
    torch_dist.write(directory, pieces, lambda piece: torch.full(piece.shape, 0.5))
    if step is not None:
        marker = {"manifest": manifest.MANIFEST} if with_manifest else {}
        (directory / "run_state.json").write_text(json.dumps({"step": step, "prompts": {}, **marker}))
    if with_manifest:
        manifest.write(directory, manifest.measure(directory, manifest.listed_files(directory)))
    return directory


def write_run(root: Path, *steps: int, tracked: int | None = None) -> Path:
    """Write a run's checkpoints of `steps` and the tracker file, which names the last of them by default."""
    for step in steps:
        write_checkpoint(root / f"iter_{step:07d}", step)
    (root / "latest_checkpointed_iteration.txt").write_text(str(steps[-1] if tracked is None else tracked))
    return root
