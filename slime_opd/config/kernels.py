"""Chooses the kernels that train a model: a pure function of the machine and of the model's attention.

`machine.py` inspects the machine; this file only decides, so every machine can be tested on any other. The limits were
read in the sources of Transformer Engine 2.11 (`get_attention_backend`, `nvte_get_fused_attn_backend`), flash-attn 2.8,
torch 2.9 to 2.13 and megatron-core 0.16.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime_opd.errors import ConfigError

# Whose attention kernel is called for a packed row: the layers' own (Transformer Engine's), flash-attn's, torch's
# variable-length one, or torch's scaled_dot_product_attention for one run of segments of equal length after the other.
AttentionKernel = Literal["engine", "flash_attn", "varlen", "segments"]

_INSTALL = "install it (tools/setup_gpu.sh)"
_WITHOUT_ENGINE = "train without it (--attention-backend local)"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware and packages of a machine that kernels depend on. The default is a machine without CUDA.

    `compute_capability`: of the GPU, (9, 0) for Hopper. `varlen_options`: the parameters of torch's
    `torch.nn.attention.varlen.varlen_attn`, none where torch has no such function. `engine`: the version of Transformer
    Engine that is installed, None without; `engine_error`: why it cannot be imported, None if it can. `engine_flash`:
    the major versions of flash-attn that Transformer Engine takes here, as it checks versions itself. `flash_attn`: the
    version of flash-attn 2 that can be imported.
    """

    has_cuda: bool = False
    compute_capability: tuple[int, int] = (0, 0)
    varlen_options: frozenset[str] = frozenset()
    engine: str | None = None
    engine_error: str | None = None
    engine_flash: frozenset[int] = frozenset()
    flash_attn: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A model's attention, as far as kernels depend on it, and the kernels that the user requests.

    `query_width` and `value_width`: of one head; keys are as wide as queries.
    `rope_fusion`: --apply-rope-fusion, None if unset.
    """

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    backend: str = "auto"
    query_width: int = 128
    value_width: int = 128
    dropout: float = 0.0
    is_latent: bool = False
    # Widths of latent attention: of a query without its rotated part, and of that part.
    latent_widths: tuple[int, int] = (128, 64)
    has_yarn: bool = False
    is_interleaved: bool = False
    rope_fusion: bool | None = None

    @property
    def is_half(self) -> bool:
        """Whether it computes in 16 bits, which flash and cuDNN kernels need."""
        return self.dtype != "fp32"


@dataclass(frozen=True)
class Kernels:
    """The kernels that train a model.

    `uses_engine`: layers are Transformer Engine's, with its fused operations; else Megatron-core's own.
    `repeats_groups`: keys and values are repeated for each query head, because the kernel takes no groups.
    `rope_fusion`: one kernel rotates queries or keys. `note`: what the user may not expect of this machine, as a
    sentence.
    """

    uses_engine: bool
    attention: AttentionKernel
    repeats_groups: bool = False
    rope_fusion: bool = False
    note: str | None = None


def choose_kernels(machine: Machine, attention: Attention) -> Kernels:
    """The kernels of a model on a machine. Raises ConfigError, in one sentence, for a request that cannot run."""
    uses_engine = _uses_engine(machine, attention)
    if attention.rope_fusion and (reason := rope_fusion_problem(attention)):
        raise ConfigError(f"--apply-rope-fusion: {reason}; drop the flag")
    if attention.rope_fusion and not uses_engine:
        raise ConfigError(
            "--apply-rope-fusion: the kernel is Transformer Engine's, whose layers are not used here; drop the flag"
        )
    fuses_rope = uses_engine and attention.rope_fusion is not False and rope_fusion_problem(attention) is None
    kernel, why = ("segments", None) if not machine.has_cuda else _attention_kernel(machine, attention, uses_engine)
    return Kernels(
        uses_engine=uses_engine,
        attention=kernel,
        repeats_groups=_repeats_groups(machine, attention, kernel),
        rope_fusion=fuses_rope,
        note=_note(machine, attention, uses_engine, kernel, why),
    )


def rope_fusion_problem(attention: Attention) -> str | None:
    """Why no fused kernel rotates these queries and keys as they have to be; None where one does."""
    if attention.is_interleaved:
        return "Megatron-core does not tell the fused kernel of packed rows that the rotated pairs are interleaved"
    if not attention.is_latent:
        return None
    if not attention.has_yarn:
        return "the fused kernel of latent attention is for yarn's frequencies only"
    content, rotated = attention.latent_widths
    if any(width & (width - 1) for width in (content, rotated, attention.value_width)):
        return "the fused kernel of latent attention takes head widths that are powers of two only"
    return None


def _uses_engine(machine: Machine, attention: Attention) -> bool:
    if not machine.has_cuda or attention.backend == "local":
        return False
    if machine.engine is None:
        if attention.backend in ("fused", "unfused"):
            raise ConfigError(
                f"--attention-backend {attention.backend}: the kernel is Transformer Engine's, which is not installed here: {_INSTALL}, or set auto"
            )
        return False
    if machine.engine_error is not None:
        raise ConfigError(
            f"Transformer Engine {machine.engine} is installed here but cannot be imported ({machine.engine_error}): {_INSTALL}, or {_WITHOUT_ENGINE}"
        )
    return True


def _attention_kernel(machine: Machine, attention: Attention, uses_engine: bool) -> tuple[AttentionKernel, str | None]:
    """The kernel of a packed row on CUDA, and why it is not the layers' own, if so."""
    flash = (_engine_flash_problem if uses_engine else _flash_problem)(machine, attention)
    if attention.backend == "flash":
        if flash is not None:
            raise ConfigError(
                f"--attention-backend flash: {flash}; set auto, which takes a kernel that can, or install flash-attn (WITH_FLASH_ATTN=1 tools/setup_gpu.sh)"
            )
        return ("engine" if uses_engine else "flash_attn"), None
    if not uses_engine:
        return ("flash_attn" if flash is None else _torch_kernel(machine, attention)), None
    if attention.backend == "unfused":
        return "engine", None
    fused = _fused_problem(machine, attention)
    if attention.backend == "fused" and fused is not None:
        raise ConfigError(f"--attention-backend fused: {fused}; set auto, which takes a kernel that can")
    if fused is None or flash is None:
        return "engine", None
    # What is left to Transformer Engine is a kernel that keeps the square of the longest sample.
    return _torch_kernel(machine, attention), f"fused: {fused}; flash: {flash}"


