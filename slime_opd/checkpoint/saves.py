"""The save policy: when checkpoints are written, and which are removed. Pure: time and steps are arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime_opd.config import Config

# Reasons to write a checkpoint, as run_state.json records them.
BY_LAST_STEP = "last"
BY_INTERVAL = "interval"
BY_TIME = "time"
BY_REQUEST = "request"

DEFAULT_MINUTES = 30.0
# Number of time-triggered checkpoints to keep: two, in case the newest turns out to be damaged.
NEWEST_BY_TIME = 2


@dataclass(frozen=True)
class SavePolicy:
    """Saves every `rollouts` rollouts (None: never), every `minutes` (0: never), and after `total` rollouts."""

    rollouts: int | None
    minutes: float
    total: int

    def reason(self, done: int, seconds: float) -> str | None:
        """Why a save is due after `done` rollouts, `seconds` after the last save or the start; None if it is not."""
        if done == self.total:
            return BY_LAST_STEP
        if self.rollouts is not None and done % self.rollouts == 0:
            return BY_INTERVAL
        if self.minutes and seconds >= 60 * self.minutes:
            return BY_TIME
        return None

    def __str__(self) -> str:
        parts = [] if self.rollouts is None else [f"every {self.rollouts} rollouts"]
        parts += [f"every {self.minutes:g} minutes"] if self.minutes else []
        return " and ".join([*parts, "after the last rollout"])


def save_policy(config: Config) -> SavePolicy:
    """The policy of the options. The default of --save-interval-minutes is 30, or 0 with --save-interval."""
    options = config.checkpoint
    minutes = options.save_interval_minutes
    if minutes is None:
        minutes = 0.0 if options.save_interval is not None else DEFAULT_MINUTES
    return SavePolicy(options.save_interval, minutes, config.rollout.num_rollout or 0)


def superfluous(checkpoints: Mapping[int, str | None], latest: int | None) -> list[int]:
    """Steps of the checkpoints to remove. `checkpoints`: the reason of each save, by step.

    `latest`: the step in the tracker file.

    Only time-triggered checkpoints are removed, all but the newest NEWEST_BY_TIME of them, and never `latest`.
    """
    by_time = sorted(step for step, made_by in checkpoints.items() if made_by == BY_TIME)
    return [step for step in by_time[:-NEWEST_BY_TIME] if step != latest]
