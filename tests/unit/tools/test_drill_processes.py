"""The drill's eyes: processes are found by their mark and known by their titles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from drill.kinds import Role
from drill.processes import MARK, descendants, marked, role_of, shared_memory

from slime_opd.engine.with_key import command_with_key

# Titles and command lines as a run has them.
COMMANDS = {
    "/venv/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/ray": Role.GCS,
    "/venv/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/ray/x": Role.RAYLET,
    "ray::DashboardAgent": Role.AGENT,
    "ray::RuntimeEnvAgent": Role.AGENT,
    "/venv/bin/python -u /venv/ray/_private/log_monitor.py --session-dir=/tmp": Role.RAY,
    "ray::IDLE": Role.RAY,
    "ray::TrainerActor": Role.TRAINER,
    "ray::TrainerActor.train": Role.TRAINER,
    "ray::EngineActor.start": Role.ENGINE_ACTOR,
    "/venv/bin/python -I -S -c from slime_opd.lifetimes.warden import main; main() 4f1c/engine-0 17": Role.WARDEN,
    "/venv/bin/python -m slime_opd.engine.cpu_launcher --model-path m": Role.LAUNCHER,
    "sglang::scheduler": Role.SCHEDULER,
    "sglang::detokenizer": Role.DETOKENIZER,
    "/venv/bin/python -m sglang_router.launch_router --port 1": Role.ROUTER,
    "sglang::router": Role.ROUTER,
    " ".join(command_with_key(["/venv/bin/python", "-m", "sglang_router.launch_router", "--port", "1"])): Role.ROUTER,
    "/venv/bin/python -P /x/slime_opd/reward/math_worker.py 10": Role.REWARD,
    "/venv/bin/python -c from multiprocessing.resource_tracker import main;main(5)": Role.OTHER,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_process_is_known_by_its_command_line(command):
    assert role_of(command) is COMMANDS[command]


def test_a_process_is_found_by_its_mark_after_its_parent_was_killed_and_a_zombie_is_not():
    grandchild = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    program = f"import subprocess, time; subprocess.Popen({grandchild!r}); time.sleep(600)"
    mark = f"test-{os.getpid()}"
    child = subprocess.Popen([sys.executable, "-S", "-c", program], env={**os.environ, MARK: mark})
    try:
        deadline = time.monotonic() + 60
        while len(found := marked(mark, child.pid)) < 2:
            assert time.monotonic() < deadline
        assert {process.role for process in found} == {Role.DRIVER, Role.OTHER}
        assert {process.pid for process in descendants(child.pid)} == {process.pid for process in found} - {child.pid}
        assert marked("test", child.pid) == [], "a mark that another begins with is not that mark"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # and not collected: it stays a zombie
        (orphan,) = marked(mark, child.pid)
        assert orphan.is_alive()
        assert [process.is_alive() for process in found if process.pid == child.pid] == [False]
        orphan.send(signal.SIGKILL)
        while marked(mark):
            assert time.monotonic() < deadline
    finally:
        child.kill()
        child.wait()
        for process in marked(mark):
            process.send(signal.SIGKILL)


def test_a_shared_memory_segment_is_known_by_the_process_id_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("drill.processes._SHARED_MEMORY", tmp_path)
    (own,) = (process for process in marked_child() if process.pid)
    for name in (f"torch_{own.pid}_123456789_0", f"torch_{own.pid + 1}_123456789_0", "sem.mp-abc"):
        (tmp_path / name).touch()
    assert {path.name for path in shared_memory([own]) if path.parent == tmp_path} == {f"torch_{own.pid}_123456789_0"}


def marked_child():
    mark = f"alone-{os.getpid()}"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, MARK: mark}
    )
    try:
        deadline = time.monotonic() + 60
        while not (found := marked(mark)):
            assert time.monotonic() < deadline
        return found
    finally:
        child.communicate()
