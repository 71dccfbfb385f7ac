"""Whether a server's processes live: real processes with the command lines that SGLang's have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import httpx
import pytest

from slime_opd.engine.health import Worker, answers, process_status, server_workers, worker_name, worst_status

# A server that starts one child with the title of a scheduler and one that is nobody's, prints their ids, and waits.
SERVER = """
import subprocess, sys
sleep = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
children = [subprocess.Popen([*sleep, name], stdin=subprocess.PIPE) for name in ("sglang::scheduler_TP0", "a_compiler")]
print(*(child.pid for child in children), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server():
    """(its process, the id of its scheduler, the id of its other child)"""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", SERVER, "sglang.launch_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    scheduler, other = map(int, process.stdout.readline().split())
    yield process, scheduler, other
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(pid: int, status: str) -> None:
    while process_status(pid) != status:
        os.sched_yield()


def test_the_schedulers_end_is_seen_although_the_server_lives(server):
    process, scheduler, other = server
    workers = server_workers(process.pid)
    assert [(worker.name, worker.pid) for worker in workers] == [
        ("HTTP process", process.pid),
        ("scheduler_TP0", scheduler),
    ]
    assert worst_status(workers) == ("running", "")
    os.kill(other, signal.SIGKILL)  # a compiler that ends is nobody's loss
    wait_for(other, "dead")
    assert worst_status(workers) == ("running", "")
    os.kill(scheduler, signal.SIGKILL)
    wait_for(scheduler, "dead")  # a zombie, as its parent does not wait for it
    assert process.poll() is None
    assert worst_status(workers) == ("dead", f"scheduler_TP0, process {scheduler}")


def test_a_short_lived_fork_with_its_parents_title_is_not_a_worker():
    """As a scheduler makes when it starts another program: until it executes that, it shows the scheduler's title."""
    program = "import os, time\npid = os.fork()\nif pid: print(pid, flush=True)\ntime.sleep(100)"
    argv = [sys.executable, "-S", "-c", program, "sglang::scheduler_TP0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as scheduler:
        try:
            fork = int(scheduler.stdout.readline())
            workers = server_workers(scheduler.pid)
            assert [worker.pid for worker in workers] == [scheduler.pid]
            os.kill(fork, signal.SIGKILL)
            wait_for(fork, "dead")
            assert worst_status(workers) == ("running", "")
        finally:
            os.killpg(scheduler.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["scheduler_TP0", "HTTP process"])
def test_a_stopped_process_of_a_server_is_seen_and_runs_again(server, name):
    process, scheduler, _ = server
    workers = server_workers(process.pid)
    pid = scheduler if name == "scheduler_TP0" else process.pid
    os.kill(pid, signal.SIGSTOP)
    wait_for(pid, "stopped")
    assert worst_status(workers) == ("stopped", f"{name}, process {pid}")
    os.kill(pid, signal.SIGCONT)
    wait_for(pid, "running")
    assert worst_status(workers) == ("running", "")


def test_a_process_with_a_reused_id_is_another_process():
    assert process_status(os.getpid()) == "running"
    assert process_status(os.getpid(), started=1.0) == "dead"


def test_a_dead_server_has_no_workers():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    assert server_workers(process.pid) == [] and process_status(process.pid) == "dead"


def test_dead_processes_are_named_before_stopped_ones():
    workers = [Worker("scheduler_TP0", 1, 0.0), Worker("scheduler_TP1", 2, 0.0), Worker("detokenizer", 3, 0.0)]
    statuses = {1: "stopped", 2: "dead", 3: "dead"}
    found = worst_status(workers, lambda pid, started: statuses[pid])
    assert found == ("dead", "scheduler_TP1, process 2; detokenizer, process 3")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["sglang::scheduler_TP1"], "scheduler_TP1"),
        (["sglang::detokenizer", "", ""], "detokenizer"),
        (["/venv/bin/python", "-m", "sglang.launch_server", "--port", "1"], "HTTP process"),
        (["/venv/bin/python", "-m", "slime_opd.engine.cpu_launcher"], "HTTP process"),
        (["/venv/bin/python", "-c", "from multiprocessing.resource_tracker import main; main(3)"], None),
        ([], None),
    ],
)
def test_a_process_is_known_by_its_command_line(command, name):
    assert worker_name(command) == name


@pytest.mark.parametrize(("status", "expected"), [(200, True), (404, True), (503, False)])
def test_a_server_answers_unless_it_says_that_it_cannot_generate(status, expected):
    transport = httpx.MockTransport(lambda request: httpx.Response(status))
    assert answers("http://h:1/", 1.0, transport) is expected


def test_a_server_that_is_late_or_away_does_not_answer():
    def late(request):
        raise httpx.ReadTimeout("late")

    def away(request):
        raise httpx.ConnectError("away")

    assert not answers("http://h:1", 1.0, httpx.MockTransport(late))
    assert not answers("http://h:1", 1.0, httpx.MockTransport(away))
