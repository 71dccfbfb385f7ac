"""The Protocol of a reward, the table of built-in rewards, and the choice of a run's reward.

A reward is a float. Teacher scores are not rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Protocol

import numpy as np

from slime_opd.config import Config
from slime_opd.errors import DataError, SlimeOPDError
from slime_opd.hooks import described
from slime_opd.reward.custom import CustomReward
from slime_opd.reward.exact_match import ExactMatch
from slime_opd.reward.math import MathReward
from slime_opd.types import Sample


class Reward(Protocol):
    """Computes the reward of one response. `name` is for messages; `close` ends the processes that it started."""

    name: str

    async def __call__(self, sample: Sample) -> float: ...

    def close(self) -> None: ...


# Rewards by --rm-type. "deepscaler" is slime's name for the verifier of its math scripts.
REWARDS: Mapping[str, Callable[[], Reward]] = {
    "math": MathReward,
    "deepscaler": MathReward,
    "exact_match": ExactMatch,
}


def make_reward(config: Config) -> Reward | None:
    """The task reward of training: `--custom-rm-path`, else `--rm-type`, else none."""
    if config.reward.custom_rm_path is not None:
        return CustomReward(config.reward.custom_rm_path, config)
    return None if config.reward.rm_type is None else REWARDS[config.reward.rm_type]()


def make_eval_reward(config: Config) -> Reward | None:
    """The reward of evaluation: `--eval-rm-type`, else that of training, else math; None without evaluation sets."""
    if not config.evaluates:
        return None
    if config.evaluation.eval_rm_type is not None:
        return REWARDS[config.evaluation.eval_rm_type]()
    return make_reward(config) or MathReward()


async def compute_reward(reward: Reward, sample: Sample) -> float:
    """The reward of `sample`. Raises DataError where the reward fails or is not a finite number."""
    try:
        value = await reward(sample)
    except SlimeOPDError:
        raise
    except Exception as error:  # a user's code may raise anything; the message names the reward
        raise DataError(
            f"reward {reward.name} failed on a response to prompt {sample.prompt.index}: {described(error)}"
        ) from error
    if not isinstance(value, Real | np.bool_) or not math.isfinite(value):
        hint = ": slime's --reward-key is not supported, return the value itself" if isinstance(value, dict) else ""
        raise DataError(
            f"reward {reward.name} returned {value!r:.80} for a response to prompt {sample.prompt.index}; "
            f"expected one finite number{hint}"
        )
    return float(value)
