"""Rollout of the student: prompts to groups of scored samples.

    prompt ──► generate ──┬──► reward  ──┬──► sample
                          └──► teacher ──┘
A response is scored the moment it is there, while others are still being generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.reward.reward import Reward, rewarded
from slime_opd.rollout.sampling import gather, training_sampler
from slime_opd.types import Prompt, Sample, SampleGroup, TeacherScores

OnSample = Callable[[Sample], None]


class Teacher(Protocol):
    """Scores a response token by token. A score that cannot be had is a failure in the result, not an exception."""

    async def score(self, sample: Sample) -> TeacherScores: ...


class Generator:
    """Generates `--n-samples-per-prompt` responses per prompt and has each rewarded and scored."""

    def __init__(
        self, client: EngineClient, tokenizer: Any, config: Config, *, reward: Reward | None, teacher: Teacher | None
    ) -> None:
        self._sampler = training_sampler(client, tokenizer, config)
        self._samples_per_prompt = config.rollout.n_samples_per_prompt
        self._reward = reward
        self._teacher = teacher

    async def generate(self, prompts: Sequence[Prompt], on_sample: OnSample | None = None) -> list[SampleGroup]:
        """One group per prompt, both in order; `on_sample` is called as each sample is finished.

        Every sample carries loss_mask, rollout_log_probs, truncated and group; reward where there
        is one; teacher_log_probs and teacher_failed where there is a teacher. The first error
        cancels everything in flight and is raised.
        """
        samples = await gather(
            self._scored_sample(prompt, number, on_sample)
            for prompt in prompts
            for number in range(self._samples_per_prompt)
        )
        return grouped(prompts, samples)

    async def _scored_sample(self, prompt: Prompt, number: int, on_sample: OnSample | None) -> Sample:
        sample = await self._sampler.sample(prompt, number)
        await gather([self._set_reward(sample), self._set_teacher_scores(sample)])
        if on_sample is not None:
            on_sample(sample)
        return sample

    async def _set_reward(self, sample: Sample) -> None:
        if self._reward is not None:
            sample.set("reward", await rewarded(self._reward, sample))

    async def _set_teacher_scores(self, sample: Sample) -> None:
        if self._teacher is None:
            return
        if sample.response_length:
            scores = await self._teacher.score(sample)
        else:  # nothing to ask about
            scores = TeacherScores(np.empty(0, dtype=np.float32))
        sample.set("teacher_log_probs", scores.log_probs)
        sample.set("teacher_failed", float(scores.failure is not None))


def grouped(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[SampleGroup]:
    """`samples`, equally many per prompt and in the prompts' order, as groups."""
    size = len(samples) // len(prompts) if prompts else 0
    return [SampleGroup(prompt, list(samples[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]
