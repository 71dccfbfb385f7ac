"""Options for debugging: rollouts recorded to files and replayed from them, and generation or training alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slime_opd.config.options import option
from slime_opd.config.resume import HONOURED, OnResume


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Debugging: rollouts recorded and replayed"""

    on_resume: ClassVar[OnResume] = HONOURED

    save_debug_rollout_data: str | None = option(
        None,
        help="record each rollout, with all columns that training reads, in a Parquet file at this path with {rollout_id} in it",
        metavar="PATH",
        is_path=True,
    )
    load_debug_rollout_data: str | None = option(
        None,
        help="train on rollouts recorded with --save-debug-rollout-data instead of generating; starts no engine and asks no teacher",
        metavar="PATH",
        is_path=True,
    )
    debug_rollout_only: bool = option(
        False, help="generate only: no trainer is started, and the engines keep the weights of --hf-checkpoint"
    )
    debug_train_only: bool = option(
        False, help="train only: start no engine and evaluate nothing; implied by --load-debug-rollout-data"
    )
