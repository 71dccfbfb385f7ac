"""The rehearsal's rollout: equal samples that fill every micro-batch, as large as the flags allow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slime_opd.config import Config, parse
from slime_opd.errors import RehearsalError
from slime_opd.types import Prompt, Sample, Status


@dataclass(frozen=True)
class Load:
    """Data of one rank in a rehearsed step: `micro_batches` rows of `sequences` samples."""

    micro_batches: int = 2
    sequences: int = 2
    prompt_tokens: int = 256


def tokens_per_micro_batch(config: Config) -> int:
    """Tokens of a full micro-batch by the run's flags."""
    training, rollout = config.training, config.rollout
    if training.use_dynamic_batch_size and training.max_tokens_per_gpu is not None:
        return training.max_tokens_per_gpu
    if rollout.rollout_max_response_len is None:
        raise RehearsalError(
            "the size of a micro-batch is unknown: give --rollout-max-response-len, or --use-dynamic-batch-size and --max-tokens-per-gpu"
        )
    return training.micro_batch_size * (rollout.rollout_max_response_len + 256)


def rollout_tokens(config: Config, load: Load) -> int:
    """Response tokens that each rank trains on."""
    length = tokens_per_micro_batch(config) // load.sequences
    return load.micro_batches * load.sequences * (length - load.prompt_tokens)


def rehearsed_config(argv: list[str], load: Load) -> Config:
    """The run's configuration, with one optimizer step of `load` as its rollout."""
    config = parse(argv)
    samples = load.micro_batches * load.sequences * config.data_parallel_size
    sizes = {"rollout-batch-size": samples, "n-samples-per-prompt": 1, "global-batch-size": samples, "num-rollout": 1}
    return parse([*argv, *(argument for name, value in sizes.items() for argument in (f"--{name}", str(value)))])


def make_samples(config: Config, load: Load) -> list[Sample]:
    """A rollout of equal samples, of all data-parallel ranks."""
    length = tokens_per_micro_batch(config) // load.sequences
    response = length - load.prompt_tokens
    return [_sample(config, index, load.prompt_tokens, response) for index in range(config.global_batch_size)]


def _sample(config: Config, index: int, prompt_tokens: int, response: int) -> Sample:
    prompt = Prompt(index=index, tokens=(1,) * prompt_tokens, text="")
    sample = Sample(prompt, (1,) * response, "", Status.TRUNCATED)
    sample.set("loss_mask", np.ones(response))
    sample.set("group", index)
    sample.set("truncated", 1)
    if config.is_sft:
        return sample
    sample.set("rollout_log_probs", np.zeros(response))
    sample.set("reward", index % 2)
    if config.teacher.scores_rollouts:
        sample.set("teacher_log_probs", np.zeros(response))
        if config.teacher_top_k:
            sample.set("teacher_top_ids", np.zeros((response, config.teacher_top_k)))
            sample.set("teacher_top_log_probs", np.zeros((response, config.teacher_top_k)))
        if config.student_top_k:
            sample.set("student_top_ids", np.zeros((response, config.student_top_k)))
            sample.set("teacher_on_student_log_probs", np.zeros((response, config.student_top_k)))
    return sample
