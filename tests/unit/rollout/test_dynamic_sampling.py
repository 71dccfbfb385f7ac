"""Dynamic sampling: which groups are accepted, how many prompts are taken for them, and when it gives up."""

from __future__ import annotations

import asyncio
import random

import pytest

from slime_opd.config import Config
from slime_opd.config.check_learning import SLIME_FILTER
from slime_opd.errors import ConfigError, DataError
from slime_opd.rollout.dynamic_sampling import load_filter, rewards_differ, sample_until_accepted
from slime_opd.types import Prompt, Sample, SampleGroup, Status


def group(index: int, rewards: tuple[float, ...]) -> SampleGroup:
    prompt, samples = Prompt(index, (1,), ""), []
    for reward in rewards:
        sample = Sample(prompt, (2,), "", Status.COMPLETED)
        sample.set("reward", reward)
        samples.append(sample)
    return SampleGroup(prompt, samples)


class Prompts:
    """An endless source; remembers how many were taken at a time."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def __call__(self, count: int) -> list[Prompt]:
        start = sum(self.taken)
        self.taken.append(count)
        return [Prompt(start + i, (1,), "") for i in range(count)]


def run(rewards_of, *, num_groups=4, prompts_per_request=4, delay=lambda index: 0.0, accept=rewards_differ):
    """Indices of the accepted groups, number of rejected ones, sizes of the prompt requests, cancelled prompts."""
    prompts, cancelled, shown = Prompts(), [], []

    async def generate(prompt: Prompt) -> SampleGroup:
        try:
            await asyncio.sleep(delay(prompt.index))
        except asyncio.CancelledError:
            cancelled.append(prompt.index)
            raise
        return group(prompt.index, rewards_of(prompt.index))

    groups, num_rejected = asyncio.run(
        sample_until_accepted(
            generate,
            prompts,
            accept,
            num_groups=num_groups,
            prompts_per_request=prompts_per_request,
            on_group=shown.append,
        )
    )
    indices = [one.prompt.index for one in groups]
    assert sorted(one.prompt.index for one in shown) == indices
    return indices, num_rejected, prompts.taken, cancelled


def mixed(index: int) -> tuple[float, ...]:
    return (0.0, 1.0)


def test_groups_that_all_differ_take_one_batch_of_prompts():
    assert run(mixed) == ([0, 1, 2, 3], 0, [4], [])


def test_groups_whose_rewards_are_equal_are_replaced():
    indices, num_rejected, taken, _ = run(lambda index: (1.0, 1.0) if index % 2 else (0.0, 1.0))
    assert indices == [0, 2, 4, 6] and num_rejected >= 3 and taken == [4, 4]


def test_groups_in_flight_are_cancelled_when_there_are_enough():
    indices, num_rejected, taken, cancelled = run(
        mixed, prompts_per_request=8, delay=lambda index: 0.0 if index < 4 else 60.0
    )
    assert (indices, num_rejected, taken, sorted(cancelled)) == ([0, 1, 2, 3], 0, [8], [4, 5, 6, 7])


def test_groups_come_in_the_prompts_order_however_they_finish():
    shuffled = random.Random(0)
    indices, *_ = run(mixed, num_groups=6, prompts_per_request=6, delay=lambda index: shuffled.random() / 50)
    assert indices == list(range(6))


def test_a_filter_that_accepts_nothing_ends_the_run_with_a_sentence():
    with pytest.raises(
        DataError, match=r"accepted 0 of .* groups of this rollout: the prompts are all too easy or too hard"
    ):
        run(lambda index: (1.0, 1.0))


def test_an_error_in_one_group_cancels_the_others():
    cancelled = []

    async def generate(prompt: Prompt) -> SampleGroup:
        if prompt.index == 1:
            raise ValueError("broken")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(prompt.index)
            raise

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(
            sample_until_accepted(
                generate, Prompts(), rewards_differ, num_groups=3, prompts_per_request=3, on_group=lambda _: None
            )
        )
    assert sorted(cancelled) == [0, 2]


@pytest.mark.parametrize(("rewards", "differ"), [((1.0, 1.0), False), ((0.0, 1.0), True), ((0.5,), False)])
def test_rewards_differ_where_the_group_has_an_advantage(rewards, differ):
    assert rewards_differ(group(0, rewards).samples) is differ


def test_filters_are_imported_by_name():
    assert load_filter(SLIME_FILTER, Config()) is rewards_differ
    by_name = load_filter("slime_opd.rollout.dynamic_sampling.rewards_differ", Config())
    assert [by_name(group(0, rewards).samples) for rewards in ((0.0, 1.0), (1.0, 1.0))] == [True, False]
    for path, message in (
        ("no_such_module.f", "cannot import no_such_module"),
        ("math.no_such", "has no function 'no_such'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_filter(path, Config())
