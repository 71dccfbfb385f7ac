import subprocess
import sys
import time
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_opd.config import Config, command_line, parse
from slime_opd.config.options import Option, options_of, stages_of
from slime_opd.errors import ConfigError

OPTIONS = options_of(Config)


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(list(argv))
    return str(caught.value).splitlines()


def words_of(option: Option) -> st.SearchStrategy[str]:
    if option.choices:
        return st.sampled_from(option.choices)
    if option.kind is int:
        return st.integers(-(10**9), 10**9).map(str)
    if option.kind is float:
        return st.floats(allow_nan=False, allow_infinity=False).map(repr)
    return st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])).filter(
        lambda word: not word.startswith("-")
    )


def test_no_arguments_give_the_defaults():
    assert parse([]) == Config()


def test_every_field_of_every_stage_is_an_option():
    declared = [row.name for stage in stages_of(Config).values() for row in fields(stage)]
    assert list(OPTIONS) == declared
    assert {row.name for row in fields(Config)} - set(stages_of(Config)) == {"sglang"}


@pytest.mark.parametrize("name", OPTIONS)
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_every_option_is_read_back_with_its_type(name, data):
    option = OPTIONS[name]
    if option.is_switch:
        assert option.read(parse([option.flag])) is True
        return
    arguments = data.draw(st.lists(words_of(option), min_size=1, max_size=3 if option.many else 1))
    found = option.read(parse([option.flag, *arguments]))
    expected = tuple(option.kind(word) for word in arguments)
    assert found == (expected if option.many else expected[0])


def test_values_are_typed_by_their_annotation():
    config = parse(["--lr", "1e-5", "--num-rollout", "3", "--use-opd", "--rollout-stop-token-ids", "1", "-2"])
    assert (config.optimizer.lr, config.rollout.num_rollout, config.opd.use_opd) == (1e-5, 3, True)
    assert config.rollout.rollout_stop_token_ids == (1, -2)


def test_the_last_of_a_repeated_flag_wins_and_an_equals_sign_works():
    config = parse(["--lr", "1", "--lr=2", "--rollout-stop=--", "--use-opd", "--use-opd=false"])
    assert (config.optimizer.lr, config.rollout.rollout_stop, config.opd.use_opd) == (2.0, ("--",), False)


def test_sglang_options_are_collected_and_options_of_this_package_are_not():
    config = parse(
        ["--sglang-cuda-graph-bs", "1", "2", "4", "--sglang-server-concurrency", "7", "--sglang-enable-x", "--lr", "1"]
    )
    assert config.sglang == {"cuda-graph-bs": ("1", "2", "4"), "enable-x": ()}
    assert config.rollout.sglang_server_concurrency == 7


def test_a_misspelt_flag_is_named_with_the_flag_it_resembles():
    assert problems_of("--rollout-bacth-size", "4") == [
        "--rollout-bacth-size: unknown flag; did you mean --rollout-batch-size?"
    ]
    assert problems_of("--zzz") == ["--zzz: unknown flag"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--lr fast", "--lr: found 'fast', expected a number"),
        ("--lr nan", "--lr: found 'nan', expected a finite number"),
        ("--num-rollout 1.5", "--num-rollout: found '1.5', expected a whole number"),
        ("--num-rollout", "--num-rollout: found no value, expected a whole number"),
        ("--num-rollout 1 2", "--num-rollout: found 2 values ['1', '2'], expected a whole number"),
        ("--use-opd 1", "--use-opd: found '1', expected no value, true or false: it is a switch"),
        (
            "--opd-type sglan",
            "--opd-type: found 'sglan', expected one of sglang, megatron; did you mean sglang?",
        ),
        ("--rollout-stop-token-ids 1 x", "--rollout-stop-token-ids: found 'x', expected a whole number"),
        ("lr 1", "found 'lr' before any flag, expected flags that start with --"),
    ],
)
def test_a_wrong_argument_is_one_sentence_with_flag_found_and_expected(argv, sentence):
    assert problems_of(*argv.split()) == [sentence]


def test_all_wrong_arguments_are_reported_together():
    assert len(problems_of("--lr", "x", "--num-rollout", "y", "--nothing")) == 3


def test_slimes_teacher_hook_means_the_built_in_teacher():
    config = parse(["--custom-rm-path", "slime.rollout.on_policy_distillation.reward_func"])
    assert config.reward.custom_rm_path is None
    assert parse(["--custom-rm-path", "mine.reward"]).reward.custom_rm_path == "mine.reward"


def test_command_line_prints_each_problem_and_leaves_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "x", "--nothing"])
    with pytest.raises(SystemExit) as left:
        command_line(parse)
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "slime_opd: error: --lr: found 'x', expected a number",
        "slime_opd: error: --nothing: unknown flag",
    ]


def test_command_line_leaves_with_code_0_and_lets_other_errors_through(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    with pytest.raises(SystemExit) as left:
        command_line(parse)
    assert left.value.code == 0
    with pytest.raises(ZeroDivisionError):
        command_line(lambda _: 1 / 0)


def test_a_wrong_flag_ends_a_process_with_one_line_and_code_2_in_seconds():
    program = "from slime_opd.config import command_line, parse; command_line(parse)"
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", program, "--use-odp"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "slime_opd: error: --use-odp: unknown flag; did you mean --use-opd?\n"
    assert time.monotonic() - start < 5


def test_chunks_grow_with_tensor_parallelism_unless_their_size_is_given():
    parallel = ["--tensor-model-parallel-size", "8", "--actor-num-gpus-per-node", "8"]
    assert parse([]).log_probs_chunk_size == 1024
    assert parse(parallel).log_probs_chunk_size == 8 * 1024
    assert parse([*parallel, "--log-probs-chunk-size", "7"]).log_probs_chunk_size == 7
