"""Inspects this machine: the hardware and packages that kernels depend on.

Transformer Engine is imported to find out whether it works. A broken install (built for another torch, a CUDA library
that is missing) can raise any exception at import; Megatron-core crashes on it, or takes an ImportError for "not
installed". The import takes seconds, so it is made once per process, and only if there is a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from slime_opd.config.kernels import Machine

# The driver's control device: without it no process of this machine reaches a GPU.
_CONTROL_DEVICE = Path("/dev/nvidiactl")
# The same of Windows' Linux (WSL) and of AMD, where torch knows the GPU as CUDA too.
_OTHER_DEVICES = (Path("/dev/dxg"), Path("/dev/kfd"))
_TIMEOUT_S = 300
# Prints what a process of this machine could use.
COMMAND = ("python", "-m", "slime_opd.config.machine")


def has_cuda() -> bool:
    """Whether this process can use a GPU. It imports torch only where there is a driver."""
    if not any(device.exists() for device in (_CONTROL_DEVICE, *_OTHER_DEVICES)):
        return False
    import torch

    return torch.cuda.is_available()


def of_this_process() -> Machine:
    """What this process can use. It imports torch, and where CUDA is also Transformer Engine and flash-attn."""
    import torch

    if not torch.cuda.is_available():
        return Machine()
    version, error = _transformer_engine()
    return Machine(
        has_cuda=True,
        compute_capability=torch.cuda.get_device_capability(),
        varlen_options=_varlen_options(),
        engine=version,
        engine_error=error,
        engine_flash=_engine_flash() if version is not None and error is None else frozenset(),
        flash_attn=_flash_attn(),
    )


@functools.cache
def of_this_computer() -> Machine:
    """What a process of this computer could use, found out in a process of its own that ends at once.

    Raises OSError, subprocess.SubprocessError or ValueError where there is a GPU and looking failed.
    """
    if not _CONTROL_DEVICE.exists():
        return Machine()
    command = [sys.executable, *COMMAND[1:]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    # Libraries print what they like at import; the description is the last line.
    return from_json(run.stdout.strip().rpartition("\n")[2])


def to_json(machine: Machine) -> str:
    """A machine as one line."""
    return json.dumps({name: _plain(value) for name, value in dataclasses.asdict(machine).items()})


def from_json(text: str) -> Machine:
    """The machine of `to_json`. Raises ValueError for anything else."""
    values = json.loads(text)
    kinds = {"compute_capability": tuple, "varlen_options": frozenset, "engine_flash": frozenset}
    return Machine(**{name: kinds.get(name, lambda value: value)(value) for name, value in values.items()})


def hide_unusable_engine() -> None:
    """Hide Transformer Engine from Megatron-core unless it works and there is a GPU. Call it before importing Megatron.

    Megatron asks in dozens of places whether it can be imported, and goes on only after an ImportError.
    """
    import torch

    if importlib.util.find_spec("transformer_engine") is None:
        return
    if torch.cuda.is_available() and _transformer_engine()[1] is None:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    # None in the place of a module makes every import of it an ImportError.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


@functools.cache
def _transformer_engine() -> tuple[str | None, str | None]:
    """Its version, None where it is not installed; and why it cannot be imported, None if it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, None
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    # The package itself imports where only its extension for torch is broken.
    return version, _import("transformer_engine.pytorch")[1]


def _engine_flash() -> frozenset[int]:
    """Major versions of flash-attn that Transformer Engine has found and takes."""
    utils, _ = _import("transformer_engine.pytorch.attention.dot_product_attention.utils")
    known = getattr(utils, "FlashAttentionUtils", None)
    found = {2: getattr(known, "is_installed", False), 3: getattr(known, "v3_is_installed", False)}
    return frozenset(major for major, is_there in found.items() if is_there)


def _flash_attn() -> str | None:
    module, _ = _import("flash_attn") if importlib.util.find_spec("flash_attn") is not None else (None, None)
    return getattr(module, "__version__", None)


def _varlen_options() -> frozenset[str]:
    module, _ = _import("torch.nn.attention.varlen")
    return frozenset() if module is None else frozenset(inspect.signature(module.varlen_attn).parameters)


def _import(name: str) -> tuple[ModuleType | None, str | None]:
    """A module, or the first line of why it cannot be imported: a broken install raises any exception."""
    try:
        return importlib.import_module(name), None
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else value


if __name__ == "__main__":
    print(to_json(of_this_process()))
