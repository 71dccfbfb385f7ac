"""SGLang's server on a machine without CUDA: `python -m slime_opd.engine.cpu_launcher --model-path DIR --port PORT`.

It takes the options of `python -m sglang.launch_server` and runs that server on SGLang's CPU engine. SGLang imports
`sgl_kernel` (CUDA kernels) and `torchvision` (image processors), although a text model on a CPU calls neither. If they
cannot be imported, this module installs stubs for them.

SGLang spawns its scheduler and its detokenizer, so that each imports SGLang once more: two thirds of the CPU time of a
start. This launcher forks them instead: without CUDA, nothing that does not survive a fork (a CUDA context, a thread)
exists yet at that time.

Options that a CPU needs, or that are best for the small models that a CPU can serve, are defaults here; each can be
overridden on the command line. OMP_NUM_THREADS is 1 unless it is set in the environment: with more threads than idle
cores the threads busy-wait for each other, and a server beside a busy trainer becomes 20 times slower.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

_STUBBED_PACKAGES = ("sgl_kernel", "torchvision")
# SGLang has its own fallback if this import fails; a stub would disable it.
_NOT_STUBBED = ("sgl_kernel.scalar_type",)

DEFAULT_OPTIONS: dict[str, tuple[str, ...]] = {
    "--device": ("cpu",),
    "--attention-backend": ("torch_native",),
    "--sampling-backend": ("pytorch",),
    "--grammar-backend": ("none",),
    "--dtype": ("float32",),
    "--disable-cuda-graph": (),
    # SGLang's default is half of the memory for its key-value cache, all of it touched at the start.
    "--max-total-tokens": ("32768",),
    # Without it the scheduler keeps one core busy when there are no requests.
    "--sleep-on-idle": (),
    # Overlapping the scheduler with the model helps only if the model runs on a GPU.
    "--disable-overlap-schedule": (),
    "--log-level-http": ("warning",),
}


class _Stub:
    """Stub of a function or class of a package that is not installed; calling it raises NotImplementedError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(f"{self._name}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(
            f"{self._name} does not run on a CPU: SGLang called it, so this model or option needs a GPU"
        )


class _StubModule(types.ModuleType):
    """A module whose every attribute is a `_Stub`."""

    def __getattr__(self, name: str) -> _Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(f"{self.__name__}.{name}")


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that returns `_StubModule`s for `packages` and all their submodules."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = frozenset(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _NOT_STUBBED or fullname.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to execute: a stub has no code."""


def prepare_process() -> None:
    """Make SGLang importable in this process, for its CPU engine. Call it before SGLang is imported."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.meta_path.insert(0, _StubFinder([name for name in _STUBBED_PACKAGES if not _can_import(name)]))

    import torch

    # With torch's default strategy the engine cannot open tensors of an unrelated process.
    torch.multiprocessing.set_sharing_strategy("file_system")


def fork_workers() -> None:
    """Make SGLang's server fork its scheduler and detokenizer.

    Not with --dp-size above 1, whose controller starts the schedulers from threads.
    """
    from sglang.srt.entrypoints import engine

    configure = engine._set_envs_and_config

    def configure_with_fork(server_args: Any) -> None:
        configure(server_args)  # sets "spawn"
        if server_args.dp_size > 1:
            return
        multiprocessing.set_start_method("fork", force=True)

    engine._set_envs_and_config = configure_with_fork


def with_default_options(argv: Sequence[str]) -> list[str]:
    """`argv` of SGLang's server, plus the `DEFAULT_OPTIONS` that are not in it."""
    options = {argument.partition("=")[0] for argument in argv}
    completed = list(argv)
    for option, values in DEFAULT_OPTIONS.items():
        if option not in options:
            completed += [option, *values]
    return completed


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a CUDA build without its libraries
        return False
    return True


def main(argv: Sequence[str]) -> None:
    """Run the server until a signal ends it."""
    import torch

    if torch.cuda.is_available():
        sys.exit("cpu_launcher: this machine has CUDA; start the server with `python -m sglang.launch_server` instead")

    if "--enable-torch-compile" not in argv:
        # SGLang compiles single functions whatever its options; on a CPU the C++ compiler takes longer than they ever
        # would.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    fork_workers()
    try:
        run_server(prepare_server_args(with_default_options(argv)))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    prepare_process()
    main(sys.argv[1:])
