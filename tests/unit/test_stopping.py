"""Signals: what is saved before a run ends, and that nothing interrupts its clean-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from slime_opd.stopping import decide

NEVER = {"grace_s": 60.0, "saves": True, "unsaved": True}


@pytest.mark.parametrize(
    ("verb", "changed", "save", "message"),
    [
        ("generate", {}, True, "saving a checkpoint before ending, within --exit-grace-s 60"),
        ("evaluate", {"last_save_s": 59.0}, True, "saving a checkpoint"),
        ("between", {}, True, "saving a checkpoint"),
        ("generate", {"last_save_s": 61.0}, False, "it needs 0 s more for the running step and 61 s for a save"),
        ("generate", {"unsaved": False}, False, "nothing is unsaved"),
        ("generate", {"saves": False}, False, "the run has no --save"),
        ("generate", {"grace_s": 0.0}, False, "--exit-grace-s is 0"),
        ("start", {}, False, "nothing was trained yet"),
        # An optimizer step: finished where what is left of it fits.
        ("train", {"elapsed_s": 10.0, "last_train_s": 30.0, "last_save_s": 40.0}, True, "finishing the running step, then"),
        ("train", {"elapsed_s": 10.0, "last_train_s": 31.0, "last_save_s": 40.0}, False, "21 s more for the running step and 40 s"),
        ("train", {"unsaved": False}, True, "finishing the running step"),  # of unknown length: the deadline bounds it
        ("train", {"saves": False}, False, "the run has no --save"),
        ("save", {"unsaved": True, "last_save_s": 100.0}, True, "when the running save is done"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_saved_first_where_it_fits_into_the_grace(verb, changed, save, message):
    decision = decide(verb, **{**NEVER, **changed})
    assert decision.save is save
    assert message in decision.message


# A run in small: verbs that take a while, a save, and a clean-up. It prints what it does; the test sends signals in
# between.
PROGRAM = """
import sys, time
from slime_opd.stopping import Stopping, during

def say(text):
    print(text, flush=True)

class Run:
    def __init__(self, stopping):
        self.stopping = stopping
        self.paused = set()
    def __enter__(self):
        say("starting")
        self.pause("start")
        return self
    def __exit__(self, kind, *_):
        try:
            if self.stopping.save_first and self.stopping.unsaved:
                self.save()
        finally:
            self.stopping.begin_cleanup()
            say("clean-up")
            self.pause("clean-up")
            say("clean")
    def pause(self, verb):
        if verb in sys.argv and verb not in self.paused:
            self.paused.add(verb)
            say("waiting")
            sys.stdin.readline()
    @during("generate")
    def generate(self):
        say("generate")
        self.pause("generate")
    @during("train")
    def train(self):
        say("train")
        self.pause("train")
    @during("save")
    def save(self):
        say("save")
        self.pause("save")
        say("saved")

grace = float(sys.argv[1])
with Stopping(grace_s=grace, saves=True) as stopping, Run(stopping) as run:
    for step in range(3):
        run.generate()
        run.train()
        say("logged")