def _torch_kernel(machine: Machine, attention: Attention) -> AttentionKernel:
    return "varlen" if _varlen_problem(machine, attention) is None else "segments"


def _shape_problem(machine: Machine, attention: Attention) -> str | None:
    """What every flash kernel of the second generation needs."""
    if not attention.is_half:
        return "it takes --bf16 and --fp16 only"
    if machine.compute_capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, found {_version(machine.compute_capability)}"
    if attention.query_width != attention.value_width:
        return f"it takes heads of one width, found {attention.query_width} for queries and {attention.value_width} for values"
    if attention.query_width > 256 or attention.query_width % 8:
        return f"it takes head widths up to 256 that are multiples of 8, found {attention.query_width}"
    return None


def _flash_problem(machine: Machine, attention: Attention) -> str | None:
    """Why flash-attn 2 cannot be called for these heads; None if it can."""
    if machine.flash_attn is None:
        return "flash-attn is not installed here, or cannot be imported"
    return _shape_problem(machine, attention)


def _engine_flash_problem(machine: Machine, attention: Attention) -> str | None:
    """Why Transformer Engine would not call flash-attn; None if it would."""
    if not machine.engine_flash:
        return "flash-attn is not installed here in a version that Transformer Engine takes"
    if 3 in machine.engine_flash and machine.compute_capability == (9, 0) and _third_generation_takes(attention):
        return None
    if 2 not in machine.engine_flash:
        return "flash-attn 3 needs a GPU of compute capability 9.0, no dropout, and head widths that it knows"
    return _shape_problem(machine, attention)


def _third_generation_takes(attention: Attention) -> bool:
    query, value = attention.query_width, attention.value_width
    fits = query <= 256 and (
        query == value or (128 < query <= 192 and 96 < value <= 128) or (query <= 64 and value <= 512)
    )
    return attention.is_half and not attention.dropout and fits


def _varlen_problem(machine: Machine, attention: Attention) -> str | None:
    """Why torch's variable-length attention cannot be called; None if it can."""
    if not {"scale", "window_size"} <= machine.varlen_options:
        return "this torch has no variable-length attention with a scale and a window"
    if attention.dropout:
        return "it has no dropout"
    return _shape_problem(machine, attention)


def _fused_problem(machine: Machine, attention: Attention) -> str | None:
    """Why cuDNN's fused attention, as Transformer Engine calls it, cannot take packed rows; None if it can."""
    query, value = attention.query_width, attention.value_width
    generation = machine.compute_capability[0]
    if not attention.is_half:
        return "it takes --bf16 and --fp16 only"
    if generation not in (9, 10, 11):
        return f"it takes packed rows on Hopper and data-center Blackwell GPUs only, found compute capability {_version(machine.compute_capability)}"
    widest = max(query, value)
    fits = widest <= 128 or (query, value) == (192, 128) or (generation == 9 and widest <= 256 and query == value)
    if not fits or query % 8 or value % 8:
        return f"it cannot train head widths of {query} for queries and {value} for values on this GPU"
    return None


def _repeats_groups(machine: Machine, attention: Attention, kernel: AttentionKernel) -> bool:
    if kernel == "varlen":
        return "enable_gqa" not in machine.varlen_options
    # torch's memory-efficient kernel takes no groups. In float32, and before Ampere, no other avoids keeping all
    # scores.
    has_flash = attention.is_half and (machine.compute_capability or (0, 0)) >= (8, 0)
    return kernel == "segments" and machine.has_cuda and not has_flash


def _note(
    machine: Machine, attention: Attention, uses_engine: bool, kernel: AttentionKernel, why: str | None
) -> str | None:
    names = {
        "flash_attn": f"flash-attn {machine.flash_attn}",
        "varlen": "torch's variable-length attention",
        "segments": "torch's scaled_dot_product_attention, segment by segment",
    }
    if uses_engine and kernel != "engine":
        return f"attention is {names[kernel]}, because no fused kernel of Transformer Engine can run it here ({why})"
    if machine.has_cuda and not uses_engine and attention.backend != "local":
        return f"Transformer Engine is not installed here: layers are Megatron-core's own, without its fused kernels, and attention is {names[kernel]}; {_INSTALL}"
    return None


def _version(parts: tuple[int, int]) -> str:
    return ".".join(map(str, parts))
