"""Paths of a run, made absolute for its other processes."""

from __future__ import annotations

import dataclasses
import os

from slime_opd.config.config import Config
from slime_opd.config.options import options_of


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths.

    Ray's workers have the working directory of their node's daemon, not the driver's. Prompt files stay as they are:
    the driver alone reads them.
    """
    for option in options_of(Config).values():
        value = option.read(config)
        if option.declaration.is_path and value is not None and not os.path.isabs(value):
            stage = dataclasses.replace(getattr(config, option.stage), **{option.name: os.path.abspath(value)})
            config = dataclasses.replace(config, **{option.stage: stage})
    return config


def names_each_rollout(path: str) -> bool:
    """Whether a path has {rollout_id} in it and nothing else to fill in."""
    try:
        return path.format(rollout_id=1) != path.format(rollout_id=2)
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
