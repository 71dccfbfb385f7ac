"""What teacher and student must share: the vocabulary size, and the ids that end a response."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from pathlib import Path

from slime_opd.config.hf_config import end_token_ids, language_model, read_hf_config, token_ids
from slime_opd.engine import protocol
from slime_opd.engine.client import EngineClient
from slime_opd.errors import DataError, EngineError

_BEYOND_ANY_VOCABULARY = 1 << 30
# A logit bias larger than any logit: the id that gets it is generated.
_FORCING_BIAS = 1e6


def student_facts(checkpoint: Path) -> tuple[int, set[int]]:
    """Vocabulary size and end-of-sequence ids of a Hugging Face directory. Raises DataError without the former."""
    try:
        config = read_hf_config(str(checkpoint))
        ends = end_token_ids(str(checkpoint))
    except ValueError as error:
        raise DataError(str(error)) from error
    model = language_model(config)
    if "vocab_size" not in model:
        raise DataError(
            f"{checkpoint / 'config.json'}: no vocab_size; is it the Hugging Face directory of a language model?"
        )
    return model["vocab_size"], {*ends, *token_ids(model.get("eos_token_id")), *token_ids(config.get("eos_token_id"))}


async def request_vocabulary_size(client: EngineClient) -> int | None:
    """The server's vocabulary size, None where it does not return it.

    It is in SGLang's refusal of a bias on an impossible id: "logit_bias must has keys in [0, 151935], got …".
    """
    sampling = {"max_new_tokens": 0, "logit_bias": {str(_BEYOND_ANY_VOCABULARY): 0.0}}
    try:
        await client.post_generate({"input_ids": [0], "sampling_params": sampling})
    except EngineError as refusal:
        if (match := re.search(r"logit_bias.*?\[0, (\d{1,9})\]", str(refusal))) is not None:
            return int(match[1]) + 1
        if "HTTP 4" not in str(refusal):
            raise
    return None


async def request_ending_ids(client: EngineClient, ids: Collection[int]) -> tuple[int, ...]:
    """The `ids` after which the teacher's server ends a response, sorted."""

    async def ends_at(token_id: int) -> bool:
        sampling = {"temperature": 0.0, "max_new_tokens": 2, "logit_bias": {str(token_id): _FORCING_BIAS}}
        answer = await client.post_generate({"input_ids": [0], "sampling_params": sampling})
        return protocol.finish_type(protocol.meta_info(answer)) == "stop"

    ordered = sorted(ids)
    ends = await asyncio.gather(*(ends_at(i) for i in ordered))
    return tuple(i for i, end in zip(ordered, ends, strict=True) if end)
