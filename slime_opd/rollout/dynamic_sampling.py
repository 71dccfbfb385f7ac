"""Dynamic sampling: groups that a filter rejects are replaced by groups of further prompts.

With the default filter, groups without an advantage are rejected (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from slime_opd.config import Config
from slime_opd.config.check_learning import SLIME_FILTER
from slime_opd.errors import DataError
from slime_opd.hooks import described, load_hook
from slime_opd.types import Prompt, Sample, SampleGroup

GroupFilter = Callable[[Sequence[Sample]], bool]

OPTION = "--dynamic-sampling-filter-path"

# A filter that accepts less than one of this many groups would keep the run waiting for ever.
_MAX_GROUPS_PER_ACCEPTED = 64


def rewards_differ(samples: Sequence[Sample]) -> bool:
    """Whether a group's rewards differ; a group whose rewards are all equal has no advantage."""
    rewards = [float(sample.values["reward"][0]) for sample in samples]
    return float(np.std(rewards)) > 1e-6


def load_filter(path: str, config: Config) -> GroupFilter:
    """The filter `MODULE.FUNCTION(samples) -> bool`, slime's `(args, samples)`, or slime's own filter by its name.

    Raises ConfigError where it cannot be imported. The filter raises DataError where the function fails or returns
    anything but a bool.
    """
    if path == SLIME_FILTER:
        return rewards_differ
    function = load_hook(OPTION, path, "samples").bind(config)

    def accept(samples: Sequence[Sample]) -> bool:
        try:
            result = function(samples)
        except Exception as error:  # code of users can raise anything
            raise DataError(f"{OPTION} {path} failed on a group: {described(error)}") from error
        result = getattr(result, "keep", result)  # slime's filters return an object with the decision and its reason
        if not isinstance(result, bool | np.bool_):
            raise DataError(f"{OPTION} {path} returned {result!r:.80}; expected True or False")
        return bool(result)

    return accept


async def sample_until_accepted(
    generate: Callable[[Prompt], Awaitable[SampleGroup]],
    take_prompts: Callable[[int], Sequence[Prompt]],
    accept: GroupFilter,
    *,
    num_groups: int,
    prompts_per_request: int,
    on_group: Callable[[SampleGroup], None],
) -> tuple[list[SampleGroup], int]:
    """The first `num_groups` accepted groups, in the prompts' order, and the number of rejected groups.

    `prompts_per_request` prompts are taken whenever the groups in flight could not be enough. Groups still in flight at
    the end are cancelled; their prompts are used up. `on_group` is called with each accepted group. Raises DataError
    where the filter accepts almost nothing.
    """
    accepted: list[SampleGroup] = []
    num_rejected, tasks = 0, set()
    try:
        while len(accepted) < num_groups:
            if len(accepted) + len(tasks) < num_groups:
                tasks |= {asyncio.ensure_future(generate(prompt)) for prompt in take_prompts(prompts_per_request)}
            finished, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for group in sorted((task.result() for task in finished), key=lambda group: group.prompt.index):
                if not accept(group.samples):
                    num_rejected += 1
                elif len(accepted) < num_groups:
                    accepted.append(group)
                    on_group(group)
            if num_rejected > _MAX_GROUPS_PER_ACCEPTED * (len(accepted) + 1):
                raise DataError(
                    f"{OPTION} accepted {len(accepted)} of {num_rejected + len(accepted)} groups of this rollout: the "
                    "prompts are all too easy or too hard, or the reward is always the same"
                )
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return sorted(accepted, key=lambda group: group.prompt.index), num_rejected
