"""One run per directory: the lock is held while its process lives, and free when it has ended, however it ended."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from slime_opd.checkpoint.lock import LOCK, RunLock
from slime_opd.errors import ConfigError

HOLDER = """
import os, subprocess, sys
from slime_opd.checkpoint.lock import RunLock
with RunLock(sys.argv[1]):
    started = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False)
    reader, writer = os.pipe()
    forked = os.fork()
    if forked == 0:
        os.write(writer, b".")
        os.close(1)
        os.execlp("sleep", "sleep", "60") if sys.argv[2] == "exec" else __import__("time").sleep(60)
    os.read(reader, 1)
    print(started.pid, forked, flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_with_the_first_ones_process_host_and_start(tmp_path):
    with RunLock(tmp_path / "new") as warning:
        assert warning is None
        with pytest.raises(ConfigError) as refusal, RunLock(tmp_path / "new"):
            pass
        sentence = str(refusal.value)
        assert sentence.startswith(f"--save {tmp_path / 'new'} is in use by another run (process {os.getpid()} on ")
        assert ", started 2" in sentence and sentence.endswith("wait until it has ended, or give another directory")
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), RunLock(tmp_path / "new"):
            pass
    with RunLock(tmp_path / "new"):
        pass


@pytest.mark.parametrize("fork", ["exec", "plain"])
def test_the_lock_ends_with_its_process_even_if_child_processes_live_on(tmp_path, fork):
    program = [sys.executable, "-c", HOLDER, str(tmp_path), fork]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        children = [int(word) for word in holder.stdout.readline().split()]
        try:
            with pytest.raises(ConfigError, match=f"process {holder.pid} on"), RunLock(tmp_path):
                pass
            holder.kill()
            holder.wait()
            for child in children:
                os.kill(child, 0)
            with RunLock(tmp_path) as warning:
                assert warning is None
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_the_lock_file_of_a_dead_run_locks_nothing(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on elsewhere, started long ago")
    with RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text() and "elsewhere" not in (tmp_path / LOCK).read_text()


def test_a_directory_that_cannot_be_made_or_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"--save .*file/x cannot be written \(Not a directory\)"),
        RunLock(tmp_path / "file" / "x"),
    ):
        pass
    with pytest.raises(ConfigError, match=r"--save /proc/x cannot be written"), RunLock("/proc/x"):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path) as warning:
        assert (
            "its file system has no locks (No locks available), so a second run in it would not be noticed" in warning
        )
