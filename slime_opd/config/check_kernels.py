"""The kernels of a configuration: what its model's attention needs, and whether this machine has it."""

from __future__ import annotations

import subprocess

from slime_opd.config import machine as machines
from slime_opd.config.config import Config
from slime_opd.config.hf_config import architecture_of
from slime_opd.config.kernels import Attention, Kernels, Machine, choose_kernels, rope_fusion_problem
from slime_opd.errors import ConfigError


def attention_of(config: Config, *, has_cuda: bool) -> Attention:
    """What the model's attention needs, by the flags (raw mode) or by --hf-checkpoint's config.json (bridge mode)."""
    training, given = config.training, config.megatron
    half = "fp16" if training.fp16 else "bf16"
    is_half = training.fp16 or training.bf16 or has_cuda
    shape = _raw_shape(config) if config.model.megatron_to_hf_mode == "raw" else _bridge_shape(architecture_of(config))
    return Attention(
        dtype="fp32" if training.fp32 or not is_half else half,
        backend=training.attention_backend,
        rope_fusion=given.apply_rope_fusion,
        **shape,
    )


def _raw_shape(config: Config) -> dict:
    model, given = config.model, config.megatron
    shape = {"dropout": model.attention_dropout, "is_interleaved": bool(given.rotary_interleaved)}
    if given.multi_latent_attention:
        # Megatron's defaults.
        content, rotated = given.qk_head_dim or 128, given.qk_pos_emb_head_dim or 64
        has_yarn = (given.rope_type or "yarn") == "yarn"
        return shape | _latent_shape(content, rotated, given.v_head_dim or 128, has_yarn)
    width = model.kv_channels
    if width is None and model.hidden_size and model.num_attention_heads:
        width = model.hidden_size // model.num_attention_heads
    return shape | ({} if width is None else {"query_width": width, "value_width": width})


def _bridge_shape(architecture: dict) -> dict:
    scaling = architecture.get("rope_scaling") or architecture.get("rope_parameters") or {}
    shape = {
        "dropout": architecture.get("attention_dropout") or 0.0,
        "is_interleaved": architecture.get("model_type") == "glm4",
    }
    if architecture.get("kv_lora_rank"):
        widths = (architecture.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        content, rotated, value = (width or default for width, default in zip(widths, (128, 64, 128), strict=True))
        has_yarn = scaling.get("rope_type", scaling.get("type")) == "yarn"
        return shape | _latent_shape(content, rotated, value, has_yarn)
    width, hidden, heads = (architecture.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    width = width or (hidden // heads if hidden and heads else None)
    return shape | ({} if width is None else {"query_width": width, "value_width": width})


def _latent_shape(content: int, rotated: int, value: int, has_yarn: bool) -> dict:
    return {
        "is_latent": True,
        "has_yarn": has_yarn,
        "latent_widths": (content, rotated),
        "query_width": content + rotated,
        "value_width": value,
    }


def kernels_of(config: Config, machine: Machine) -> Kernels:
    """The kernels of the model on a machine. Raises ConfigError, in one sentence, where what is asked for cannot run."""
    return choose_kernels(machine, attention_of(config, has_cuda=machine.has_cuda))


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
            f"the GPUs of this machine cannot be looked at: {_reason(error)}; does `{' '.join(machines.COMMAND)}` run?"
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
