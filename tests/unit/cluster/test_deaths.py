"""Failures as sentences, from exceptions as Ray hands them to the driver: pickled, wrapped, with its own messages."""

from __future__ import annotations

import pickle

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
)

from slime_opd.cluster import deaths
from slime_opd.cluster.deaths import Memory, describe, exit_message, root_cause
from slime_opd.errors import CheckpointError, ConfigError, NonFiniteError, ProcessDied

MEMORY = "3.0 of 24.0 GiB of memory are free"
# What Ray 2.60 says of an actor whose process was killed.
KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed "
    "by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly."
)
FOR_MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 5c6b) was "
    "23.10GB used / 23.54GB limit (0.981)\nOOM kill reason: Memory usage exceeded threshold"
)


def actor_died(message: str = KILLED) -> ActorDiedError:
    context = ActorDiedErrorContext(
        class_name="TrainerActor", actor_id=bytes(16), pid=9799, node_ip_address="10.0.0.7", error_message=message
    )
    return ActorDiedError(context)


def raised_by_actor(cause: Exception) -> Exception:
    """What `ray.get` raises where an actor's method raised `cause`: it crosses processes, and then is a `cause` too."""
    error = RayTaskError("TrainerActor.train", "Traceback (most recent call last):\n  a long one", cause)
    return pickle.loads(pickle.dumps(error)).as_instanceof_cause()


def gpu_memory() -> Exception:
    import torch

    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."
    )


CASES = [
    (
        actor_died(),
        "trainer rank 1 (process 9799 on 10.0.0.7) died without an error of its own: it was killed by a signal",
    ),
    (
        actor_died(FOR_MEMORY),
        "Ray's memory monitor killed trainer rank 1 (process 9799 on 10.0.0.7) because its machine ran",
    ),
    (
        OutOfMemoryError(FOR_MEMORY),
        "ran low on memory (23.10GB of 23.54GB were in use there): give it more memory, lower",
    ),
    (
        RaySystemError("Unable to connect to the GCS. It may have died"),
        "a part of Ray failed: System error: Unable to connect to the GCS",
    ),
    (ActorUnavailableError("The actor is temporarily unavailable: RpcError: Socket closed", bytes(16)), "rank 1 died"),
    (NodeDiedError("the node died"), "the machine of trainer rank 1 has left the Ray cluster"),
    (LocalRayletDiedError("gone"), "Ray's processes on the driver's machine died"),
    (
        raised_by_actor(gpu_memory()),
        "trainer rank 1 ran out of GPU memory (CUDA out of memory): lower --max-tokens-per-gpu",
    ),
    (raised_by_actor(RuntimeError("CUDA out of memory. Tried")), "--log-probs-chunk-size"),
    (
        raised_by_actor(
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you")
        ),
        "trainer rank 1 could not allocate memory",
    ),
    (raised_by_actor(MemoryError()), "trainer rank 1 could not allocate memory (no message; 3.0 of 24.0 GiB"),
    (
        raised_by_actor(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:4711")),
        "trainer rank 1 lost its connection to another trainer rank",
    ),
    (raised_by_actor(NonFiniteError("the loss is not finite")), "the loss is not finite"),
    (CheckpointError("of another model"), "of another model"),
]


@pytest.mark.parametrize(("error", "expected"), CASES, ids=lambda case: getattr(type(case), "__name__", "")[:30])
def test_each_failure_has_its_message(error, expected):
    told = str(describe("trainer rank 1", error, MEMORY))
    assert expected in told and "\n" not in told and "Traceback" not in told


def test_an_unknown_error_has_no_message_of_its_own():
    assert describe("trainer rank 1", raised_by_actor(KeyError("columns")), MEMORY) is None
    assert describe("trainer rank 1", ZeroDivisionError(), MEMORY) is None


def test_the_root_cause_is_the_death_and_not_the_connections_it_cut():
    lost = raised_by_actor(RuntimeError("Connection closed by peer"))
    bug = raised_by_actor(KeyError("columns"))
    refused = raised_by_actor(CheckpointError("of another model"))
    assert root_cause([("rank 0", lost), ("rank 1", actor_died())])[0] == "rank 1"
    assert root_cause([("rank 0", lost), ("rank 1", bug)])[0] == "rank 1"
    assert root_cause([("rank 0", lost), ("rank 1", OutOfMemoryError(FOR_MEMORY))])[0] == "rank 1"
    assert root_cause([("rank 0", bug), ("rank 1", lost), ("rank 2", refused)])[0] == "rank 2"
    assert root_cause([("rank 0", lost), ("rank 1", lost)])[0] == "rank 0"


def test_out_of_memory_kills_are_reported():
    before, gib = Memory(0, 0, 3), 1024**3
    assert "out-of-memory killer ended 2 processes there" in Memory(2 * gib, 24 * gib, 5).describe_since(before)
    assert "ended 1 process there" in Memory(2 * gib, 24 * gib, 4).describe_since(before)
    assert (
        Memory(2 * gib, 24 * gib, 3).describe_since(before)
        == "2.0 of 24.0 GiB of memory are free on the driver's machine"
    )
    assert "killer" not in Memory(2 * gib, 24 * gib, None).describe_since(before)


def test_kills_are_read_from_the_kernels_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(deaths, "_VMSTAT", tmp_path / "vmstat")
    assert Memory.now().kernel_kills is None
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 7\nnuma_hit 1\n")
    assert Memory.now().kernel_kills == 7


def test_the_exit_message_names_the_activity_and_the_traceback(tmp_path, capsys):
    log = tmp_path / "logs" / "traceback.log"
    failure = describe("trainer rank 1", actor_died(), MEMORY)
    failure.__cause__ = actor_died()
    message = exit_message(failure, log, "training 5/100")
    assert message.startswith("slime_opd: error: trainer rank 1") and "(in: training 5/100)" in message
    assert message.endswith(f"the traceback is in {log}") and "ActorDiedError" in log.read_text()
    assert "\n" not in message and capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback_and_is_the_last_line_too(tmp_path, capsys):
    try:
        {}["columns"]
    except KeyError as error:
        message = exit_message(error, tmp_path / "log", None)
    assert message == f"slime_opd: error: KeyError: 'columns'; the traceback is in {tmp_path}/log"
    assert "Traceback" in capsys.readouterr().err and "Traceback" in (tmp_path / "log").read_text()


def test_the_error_of_a_run_that_had_not_started_has_no_traceback(capsys):
    assert exit_message(CheckpointError("no"), None, None) == "slime_opd: error: no"
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_written_does_not_hide_the_failure(tmp_path):
    (tmp_path / "file").write_text("")
    message = exit_message(raised_by_actor(NonFiniteError("not finite")), tmp_path / "file" / "log", None)
    assert message.startswith("slime_opd: error: not finite") and "could not be written" in message


def test_a_config_error_of_an_actor_is_a_config_error_of_the_run(tmp_path):
    with pytest.raises(ConfigError, match="no such transport"):
        exit_message(raised_by_actor(ConfigError("no such transport")), tmp_path / "log", None)


def test_sentences_about_dead_processes_are_errors_of_this_package():
    assert isinstance(deaths.died("engine 0", MEMORY), ProcessDied)
    assert isinstance(raised_by_actor(NonFiniteError("x")), ray.exceptions.RayTaskError)
