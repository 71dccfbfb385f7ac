"""Generation of a rollout: prompts to groups of rewarded and scored samples.

    prompt ──► generate ──┬──► reward  ──┬──► sample
                          └──► teacher ──┘
Each response is rewarded and scored as soon as it is complete, while others are still being generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.errors import EngineError
from slime_opd.reward.reward import Reward, compute_reward
from slime_opd.rollout import single_turn
from slime_opd.rollout.generation import GenerateFunction
from slime_opd.rollout.loop import gather
from slime_opd.rollout.off_policy import make_mix
from slime_opd.rollout.sampling import training_sampler
from slime_opd.teacher.teacher import Teacher
from slime_opd.types import Prompt, Sample, SampleGroup

OnSample = Callable[[Sample], None]


class Generator:
    """Generates `--n-samples-per-prompt` responses per prompt, and has each rewarded and scored."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Any,
        config: Config,
        *,
        reward: Reward | None,
        teacher: Teacher | None,
        generate: GenerateFunction = single_turn.generate,
    ) -> None:
        self._client, self._student_top_k = client, config.student_top_k
        self._generate = generate
        self._sampler = training_sampler(client, tokenizer, config, num_top_logprobs=config.student_top_k)
        self._mix = make_mix(config, tokenizer, self._sampler, teacher)
        self._samples_per_prompt = config.rollout.n_samples_per_prompt
        self._reward = reward
        self._teacher = teacher

    async def aclose(self) -> None:
        """Close the connections that it opened itself."""
        if self._mix is not None:
            await self._mix.aclose()

    async def generate(self, prompts: Sequence[Prompt], on_sample: OnSample | None = None) -> list[SampleGroup]:
        """One group per prompt, both in order; `on_sample` is called with each sample once it is complete.

        Every sample has loss_mask, truncated and group; rollout_log_probs unless it is off-policy; reward, and
        teacher_log_probs and teacher_failed, where the run has them. The first error cancels all other samples and is
        raised.
        """
        samples = await gather(
            self._scored_sample(prompt, sample_index, on_sample)
            for prompt in prompts
            for sample_index in range(self._samples_per_prompt)
        )
        size = self._samples_per_prompt
        return [SampleGroup(prompt, samples[i * size : (i + 1) * size]) for i, prompt in enumerate(prompts)]

    async def generate_group(self, prompt: Prompt, on_sample: OnSample | None = None) -> SampleGroup:
        """The group of one prompt, as `generate` makes it."""
        (group,) = await self.generate([prompt], on_sample)
        return group

    async def _scored_sample(self, prompt: Prompt, sample_index: int, on_sample: OnSample | None) -> Sample:
        sample, failure = await self._sample(prompt, sample_index)
        await gather([self._set_reward(sample), self._set_teacher_scores(sample, failure)])
        if on_sample is not None:
            on_sample(sample)
        return sample

    async def _sample(self, prompt: Prompt, sample_index: int) -> tuple[Sample, EngineError | None]:
        """A response, and the error for which it is the student's although it should be off-policy."""
        sample, failure = None, None
        if self._mix is not None and self._mix.is_off_policy(prompt, sample_index):
            try:
                sample = await self._mix.sample(prompt, sample_index)
            except EngineError as error:
                failure = error
        if sample is None:
            sample = await self._sampler.sample(self._generate, prompt, sample_index)
        if self._student_top_k and "student_top_ids" not in sample.values:
            _, top = await self._client.score_top_k(sample.tokens, len(prompt.tokens), self._student_top_k)
            sample.set("student_top_ids", top.ids)
        return sample, failure

    async def _set_reward(self, sample: Sample) -> None:
        if self._reward is not None:
            sample.set("reward", await compute_reward(self._reward, sample))

    async def _set_teacher_scores(self, sample: Sample, failure: EngineError | None) -> None:
        if self._teacher is None:
            return
        # A teacher that failed to generate the response counts as one that failed to score it.
        if failure is None:
            scores = await self._teacher.score(sample)
        else:
            scores = self._teacher.failed_scores(sample, failure)
        arrays = {
            "teacher_log_probs": scores.log_probs,
            "teacher_top_ids": scores.top_ids,
            "teacher_top_log_probs": scores.top_log_probs,
            "teacher_on_student_log_probs": scores.student_log_probs,
        }
        for name, values in arrays.items():
            if values is not None:
                sample.set(name, values)
        sample.set("teacher_failed", float(scores.failure is not None))
