import pytest

from slime_opd.config import Config, difference_to_defaults, parse
from slime_opd.config.help import help_text
from slime_opd.config.options import options_of, stages_of
from slime_opd.errors import ConfigError


def test_help_prints_and_leaves_with_code_0(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--lr", "wrong", "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_help_has_one_line_per_option_under_its_stages_title():
    groups = help_text(Config, list(stages_of(Config))).split("\n\n")
    for stage, stage_class in stages_of(Config).items():
        (lines,) = (
            group.splitlines() for group in groups if group.splitlines()[0] == stage_class.__doc__.splitlines()[0]
        )
        flags = [option.flag for option in options_of(Config).values() if option.stage == stage]
        assert [line.split()[0] for line in lines[1:]] == flags


def test_help_shows_placeholders_choices_and_defaults():
    lines = {line.split()[0]: line for line in help_text(Config).splitlines() if line.startswith("  --")}
    assert "--opd-type {sglang,megatron}" in lines["--opd-type"]
    assert "--eval-prompt-data NAME FILE ..." in lines["--eval-prompt-data"]
    assert "--hf-checkpoint DIR" in lines["--hf-checkpoint"]
    assert lines["--opd-divergence-coef"].endswith("(default 1.0)")
    assert "default" not in lines["--use-opd"]


def test_help_of_a_group_shows_that_group_alone():
    text = help_text(Config, ["opd"])
    assert "--opd-kl-coef" in text
    assert "--lr " not in text and "--opd-divergence " not in text
    assert "--opd-divergence " in help_text(Config, ["divergence"])
    with pytest.raises(ConfigError, match=r"--help: found 'odp', expected groups of cluster, .*opd"):
        help_text(Config, ["odp"])


def test_difference_to_defaults_is_empty_for_the_defaults():
    assert difference_to_defaults(Config()) == ""


def test_difference_to_defaults_names_flag_value_and_default():
    config = parse(
        ["--use-opd", "--lr", "2e-6", "--eval-prompt-data", "a", "b", "--sglang-foo", "1", "2", "--num-rollout", "3"]
    )
    assert difference_to_defaults(config).splitlines() == [
        "--lr 2e-06 (default 1e-06)",
        "--num-rollout 3 (default unset)",
        "--eval-prompt-data a b (default none)",
        "--use-opd (default off)",
        "--sglang-foo 1 2",
    ]
