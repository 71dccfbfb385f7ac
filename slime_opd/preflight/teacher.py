"""The checks of a teacher's server, as a run makes them before its first rollout."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from slime_opd.config import Config
from slime_opd.preflight.findings import Findings, attempt


def inspect_teacher(config: Config, tokenizer: Any, found: Findings) -> None:
    """Probe the teacher's server, without retries; nothing for a run whose rollouts no server scores."""
    if not (config.teacher.scores_rollouts and config.generates and config.reward.rm_url):
        return
    from slime_opd.teacher.teacher import make_teacher

    async def probe() -> str:
        teacher = make_teacher(replace(config, opd=replace(config.opd, opd_teacher_retries=0)))
        try:
            return str(await teacher.probe(tokenizer, config.model.hf_checkpoint))
        finally:
            await teacher.aclose()

    attempt(found, lambda: asyncio.run(probe()))
