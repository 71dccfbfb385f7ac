"""Runs that cannot work, as users have started them: `--check` finds each, in a sentence, without a traceback."""

from __future__ import annotations

import json
import shlex
import shutil
import sys

import pytest
from damage import edit_config, truncate

from slime_opd import train
from slime_opd.errors import ConfigError


@pytest.fixture(scope="module")
def inputs(tiny_model_dir, tmp_path_factory):
    """A directory with a student and prompts."""
    root = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_model_dir, root / "student")
    rows = [{"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(8)]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def run(inputs, tmp_path):
    """A copy of the inputs that a test may damage, and the flags of a run that works."""
    root = shutil.copytree(inputs, tmp_path / "run")
    flags = (
        f"--hf-checkpoint {root}/student --megatron-to-hf-mode bridge --prompt-data {root}/train.jsonl --input-key prompt "
        "--label-key label --rm-type exact_match --num-rollout 4 --rollout-batch-size 2 --n-samples-per-prompt 2 "
        f"--rollout-max-response-len 8 --ray-address local --save {root}/save"
    )
    return root, shlex.split(flags)


def check(arguments, capsys):
    """Exit code and lines of `--check`."""
    with pytest.raises(SystemExit) as left:
        train.main(["--check", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return left.value.code, printed.out.splitlines()


def torch_dist(directory, metadata=b"\x80\x04garbage"):
    """A torch_dist checkpoint of step 1 whose `.metadata` is damaged."""
    step = directory / "iter_0000001"
    step.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("1")
    (step / ".metadata").write_bytes(metadata)
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (step / "common.pt").write_bytes(b"")
    (step / "__0_0.distcp").write_bytes(b"")


def garble(directory):
    (directory / "model.safetensors").write_bytes(b"garbage" * 100)


TEACHER = "--use-opd --opd-type megatron --opd-teacher-load"

# What is done to the run's directory, the flags that are added, and what one line of the answer has.
ROWS = {
    "truncated weights": (lambda root: truncate(root / "student"), "", "model.safetensors is truncated"),
    "garbage for weights": (lambda root: garble(root / "student"), "", "is not a whole safetensors file"),
    "no weights": (lambda root: (root / "student/model.safetensors").unlink(), "", "has no .safetensors file"),
    "truncated weights of the teacher": (
        lambda root: (shutil.copytree(root / "student", root / "teacher"), truncate(root / "teacher")),
        f"{TEACHER} ROOT/teacher",
        "--opd-teacher-load ROOT/teacher: ROOT/teacher/model.safetensors is truncated",
    ),
    "truncated weights to start from": (
        lambda root: (shutil.copytree(root / "student", root / "start"), truncate(root / "start", 0.99)),
        "--load ROOT/start",
        "--load ROOT/start: ROOT/start/model.safetensors is truncated",
    ),
    "a damaged checkpoint to continue from": (
        lambda root: torch_dist(root / "ck"),
        "--load ROOT/ck",
        "--load ROOT/ck/iter_0000001",
    ),
    "a damaged checkpoint of the teacher": (
        lambda root: torch_dist(root / "ck"),
        f"{TEACHER} ROOT/ck",
        "--opd-teacher-load ROOT/ck/iter_0000001",
    ),
    "a family that is not supported": (
        lambda root: edit_config(root / "student", model_type="gemma3"),
        "",
        "model_type 'gemma3' is not supported",
    ),
    "a config that contradicts the weights": (
        lambda root: edit_config(root / "student", hidden_size=32),
        "",
        "have another shape than config.json describes",
    ),
    "more processes than cores": (None, "--actor-num-gpus-per-node 4000", "4,000 training processes and 1 of engines"),
    "a micro-batch of ten tokens": (
        None,
        "--rollout-max-response-len 64 --use-dynamic-batch-size --max-tokens-per-gpu 10",
        "--max-tokens-per-gpu 10 is less than --rollout-max-response-len 64",
    ),
    "a rollout of a million million prompts": (
        None,
        "--rollout-batch-size 1000000000000",
        "the 2,000,000,000,000 samples",
    ),
    "a learning rate of a thousand": (None, "--lr 1000", "--lr: found 1000.0, expected a number from 0 to 1"),
    "an engine option of the wrong type": (
        None,
        "--sglang-mem-fraction-static five",
        "--sglang-mem-fraction-static: found 'five', expected a number",
    ),
    "a file for a directory": (None, "--save ROOT/train.jsonl/x", "is not writable: ROOT/train.jsonl is a file"),
    "a directory that no one can write to": (
        None,
        "--save /proc/x",
        "--save /proc/x is not writable: no file can be made",
    ),
    "a run directory that no one can write to": (None, "--run-dir /proc/x", "--run-dir /proc/x is not writable"),
    "a path that is none": (None, f"--save {'x' * 5000}", "is not writable"),
    "a learning rate that is no number": (None, "--lr nan", "--lr: found 'nan', expected a finite number"),
    "another trainer's flag": (None, "--learning-rate 1e-6", "--learning-rate: unknown flag; here it is --lr"),
    "a switch with a value": (None, "--use-opd maybe", "expected no value, true or false: it is a switch"),
}
# Allowed, and worth a note.
NOTED = {"a micro-batch of ten tokens"}


@pytest.mark.parametrize("name", ROWS)
def test_a_run_that_cannot_work_is_found_in_a_sentence(run, capsys, name):
    root, flags = run
    damage, more, sentence = ROWS[name]
    if damage is not None:
        damage(root)
    code, lines = check([*flags, *shlex.split(more.replace("ROOT", str(root)))], capsys)
    kind = "note " if name in NOTED else "problem "
    assert any(line.startswith(kind) and sentence.replace("ROOT", str(root)) in line for line in lines), lines
    assert not any("internal error" in line or "Traceback" in line for line in lines)
    assert (code, lines[-1].partition(" ")[0].isdigit()) == ((0, False) if name in NOTED else (2, True))


def test_the_run_that_they_are_made_from_is_ready_and_nothing_is_left_behind(run, capsys):
    root, flags = run
    before = sorted(root.rglob("*"))
    code, lines = check(flags, capsys)
    assert (code, lines[-1]) == (0, "ready: no problem was found")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("name", ["truncated weights", "a file for a directory", "a family that is not supported"])
def test_a_run_finds_the_same_before_ray_is_imported(run, name, monkeypatch):
    root, flags = run
    damage, more, sentence = ROWS[name]
    if damage is not None:
        damage(root)
    monkeypatch.setitem(sys.modules, "slime_opd.cluster.run", None)  # to import it raises ImportError
    with pytest.raises(ConfigError) as raised:
        train.main([*flags, *shlex.split(more.replace("ROOT", str(root)))])
    assert sentence.replace("ROOT", str(root)) in str(raised.value)


def test_weights_that_nothing_loads_need_not_be_there(run, capsys):
    root, flags = run
    shutil.move(root / "student", root / "start")
    shutil.copytree(root / "start", root / "student")
    (root / "student/model.safetensors").unlink()
    rows = [{"prompt": "1+1=", "label": "2"} for _ in range(8)]
    (root / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sft = f"--loss-type sft_loss --prompt-data {root}/sft.jsonl --load {root}/start"
    tuned = [flag for flag in flags if flag not in ("--rm-type", "exact_match")]
    code, lines = check([*tuned, *shlex.split(sft)], capsys)
    assert code == 0, lines
    assert not any("--hf-checkpoint" in line for line in lines if line.startswith("ok "))
