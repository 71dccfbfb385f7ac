"""Off-policy responses: a share of the samples whose response the teacher or the data set gives, not the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slime_opd import schedule
from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.rollout.generation import GenerateContext, GenerateFunction, Row, Span
from slime_opd.rollout.sampling import Sampler, training_sampler
from slime_opd.teacher.teacher import Teacher
from slime_opd.types import Prompt, Sample, Status


class OffPolicyMix:
    """Which samples of a run are off-policy, and how their responses are generated.

    A sample's position in the run decides, so that a resumed run makes the same choice. `client`: closed with the mix.
    """

    def __init__(
        self, config: Config, sampler: Sampler, generate: GenerateFunction, client: EngineClient | None = None
    ) -> None:
        self._options, self._rollout = config.divergence, config.rollout
        self._sampler, self._generate, self._client = sampler, generate, client

    def is_off_policy(self, prompt: Prompt, sample_index: int) -> bool:
        """Whether response `sample_index` to `prompt` is off-policy."""
        if self._options.opd_off_policy_unit == "rollouts":
            index = prompt.index // self._rollout.rollout_batch_size
        else:
            index = prompt.index * self._rollout.n_samples_per_prompt + sample_index
        return schedule.is_chosen(index, self._options.opd_off_policy_fraction)

    async def sample(self, prompt: Prompt, sample_index: int) -> Sample:
        """A response to `prompt`, with off_policy set. Raises EngineError where the teacher's server fails."""
        sample = await self._sampler.sample(self._generate, prompt, sample_index)
        sample.set("off_policy", 1.0)
        return sample

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()


async def generate_by_teacher(prompt: Prompt, context: GenerateContext) -> Sequence[Row]:
    """A continuation by the teacher, without log-probs: those that it returns are not the student's."""
    row = await context.complete(prompt.tokens)
    return [replace(row, spans=tuple(replace(span, log_probs=None) for span in row.spans))]


async def take_from_data_set(prompt: Prompt, context: GenerateContext) -> Sequence[Row]:
    """The data set's own response, the same for every sample of the prompt, cut at the student's length limits."""
    tokens = prompt.response_tokens[: context.max_response_tokens]
    is_whole = len(tokens) == len(prompt.response_tokens)
    return [Row((Span(tokens),), Status.COMPLETED if is_whole else Status.TRUNCATED)]


def make_mix(config: Config, tokenizer: Any, student: Sampler, teacher: Teacher | None) -> OffPolicyMix | None:
    """The off-policy responses of a run, None for a run without any."""
    if not config.opd.use_opd or not config.divergence.opd_off_policy_fraction:
        return None
    if config.divergence.opd_off_policy_source == "dataset":
        return OffPolicyMix(config, student, take_from_data_set)
    client = teacher.generation_client()
    sampler = training_sampler(client, tokenizer, config, purpose="teacher")
    return OffPolicyMix(config, sampler, generate_by_teacher, client)
