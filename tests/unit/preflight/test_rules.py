"""All rules of a run together, and the notes at its start."""

import copy
import shlex

import pytest

from slime_opd.config import parse
from slime_opd.config.config import Config
from slime_opd.errors import ConfigError
from slime_opd.preflight.rules import notes, problems, validate

MODEL = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --vocab-size 64"
DATA = "--hf-checkpoint student --prompt-data train.jsonl --label-key label"
ROLLOUT = "--num-rollout 2 --rollout-batch-size 2 --n-samples-per-prompt 2 --rollout-max-response-len 8"
TEACHER = "--use-opd --opd-type sglang --rm-url http://localhost:1/generate"
GOOD = f"{MODEL} {DATA} {ROLLOUT} {TEACHER}"


def config_of(arguments: str) -> Config:
    return parse(shlex.split(arguments))


def test_validate_reports_all_problems_one_line_each():
    with pytest.raises(ConfigError) as caught:
        validate(config_of(f"{GOOD} --opd-kl-coef -1 --bf16 --fp16 --save-interval 1"))
    lines = str(caught.value).splitlines()
    assert lines == problems(config_of(f"{GOOD} --opd-kl-coef -1 --bf16 --fp16 --save-interval 1"))
    assert len(lines) == 5  # the three, and two paths that are not there


def test_no_configuration_makes_a_check_fail_with_anything_but_a_sentence():
    zeros = "--global-batch-size 0 --num-steps-per-rollout 0 --tensor-model-parallel-size 0 --num-query-groups 0 --num-attention-heads 0 --rollout-num-gpus-per-engine 0 --rollout-num-gpus 0 --rollout-batch-size 0"
    assert len(problems(config_of(f"{GOOD} {zeros}"))) > 5
    assert len(problems(Config())) > 5


def test_no_rule_edits_the_configuration():
    config = config_of(f"{GOOD} --opd-kl-coef -1")
    before = copy.deepcopy(config)
    problems(config)
    assert config == before


SAVED = f"{GOOD} --save s"


def test_a_sensible_run_has_no_notes():
    assert notes(config_of(SAVED)) == []
    (note,) = notes(config_of(f"{SAVED} --colocate"))
    assert "keep their memory on the GPUs at the same time" in note and "--sglang-mem-fraction-static" in note


def test_a_run_without_checkpoints_has_a_note():
    (note,) = notes(config_of(GOOD))
    assert note.startswith("no --save")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (f"{SAVED} --rollout-temperature 0.8", "an SGLang teacher always scores at temperature 1"),
        (f"{SAVED} --rm-type math --n-samples-per-prompt 1", "only the teacher teaches"),
        (f"{SAVED} --load nowhere", "--load nowhere holds no checkpoint yet: training starts from --hf-checkpoint"),
        (f"{SAVED} --load nowhere --ref-load r", "training starts from --ref-load"),
        (
            f"{SAVED} --custom-reward-post-process-path slime.rollout.on_policy_distillation.post_process_rewards",
            "is built in",
        ),
    ],
)
def test_a_surprising_option_has_a_note(arguments, sentence):
    (note,) = notes(config_of(arguments))
    assert sentence in note


def test_a_checkpoint_to_continue_from_needs_no_note(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert notes(config_of(f"{SAVED} --load {tmp_path}")) == []
    assert notes(config_of(f"{GOOD} --load nowhere --save {tmp_path}")) == []
