"""What a process started is gone when the process is, however it ended; with small real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from slime_opd import lifetimes

SLEEP = "import time; time.sleep(600)"

# Starts one process of each kind that a run has, then waits to be killed. Arguments: what to do once they run.
OWNER = f"""
import multiprocessing, os, subprocess, sys, threading, time
from slime_opd import lifetimes

def wait():
    time.sleep(600)

if __name__ == "__main__":
    scope = lifetimes.own()
    lifetimes.leave_last_words("it had only begun")
    lifetimes.leave_last_words("the last checkpoint is\\niter_7")
    sleep = [sys.executable, "-S", "-c", {SLEEP!r}]
    subprocess.Popen(sleep, start_new_session=True)
    thread = threading.Thread(target=lambda: subprocess.Popen(sleep))
    thread.start()
    thread.join()
    # One whose parent has ended already.
    subprocess.run([sys.executable, "-S", "-c", "import subprocess; subprocess.Popen(%r)" % sleep])
    multiprocessing.get_context("fork").Process(target=wait, daemon=True).start()
    inner = lifetimes.scope_environment(scope + "/engine-0")
    subprocess.Popen(sleep, env={{**os.environ, **inner}})
    open("/dev/shm/torch_%d_0_0" % os.getpid(), "w").close()
    print(scope, flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.read()
    elif sys.argv[1] == "crash":
        os.abort()
    elif sys.argv[1] == "raise":
        raise ValueError("an error")
"""
STARTED = 6  # five processes, and the warden


# Leaves what SGLang's processes leave: semaphores whose resource tracker was killed, held by two processes, of which
# one has made a session of its own, and sockets and directories in the temporary directory.
LITTER = """
import multiprocessing, os, signal, socket, subprocess, sys, tempfile, time
from multiprocessing import resource_tracker

def wait(lock):
    os.setsid()
    print(lock._semlock.name, tempfile.gettempdir(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    lock, own = context.Lock(), context.Lock()
    context.Process(target=wait, args=(lock,)).start()
    os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
    path = tempfile.mktemp()
    socket.socket(socket.AF_UNIX).bind(path)
    # Of the semaphore that no other process has opened, /proc shows another name.
    print(path, own._semlock.name, "alone", flush=True)
    time.sleep(600)
"""
LITTERING_OWNER = """
import os, subprocess, sys
from slime_opd import lifetimes

if __name__ == "__main__":
    print(lifetimes.own(), os.environ["TMPDIR"], flush=True)
    subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from within another run: its scope is in the environment of everything, and must not hide the owner's.
        env={**os.environ, lifetimes.RUN_VARIABLE: "outer"},
    )


def wait_until(condition, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds


def shared_memory(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"torch_{pid}_*"))


def test_an_owner_killed_without_warning_leaves_no_process_and_no_shared_memory():
    owner = start(OWNER, "wait")
    scope = owner.stdout.readline().strip()
    assert len(lifetimes.processes_in_scope(scope)) == STARTED + 1
    assert len(lifetimes.processes_in_scope(f"{scope}/engine-0")) == 1
    assert lifetimes.scope_of_process(owner.pid) == scope and scope.startswith("outer/")
    assert shared_memory(owner.pid)
    owner.kill()
    assert wait_until(lambda: not lifetimes.processes_in_scope(scope)), lifetimes.processes_in_scope(scope)
    assert not shared_memory(owner.pid)
    _, message = owner.communicate(timeout=20)
    assert f"slime_opd: process {owner.pid} died; ended what it had started: " in message
    (error,) = (line for line in message.splitlines() if line.startswith("slime_opd: error: "))
    assert f"process {owner.pid} died" in error and error.endswith("; the last checkpoint is iter_7")


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 1), ("crash", -signal.SIGABRT)])
def test_every_other_end_leaves_nothing_either(how, code):
    owner = start(OWNER, how)
    scope = owner.stdout.readline().strip()
    assert wait_until(lambda: not lifetimes.processes_in_scope(scope)), lifetimes.processes_in_scope(scope)
    _, message = owner.communicate(timeout=20)
    assert owner.returncode == code
    # An end by itself is no news; only a death is reported.
    assert ("died" in message) is (how == "crash")


def test_signals_to_the_owners_group_do_not_end_its_warden():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    scope = owner.stdout.readline().decode().strip()
    os.killpg(owner.pid, signal.SIGKILL)
    owner.wait()
    assert wait_until(lambda: not lifetimes.processes_in_scope(scope)), lifetimes.processes_in_scope(scope)
    owner.stdin.close()
    owner.stdout.close()


