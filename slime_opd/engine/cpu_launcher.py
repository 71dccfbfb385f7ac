"""SGLang's server on a machine without CUDA: `python -m slime_opd.engine.cpu_launcher --model-path DIR --port PORT`.

It takes the options of `python -m sglang.launch_server` and runs that server on SGLang's
CPU engine. Two things stand between SGLang and a CPU, both at import time: it imports
`sgl_kernel` (CUDA kernels) and `torchvision` (image processors) although a text model on a CPU
calls neither. Where they cannot be imported, this module puts stand-ins in their place.
SGLang spawns its scheduler and detokenizer, and a spawned child imports the main module of
its parent first, as `__mp_main__`: so the stand-ins are there too.

Options that a CPU needs, or that are best for the small models a CPU can serve, are
defaults here; each can be overridden on the command line. So can OMP_NUM_THREADS, which is 1
here unless the environment says otherwise: with more threads than idle cores they wait for each other
spinning, and a server beside a busy trainer becomes 20 times slower.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence

_STOOD_IN = ("sgl_kernel", "torchvision")
# SGLang has a fallback of its own where this one is missing; a stand-in would be taken for the real one.
_LEFT_MISSING = ("sgl_kernel.scalar_type",)

DEFAULT_OPTIONS: dict[str, tuple[str, ...]] = {
    "--device": ("cpu",),
    "--attention-backend": ("torch_native",),
    "--sampling-backend": ("pytorch",),
    "--grammar-backend": ("none",),
    "--dtype": ("float32",),
    "--disable-cuda-graph": (),
    # SGLang would take half of the memory for its key-value cache, and touch all of it at the start.
    "--max-total-tokens": ("32768",),
    # Its scheduler otherwise keeps one core busy while there is nothing to do.
    "--sleep-on-idle": (),
    # Overlapping the scheduler with the model is for a model that runs elsewhere, on a GPU.
    "--disable-overlap-schedule": (),
    "--log-level-http": ("warning",),
}


class _Absent:
    """Stands for a function or class of a package that is not installed; calling it raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(
            f"{self._name} does not run on a CPU: SGLang called it, so this model or option needs a GPU"
        )


class _AbsentModule(types.ModuleType):
    """A module whose every attribute is an `_Absent`."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of `packages`, and everything below them, as `_AbsentModule`s."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = frozenset(packages)

    def find_spec(self, fullname, path=None, target=None):
        if fullname in _LEFT_MISSING or fullname.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _AbsentModule(spec.name)

    def exec_module(self, module) -> None:
        pass


def prepare_process() -> None:
    """Make SGLang importable in this process, for its CPU engine.

    Must run before anything of SGLang is imported.
    """
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    absent = [name for name in _STOOD_IN if not _imports(name)]
    sys.meta_path.insert(0, _StandIns(absent))

    import torch

    # With torch's default strategy the engine cannot open tensors of a process that is not its ancestor.
    torch.multiprocessing.set_sharing_strategy("file_system")


def with_default_options(arguments: Sequence[str]) -> list[str]:
    """`arguments` of SGLang's server, completed with those of `DEFAULT_OPTIONS` that they do not name."""
    named = {argument.partition("=")[0] for argument in arguments}
    completed = list(arguments)
    for option, words in DEFAULT_OPTIONS.items():
        if option not in named:
            completed += [option, *words]
    return completed


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a CUDA build whose libraries are not on this machine
        return False
    return True


def main(arguments: Sequence[str]) -> None:
    """Serve until told to stop."""
    import torch

    if torch.cuda.is_available():
        sys.exit("cpu_launcher: this machine has CUDA; start the server with `python -m sglang.launch_server` instead")

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(with_default_options(arguments)))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ in ("__main__", "__mp_main__"):
    prepare_process()
if __name__ == "__main__":
    main(sys.argv[1:])
