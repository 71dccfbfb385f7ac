"""Error messages for what Ray raises when a process of the run fails: which process, the cause, and what to do."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from slime_opd.errors import ConfigError, ProcessDied, SlimeOPDError

_GIB = 1024**3
_VMSTAT = Path("/proc/vmstat")

# Messages of collectives that fail because another rank has died.
_LOST_CONNECTION = re.compile(
    r"connection closed by peer|connection reset by peer|broken pipe|ncclRemoteError|NCCL communicator was aborted|"
    r"Timed out waiting \d+ms for (?:recv|send) operation|Socket Timeout|DistNetworkError",
    re.IGNORECASE,
)
_GPU_MEMORY = re.compile(r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory")
_HOST_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory")
_RAY_KILLED_FOR_MEMORY = re.compile(r"running low on memory|memory monitor|memory pressure", re.IGNORECASE)


@dataclass(frozen=True)
class Memory:
    """Memory of this machine in bytes, and the kernel's count of out-of-memory kills since boot."""

    available: int
    total: int
    kernel_kills: int | None

    @staticmethod
    def now() -> Memory:
        """The current state."""
        memory = psutil.virtual_memory()
        return Memory(memory.available, memory.total, _kernel_kills())

    def describe_since(self, before: Memory) -> str:
        """The free memory, and the out-of-memory kills since `before`, for an error message."""
        free = f"{self.available / _GIB:.1f} of {self.total / _GIB:.1f} GiB of memory are free on the driver's machine"
        if self.kernel_kills is None or before.kernel_kills is None or self.kernel_kills <= before.kernel_kills:
            return free
        kills = self.kernel_kills - before.kernel_kills
        processes = "1 process" if kills == 1 else f"{kills} processes"
        return f"the kernel's out-of-memory killer ended {processes} there since the run started; {free}"


def _kernel_kills() -> int | None:
    match = re.search(r"^oom_kill (\d+)$", _VMSTAT.read_text(), re.MULTILINE) if _VMSTAT.exists() else None
    return int(match[1]) if match else None


def root_cause(failures: Sequence[tuple[str, Exception]]) -> tuple[str, Exception]:
    """The failure (name, exception) that most likely caused the others."""
    return min(failures, key=lambda failure: _order(failure[1]))


def explains_others(error: Exception) -> bool:
    """Whether an error is a cause and not a consequence: a death, or an error of this package."""
    return _order(error) < 2


def _order(error: Exception) -> int:
    """Sort key, causes first: a death, an error of this package, any other error, a lost connection."""
    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError):
        return 0
    if isinstance(cause_of(error), SlimeOPDError):
        return 1
    return 3 if is_lost_connection(error) else 2


def cause_of(error: BaseException) -> BaseException:
    """The exception of the actor's code, if Ray has wrapped one; else the error itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def is_lost_connection(error: BaseException) -> bool:
    """Whether a rank failed only because it lost its connection to another rank."""
    return bool(_LOST_CONNECTION.search(str(cause_of(error))))


def describe(name: str, error: BaseException, memory: str) -> SlimeOPDError | None:
    """The error of this package for `error`, raised by a call to the process `name`; None for an unknown error (a bug).

    `memory`: the result of `Memory.describe_since`.
    """
    cause = cause_of(error)
    text = str(cause)
    if isinstance(cause, SlimeOPDError):
        return cause
    if type(cause).__name__ == "OutOfMemoryError" and not isinstance(cause, ray.exceptions.RayError):
        return _out_of_gpu_memory(name, text)
    if _GPU_MEMORY.search(text):
        return _out_of_gpu_memory(name, text)
    if isinstance(error, ray.exceptions.OutOfMemoryError) or (
        isinstance(error, ray.exceptions.RayError) and _RAY_KILLED_FOR_MEMORY.search(text)
    ):
        used = re.search(r"([\d.]+ ?GB) used / ([\d.]+ ?GB)", text)
        figures = f"{used[1]} of {used[2]} were in use there" if used else memory
        return ProcessDied(
            f"Ray's memory monitor killed {_with_process(name, text)} because its machine ran low on memory "
            f"({figures}): give it more memory, lower --max-tokens-per-gpu or --sglang-server-concurrency, "
            "or run fewer processes per node"
        )
    if isinstance(cause, MemoryError) or _HOST_MEMORY.search(text):
        return ProcessDied(f"{name} could not allocate memory ({first_sentence(text)}; {memory})")
    if isinstance(error, ray.exceptions.NodeDiedError):
        return ProcessDied(f"the machine of {name} has left the Ray cluster")
    if isinstance(error, ray.exceptions.RayActorError):
        return died(_with_process(name, text), memory)
    if isinstance(error, ray.exceptions.LocalRayletDiedError | ray.exceptions.OwnerDiedError):
        return ProcessDied(f"Ray's processes on the driver's machine died ({memory})")
    if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
        return ProcessDied(f"a part of Ray failed: {first_sentence(text)} ({memory})")
    if is_lost_connection(error):
        return ProcessDied(f"{name} lost its connection to another trainer rank: {first_sentence(text)}")
    return None


def died(name: str, memory: str) -> ProcessDied:
    """The error for a process that ended without raising one."""
    return ProcessDied(f"{name} died without an error of its own: it was killed by a signal, or crashed ({memory})")


def first_sentence(text: str) -> str:
    """The first line of a message that is not blank, up to its first full stop."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return line.partition(". ")[0][:300]


def exit_message(error: Exception, log: Path | None, activity: str | None) -> str:
    """The last line of a failed run: the error, the activity in which it happened, and the path of the traceback.

    `log`: the file for tracebacks; None for a run that had not started. The traceback of an unknown error is printed
    too. Raises ConfigError if that is the cause.
    """
    memory = Memory.now()
    known = describe("a process of the run", error, memory.describe_since(memory))
    if isinstance(known, ConfigError):
        raise known from None
    if known is None:
        traceback.print_exception(error, file=sys.stderr)
    what = f"{type(error).__name__}: {first_sentence(str(error))}" if known is None else str(known)
    message = f"slime_opd: error: {what}" + (f" (in: {activity})" if activity else "")
    # The traceback of an error of this package without a cause adds nothing to its message.
    has_details = known is not error or error.__cause__ is not None
    return message + (_write_traceback(error, log) if has_details and log is not None else "")


def _write_traceback(error: Exception, log: Path) -> str:
    """Append the traceback to `log`; returns its path, as the end of a sentence."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            traceback.print_exception(error, file=file)
    except OSError as refusal:
        return f"; its traceback could not be written: {refusal}"
    return f"; the traceback is in {log}"


def _out_of_gpu_memory(name: str, text: str) -> ProcessDied:
    return ProcessDied(
        f"{name} ran out of GPU memory ({first_sentence(text)}): lower --max-tokens-per-gpu or --log-probs-chunk-size, "
        "recompute activations (--recompute-granularity full), "
        "or shard the model over more GPUs (--tensor-model-parallel-size)"
    )


def _with_process(name: str, text: str) -> str:
    """The name, with the process id and the address from Ray's message."""
    known = [
        f"{title} {found[1]}"
        for title, pattern in (("process", r"^\s*pid: (\d+)"), ("on", r"^\s*ip: (\S+)"))
        if (found := re.search(pattern, text, re.MULTILINE))
    ]
    return f"{name} ({' '.join(known)})" if known else name
