"""Rollouts of supervised fine-tuning: the data set's own responses, without generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slime_opd.errors import DataError
from slime_opd.rollout.generation import Row, Span, make_sample
from slime_opd.types import Prompt, Sample, SampleGroup, Status


def dataset_groups(prompts: Sequence[Prompt], tokenizer: Any) -> list[SampleGroup]:
    """One group of one sample per prompt, with loss_mask, truncated and group set.

    Raises DataError for a prompt without a response.
    """
    return [SampleGroup(prompt, [_sample(prompt, tokenizer)]) for prompt in prompts]


def _sample(prompt: Prompt, tokenizer: Any) -> Sample:
    if prompt.response_tokens is None:
        raise DataError(f"prompt {prompt.index} has no response to train on; the prompts were not read for sft_loss")
    text = tokenizer.decode(prompt.response_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return make_sample(prompt, Row((Span(prompt.response_tokens),), Status.COMPLETED), text)
