"""The device layer: the device that trains, and replacements of CUDA functions that let Megatron-core run on a CPU.

Megatron-core names CUDA in its code (`device="cuda"`, `Tensor.cuda()`, `torch.cuda.current_device()`, the string
"torch.cuda.FloatTensor"). On a machine without CUDA `install()` gives these a CPU meaning, once per process and before
Megatron builds anything. Where CUDA is available it does nothing.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def has_cuda() -> bool:
    """Whether this process trains on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of this machine."""
    return "nccl" if has_cuda() else "gloo"


def synchronize() -> None:
    """Wait for the device, so that a timer measures the work and not its submission."""
    if has_cuda():
        torch.cuda.synchronize()


def choose_deterministic_kernels() -> None:
    """Keep torch, cuBLAS and Transformer Engine from kernels whose results differ from run to run.

    Call it before layers are built. torch warns where it has no deterministic kernel. Megatron refuses
    --deterministic-mode unless Transformer Engine's variable is 0.
    """
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def install() -> None:
    """Give Megatron-core's CUDA calls a CPU meaning; a second call does nothing."""
    if has_cuda() or _CPUMode.installed:
        return
    _replace_cuda_functions()
    # Entered and never left: it must last as long as the process.
    _CPUMode().__enter__()
    _CPUMode.installed = True


class _CPUMode(TorchFunctionMode):
    """Replaces CUDA by the CPU in the arguments of torch calls."""

    installed = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer and gradient clipping compare this string with "torch.cuda.…Tensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        if any(_names_cuda(argument) for argument in args):
            args = tuple(torch.device("cpu") if _names_cuda(argument) else argument for argument in args)
        return func(*args, **kwargs)


class _Stream:
    """A stream or event on a CPU, where everything runs in order: all its methods do nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        # wait_stream, wait_event, record_event (which returns an event), record, synchronize.
        return lambda *args, **kwargs: _Stream()


def _names_cuda(value: object) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _replace(module: Any, name: str, value: Any) -> None:
    """Replace a function of Megatron. Raises AttributeError if it does not exist."""
    getattr(module, name)
    setattr(module, name, value)


def _replace_cuda_functions() -> None:
    from megatron.core.tensor_parallel import random as parallel_random
    from megatron.core.transformer.moe import token_dispatcher

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    # The MoE token dispatcher overlaps copies and shared experts on streams.
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: nullcontext()
    # Megatron converts a tensor to the numbers that all-to-all needs only while it moves it to the CPU.
    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", _to_numpy)
    cuda.empty_cache = lambda: None
    cuda.manual_seed = torch.random.default_generator.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module_class: Any = torch.nn.Module
    module_class.cuda = lambda self, device=None: self
    _replace(
        parallel_random,
        "_get_cuda_rng_state",
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
    )
    _replace(
        parallel_random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    )
