"""Dynamic sampling: groups that have nothing to teach are left out, and others generated in their place (DAPO, Yu et al. 2025,
arXiv:2503.14476, section 3.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from slime_opd.config import Config
from slime_opd.config.check_learning import SLIME_FILTER
from slime_opd.errors import DataError
from slime_opd.hooks import described, load_hook
from slime_opd.types import Prompt, Sample, SampleGroup

Keep = Callable[[Sequence[Sample]], bool]

OPTION = "--dynamic-sampling-filter-path"

# A filter that keeps less than one group of this many keeps nothing, and a run would wait for ever.
_GROUPS_PER_KEPT = 64


def rewards_differ(samples: Sequence[Sample]) -> bool:
    """Whether a group's rewards are not all the same: those of a group that are have no advantage."""
    rewards = [float(sample.values["reward"][0]) for sample in samples]
    return float(np.std(rewards)) > 1e-6


def load_filter(path: str, config: Config) -> Keep:
    """The filter `MODULE.FUNCTION(samples) -> bool`, slime's `(args, samples)`, or slime's own by its name.

    Raises ConfigError where it cannot be imported; the filter raises DataError where the function fails or returns anything else.
    """
    if path == SLIME_FILTER:
        return rewards_differ
    function = load_hook(OPTION, path, "samples").bind(config)

    def keep(samples: Sequence[Sample]) -> bool:
        try:
            result = function(samples)
        except Exception as error:  # code of users can raise anything
            raise DataError(f"{OPTION} {path} failed on a group: {described(error)}") from error
        result = getattr(result, "keep", result)  # slime's filters return an object with the decision and its reason
        if not isinstance(result, bool | np.bool_):
            raise DataError(f"{OPTION} {path} returned {result!r:.80}; expected True or False")
        return bool(result)

    return keep


async def kept_groups(
    generate: Callable[[Prompt], Awaitable[SampleGroup]],
    take: Callable[[int], Sequence[Prompt]],
    keep: Keep,
    *,
    wanted: int,
    at_once: int,
    on_group: Callable[[SampleGroup], None],
) -> tuple[list[SampleGroup], int]:
    """The first `wanted` groups that are kept, in the prompts' order, and how many were left out.

    `at_once` prompts are taken whenever those in flight could not be enough. What is still in flight in the end is cancelled;
    its prompts are used up. `on_group` is called with each group that is kept. Raises DataError where the filter keeps nearly nothing.
    """
    kept: list[SampleGroup] = []
    left_out, tasks = 0, set()
    try:
        while len(kept) < wanted:
            if len(kept) + len(tasks) < wanted:
                tasks |= {asyncio.ensure_future(generate(prompt)) for prompt in take(at_once)}
            finished, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for group in sorted((task.result() for task in finished), key=lambda group: group.prompt.index):
                if not keep(group.samples):
                    left_out += 1
                elif len(kept) < wanted:
                    kept.append(group)
                    on_group(group)
            if left_out > _GROUPS_PER_KEPT * (len(kept) + 1):
                raise DataError(
                    f"--dynamic-sampling-filter-path kept {len(kept)} of {left_out + len(kept)} groups of this rollout: the prompts are all too easy or too hard, or the reward is always the same"
                )
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return sorted(kept, key=lambda group: group.prompt.index), left_out
