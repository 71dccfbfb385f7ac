"""The configuration of a run that follows from its data, its debugging options and its directory."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

from slime_opd.config import Config
from slime_opd.data.source import PromptSource


def run_dir(config: Config) -> Path:
    """Directory of the run's metrics, logs and resolved configuration."""
    if config.observe.run_dir is not None:
        return Path(config.observe.run_dir)
    if config.checkpoint.save is not None:
        return Path(config.checkpoint.save) / "run"
    return Path("runs").absolute() / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def with_disk_directory(config: Config, run_directory: Path) -> Config:
    """The configuration with a directory for --update-weight-transport disk: the run's own unless one is set."""
    directory = config.weights.update_weight_disk_dir or str(run_directory / "weights")
    return replace(config, weights=replace(config.weights, update_weight_disk_dir=directory))


def without_checkpoints(config: Config) -> Config:
    """With --debug-rollout-only, the configuration without its checkpoint options, which it does not use."""
    if not config.debug.debug_rollout_only:
        return config
    return replace(config, checkpoint=type(config.checkpoint)())


def with_epochs(config: Config, source: PromptSource | None) -> Config:
    """The configuration with `--num-epoch` as a number of rollouts, which the number of prompts gives."""
    if config.data.num_epoch is None or config.rollout.num_rollout is not None or source is None:
        return config
    num_rollout = config.data.num_epoch * len(source) // config.rollout.rollout_batch_size
    return replace(config, rollout=replace(config.rollout, num_rollout=num_rollout))
