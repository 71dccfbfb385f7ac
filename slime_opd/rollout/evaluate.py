"""Evaluation of the student on prompts that it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.metrics import Mean
from slime_opd.reward.reward import Reward, compute_reward
from slime_opd.rollout import single_turn
from slime_opd.rollout.generate import OnSample
from slime_opd.rollout.generation import GenerateFunction
from slime_opd.rollout.loop import gather
from slime_opd.rollout.sampling import Sampler, evaluation_sampler
from slime_opd.types import Prompt, Sample, Status


@dataclass(frozen=True)
class EvalSet:
    """A named list of prompts."""

    name: str
    prompts: Sequence[Prompt]


async def evaluate(
    client: EngineClient,
    tokenizer: Any,
    config: Config,
    eval_sets: Sequence[EvalSet],
    reward: Reward,
    on_sample: OnSample | None = None,
    generate: GenerateFunction = single_turn.generate,
) -> dict[str, Mean]:
    """Means over all samples of each set: `eval/NAME/accuracy` (the reward), `eval/NAME/response_length` (tokens) and
    `eval/NAME/truncated_ratio`.

    Samples `--n-samples-per-eval-prompt` responses per prompt, greedily by default (`--eval-temperature`). No teacher
    takes part. The first error cancels all other samples and is raised.
    """

    async def rewarded_sample(sampler: Sampler, prompt: Prompt, sample_index: int) -> Sample:
        sample = await sampler.sample(generate, prompt, sample_index)
        sample.set("reward", await compute_reward(reward, sample))
        if on_sample is not None:
            on_sample(sample)
        return sample

    async def samples_of(eval_set: EvalSet) -> list[Sample]:
        sampler = evaluation_sampler(client, tokenizer, config, eval_set.name)
        indices = range(config.evaluation.n_samples_per_eval_prompt)
        return await gather(
            rewarded_sample(sampler, prompt, sample_index) for prompt in eval_set.prompts for sample_index in indices
        )

    metrics: dict[str, Mean] = {}
    for eval_set, samples in zip(eval_sets, await gather(map(samples_of, eval_sets)), strict=True):
        metrics |= {f"eval/{eval_set.name}/{name}": mean for name, mean in _means(samples).items()}
    return metrics


def _means(samples: Sequence[Sample]) -> dict[str, Mean]:
    count = len(samples)
    return {
        "accuracy": Mean(sum(float(sample.values["reward"][0]) for sample in samples), count),
        "response_length": Mean(float(sum(sample.response_length for sample in samples)), count),
        "truncated_ratio": Mean(float(sum(sample.status is Status.TRUNCATED for sample in samples)), count),
    }
