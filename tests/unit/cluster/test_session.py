"""Devices are reserved where there are enough; on pretended GPUs: tests/dist/test_placement.py."""

from __future__ import annotations

import pytest

from slime_opd import lifetimes
from slime_opd.cluster import session
from slime_opd.config import parse
from slime_opd.errors import ConfigError, ProcessDied


def test_a_cluster_of_cpus_is_not_filled_with_more_processes_than_it_can_run(monkeypatch):
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"64 training processes and 1 of engines .* too many for 2 CPU cores"):
        session.reserve(parse(["--actor-num-gpus-per-node", "64"]))
    assert len(session.reserve(parse(["--actor-num-gpus-per-node", "2"])).trainers) == 2
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 64.0})
    assert len(session.reserve(parse(["--actor-num-gpus-per-node", "64"])).trainers) == 64


def test_slots_carry_the_scope_and_the_environment_of_a_process():
    slot = session.Slot({"num_cpus": 0}, 3)
    options = slot.options_in("trainer-0", {"NCCL_CUMEM_ENABLE": "0"})
    variables = options["runtime_env"]["env_vars"]
    assert variables["NCCL_CUMEM_ENABLE"] == "0" and variables[lifetimes.RUN_VARIABLE].endswith("/trainer-0")


def test_a_cluster_that_cannot_be_joined_is_one_sentence_with_the_flag(monkeypatch):
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    for error, sentence in (
        (ConnectionError("no"), "no Ray cluster answers there"),
        (
            RuntimeError("Version mismatch: Ray 2.1. Python 3"),
            "the Ray cluster cannot be joined: Version mismatch: Ray 2.1",
        ),
        (TimeoutError("it took too long"), "the Ray cluster cannot be joined: it took too long"),
        # What ray.init raises where the raylet that it has started is killed at once.
        (Exception("The node timed out. Look at"), "the Ray cluster cannot be joined: The node timed out"),
    ):

        def init(error: Exception = error, **_: object) -> None:
            raise error

        monkeypatch.setattr(session.ray, "init", init)
        with pytest.raises(ConfigError, match=rf"^--ray-address 10.0.0.1:1: {sentence}"):
            session.join("10.0.0.1:1")
    with pytest.raises(ProcessDied, match=r"^Ray did not start on this machine: The node timed out"):
        session.join("local")
