"""`--check` finds everything at once, and starts nothing."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
from conftest import save_tiny_model

from slime_opd import train
from slime_opd.checkpoint.formats.architecture import sizes_at
from slime_opd.config import machine, parse
from slime_opd.config.kernels import Machine
from slime_opd.errors import ConfigError
from slime_opd.preflight.check import preflight, require_ready

QWEN3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student, another model, and data."""
    root = tmp_path_factory.mktemp("preflight")
    save_tiny_model(root / "student")
    save_tiny_model(root / "other", num_hidden_layers=3, intermediate_size=96)
    rows = [{"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(8)]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def findings(arguments: str):
    return preflight(parse(shlex.split(arguments)), [])


def good(place) -> str:
    return (
        f"--hf-checkpoint {place}/student --megatron-to-hf-mode bridge --prompt-data {place}/train.jsonl --input-key prompt "
        f"--label-key label --rm-type exact_match --num-rollout 4 --rollout-batch-size 2 --n-samples-per-prompt 2 "
        f"--rollout-max-response-len 8 --save {place}/save"
    )


def test_a_run_that_makes_sense_has_no_problem_and_leaves_nothing_behind(place):
    found = findings(f"{good(place)} --use-opd --opd-type megatron --opd-teacher-load {place}/student")
    assert (found.problems, found.unchecked) == ([], [])
    said = "\n".join(found.ok)
    assert (
        "8 prompts, 4 to 4 tokens (median 4), labels in all" in said
        and "--opd-teacher-load" in said
        and "GiB free" in said
    )
    assert f"--hf-checkpoint and --opd-teacher-load {place}/student: 25 tensors, 106,944 values in F32" in said
    assert found.figures[0].startswith("0.1M parameters; about ")
    assert " MiB on each training rank: weights 0.2 MiB, gradients 0.2 MiB" in found.figures[0]
    assert found.closing_line == "ready: no problem was found"
    assert not (place / "save").exists()


def test_ten_mistakes_of_one_script_are_found_in_one_go(place, capsys):
    imported_before = set(sys.modules)
    arguments = (
        f"--hf-checkpoint {place}/student --prompt-data {place}/train.jsonl --input-key promt --label-key label --rm-type math "
        "--num-layers 24 --hidden-size 64 --num-attention-heads 4 --vocab-size 64 --lr fast --rollot-shuffle --kl-loss-type k9 "
        "--num-rollout 4 --rollout-batch-size 2 --n-samples-per-prompt 2 --rollout-max-response-len 8 --tensor-model-parallel-size 3 "
        f"--ref-load {place}/other --use-kl-loss --save-interval 2 --eval-prompt-data gone {place}/gone.jsonl --eval-interval 1 "
        "--use-opd --opd-type sglang --rm-url http://127.0.0.1:9/generate --opd-kl-coef -1 --sglang-mem-fraction-statik 0.5"
    )
    with pytest.raises(SystemExit) as left:
        train.main(["--check", *shlex.split(arguments)])
    assert left.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{sum(line.startswith('problem ') for line in lines)} problems"
    printed = [line for line in lines if line.startswith("problem ")]
    differs = [line.split()[1:] for line in lines if line.startswith("differs ")]
    assert differs == [
        ["flags", "--hf-checkpoint", "--ref-load"],
        ["num_hidden_layers", "24", "2", "3"],
        ["num_key_value_heads", "4", "2", "–"],
        ["rms_norm_eps", "1e-05", "1e-06", "–"],
        ["intermediate_size", "–", "128", "96"],
    ]
    planted = [
        "--lr: found 'fast', expected a number",
        "--rollot-shuffle: unknown flag; did you mean --rollout-shuffle?",
        "--kl-loss-type: found 'k9', expected one of k1, k2",
        "no key 'promt' (--input-key); present are prompt, label",
        "--num-layers: found 24, but",
        "are no multiple of 3 (--tensor-model-parallel-size",
        "--ref-load",
        "--save-interval 2 has no effect without --save",
        "--eval-prompt-data: found no file",
        "the teacher at --rm-url does not score",
        "--opd-kl-coef: found -1.0, expected a number from 0 to 10000",
        "did you mean --sglang-mem-fraction-static?",
    ]
    assert [mistake for mistake in planted if not any(mistake in line for line in printed)] == []
    assert (
        "not of --hf-checkpoint's architecture: num_hidden_layers 3 there, 2 here; intermediate_size 96 there, 128"
        in str(printed)
    )
    assert "ray" not in {name.partition(".")[0] for name in set(sys.modules) - imported_before}


def test_without_a_tokenizer_it_names_what_was_not_checked(place):
    found = findings(f"{good(place)} --hf-checkpoint {place}/nowhere")
    assert any("data and teacher" in line for line in found.unchecked)
    assert any("found no directory" in line for line in found.problems)


def test_a_place_without_a_checkpoint_has_no_shapes(tmp_path):
    assert sizes_at(str(tmp_path)) == {}


def test_the_start_of_the_run_is_reported_and_a_refused_start_is_a_problem(place, tmp_path):
    arguments = f"{good(place)} --use-opd --opd-type megatron --opd-teacher-load {place}/student --save {tmp_path}"
    assert any(f"start: --hf-checkpoint {place}/student" in line for line in findings(arguments).ok)
    step = tmp_path / "iter_0000002"
    step.mkdir()
    (step / ".metadata").touch()
    (step / "run_state.json").write_text('{"step": 2}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    (problem,) = findings(arguments).problems
    assert "holds checkpoints of another run" in problem and "give another --save" in problem


def test_a_kernel_that_this_computer_does_not_have_is_found_by_check_and_before_a_run(place, monkeypatch):
    monkeypatch.setattr(machine, "of_this_computer", lambda: Machine(has_cuda=True, compute_capability=(9, 0)))
    arguments = f"{good(place)} --attention-backend flash"
    (problem,) = findings(arguments).problems
    assert problem.startswith("--attention-backend flash: flash-attn is not installed here")
    with pytest.raises(ConfigError, match="--attention-backend flash: flash-attn is not installed here"):
        require_ready(parse(shlex.split(arguments)))
    without = findings(good(place))
    assert without.problems == []
    assert any(note.startswith("Transformer Engine is not installed here") for note in without.notes)
