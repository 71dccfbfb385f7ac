"""Which checkpoint a directory denotes, and what is refused and with which advice."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
from tiny_checkpoint import write_checkpoint, write_run

from slime_opd.checkpoint import directory
from slime_opd.checkpoint.directory import Location, find, read_run_state, require, tokenizer_dir
from slime_opd.checkpoint.whole import newest_whole, problems_of, require_whole
from slime_opd.config.parser import parse
from slime_opd.errors import CheckpointError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run's checkpoints of steps 2, 4 and 6."""
    return write_run(tmp_path_factory.mktemp("written") / "run", 2, 4, 6)


@pytest.fixture
def run(written, tmp_path):
    """A copy of them to damage."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def steps(root) -> list[int]:
    return list(directory.iterations(root))


def test_the_tracker_a_step_or_the_directory_itself_name_a_checkpoint(run):
    assert find(str(run)) == Location(run / "iter_0000006", 6)
    assert find(str(run), 4) == Location(run / "iter_0000004", 4)
    assert find(str(run / "iter_0000002")) == Location(run / "iter_0000002", 2)
    for location in directory.iterations(run).values():
        assert problems_of(location) == []
    assert read_run_state(find(str(run))) == {"step": 6, "prompts": {}}


def test_a_missing_an_empty_and_a_not_yet_saved_directory_have_no_checkpoint_yet(tmp_path):
    for entries in ([], ["run/config.yaml"], ["run.lock"], ["iter_0000002.partial/common.pt"], ["train.log"]):
        for entry in entries:
            (tmp_path / "started" / entry).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "started" / entry).write_text("")
        assert find(str(tmp_path / "started")) is None
        shutil.rmtree(tmp_path / "started", ignore_errors=True)
    assert find(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match=r"--ref-load .*: no checkpoint there; expected a latest_checkpointed"):
        require(str(tmp_path), "--ref-load")


def remove_tracker(run):
    (run / directory.TRACKER).unlink()


def tracker(content: bytes):
    return lambda run: (run / directory.TRACKER).write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "step", "expected"),
    [
        (remove_tracker, None, "--load RUN holds checkpoints but no latest_checkpointed_iteration.txt, which names the one to load; the newest whole one is step 6: give --load RUN --ckpt-step 6 or write 6 into that file, or give another directory to start anew"),
        (tracker(b"8"), None, "--load RUN: step 8 does not exist; existing steps: 2, 4, 6; the newest whole one is step 6: give --load RUN --ckpt-step 6"),
        (tracker(b""), None, "--load RUN/latest_checkpointed_iteration.txt holds '', expected a step number or 'release'; the newest whole checkpoint is step 6: give --load RUN --ckpt-step 6"),
        (tracker(b"\xff\xfe"), None, "--load RUN/latest_checkpointed_iteration.txt holds 'no text (UnicodeDecodeError)', expected a step number or 'release'; the newest whole checkpoint is step 6: give --load RUN --ckpt-step 6"),
        (tracker(b"release"), None, "--load RUN/release: the directory that latest_checkpointed_iteration.txt names is not there"),
        (lambda run: None, 5, "--load RUN: step 5 does not exist; existing steps: 2, 4, 6; the newest whole one is step 6: give --load RUN --ckpt-step 6"),
        (lambda run: (run / "iter_0000006/.metadata").unlink(), None, "--load RUN/iter_0000006: .metadata is missing; the newest earlier one that looks whole is step 4: --load RUN --ckpt-step 4"),
    ],
    ids=["no tracker", "absent step", "empty tracker", "no text", "absent release", "absent --ckpt-step", "no .metadata"],
)  # fmt: skip
def test_a_missing_part_is_an_error_with_the_step_to_load_and_never_a_new_start(run, harm, step, expected):
    harm(run)
    with pytest.raises(CheckpointError) as refusal:
        find(str(run), step)
    assert str(refusal.value).replace(str(run), "RUN") == expected


def test_without_a_tracker_a_damaged_newest_checkpoint_is_not_offered(run):
    remove_tracker(run)
    os.truncate(next((run / "iter_0000006").glob("*.distcp")), 10)
    with pytest.raises(CheckpointError, match=r"the newest whole one is step 4: give --load \S+ --ckpt-step 4"):
        find(str(run))


def test_a_file_and_an_unrelated_directory_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--load .*file is a file, expected a directory of checkpoints"):
        find(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="is not empty, but holds no checkpoint and no other file of a run"):
        find("/etc")


def test_a_checkpoint_in_the_older_format_is_named_as_such(tmp_path):
    (tmp_path / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / directory.TRACKER).write_text("3")
    with pytest.raises(CheckpointError, match="it is in Megatron-LM's older format 'torch', expected 'torch_dist'"):
        find(str(tmp_path))


def test_a_checkpoints_directory_with_the_step_of_another_is_refused(run):
    with pytest.raises(CheckpointError, match="is one checkpoint, but step 4 is another"):
        find(str(run / "iter_0000006"), 4)
    assert find(str(run / "iter_0000006"), 6) == Location(run / "iter_0000006", 6)


def harm_json(name, content):
    return lambda checkpoint: (checkpoint / name).write_text(content)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda c: os.truncate(next(c.glob("*.distcp")), 10), "__0_0.distcp has 10 bytes, manifest.sha256 records "),
        (lambda c: next(c.glob("*.distcp")).unlink(), "__0_0.distcp is missing"),
        (lambda c: (c / "common.pt").write_bytes(b"\0" * 1129), "common.pt "),
        (lambda c: (c / "common.pt").unlink(), "common.pt is missing"),
        (lambda c: (c / "metadata.json").unlink(), "metadata.json is missing"),
        (harm_json("metadata.json", "{"), "metadata.json has 1 bytes, manifest.sha256 records"),
        (lambda c: (c / "manifest.sha256").unlink(), "manifest.sha256 is missing, although this checkpoint was written with one"),
        (lambda c: (c / "manifest.sha256").write_text(""), "manifest.sha256 is damaged"),
        (lambda c: shutil.rmtree(c), "the directory does not exist"),
    ],
)  # fmt: skip
def test_the_quick_check_finds_damage_and_names_the_checkpoint_to_load_instead(run, harm, expected):
    location = find(str(run))
    harm(location.directory)
    with pytest.raises(CheckpointError) as refusal:
        require_whole(location, "--load")
    sentence = str(refusal.value).replace(str(run), "RUN")
    assert sentence.startswith(f"--load RUN/iter_0000006: {expected}")
    assert sentence.endswith("the newest earlier one that looks whole is step 4: --load RUN --ckpt-step 4")


def test_a_checkpoint_without_a_manifest_is_checked_too(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "iter_0000003", with_manifest=False)
    location = Location(checkpoint, 3)
    assert problems_of(location) == []
    (shard,) = checkpoint.glob("*.distcp")
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    assert problems_of(location) == [
        f"__0_0.distcp is cut off: it has {size - 1:,} bytes, .metadata refers to {size:,}"
    ]
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert problems_of(location) == ["metadata.json: the format is 'zarr', expected 'torch_dist'"]
    (checkpoint / "metadata.json").write_text("[]")
    assert problems_of(location) == ["metadata.json is damaged: expected a JSON object"]


def test_a_flipped_bit_in_a_small_file_is_found_but_not_where_checksums_are_not_compared(run):
    location = find(str(run))
    (shard,) = location.directory.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[-200] ^= 1
    shard.write_bytes(content)
    assert problems_of(location) == [
        f"{shard.name} is damaged: its contents differ from their checksum in manifest.sha256"
    ]
    assert problems_of(location, verify=False) == []


def test_random_damage_to_any_file_is_found_in_one_line_and_never_another_error(run):
    draw, location = random.Random(1), find(str(run))
    whole = {path: path.read_bytes() for path in location.directory.iterdir()}
    for _ in range(300):
        path, kind = draw.choice(sorted(whole)), draw.choice(["cut", "flip", "delete", "zero"])
        at = draw.randrange(len(whole[path]))
        if kind == "delete":
            path.unlink()
        elif kind == "flip":
            content = bytearray(whole[path])
            content[at] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
        else:
            path.write_bytes(whole[path][:at] if kind == "cut" else bytes(len(whole[path])))
        found = problems_of(location)
        if path.name == "run_state.json" and kind == "delete":
            with pytest.raises(CheckpointError, match="is missing"):
                read_run_state(location)
        else:
            assert len(found) == 1 and "\n" not in found[0], (path.name, kind, at, found)
        for problem in problems_of(location, verify=False):
            assert "\n" not in problem
        path.write_bytes(whole[path])
    assert problems_of(location) == []


def test_without_a_run_state_only_finetune_takes_the_weights(run):
    (run / "iter_0000006" / "run_state.json").unlink()
    with pytest.raises(CheckpointError) as refusal:
        read_run_state(find(str(run)))
    assert (
        "run_state.json is missing, which has the step and the data order to resume from: add --finetune to start"
        in str(refusal.value)
    )
    assert str(refusal.value).endswith("--ckpt-step 4")
    assert problems_of(find(str(run))) == []
    words = ["--load", str(run)]
    assert len(directory.problems(parse(words))) == 1 and directory.problems(parse([*words, "--finetune"])) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00" * 40])
def test_a_damaged_run_state_is_refused(tmp_path, content):
    checkpoint = write_checkpoint(tmp_path / "iter_0000003", with_manifest=False)
    (checkpoint / "run_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run_state\.json is damaged"):
        read_run_state(Location(checkpoint, 3))


def test_a_release_has_no_run_state(tmp_path):
    assert read_run_state(Location(tmp_path, None)) == {}


def test_all_checkpoints_of_a_configuration_are_checked_and_errors_name_the_right_step_flag(run, tmp_path):
    (run / "iter_0000006" / "common.pt").unlink()
    words = ["--load", str(run), "--ref-load", str(run), "--opd-teacher-load", str(run)]
    load, reference, teacher = directory.problems(parse(words))
    assert load.startswith("--load ") and load.endswith("--ckpt-step 4")
    assert reference.startswith("--ref-load ") and reference.endswith("--ref-ckpt-step 4")
    assert teacher.startswith("--opd-teacher-load ") and teacher.endswith("--opd-teacher-ckpt-step 4")
    assert directory.problems(parse([*words[:2], "--ckpt-step", "4"])) == []
    assert directory.problems(parse([])) == []


def test_a_flag_without_a_step_flag_gets_the_directory_to_load(run):
    (run / "iter_0000006" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"whole is step 4: --input-dir \S+/iter_0000004$"):
        require_whole(find(str(run)), "--input-dir")


def test_a_hugging_face_directory_with_a_manifest_is_compared_with_it(tmp_path):
    from slime_opd.checkpoint import manifest

    (tmp_path / "config.json").write_text("{}")
    location = Location(tmp_path, None, is_hugging_face=True)
    assert find(str(tmp_path)) == location and problems_of(location) == []
    manifest.write(tmp_path, manifest.measure(tmp_path, manifest.listed_files(tmp_path)))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: .*; copy or convert it again from its source"):
        require_whole(location, "--ref-load")


def test_partial_directories_and_other_names_are_not_checkpoints(run):
    for name in ("iter_0000008.partial", "iter_", "iter_x", "iter_0000009.backup"):
        (run / name).mkdir()
    assert steps(run) == [2, 4, 6] and newest_whole(run).iteration == 6


def test_the_tokenizer_of_a_checkpoint_is_found_beside_it(tmp_path):
    from slime_opd.checkpoint.tokenizer import copy_tokenizer

    source, checkpoint = tmp_path / "source", tmp_path / "iter_0000001"
    source.mkdir()
    checkpoint.mkdir()
    for name in (
        "tokenizer.json",
        "config.json",
        "spiece.model",
        "model.safetensors",
        "modeling_custom.py",
        "pytorch_model.bin",
    ):
        (source / name).write_text(name)
    assert tokenizer_dir(Location(checkpoint, 1)) is None
    copy_tokenizer(source, checkpoint)
    kept = tokenizer_dir(Location(checkpoint, 1))
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "spiece.model", "tokenizer.json"]
    assert tokenizer_dir(Location(source, None, is_hugging_face=True)) == source
    assert json.loads(json.dumps(str(kept))).endswith("iter_0000001/tokenizer")
