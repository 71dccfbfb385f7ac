"""Signal handling of a run: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) end it with exit code 128 + signal.

The run ends through every `finally`. A run with --save first saves the finished steps, if that fits into
`--exit-grace-s`. Generation and evaluation are interrupted at once, since the trainer then has the weights of a
finished step. A training step is finished first, if its remaining time and a save fit, by the durations of the last
step and the last save; else the run ends at once and reports what is not saved. The grace period is a deadline in any
case. A second Ctrl-C cancels the save. Clean-up is not interrupted; if it hangs, the process is ended by force.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

# Verbs during which the trainer has the weights of a finished step, so that a signal may interrupt them.
INTERRUPTIBLE = ("start", "generate", "evaluate")

# Seconds for clean-up after a signal; then the process ends by force, and its warden ends what is left.
CLEANUP_LIMIT_S = 45.0


@dataclass(frozen=True)
class Decision:
    """The reaction to a signal: whether to save a checkpoint first, and the message to print."""

    save: bool
    message: str


def decide(
    verb: str,
    *,
    grace_s: float,
    saves: bool,
    unsaved: bool,
    elapsed_s: float = 0.0,
    last_train_s: float | None = None,
    last_save_s: float | None = None,
) -> Decision:
    """Whether a run that received a signal saves a checkpoint first.

    `verb`: the current verb; `elapsed_s`: its seconds so far. `saves`: the run has `--save`. `unsaved`: finished steps
    are not in a checkpoint. A duration of None is not known yet and counts as 0; the grace period bounds it anyway.
    """
    if verb == "start":
        return Decision(False, "ending: nothing was trained yet")
    if verb != "train" and verb != "save" and not unsaved:
        return Decision(False, "ending: nothing is unsaved")
    if not saves:
        return Decision(False, "ending without a checkpoint: the run has no --save")
    if grace_s == 0:
        return Decision(False, "ending without a checkpoint: --exit-grace-s is 0")
    if verb == "save":
        return Decision(True, f"ending when the running save is done, within --exit-grace-s {grace_s:g}")
    rest_s = max((last_train_s or 0.0) - elapsed_s, 0.0) if verb == "train" else 0.0
    needed = rest_s + (last_save_s or 0.0)
    if needed > grace_s:
        durations = f"{rest_s:.0f} s more for the running step and {last_save_s or 0:.0f} s for a save"
        return Decision(False, f"ending without a checkpoint: it needs {durations}, --exit-grace-s is {grace_s:g}")
    first = "finishing the running step, then " if verb == "train" else ""
    return Decision(True, f"{first}saving a checkpoint before ending, within --exit-grace-s {grace_s:g}")


class Stopping:
    """Signal handlers of a run, from `install` to the end of its process. Used from the main thread.

    As a context manager it sets the exit code 128 + signal, whatever exception arrives: Ray replaces a SystemExit that
    is raised while it waits by its own.
    """

    def __init__(self, *, grace_s: float, saves: bool) -> None:
        self._grace_s, self._saves = grace_s, saves
        self._verb, self._since = "start", time.monotonic()
        self._seconds: dict[str, float] = {}
        self._ending = False
        self.unsaved = False  # finished steps are not in a checkpoint
        self.signal: int | None = None  # the first signal received
        self.save_first = False  # the run has to save before it ends

    def install(self) -> None:
        """Install the signal handlers."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_deadline)

    @contextlib.contextmanager
    def during(self, verb: str) -> Iterator[None]:
        """Context of a verb. A pending signal interrupts the run at the start of an interruptible verb."""
        self._verb, self._since = verb, time.monotonic()
        if self.signal is not None and verb in INTERRUPTIBLE:
            self._interrupt()
        yield
        self._seconds[verb] = time.monotonic() - self._since
        if verb in ("train", "save"):
            self.unsaved = verb == "train"
        self._verb = "between"

    def begin_cleanup(self) -> None:
        """Ignore further signals. If there has been one, or one arrives, a clean-up that hangs is ended by force."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._ending = True
        if self.signal is not None:
            self._force_end_after(CLEANUP_LIMIT_S)

    def __enter__(self) -> Stopping:
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ending = True
        if self.signal is not None and kind is not None and not issubclass(kind, Exception):
            raise SystemExit(128 + self.signal) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _drop_terminal()
        if self._ending:
            if self.signal is None:
                self.signal = number
                self._force_end_after(CLEANUP_LIMIT_S)
            return
        if self.signal is not None:
            if number == signal.SIGINT and self.save_first:
                self._give_up("ending without a checkpoint: interrupted again")
            return
        self.signal = number
        decision = decide(
            self._verb,
            grace_s=self._grace_s,
            saves=self._saves,
            unsaved=self.unsaved,
            elapsed_s=time.monotonic() - self._since,
            last_train_s=self._seconds.get("train"),
            last_save_s=self._seconds.get("save"),
        )
        self.save_first = decision.save
        _write(f"{signal.Signals(number).name}: {decision.message}")
        if decision.save:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        if not decision.save or self._verb in INTERRUPTIBLE:
            self._interrupt()

    def _on_deadline(self, number: int, frame: FrameType | None) -> None:
        if not self._ending:
            self._give_up(f"ending without a checkpoint: --exit-grace-s {self._grace_s:g} is over")

    def _give_up(self, message: str) -> None:
        self.save_first = False
        _write(message)
        self._ending = True
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def _interrupt(self) -> None:
        self._ending = not self.save_first
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def _force_end_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, lambda: os._exit(128 + (self.signal or signal.SIGTERM)))
        timer.daemon = True
        timer.start()


def during(verb: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that runs a method as a verb of `self.stopping`, a Stopping."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def decorated(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.stopping.during(verb):
                return method(self, *args, **kwargs)

        return decorated

    return decorate


@contextlib.contextmanager
def keep_handlers_while_starting_ray() -> Iterator[None]:
    """Context for starting Ray: this process keeps its signal handlers, and forked processes get their own sessions.

    `ray.init` installs handlers in Python, which are ignored here, and in native code, which are replaced at the end of
    the context. In between, while Ray connects, SIGTERM ends the process through Ray's handler, and the warden cleans
    up. The sessions keep Ctrl-C and signals to the process group from Ray's daemons. This works for processes started
    by `os.fork`, or by `subprocess` with a `preexec_fn` as in Ray: only these run Python's fork hooks.
    """
    active = True

    def in_child() -> None:
        if active:
            os.setsid()

    def keep(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else set_handler(number, handler)

    os.register_at_fork(after_in_child=in_child)
    set_handler = signal.signal
    signal.signal = keep  # type: ignore[assignment]  # a replacement for as long as Ray starts
    try:
        yield
    finally:
        active = False
        signal.signal = set_handler
        for number in SIGNALS:
            signal.signal(number, signal.getsignal(number))


def _write(message: str) -> None:
    # Not print, which is not reentrant: the signal may have interrupted a print.
    with contextlib.suppress(OSError):
        os.write(2, f"\nslime_opd: {message}\n".encode())


def _drop_terminal() -> None:
    """Redirect output from a closed terminal to /dev/null: a write error would end the save."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)
