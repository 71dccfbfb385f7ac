"""What the run would start from, by the table of slime_opd/checkpoint/start.py."""

from __future__ import annotations

from slime_opd.checkpoint.record import identity_of
from slime_opd.checkpoint.start import choose_start, read_facts, request_of
from slime_opd.config import Config
from slime_opd.preflight.findings import Findings, attempt


def look_at_start(config: Config, found: Findings) -> None:
    """The start, or why there is none. Prompts are compared only when a run has read them all."""

    def look() -> str:
        request = request_of(config)
        start = choose_start(request, read_facts(request, identity_of(config, {})))
        return f"start: {start.flag} {start.path}, the run {start.outcome.value.replace('`', '')}"

    attempt(found, look)
