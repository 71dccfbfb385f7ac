"""Other trainers' names lead to the option here."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.config.options import options_of
from slime_opd.config.parser import parse_all
from slime_opd.config.synonyms import SYNONYMS


def test_every_hint_names_an_option_and_no_option_is_a_synonym():
    flags = {option.flag for option in options_of(Config).values()}
    named = [word for hint in SYNONYMS.values() for word in hint.split() if word.startswith("--")]
    assert set(named) <= flags
    assert not {f"--{name.replace('_', '-')}" for name in SYNONYMS} & flags


def test_another_trainers_name_is_answered_with_the_name_here():
    _, problems = parse_all(["--learning-rate", "1", "--max_new_tokens", "8"])
    assert problems == [
        "--learning-rate: unknown flag; here it is --lr",
        "--max_new_tokens: unknown flag; here it is --rollout-max-response-len",
    ]


def test_a_yaml_file_gets_the_same_hint(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\n")
    assert parse_all(["--config", str(file)])[1] == [f"{file}:1: unknown option 'epochs'; here it is --num-epoch"]
