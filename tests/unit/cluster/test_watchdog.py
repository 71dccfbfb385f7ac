"""The watchdog's thread, the waits that raise what it found, and the reports of ranks; Ray and time are made up."""

from __future__ import annotations

import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError, RpcError

from slime_opd.cluster import heartbeat, ray_processes, trainers
from slime_opd.cluster import watchdog as module
from slime_opd.cluster.heartbeat import Beat
from slime_opd.cluster.trainers import RankReports
from slime_opd.cluster.watchdog import Watchdog
from slime_opd.errors import NonFiniteError, ProcessDied
from slime_opd.observe.watch import ProcessView, Status
from slime_opd.rollout.loop import BackgroundLoop

ALIVE, DEAD = ProcessView("engine 0", Status.ALIVE), ProcessView("engine 0", Status.DEAD, "scheduler, process 7")


class Clock:
    """`time.monotonic` that the test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def reported():
    return []


@pytest.fixture
def watchdog(reported):
    """One whose thread is not started: the tests look."""
    return Watchdog(60, 0, report=reported.append)


def test_a_dead_process_is_reported_at_once_and_raised_in_the_drivers_wait_once(watchdog, reported):
    watchdog.add(lambda: [ALIVE])
    watchdog._look()
    watchdog.check()
    watchdog.add(lambda: [DEAD])
    watchdog._look()
    assert reported == ["engine 0 died (scheduler, process 7): the run ends"]
    with pytest.raises(ProcessDied, match=r"engine 0 died \(scheduler, process 7\); .* GiB of memory are free"):
        watchdog.check()
    watchdog._look()
    watchdog.check()  # what ends the run waits too, and must not fail of the same again
    assert len(reported) == 1


def test_a_wait_in_the_background_loop_ends_with_what_the_watchdog_found(watchdog):
    import asyncio

    watchdog.add(lambda: [DEAD])
    watchdog._look()
    with (
        BackgroundLoop(check=watchdog.check) as loop,
        pytest.raises(ProcessDied),
        watchdog.waiting_for("rollout 4/100"),
    ):
        loop.run(asyncio.Event().wait())
    assert watchdog.failed_in == "rollout 4/100"


def test_the_thread_looks_by_itself_and_ends_with_its_run(monkeypatch, reported):
    import threading

    monkeypatch.setattr(module, "POLL_PERIOD_S", 0.01)
    looked = threading.Event()
    with Watchdog(60, 0, report=reported.append) as watchdog:
        watchdog.add(lambda: looked.set() or [])
        assert looked.wait(10)
    assert not watchdog._thread.is_alive()


def test_a_server_is_polled_only_without_progress(watchdog, clock, monkeypatch, reported):
    asked = []
    monkeypatch.setattr(module.health, "answers", lambda url, timeout_s: bool(asked.append(url)))
    watchdog.add_server("the teacher", "http://h:1")
    with watchdog.waiting_for("rollout 1/1"):
        for clock.now in (1, 4):
            watchdog._look()
        assert asked == []
        for clock.now in (10, 20, 35):
            watchdog._look()
        # The next sample shows that it answers again.
        clock.now = 41
        watchdog.advance(1, "samples")
        watchdog._look()
        assert reported == [
            "the teacher http://h:1 does not answer, for 10 s so far; waiting for it",
            "waited 31 s for the teacher http://h:1, which did not answer; it responds again",
        ]
        assert len(asked) == 3


def test_if_ray_does_not_answer_the_other_processes_are_still_checked(watchdog, clock, reported):
    def broken():
        raise RpcError("Deadline Exceeded. And more")

    watchdog.add(broken)
    for clock.now in (1, 12):
        watchdog._look()
    assert reported == ["Ray does not answer (Deadline Exceeded), for 11 s so far; waiting for it"]
    watchdog.add(lambda: [DEAD])
    watchdog._look()
    assert reported[1:] == ["engine 0 died (scheduler, process 7): the run ends"]


class Calls:
    """Ray calls that are strings: what each gives or raises, after so many slices of waiting."""

    def __init__(self, monkeypatch, results: dict, slices: int = 0) -> None:
        self.results, self.slices = results, slices
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(ray, "wait", self.wait)

    def get(self, refs, timeout=None):
        if self.slices:
            self.slices -= 1
            raise GetTimeoutError("slice")
        single = isinstance(refs, str)
        found = [self.results[ref] for ref in ([refs] if single else refs)]
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found[0] if single else found

    def wait(self, refs, num_returns, timeout):
        self.grace_s = timeout
        ready = [ref for ref in refs if self.results.get(ref) != "pending"]
        return ready, [ref for ref in refs if ref not in ready]


def task_error(cause: Exception) -> Exception:
    return RayTaskError("train", "a traceback", cause).as_instanceof_cause()


def test_results_are_returned_as_soon_as_they_are_ready(watchdog, monkeypatch):
    Calls(monkeypatch, {"a": 1, "b": 2}, slices=3)
    assert watchdog.get(["a", "b"], ["rank 0", "rank 1"]) == [1, 2]


def test_the_root_cause_of_several_failures_is_raised(watchdog, monkeypatch):
    lost = task_error(RuntimeError("Connection closed by peer"))
    killed = ActorUnavailableError("RpcError\n\tpid: 12", bytes(16))
    calls = Calls(monkeypatch, {"a": lost, "b": killed, "c": "pending"})
    with pytest.raises(ProcessDied, match=r"trainer rank 1 \(process 12\) died without an error of its own") as found:
        watchdog.get(["a", "b", "c"], ["trainer rank 0", "trainer rank 1", "trainer rank 2"])
    assert found.value.__cause__ is lost and calls.grace_s > 0


def test_a_death_is_reported_without_waiting_for_its_consequences(watchdog, monkeypatch):
    calls = Calls(monkeypatch, {"a": ActorUnavailableError("RpcError", bytes(16)), "b": "pending"})
    with pytest.raises(ProcessDied, match="trainer rank 0 died"):
        watchdog.get(["a", "b"], ["trainer rank 0", "trainer rank 1"])
    assert calls.grace_s == 0


def test_an_error_of_this_package_in_an_actor_is_raised_unchanged(watchdog, monkeypatch):
    Calls(monkeypatch, {"a": task_error(NonFiniteError("the loss is not finite"))})
    with pytest.raises(NonFiniteError, match=r"^the loss is not finite$"):
        watchdog.get(["a"], ["trainer rank 0"])


def test_a_bug_in_an_actor_is_raised_unchanged(watchdog, monkeypatch):
    Calls(monkeypatch, {"a": task_error(KeyError("columns"))})
    with pytest.raises(KeyError):
        watchdog.get(["a"], ["trainer rank 0"])


def test_a_wait_has_a_limit_that_names_who_is_late(watchdog, clock, monkeypatch):
    Calls(monkeypatch, {"a": 1, "b": "pending"}, slices=1)
    monkeypatch.setattr(watchdog, "check", lambda: setattr(clock, "now", clock.now + 20))
    with pytest.raises(ProcessDied, match=r"no answer within 10 s from trainer rank 1$"):
        watchdog.get(["a", "b"], ["trainer rank 0", "trainer rank 1"], timeout_s=10)


def test_the_death_of_ray_is_raised_before_its_consequences(watchdog, monkeypatch, reported):
    view = ProcessView("Ray's raylet", Status.DEAD, "process 5, killed by signal 9")
    calls = Calls(monkeypatch, {"a": ActorUnavailableError("Socket closed", bytes(16))}, slices=1)
    monkeypatch.setattr(ray_processes, "look", lambda: [] if calls.slices else [view])
    with pytest.raises(ProcessDied, match=r"Ray's raylet died \(process 5, killed by signal 9\)"):
        watchdog.get(["a"], ["trainer rank 0"])
    assert reported == ["Ray's raylet died (process 5, killed by signal 9): the run ends"]


class Process:
    def __init__(self, code: int | None) -> None:
        self.pid, self.code = 5, code

    def poll(self) -> int | None:
        return self.code


class Node:
    class Info:
        def __init__(self, code: int | None) -> None:
            self.process = Process(code)

    def __init__(self, **codes: int | None) -> None:
        self.all_processes = {name: [self.Info(code)] for name, code in codes.items()}


def test_rays_processes_are_those_that_this_process_started(monkeypatch):
    def views(node):
        monkeypatch.setattr(ray._private.worker, "_global_node", node)
        return [str(view) for view in ray_processes.look()]

    assert views(None) == views(Node()) == []
    assert views(Node(gcs_server=None, raylet=-9, dashboard=1)) == [
        "Ray's GCS server is alive (process 5)",
        "Ray's raylet died (process 5, killed by signal 9)",
    ]


def test_rays_messages_about_itself_go_to_a_file_and_those_of_actors_to_the_console(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", lambda data, ignore_prefix: printed.append(data))
    ray_processes.write_messages_to(tmp_path / "ray.log")
    for pid in ("raylet", 12):
        ray._private.worker.print_to_stdstream({"lines": ["[state-dump]", "more"], "pid": pid}, ignore_prefix=False)
    assert [data["pid"] for data in printed] == [12]
    assert (tmp_path / "ray.log").read_text() == "[state-dump]\nmore\n"


@pytest.fixture
def beats(monkeypatch):
    """The latest report by rank, on this machine (node "here") unless a test says otherwise."""
    latest: dict[int, Beat] = {}
    monkeypatch.setattr(heartbeat, "latest", lambda key: latest.get(int(key.rsplit("/")[-1])))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "here")
    monkeypatch.setattr(trainers, "process_status", lambda pid: {11: "running", 12: "stopped", 13: "dead"}[pid])
    return latest


def test_the_status_of_ranks_on_this_machine_is_that_of_their_processes(beats):
    reports = RankReports(["rank 0", "rank 1", "rank 2", "rank 3"])
    beats.update({rank: Beat("here", 11 + rank, 1, 0) for rank in range(3)})
    views, _ = reports.look()
    assert [(view.name, view.status) for view in views] == [
        ("rank 0", Status.ALIVE),
        ("rank 1", Status.STOPPED),
        ("rank 2", Status.DEAD),
    ]  # the last has not reported yet
    reports.close()
    assert reports.look() == ([], 0)


def test_a_rank_on_another_node_without_recent_heartbeats_is_silent(beats, clock):
    reports = RankReports(["rank 0"])
    beats[0] = Beat("there", 13, 1, 0)
    assert reports.look()[0][0].status is Status.ALIVE
    clock.now = heartbeat.SILENT_AFTER_S + 1
    assert reports.look()[0][0].status is Status.SILENT
    beats[0] = Beat("there", 13, 2, 0)
    assert reports.look()[0][0].status is Status.ALIVE


def test_micro_batches_are_counted_once_however_many_ranks_share_them(beats):
    reports = RankReports(["rank 0", "rank 1"])
    beats.update({0: Beat("here", 11, 1, 4), 1: Beat("here", 11, 1, 3)})
    assert reports.look()[1] == 4
    assert reports.look()[1] == 0
    beats.update({0: Beat("here", 11, 2, 5), 1: Beat("here", 11, 2, 5)})
    assert reports.look()[1] == 2
