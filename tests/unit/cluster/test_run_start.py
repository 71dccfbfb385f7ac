"""What ends a run before it joins Ray: a damaged checkpoint, and another run in its directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slime_opd.checkpoint.lock import LOCK, RunLock
from slime_opd.cluster import session
from slime_opd.cluster.run import Run, start_processes
from slime_opd.cluster.run_config import with_disk_directory
from slime_opd.config.parser import parse
from slime_opd.errors import ConfigError


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def join(*_, **__):
        raise AssertionError("the run went on to join Ray")

    monkeypatch.setattr(session, "join", join)


def start(directory: Path, *more: str) -> None:
    words = ["--loss-type", "sft_loss", "--run-dir", str(directory / "run"), *more]
    with Run(parse(words), None, None, []):
        pass


def test_a_second_run_in_one_directory_is_refused_and_the_first_keeps_its_lock(tmp_path):
    save = tmp_path / "save"
    with RunLock(save):
        with pytest.raises(ConfigError, match=f"--save {save} is in use by another run .process {os.getpid()} on"):
            start(tmp_path, "--save", str(save))
        assert str(os.getpid()) in (save / LOCK).read_text()


def test_a_run_that_cannot_start_releases_its_lock(tmp_path):
    with pytest.raises(AssertionError, match="join Ray"):
        start(tmp_path, "--save", str(tmp_path / "save"))
    with RunLock(tmp_path / "save"):
        pass


@pytest.mark.parametrize("flag", ["--load", "--ref-load", "--opd-teacher-load"])
def test_a_checkpoint_that_is_not_whole_is_refused_with_the_flag_that_names_it(tmp_path, flag):
    (tmp_path / "ckpt" / "iter_0000003").mkdir(parents=True)
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ConfigError, match=rf"^{flag} .*iter_0000003: \.metadata is missing; no earlier checkpoint in"):
        start(tmp_path, flag, str(tmp_path / "ckpt"))


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--load /etc is not empty, but holds no checkpoint"):
        start(tmp_path, "--load", "/etc")


class Recorder:
    """Stands for the trainers or the engines of a run, and notes what is asked of it."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self._name, self._calls = name, calls

    def begin_start(self, trainer_gpus: list | None = None) -> list:
        self._calls.append(f"begin {self._name}" + (f" on {trainer_gpus}" if trainer_gpus else ""))
        return []

    def finish_start(self, pending: list) -> str:
        self._calls.append(f"finish {self._name}")
        return "report"

    def gpu_ids(self) -> list[list[str]]:
        return [["0"], ["1"]]


@pytest.mark.parametrize(
    ("shares_gpus", "expected"),
    [
        (False, ["begin engines", "begin trainers", "finish trainers", "finish engines"]),
        (True, ["begin trainers", "finish trainers", "begin engines on [['0'], ['1']]", "finish engines"]),
    ],
)
def test_engines_start_with_the_trainers_but_after_them_where_they_share_gpus(shares_gpus, expected):
    calls = []
    trainers, engines = Recorder("trainers", calls), Recorder("engines", calls)
    assert start_processes(trainers, engines, shares_gpus=shares_gpus) == "report"
    assert calls == expected


def test_a_run_without_engines_starts_its_trainers_alone():
    calls = []
    assert start_processes(Recorder("trainers", calls), None, shares_gpus=True) == "report"
    assert calls == ["begin trainers", "finish trainers"]


def test_a_run_that_only_generates_writes_nothing_into_its_checkpoints_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(parse(["--save", str(tmp_path / "save"), "--debug-rollout-only"]), None, None, [])
    assert run.config.checkpoint.save is None
    assert run.log_dir.parents[1] == tmp_path / "runs"


def test_weights_that_travel_by_disk_have_a_directory_of_this_run_alone(tmp_path):
    config = parse(["--update-weight-transport", "disk"])
    assert with_disk_directory(config, tmp_path).weights.update_weight_disk_dir == str(tmp_path / "weights")
    given = parse(["--update-weight-transport", "disk", "--update-weight-disk-dir", "/fast"])
    assert with_disk_directory(given, tmp_path).weights.update_weight_disk_dir == "/fast"
