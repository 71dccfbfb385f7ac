"""Files that options name are there."""

import json

import pytest

from slime_opd.config import parse
from slime_opd.preflight import check_files


@pytest.fixture
def student(tmp_path):
    directory = tmp_path / "student"
    directory.mkdir()
    architecture = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    (directory / "config.json").write_text(json.dumps(architecture))
    return directory


def test_model_directories_that_are_there_are_no_problem(student, tmp_path):
    arguments = ["--hf-checkpoint", str(student), "--ref-load", str(student), "--opd-teacher-load", str(student)]
    assert check_files.check_checkpoints_exist(parse([*arguments, "--load", str(tmp_path / "not-yet")])) == []


@pytest.mark.parametrize("flag", ["--hf-checkpoint", "--ref-load", "--opd-teacher-load"])
def test_a_missing_model_directory_is_named(flag, tmp_path):
    missing = tmp_path / "missing"
    assert check_files.check_checkpoints_exist(parse([flag, str(missing)])) == [
        f"{flag}: found no directory {missing}, expected one with a checkpoint"
    ]


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    assert check_files.check_checkpoints_exist(parse(["--ref-load", str(tmp_path)])) == [
        f"--ref-load: found the empty directory {tmp_path}, expected one with a checkpoint"
    ]
    assert check_files.check_checkpoints_exist(parse(["--hf-checkpoint", str(tmp_path)])) == [
        f"--hf-checkpoint: found no config.json in {tmp_path}, expected a Hugging Face checkpoint"
    ]


@pytest.mark.parametrize("flag", ["--load", "--save"])
def test_a_file_is_no_checkpoint_directory(flag, student):
    file = student / "config.json"
    assert check_files.check_checkpoints_exist(parse([flag, str(file)])) == [
        f"{flag}: found the file {file}, expected a directory"
    ]


def test_missing_data_is_named_and_a_slice_is_no_part_of_the_name(tmp_path):
    there = tmp_path / "there.jsonl"
    there.write_text("{}\n")
    fine = ["--prompt-data", f"{there}@[0:5]", "--eval-prompt-data", "a", str(there)]
    assert check_files.check_data_exists(parse(fine)) == []
    missing = ["--prompt-data", "gone.jsonl@[0:5]", "--eval-prompt-data", "a", str(there), "b", "gone.parquet"]
    assert check_files.check_data_exists(parse(missing)) == [
        "--prompt-data: found no file gone.jsonl, expected one in JSONL, JSON, CSV or Parquet",
        "--eval-prompt-data: found no file gone.parquet, expected one in JSONL, JSON, CSV or Parquet",
    ]