def test_killed_processes_leave_no_semaphore_no_socket_and_no_directory(tmp_path):
    litter = tmp_path / "litter.py"
    litter.write_text(LITTER)
    owner = start(LITTERING_OWNER, str(litter))
    scope, directory = owner.stdout.readline().split()
    lines = [owner.stdout.readline().split(), owner.stdout.readline().split()]
    ((semaphore, seen_by_child),) = (line for line in lines if len(line) == 2)
    ((socket_path, own, _),) = (line for line in lines if len(line) == 3)
    semaphores = [Path(f"/dev/shm/sem.{name.removeprefix('/')}") for name in (semaphore, own)]
    assert seen_by_child == directory == str(Path(socket_path).parent) != tempfile.gettempdir()
    assert all(path.exists() for path in semaphores) and Path(socket_path).is_socket()
    owner.kill()
    assert wait_until(lambda: not lifetimes.processes_in_scope(scope)), lifetimes.processes_in_scope(scope)
    assert not any(path.exists() for path in semaphores)
    assert wait_until(lambda: not Path(directory).exists())
    owner.communicate(timeout=20)


def test_shared_memory_that_a_living_process_has_mapped_stays(tmp_path):
    import mmap

    paths = [Path(f"/dev/shm/slime_opd_test_{os.getpid()}_{name}") for name in ("mapped", "left")]
    try:
        for path in paths:
            path.write_bytes(b"\0")
        with paths[0].open("r+b") as file, mmap.mmap(file.fileno(), 1):
            inodes = {path.stat().st_ino for path in paths}
            assert inodes & lifetimes.processes.mapped_shared_memory([os.getpid()]) == {paths[0].stat().st_ino}
            lifetimes.processes.remove_shared_memory(inodes)
            assert [path.exists() for path in paths] == [True, False]
        lifetimes.processes.remove_shared_memory(inodes)
        assert not paths[0].exists()
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_a_private_directory_leaves_room_for_sockets_and_rays_sessions_where_they_were(tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    program = (
        "import os; from slime_opd import lifetimes; lifetimes.own();"
        "print(*(os.environ[name] for name in ('TMPDIR', 'RAY_TMPDIR', 'TORCHINDUCTOR_CACHE_DIR')))"
    )
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    try:
        for shared, parent in ((short, short), (long, Path("/tmp"))):
            environment = {
                name: value for name, value in os.environ.items() if name not in lifetimes.SHARED_DIRECTORIES
            }
            environment["TMPDIR"] = str(shared)
            command = [sys.executable, "-c", program]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            private, ray, kernels = map(Path, run.stdout.split())
            assert private.parent == parent and len(f"{private}/pymp-12345678/listener-12345678") < 107
            assert ray == shared and kernels.parent == shared
            assert wait_until(lambda private=private: not private.exists())
    finally:
        short.rmdir()


def test_only_the_scope_of_the_dead_owner_is_ended():
    first, second = start(OWNER, "wait"), start(OWNER, "wait")
    scopes = [owner.stdout.readline().strip() for owner in (first, second)]
    first.kill()
    assert wait_until(lambda: not lifetimes.processes_in_scope(scopes[0]))
    assert len(lifetimes.processes_in_scope(scopes[1])) == STARTED + 1
    second.kill()
    assert wait_until(lambda: not lifetimes.processes_in_scope(scopes[1]))
    for owner in (first, second):
        owner.communicate(timeout=20)


def test_a_process_that_renames_itself_keeps_its_scope():
    program = (
        "import setproctitle; setproctitle.setproctitle('sglang::scheduler ' + 200 * 'x'); print(flush=True); input()"
    )
    environment = {**os.environ, **lifetimes.scope_environment("renamed")}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    assert lifetimes.processes_in_scope("renamed") == [process.pid]
    process.communicate(b"\n")
    assert lifetimes.processes_in_scope("renamed") == []


def test_a_scope_holds_what_is_below_it_and_nothing_beside_it():
    assert lifetimes.is_within("ab", "ab") and lifetimes.is_within("ab/engine-0", "ab")
    assert not any(lifetimes.is_within(other, "ab") for other in ("abc", "b/ab", "a", "", None))


def test_a_process_has_one_scope_and_its_children_have_scopes_below_it():
    program = "from slime_opd import lifetimes; print(lifetimes.own(), lifetimes.own())"
    environment = {**os.environ, lifetimes.RUN_VARIABLE: "outer"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = run.stdout.split()
    assert first == second and first.startswith("outer/")
