"""Responses that are not the student's: the teacher's, or the data set's."""

from __future__ import annotations

from typing import Any, Protocol

from slime_opd import schedule
from slime_opd.config import Config
from slime_opd.rollout.sampling import Sampler, training_sampler
from slime_opd.teacher.sglang import teacher_client
from slime_opd.types import Prompt, Sample, Status


class Writer(Protocol):
    """Writes responses in the student's place."""

    async def write(self, prompt: Prompt, number: int) -> Sample:
        """Response `number` to `prompt`. Raises EngineError where it cannot be had."""

    async def aclose(self) -> None:
        """Close connections."""


class OffPolicyMix:
    """Which samples of a run another model writes, and that model.

    A sample's place in the run decides, so that a run that is resumed makes the same choice.
    """

    def __init__(self, config: Config, writer: Writer) -> None:
        self._options, self._rollout = config.divergence, config.rollout
        self._writer = writer

    def chooses(self, prompt: Prompt, number: int) -> bool:
        """Whether response `number` to `prompt` is not to be the student's."""
        if self._options.opd_off_policy_unit == "rollouts":
            place = prompt.index // self._rollout.rollout_batch_size
        else:
            place = prompt.index * self._rollout.n_samples_per_prompt + number
        return schedule.is_chosen(place, self._options.opd_off_policy_fraction)

    async def write(self, prompt: Prompt, number: int) -> Sample:
        """Response `number` to `prompt`, with off_policy set. Raises EngineError where it cannot be had."""
        sample = await self._writer.write(prompt, number)
        sample.set("off_policy", 1.0)
        return sample

    async def aclose(self) -> None:
        """Close connections."""
        await self._writer.aclose()


class TeacherWriter:
    """The teacher's server writes, under the sampling options and length limits of the student's rollouts."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        # A response takes longer than a score: the time limit is that of the student's.
        self._client = teacher_client(config, timeout_s=config.rollout.rollout_request_timeout_s)
        self._sampler = training_sampler(self._client, tokenizer, config, purpose="teacher")

    async def write(self, prompt: Prompt, number: int) -> Sample:
        """Response `number` to `prompt`, drawn from the teacher."""
        sample = await self._sampler.sample(prompt, number)
        # These are the teacher's, at the sampling temperature: not what the field says.
        del sample.values["rollout_log_probs"]
        return sample

    async def aclose(self) -> None:
        """Close connections."""
        await self._client.aclose()


class DataSetWriter:
    """The data set's own responses, cut at the student's length limits."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    async def write(self, prompt: Prompt, number: int) -> Sample:
        """The response to `prompt`, the same for every number."""
        tokens = prompt.response_tokens[: self._sampler.max_response_tokens(prompt)]
        is_whole = len(tokens) == len(prompt.response_tokens)
        return self._sampler.finished(prompt, tokens, Status.COMPLETED if is_whole else Status.TRUNCATED)

    async def aclose(self) -> None:
        """There is nothing to close."""


def make_mix(config: Config, tokenizer: Any, sampler: Sampler) -> OffPolicyMix | None:
    """The mix that a run asks for, if any; `sampler` is the student's."""
    if not config.opd.use_opd or not config.divergence.opd_off_policy_fraction:
        return None
    if config.divergence.opd_off_policy_source == "teacher":
        return OffPolicyMix(config, TeacherWriter(config, tokenizer))
    return OffPolicyMix(config, DataSetWriter(sampler))
