"""Rollout of supervised fine-tuning: the data set's own responses, nothing generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slime_opd.errors import DataError
from slime_opd.types import Prompt, Sample, SampleGroup, Status


def dataset_groups(prompts: Sequence[Prompt], tokenizer: Any) -> list[SampleGroup]:
    """One group of one sample per prompt, with loss_mask, truncated and group set.

    Raises DataError for a prompt that has no response.
    """
    return [SampleGroup(prompt, [_sample(prompt, tokenizer)]) for prompt in prompts]


def _sample(prompt: Prompt, tokenizer: Any) -> Sample:
    if prompt.response_tokens is None:
        raise DataError(f"prompt {prompt.index} has no response to train on; the prompts were not read for sft_loss")
    text = tokenizer.decode(prompt.response_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    sample = Sample(prompt, prompt.response_tokens, text, Status.COMPLETED)
    sample.set("loss_mask", np.ones(sample.response_length))
    sample.set("truncated", 0.0)
    sample.set("group", prompt.index)
    return sample
