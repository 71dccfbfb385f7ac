"""The teacher, asked what a run would ask it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from slime_opd.config import Config
from slime_opd.preflight.findings import Findings, attempt


def ask_teacher(config: Config, tokenizer: Any, found: Findings) -> None:
    """Everything that a run asks a teacher's server before its first rollout."""
    if not (config.teacher.scores_rollouts and config.generates) or not config.reward.rm_url:
        return
    from slime_opd.teacher.probe import probe
    from slime_opd.teacher.sglang import make_teacher

    async def ask() -> str:
        hasty = replace(config, opd=replace(config.opd, opd_teacher_retries=0))
        teacher = make_teacher(hasty)
        try:
            return str(await probe(teacher.client, tokenizer, config.model.hf_checkpoint, teacher.wanted.asked))
        finally:
            await teacher.client.aclose()

    attempt(found, lambda: asyncio.run(ask()))
