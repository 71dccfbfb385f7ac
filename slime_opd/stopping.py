"""How a run answers SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal): by way of every `finally`, with 128 + the signal.

Where a run saves checkpoints, it saves the steps that are done first, if that fits into
`--exit-grace-s`. The weights are those of a whole step while the student generates or is evaluated: there the signal
interrupts. A step that trains is finished when its remaining time and a save fit, by what the last ones
took; otherwise the run ends at once and says what is not saved. The grace is a deadline whatever was estimated.
A second Ctrl-C gives up the save. Cleaning up is not interrupted, and ends by force when it hangs.
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

# Verbs during which the trainer holds the weights of a whole step, so that a signal may interrupt them.
INTERRUPTIBLE = ("start", "generate", "evaluate")

# Seconds for stopping what the run started; then the process ends, and its warden ends what is left.
CLEANUP_LIMIT_S = 45.0


@dataclass(frozen=True)
class Decision:
    """What to do about a signal: whether to save (and wait for that), and the sentence that says so."""

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
    """Whether a run that was told to end saves a checkpoint first.

    `verb`: what runs now; `elapsed_s`: for how many seconds. `saves`: the run has `--save`.
    `unsaved`: steps are done that no checkpoint holds. A duration of None is not known yet and counts as 0: the grace still bounds it.
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
        what = f"{rest_s:.0f} s more for the running step and {last_save_s or 0:.0f} s for a save"
        return Decision(False, f"ending without a checkpoint: it needs {what}, --exit-grace-s is {grace_s:g}")
    first = "finishing the running step, then " if verb == "train" else ""
    return Decision(True, f"{first}saving a checkpoint before ending, within --exit-grace-s {grace_s:g}")


class Stopping:
    """The signals of a run, from `install` to the end of its process. Used from the main thread.

    As a context manager it gives the process the exit code 128 + signal, whatever exception the interruption became on
    its way: Ray turns any SystemExit that is raised while it waits into one of its own.
    """

    def __init__(self, *, grace_s: float, saves: bool) -> None:
        self._grace_s, self._saves = grace_s, saves
        self._verb, self._since = "start", time.monotonic()
        self._seconds: dict[str, float] = {}
        self._ending = False
        self.unsaved = False  # steps are done that no checkpoint holds
        self.signal: int | None = None  # the first that came
        self.save_first = False  # the run is to save before it ends

    def install(self) -> None:
        """Take the signals over."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_deadline)

    @contextlib.contextmanager
    def during(self, verb: str) -> Iterator[None]:
        """Say what the run does: a signal that waits for a safe point interrupts here, at the start of such a verb."""
        self._verb, self._since = verb, time.monotonic()
        if self.signal is not None and verb in INTERRUPTIBLE:
            self._interrupt()
        yield
        self._seconds[verb] = time.monotonic() - self._since
        if verb in ("train", "save"):
            self.unsaved = verb == "train"
        self._verb = "between"

    def begin_cleanup(self) -> None:
        """From here on signals interrupt nothing; a clean-up that was begun by one, or meets one, ends by force when it hangs."""
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
    """Decorates a method of an object that has its Stopping in `stopping`: the method is that verb."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def decorated(self: Any, *arguments: Any, **options: Any) -> Any:
            with self.stopping.during(verb):
                return method(self, *arguments, **options)

        return decorated

    return decorate


@contextlib.contextmanager
def daemons_apart() -> Iterator[None]:
    """For starting Ray: this process keeps its signal handlers, and what is forked gets a session of its own.

    `ray.init` sets handlers of its own, in Python, which are ignored here, and in native code, which are
    replaced when this ends: in the moment between, while Ray connects, SIGTERM ends the process by Ray's way and its
    warden does the rest. The sessions keep Ctrl-C and signals to the process group from the daemons; for that they have to be
    started by `os.fork` or by `subprocess` with a `preexec_fn`, as Ray does: only those run Python's hooks for forks.
    """
    active = True

    def in_child() -> None:
        if active:
            os.setsid()

    def keep(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else set_handler(number, handler)

    os.register_at_fork(after_in_child=in_child)
    set_handler, signal.signal = signal.signal, keep
    try:
        yield
    finally:
        active = False
        signal.signal = set_handler
        for number in SIGNALS:
            signal.signal(number, signal.getsignal(number))


def _write(message: str) -> None:
    # Not print: a signal may come in the middle of one.
    with contextlib.suppress(OSError):
        os.write(2, f"\nslime_opd: {message}\n".encode())


def _drop_terminal() -> None:
    """After the terminal has closed, writing to it is an error that would end the save."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)
