"""The default generate function: one continuation of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from slime_opd.rollout.generation import GenerateContext, Row
from slime_opd.types import Prompt


async def generate(prompt: Prompt, context: GenerateContext) -> Sequence[Row]:
    """One response, until the model ends it or reaches the length limit."""
    return [await context.complete(prompt.tokens)]
