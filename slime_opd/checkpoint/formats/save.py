"""Writes a torch_dist checkpoint, on all ranks together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from slime_opd.checkpoint import disk
from slime_opd.checkpoint.formats.failures import writing
from slime_opd.checkpoint.formats.state import TrainingState, state_to_save
from slime_opd.checkpoint.formats.thread_writer import write_with_threads
from slime_opd.checkpoint.formats.verification import gather, on_first_rank, write_manifest
from slime_opd.checkpoint.location import RUN_STATE
from slime_opd.checkpoint.manifest import MANIFEST
from slime_opd.checkpoint.publish import publish, remove_old
from slime_opd.checkpoint.tokenizer import copy_tokenizer
from slime_opd.model.hidden_states import HiddenStatesModel


def save(
    root: str,
    iteration: int | None,
    model: HiddenStatesModel,
    training: TrainingState | None,
    run_state: dict[str, Any],
    keep: int = 0,
    tokenizer: str | None = None,
) -> Path:
    """Write one checkpoint under `root`; returns its directory. `iteration` None: a release, of weights alone.

    `run_state`: the driver's state, as JSON values. `keep`: checkpoints that are kept (0: all). `tokenizer`: a Hugging
    Face directory whose tokenizer is copied beside the weights. Raises CheckpointError where the checkpoint cannot be
    written: its files are removed, and the tracker file still names the one before.
    """
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    partial = Path(root) / f"{name}.partial"
    state = state_to_save(model, training, iteration)
    needed = sum(gather(_own_bytes(state)))

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        disk.check_free_space(Path(root), name, needed)

    def add_companions() -> None:
        (partial / RUN_STATE).write_text(json.dumps({**run_state, "manifest": MANIFEST}, indent=1))
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)

    def finish() -> Path:
        final = publish(partial)
        remove_old(Path(root), keep)
        return final

    with writing(partial, needed):
        on_first_rank(begin)
        write_with_threads()
        dist_checkpointing.save(state, str(partial))
        on_first_rank(add_companions)
        write_manifest(partial)
        return on_first_rank(finish)


def _own_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors of `state` that this rank writes."""
    values = [value for value in nested_values(state) if getattr(value, "data", None) is not None]
    own = [value for value in values if hasattr(value, "replica_id") and is_main_replica(value.replica_id)]
    return sum(value.data.nbytes for value in own if isinstance(value.data, Tensor))
