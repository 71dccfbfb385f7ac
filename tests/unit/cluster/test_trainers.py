"""Which process becomes which rank, and what the group's verbs wait for, with scripted actors."""

from __future__ import annotations

from typing import Any

import pytest

from slime_opd.cluster import trainers
from slime_opd.cluster.session import Slot
from slime_opd.config import parse


class Actor:
    """Stands for a trainer's actor on a GPU: its calls are answered at once, and noted."""

    def __init__(self, gpu: str, variables: dict[str, str]) -> None:
        self.gpu, self.variables, self.calls = gpu, variables, []

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.calls.append((method, *arguments))
            return {"gpu_ids": [self.gpu] if self.gpu else [], "address": f"tcp://of-{self.gpu}", "data_rank": 0}.get(
                method, {}
            )

        return type("Method", (), {"remote": staticmethod(remote)})


class Watchdog:
    """Returns what the calls have answered."""

    def add(self, probe: Any) -> None:
        pass

    def get(self, answers: list[Any], names: list[str], timeout_s: float | None = None) -> list[Any]:
        assert len(answers) == len(names)
        return answers


@pytest.fixture
def make_group(monkeypatch):
    def make(places: list[tuple[int | None, str]]) -> tuple[trainers.TrainerGroup, list[Actor]]:
        actors = []

        class Remote:
            @staticmethod
            def options(**options: Any) -> Any:
                actors.append(Actor(places[len(actors)][1], options["runtime_env"]["env_vars"]))
                return type("Options", (), {"remote": staticmethod(lambda *_, made=actors[-1]: made)})

        monkeypatch.setattr(trainers, "TrainerActor", Remote)
        slots = [Slot({"num_cpus": 0}, bundle) for bundle, _ in places]
        return trainers.TrainerGroup(parse([]), slots, Watchdog(), {"NCCL_CUMEM_ENABLE": "0"}), actors

    return make


def ranks(actors: list[Actor]) -> list[int]:
    return [dict(call[:2] for call in actor.calls if len(call) > 1)["set_rank"] for actor in actors]


def test_processes_on_gpus_become_ranks_by_node_and_gpu_and_meet_at_the_first(make_group):
    group, actors = make_group([(0, "3"), (0, "1"), (1, "0"), (1, "10"), (1, "2")])
    group.begin_start()
    assert ranks(actors) == [1, 0, 2, 4, 3]
    assert {call for actor in actors for call in actor.calls if call[0] == "start"} == {("start", "tcp://of-1")}
    assert group.gpu_ids() == [["1"], ["3"], ["0"], ["2"], ["10"]]
    assert {actor.variables["NCCL_CUMEM_ENABLE"] for actor in actors} == {"0"}
    # Before it starts, a rank reports under its own name.
    keys = [next(call[1] for call in actor.calls if call[0] == "report_under") for actor in actors]
    assert [key.rpartition("/")[2] for key in keys] == ["1", "0", "2", "4", "3"]


def test_without_gpus_nothing_is_waited_for_before_the_start(make_group):
    group, actors = make_group([(None, ""), (None, "")])
    group.begin_start()
    assert ranks(actors) == [0, 1]
    assert not any(call[0] == "gpu_ids" for actor in actors for call in actor.calls)


def test_an_error_of_scores_that_the_driver_does_not_read_is_the_steps_error(make_group, monkeypatch):
    """Calls of `score` are not waited for where no column is requested; the next step reports their error."""
    monkeypatch.setattr(trainers.ray, "put", lambda value: value)
    group, actors = make_group([(None, "")])
    group._data_ranks = [0]
    waited: list[list[Any]] = []
    group._watchdog.get = lambda answers, names, timeout_s=None: waited.append(answers) or answers
    assert group.score([object()], 0.0, frozenset()) == [{}] and waited == []
    group.step([{}], 0.0)
    assert [call[0] for call in actors[0].calls[-2:]] == ["score", "step"] and len(waited) == 2
    group.score([object()], 0.0, frozenset({"log_probs"}))
    group.step([{}], 0.0)
    assert len(waited) == 4, "scores with names are waited for by score, and not again"