"""


class Scripted:
    """The program above, told to wait in one verb."""

    def __init__(self, *verbs: str, grace_s: float = 60.0) -> None:
        command = [sys.executable, "-u", "-c", PROGRAM, str(grace_s), *verbs]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def until(self, line: str) -> list[str]:
        lines = []
        while not lines or lines[-1] != line:
            text = self.process.stdout.readline()
            assert text, (lines, self.process.stderr.read())
            lines.append(text.strip())
        return lines

    def answered(self) -> str:
        """The sentence that answers a signal."""
        while not (line := self.process.stderr.readline()).strip():
            assert line, "the program ended without a sentence"
        return line

    def end(self, go_on: bool = False) -> tuple[int, list[str], str]:
        """Exit code, what was printed since the last look, and the errors; `go_on` ends the wait."""
        process = self.process
        if go_on:
            process.stdin.write("\n")
            process.stdin.flush()
        # Not `communicate`, which loses what `readline` has read ahead.
        watchdog = threading.Timer(30, process.kill)
        watchdog.start()
        out, err = process.stdout.read(), process.stderr.read()
        process.wait()
        watchdog.cancel()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
        return process.returncode, out.split(), err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_a_signal_during_start_up_ends_through_every_finally(number, code):
    run = Scripted("start")
    run.until("waiting")
    run.process.send_signal(number)
    returned, lines, error = run.end()
    # Start-up raised before `with` held the run; its own ExitStack is what cleans up there.
    assert (returned, lines) == (code, [])
    assert "nothing was trained yet" in error and "Traceback" not in error


def test_a_signal_while_generating_saves_the_steps_that_are_done():
    run = Scripted("generate")
    run.until("waiting")
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[:2] == (143, ["clean-up", "clean"])  # step 1 was not trained yet: nothing to save
    run = Scripted("train")
    run.until("waiting")
    run.process.send_signal(signal.SIGTERM)
    assert "finishing the running step, then saving" in run.answered()
    assert run.end(go_on=True)[:2] == (143, ["logged", "save", "saved", "clean-up", "clean"])


def test_without_a_grace_period_the_run_ends_at_once_without_a_save():
    run = Scripted("train", grace_s=0)
    run.until("waiting")
    run.process.send_signal(signal.SIGTERM)
    code, lines, error = run.end()
    assert (code, lines) == (143, ["clean-up", "clean"])
    assert "SIGTERM: ending without a checkpoint: --exit-grace-s is 0" in error


def test_the_grace_period_is_a_deadline_in_any_case():
    run = Scripted("train", grace_s=0.3)
    run.until("waiting")
    run.process.send_signal(signal.SIGTERM)
    code, lines, error = run.end()
    assert (code, lines) == (143, ["clean-up", "clean"])
    assert "--exit-grace-s 0.3 is over" in error


def test_a_second_signal_has_no_effect_and_a_second_interrupt_cancels_the_save():
    run = Scripted("train")
    run.until("waiting")
    run.process.send_signal(signal.SIGTERM)
    run.answered()
    for number in (signal.SIGTERM, signal.SIGHUP):
        run.process.send_signal(number)
    assert run.end(go_on=True)[:2] == (143, ["logged", "save", "saved", "clean-up", "clean"])
    run = Scripted("train")
    run.until("waiting")
    run.process.send_signal(signal.SIGINT)
    run.answered()
    run.process.send_signal(signal.SIGINT)
    code, lines, error = run.end()
    assert (code, lines) == (130, ["clean-up", "clean"])
    assert "interrupted again" in error


def test_signals_do_not_interrupt_the_clean_up():
    run = Scripted("clean-up", "generate")
    run.until("waiting")
    run.process.stdin.write("\n")
    run.process.stdin.flush()
    run.until("waiting")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        run.process.send_signal(number)
    assert run.end(go_on=True)[:2] == (0, ["clean"])


APART = """
import os, signal, subprocess, sys, threading, time
from slime_opd.stopping import keep_handlers_while_starting_ray
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
# A thread more, as a run has: a signal may be delivered to any of them.
threading.Thread(target=lambda: time.sleep(30), daemon=True).start()
with keep_handlers_while_starting_ray():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(15))  # as ray.init does
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    command = [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"]
    subprocess.run(command, preexec_fn=lambda: None)
    if sys.argv[1] == "inside":
        os.kill(os.getpid(), signal.SIGTERM)
    import ctypes
    # As Ray's native code does: the handler of the process, which Python knows nothing of.
    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(0))
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("when", ["inside", "after"])
def test_starting_ray_keeps_the_handlers_and_gives_its_daemons_their_own_sessions(when):
    run = subprocess.run([sys.executable, "-u", "-c", APART, when], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (143, "True\n"), run.stderr


def test_a_closed_terminal_does_not_make_printing_an_error():
    program = (
        "import os, pty, signal, sys, time\n"
        "from slime_opd.stopping import Stopping\n"
        "reading, writing = os.openpty()\n"
        "os.dup2(writing, 1)\n"
        "os.close(writing)\n"
        "stopping = Stopping(grace_s=60, saves=True)\n"
        "stopping.install()\n"
        "stopping.unsaved, stopping._verb = True, 'between'\n"
        "os.close(reading)\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('to nobody', flush=True)\n"
        "sys.exit(7)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 7, run.stderr
    assert os.strerror(5) not in run.stderr
