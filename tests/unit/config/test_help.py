import pytest

from slime_opd.config import Config, parse
from slime_opd.config.help import help_text, title_of
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
        (lines,) = (group.splitlines() for group in groups if group.splitlines()[0] == title_of(stage_class))
        flags = [option.flag for option in options_of(Config).values() if option.stage == stage]
        assert [line.split()[0] for line in lines[1:]] == flags


def test_help_shows_placeholders_choices_and_defaults():
    lines = {line.split()[0]: line for line in help_text(Config).splitlines() if line.startswith("  --")}
    assert "--opd-type {sglang,megatron}" in lines["--opd-type"]
    assert "--eval-prompt-data NAME FILE ..." in lines["--eval-prompt-data"]
    assert "--hf-checkpoint DIR" in lines["--hf-checkpoint"]
    assert lines["--rollout-stop"].endswith("strings that end a response")
    assert lines["--seed"].endswith("(default 1234; in [0, 2147483647])")
    assert lines["--update-weight-transport"].endswith("(default auto)")
    assert "default" not in lines["--use-opd"]


def test_help_shows_ranges_and_what_an_option_depends_on():
    lines = {line.split()[0]: line for line in help_text(Config).splitlines() if line.startswith("  --")}
    assert lines["--lr"].endswith("(default 1e-06; in [0, 1])")
    assert lines["--save-interval"].endswith("(> 0; only with --save)")
    assert "(only with --use-opd)" in help_text(Config, ["opd"]).splitlines()[0]


def test_help_of_a_group_shows_that_group_alone():
    text = help_text(Config, ["opd"])
    assert "--opd-kl-coef" in text
    assert "  --lr " not in text and "  --opd-divergence " not in text
    assert "--opd-divergence " in help_text(Config, ["divergence"])
    with pytest.raises(ConfigError, match=r"--help: found 'odp', expected groups of cluster, .*opd"):
        help_text(Config, ["odp"])
