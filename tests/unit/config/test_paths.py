"""Relative paths are made absolute before other processes, which have other working directories, are given them."""

from __future__ import annotations

import os

from slime_opd.config import parse
from slime_opd.config.paths import with_absolute_paths


def test_every_path_that_leaves_the_driver_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "--hf-checkpoint": "student",
        "--load": "../load",
        "--save": "save",
        "--save-hf": "hf/{rollout_id}",
        "--ref-load": "/ref",
        "--opd-teacher-load": "teacher",
        "--run-dir": "run",
        "--save-debug-rollout-data": "rollouts/{rollout_id}",
    }
    config = with_absolute_paths(parse([word for pair in given.items() for word in pair]))
    assert config.model.hf_checkpoint == str(tmp_path / "student")
    assert config.checkpoint.load == str(tmp_path.parent / "load")
    assert config.checkpoint.save == str(tmp_path / "save")
    assert config.checkpoint.save_hf == str(tmp_path / "hf" / "{rollout_id}")
    assert config.checkpoint.ref_load == "/ref"
    assert config.opd.opd_teacher_load == str(tmp_path / "teacher")
    assert config.observe.run_dir == str(tmp_path / "run")
    assert os.path.isabs(config.debug.save_debug_rollout_data)
    assert config.weights.update_weight_disk_dir is None
