"""Rollout of the student: prompts to groups of scored samples.

    prompt ──► generate ──┬──► reward  ──┬──► sample
                          └──► teacher ──┘
A response is the student's, or of another model where the run mixes some in (`off_policy`). It is scored the moment it is there, while others are still being generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.errors import EngineError
from slime_opd.reward.reward import Reward, rewarded
from slime_opd.rollout.off_policy import make_mix
from slime_opd.rollout.sampling import gather, training_sampler
from slime_opd.types import Prompt, Sample, SampleGroup, TeacherScores

OnSample = Callable[[Sample], None]


class Teacher(Protocol):
    """Scores a response token by token. A score that cannot be had is a failure in the result, not an exception."""

    latest_failure: str | None

    async def score(self, sample: Sample) -> TeacherScores: ...

    def failed(self, sample: Sample, error: EngineError) -> TeacherScores:
        """The scores of a response that there are none of; the failure is noted."""


class Generator:
    """Generates `--n-samples-per-prompt` responses per prompt and has each rewarded and scored."""

    def __init__(
        self, client: EngineClient, tokenizer: Any, config: Config, *, reward: Reward | None, teacher: Teacher | None
    ) -> None:
        self._client, self._student_top_k = client, config.student_top_k
        self._sampler = training_sampler(client, tokenizer, config, most_likely=config.student_top_k)
        self._mix = make_mix(config, tokenizer, self._sampler)
        self._samples_per_prompt = config.rollout.n_samples_per_prompt
        self._reward = reward
        self._teacher = teacher

    async def aclose(self) -> None:
        """Close the connections that are its own."""
        if self._mix is not None:
            await self._mix.aclose()

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

    async def group(self, prompt: Prompt, on_sample: OnSample | None = None) -> SampleGroup:
        """The group of one prompt, as `generate` makes it."""
        (group,) = await self.generate([prompt], on_sample)
        return group

    async def _scored_sample(self, prompt: Prompt, number: int, on_sample: OnSample | None) -> Sample:
        sample, failure = await self._response(prompt, number)
        await gather([self._set_reward(sample), self._set_teacher_scores(sample, failure)])
        if on_sample is not None:
            on_sample(sample)
        return sample

    async def _response(self, prompt: Prompt, number: int) -> tuple[Sample, EngineError | None]:
        """A response, and why it is the student's where it should not be."""
        if self._mix is None or not self._mix.chooses(prompt, number):
            return await self._sampler.sample(prompt, number), None
        try:
            sample = await self._mix.write(prompt, number)
        except EngineError as error:
            return await self._sampler.sample(prompt, number), error
        if self._student_top_k:
            tokens, start = sample.tokens, len(prompt.tokens)
            _, top = await self._client.score_top_k(tokens, start, self._student_top_k)
            sample.set("student_top_ids", top.ids)
        return sample, None

    async def _set_reward(self, sample: Sample) -> None:
        if self._reward is not None:
            sample.set("reward", await rewarded(self._reward, sample))

    async def _set_teacher_scores(self, sample: Sample, failure: EngineError | None) -> None:
        if self._teacher is None:
            return
        # A teacher that could not write is one that failed: counted, and in no metric, whatever it says of another response.
        scores = await self._teacher.score(sample) if failure is None else self._teacher.failed(sample, failure)
        found = {
            "teacher_log_probs": scores.log_probs,
            "teacher_top_ids": scores.top_ids,
            "teacher_top_log_probs": scores.top_log_probs,
            "teacher_on_student_log_probs": scores.student_log_probs,
        }
        for name, values in found.items():
            if values is not None:
                sample.set(name, values)
        sample.set("teacher_failed", float(scores.failure is not None))


def grouped(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[SampleGroup]:
    """`samples`, equally many per prompt and in the prompts' order, as groups."""
    size = len(samples) // len(prompts) if prompts else 0
    return [SampleGroup(prompt, list(samples[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]
