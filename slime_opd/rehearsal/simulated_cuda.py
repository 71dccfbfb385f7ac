"""Simulates a CUDA device in torch's CPU build: native hooks, and the functions of `torch.cuda` that training calls.

    simulated_cuda.load()          # before torch is imported
    import torch
    simulated_cuda.install()

Nothing runs on the device: it is only for tensors of FakeTensorMode.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slime_opd.errors import RehearsalError

_SOURCE = Path(__file__).with_suffix(".cpp")

# Simulated parts of the device, which every report lists.
SIMULATED = (
    "torch.cuda's devices, streams, events and memory: they exist, but do nothing",
    "CUDA's random states: a CPU generator's",
    "pinned host memory: counted as host memory",
    "Module.to(device): weights are created on the device, and it is checked that nothing has to be moved",
)


def load() -> None:
    """Compile the hooks (two seconds) and load them into this process, which must not have imported torch yet.

    It cannot be undone.

    Raises RehearsalError where torch is imported already or is a CUDA build, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise RehearsalError(
            "the CUDA device must be simulated before torch is imported: start the rehearsal in its own process"
        )
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RehearsalError("the rehearsal needs torch, which is not installed: see tools/setup_cpu.sh")
    torch_directory = Path(spec.origin).parent
    if (torch_directory / "lib" / "libtorch_cuda.so").exists():
        raise RehearsalError(
            f"the torch in {torch_directory} is a CUDA build, which the rehearsal cannot use: rehearse in an environment with torch's CPU build (tools/setup_cpu.sh makes one)"
        )
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "simulated_cuda.so"
        _compile(torch_directory, library)
        for path in (torch_directory / "lib" / "libc10.so", torch_directory / "lib" / "libtorch_cpu.so", library):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _compile(torch_directory: Path, library: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RehearsalError(
            f"the rehearsal compiles 60 lines of C++, but there is no {compiler} on PATH: install g++ (Debian: apt-get install g++), or set CXX to a C++20 compiler"
        )
    include = torch_directory / "include"
    command = [
        *(compiler, "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{include}"),
        *(f"-I{include}/torch/csrc/api/include", str(_SOURCE), f"-L{torch_directory}/lib", "-lc10", "-ltorch_cpu"),
        *("-o", str(library)),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if "error" in line] or finished.stderr.splitlines()
        raise RehearsalError(
            f"{compiler} could not compile {_SOURCE} against torch's headers: {lines[0].strip() if lines else 'no error message'}; GCC 11 or newer is needed"
        )


class _Stream:
    """A stream or event whose methods do nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: _Stream()


def install(total_memory: int = 80 * 10**9) -> None:
    """Give `torch.cuda` one device of compute capability 9.0 with `total_memory` bytes."""
    import torch

    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name="simulated CUDA", major=9, minor=0, total_memory=total_memory, multi_processor_count=132
    )
    generator = torch.Generator()
    # torch's optimizers use their foreach kernels only for listed parameter types.
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.optim.optimizer import _foreach_supported_types

    _foreach_supported_types.append(FakeTensor)
    module_class: Any = torch.nn.Module
    module_class._apply = _apply
    _register_fused_norm(torch)
    cuda._lazy_init = cuda.init = lambda: None
    cuda._lazy_call = lambda call, **options: call()
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.set_device = cuda.empty_cache = lambda *args: None
    cuda.get_device_name = lambda device=None: properties.name
    cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    cuda.get_device_properties = lambda device=None: properties
    cuda.mem_get_info = lambda device=None: (total_memory, total_memory)
    cuda.memory_allocated = cuda.memory_reserved = cuda.max_memory_allocated = lambda device=None: 0
    cuda.default_generators = (generator,)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: generator.manual_seed(int(seed))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: generator.set_state(state)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: nullcontext()


def _register_fused_norm(torch: Any) -> None:
    """Make RMSNorm one kernel that saves its input, as in CUDA builds; a CPU build would save float32 copies.

    The kernel is never called: FakeTensorMode replaces it.
    """
    global _library
    _library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
        _library.impl(name, lambda *args: NotImplemented, "CUDA")


# Registrations last only as long as this object.
_library: Any = None


def _apply(module: Any, convert: Any, recurse: bool = True) -> Any:
    """`torch.nn.Module._apply` for fake parameters. Raises RehearsalError where one would have to be replaced."""
    for child in module.children() if recurse else ():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None and convert(parameter) is not parameter:
            raise RehearsalError(
                f"{type(module).__name__}.{name} is {parameter.dtype} on {parameter.device} and would be moved: create it there"
            )
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else convert(buffer)
    return module
