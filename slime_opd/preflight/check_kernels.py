"""Rules about the kernels of a run: what its model's attention needs, and whether this machine has it."""

from __future__ import annotations

import subprocess

from slime_opd.config import machine as machines
from slime_opd.config.attention import attention_of, kernels_of
from slime_opd.config.config import Config
from slime_opd.config.kernels import rope_fusion_problem
from slime_opd.errors import ConfigError


def check_rope_fusion(config: Config) -> list[str]:
    """A fused rotation that is wrong on every machine."""
    attention = attention_of(config, has_cuda=True)
    reason = rope_fusion_problem(attention) if attention.rope_fusion else None
    return [] if reason is None else [f"--apply-rope-fusion: {reason}; drop the flag"]


def check_kernels(config: Config) -> list[str]:
    """Kernels that this computer's GPU does not have; nothing where there is none, since other computers may train.

    It starts a process that imports what is installed, which takes seconds: rules that need only the flags come first.
    """
    try:
        machine = machines.of_this_computer()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [
            f"the GPUs of this machine cannot be inspected: {_reason(error)}; does `{' '.join(machines.COMMAND)}` run?"
        ]
    try:
        if machine.has_cuda:
            kernels_of(config, machine)
    except ConfigError as error:
        return [str(error)]
    return []


def notes(config: Config) -> list[str]:
    """What may surprise of the kernels that a machine with a GPU chooses; `check_kernels` reports what cannot run."""
    try:
        note = kernels_of(config, machines.of_this_computer()).note
    except (ConfigError, OSError, subprocess.SubprocessError, ValueError):
        return []
    return [] if note is None else [note]


def _reason(error: Exception) -> str:
    """The last line of what a process that failed printed, or of the error itself."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
