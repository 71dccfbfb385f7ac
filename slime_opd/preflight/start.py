"""What the run would start from, by the table of slime_opd/checkpoint/start_table.py."""

from __future__ import annotations

import dataclasses

from slime_opd.checkpoint.record import identity_of
from slime_opd.checkpoint.start import Start, choose_start, read_facts, request_of
from slime_opd.config import Config
from slime_opd.errors import SlimeOPDError
from slime_opd.preflight.findings import Findings, attempt


def inspect_start(config: Config, found: Findings) -> None:
    """The start, or why there is none. Prompts are compared only when a run has read them all."""

    def inspect() -> str:
        start = _start_of(config)
        return f"start: {start.flag} {start.path}, the run {start.outcome.value.replace('`', '')}"

    attempt(found, inspect)


def trainer_config(config: Config) -> Config:
    """The configuration of the trainers: --load is the checkpoint that the run starts from, or None.

    Where the table refuses there is none either: `inspect_start` reports why.
    """
    try:
        return _start_of(config).resolve(config)
    except SlimeOPDError:
        return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, load=None, ckpt_step=None))


def _start_of(config: Config) -> Start:
    request = request_of(config)
    return choose_start(request, read_facts(request, identity_of(config, {})))
