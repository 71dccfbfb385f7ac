"""What the attention of a configuration's model needs of a kernel, and the kernels for it on a machine."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.config.families import FAMILIES
from slime_opd.config.hf_config import architecture_of
from slime_opd.config.kernels import Attention, Kernels, Machine, choose_kernels


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
    family = FAMILIES.get(architecture.get("model_type") or "")
    shape = {
        "dropout": architecture.get("attention_dropout") or 0.0,
        "is_interleaved": family is not None and family.has_interleaved_rotary,
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
    """The kernels of the model on a machine. Raises ConfigError, in one sentence, for a request that cannot run."""
    return choose_kernels(machine, attention_of(config, has_cuda=machine.has_cuda))
