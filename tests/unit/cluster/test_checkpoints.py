"""The driver's side of checkpoints, with trainers that write empty ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from slime_opd.checkpoint import directory, saves
from slime_opd.checkpoint.aside import complete_steps
from slime_opd.checkpoint.publish import publish
from slime_opd.cluster.checkpoints import RunCheckpoints
from slime_opd.config import Config
from slime_opd.config.stages import CheckpointConfig, DebugConfig, ModelConfig, OptimizerConfig, RolloutConfig
from slime_opd.errors import CheckpointError, ConfigError


class Source:
    """A cursor that counts, over prompts of one name."""

    def __init__(self, name: str = "prompts") -> None:
        self.name, self.offset = name, 0

    def identity(self) -> dict:
        return {"rows": 3, "fingerprint": self.name}

    def state(self) -> dict:
        return {"epoch": 0, "offset": self.offset, **self.identity()}

    def load_state(self, state: dict) -> None:
        if state["fingerprint"] != self.name:
            raise CheckpointError("--prompt-data gives other prompts")
        self.offset = state["offset"]


class Trainers:
    """Publishes a directory without weights."""

    def __init__(self, root: Path) -> None:
        self.root, self.saves = root, 0

    def save(self, step: int, run_state: dict) -> str:
        self.saves += 1
        partial = self.root / f"iter_{step:07d}.partial"
        partial.mkdir(parents=True)
        (partial / ".metadata").touch()
        (partial / directory.RUN_STATE).write_text(json.dumps(run_state))
        return str(publish(partial))

    def save_hugging_face(self, iteration_directory: str, path: str) -> None:
        assert Path(iteration_directory).is_dir()
        Path(path).mkdir(parents=True)


def config_of(save: Path, lr: float = 1e-3, **options) -> Config:
    return Config(
        model=ModelConfig(hf_checkpoint="hf"),
        optimizer=OptimizerConfig(lr=lr),
        rollout=RolloutConfig(num_rollout=100),
        checkpoint=CheckpointConfig(save=str(save), **options),
    )


def begin(config: Config, source: Source | None = None) -> tuple[RunCheckpoints, Trainers, Source]:
    source = source or Source()
    checkpoints, trainers = RunCheckpoints(config, source), Trainers(Path(config.checkpoint.save))
    checkpoints.begin(trainers)
    return checkpoints, trainers, source


def save(parts: tuple[RunCheckpoints, Trainers, Source], step: int, reason: str = "interval") -> None:
    checkpoints, trainers, source = parts
    source.offset = 10 * step
    checkpoints.save(trainers, {"step": step, "prompts": source.state()}, reason)


def test_the_same_command_continues_at_its_position_in_the_prompts(tmp_path, capsys):
    first = begin(config_of(tmp_path))
    assert first[0].start.step == 0
    save(first, 3)
    again, _, source = begin(config_of(tmp_path))
    assert (again.start.step, source.offset) == (3, 30)
    assert again.trainer_config.checkpoint.load == str(tmp_path / "iter_0000003")
    output = capsys.readouterr().out
    assert "resumed --save" in output and "at rollout 4" in output and "differ" not in output


def test_a_changed_option_is_shown(tmp_path, capsys):
    save(begin(config_of(tmp_path)), 3)
    begin(config_of(tmp_path, lr=2e-3))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("--lr "))
    assert line.split()[:3] == ["--lr", "0.001", "0.002"]


@pytest.mark.parametrize(
    ("change", "load", "sentence"),
    [({"seed": 7}, False, "--seed is 7"), ({}, True, "gives other prompts"), ({}, False, "on other prompts")],
)
def test_an_option_that_must_not_change_is_a_config_error(tmp_path, change, load, sentence):
    save(begin(config_of(tmp_path)), 3)
    config = config_of(tmp_path, load=str(tmp_path) if load else None)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **change))
    source = Source() if change else Source("others")
    with pytest.raises(ConfigError, match=sentence):
        RunCheckpoints(config, source)


def test_superfluous_checkpoints_by_time_are_removed_and_others_kept(tmp_path):
    parts = begin(config_of(tmp_path))
    for step, reason in ((1, "time"), (2, "interval"), (3, "time"), (4, "time"), (5, "time"), (6, "last")):
        save(parts, step, reason)
    assert complete_steps(tmp_path) == [2, 4, 5, 6]
    assert directory.find(str(tmp_path)).iteration == 6


def test_a_users_limit_replaces_the_default(tmp_path):
    parts = begin(config_of(tmp_path, keep_checkpoints=9))
    for step in range(1, 6):
        save(parts, step, "time")
    assert complete_steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_step_is_saved_once(tmp_path):
    parts = begin(config_of(tmp_path))
    save(parts, 3)
    save(parts, 3, saves.BY_REQUEST)
    assert parts[1].saves == 1


def test_time_counts_from_the_last_checkpoint(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    parts = begin(config_of(tmp_path, save_interval_minutes=1.0))
    now = 59.0
    assert parts[0].reason(1) is None
    now = 61.0
    assert parts[0].reason(1) == "time"
    save(parts, 1, "time")
    assert parts[0].reason(2) is None
    assert parts[0].reason(100) == "last"


def test_without_save_nothing_is_due(tmp_path):
    config = dataclasses.replace(config_of(tmp_path), checkpoint=CheckpointConfig())
    assert RunCheckpoints(config, Source()).reason(100) is None


def test_each_checkpoint_has_a_hugging_face_copy_even_if_a_kill_prevented_it(tmp_path):
    config = config_of(tmp_path / "save", save_hf=str(tmp_path / "hf" / "step_{rollout_id}"))
    parts = begin(config)
    save(parts, 2)
    save(parts, 4)
    made = tmp_path / "hf"
    assert sorted(path.name for path in made.iterdir()) == ["step_2", "step_4"]
    (made / "step_4").rmdir()
    again = begin(config)
    assert sorted(path.name for path in made.iterdir()) == ["step_2", "step_4"]
    # What SIGTERM asks for has to be quick.
    save(again, 5, saves.BY_REQUEST)
    assert not (made / "step_5").exists()
    begin(config)
    assert (made / "step_5").exists()


def test_later_checkpoints_are_set_aside_only_by_a_run_that_will_write_some(tmp_path):
    parts = begin(config_of(tmp_path))
    for step in (2, 4):
        save(parts, step)
    back = config_of(tmp_path, ckpt_step=2)
    begin(dataclasses.replace(back, rollout=RolloutConfig(num_rollout=0)))
    assert complete_steps(tmp_path) == [2, 4]
    begin(back)
    assert complete_steps(tmp_path) == [2]


def test_weights_alone_are_continued_with_a_fresh_optimizer(tmp_path, capsys):
    save(begin(config_of(tmp_path, no_save_optim=True)), 2)
    again, _, _ = begin(config_of(tmp_path, no_save_optim=True))
    assert again.trainer_config.checkpoint.no_load_optim and again.start.step == 2
    assert "is initialised anew" in capsys.readouterr().out


def test_a_replay_may_load_the_recorded_runs_checkpoint_but_not_share_its_save(tmp_path):
    config = config_of(tmp_path / "recorded")
    save(begin(config), 3)
    replay = dataclasses.replace(config, debug=DebugConfig(load_debug_rollout_data="rollouts/{rollout_id}"))
    with pytest.raises(ConfigError, match=r"is of a run that generated its rollouts: give this run another --save"):
        RunCheckpoints(replay, None)
    options = CheckpointConfig(save=str(tmp_path / "replay"), load=str(tmp_path / "recorded"))
    replay = dataclasses.replace(replay, checkpoint=options)
    checkpoints = RunCheckpoints(replay, None)
    assert checkpoints.start.step == 3 and checkpoints.run_state["prompts"]["offset"] == 30
    trainers = Trainers(tmp_path / "replay")
    checkpoints.save(trainers, {"step": 4, "prompts": checkpoints.run_state["prompts"]}, "interval")
    assert RunCheckpoints(replay, None).start.step == 4
