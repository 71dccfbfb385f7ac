"""The declarations of options: complete, consistent, and enough to add an option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from write_flags_page import PAGE, flags_page

from slime_opd.algorithm import advantages, kl
from slime_opd.config import check_options, parse
from slime_opd.config.conditions import equals, is_set
from slime_opd.config.config import Config
from slime_opd.config.help import help_text
from slime_opd.config.options import option, options_of
from slime_opd.config.ranges import FRACTION, POSITIVE, POSITIVE_FRACTION, TOP_K, Range
from slime_opd.config.resume import HONOURED, OnResume
from slime_opd.distill import candidates, divergences
from slime_opd.reward.reward import REWARDS
from slime_opd.schedule import KINDS
from slime_opd.weights.update import TRANSPORTS

OPTIONS = options_of(Config)


@dataclass(frozen=True)
class Server:
    """A server"""

    on_resume: ClassVar[OnResume] = HONOURED

    server: bool = option(False, help="start a server", needs=("port",))
    port: int | None = option(None, help="its port", within=POSITIVE, only_with=(is_set("server"),))
    log: str | None = option(
        None, help="none, text or json", choices=("none", "text", "json"), needs={"text": ("port",)}
    )
    indent: int = option(2, help="spaces", only_with=(is_set("server"), equals("log", "json")))


@dataclass(frozen=True)
class Small:
    server: Server = field(default_factory=Server)


def problems(**values) -> list[str]:
    config = Small(Server(**values))
    found = [option for option in options_of(Small).values() if option.is_given(config)]
    unmet = {option.name: str(condition) for option in found if (condition := option.unmet_condition(config))}
    missing = {option.name: [other.name for other in option.missing_needs(config)] for option in found}
    return [f"{name} without {text}" for name, text in unmet.items()] + [
        f"{name} needs {' '.join(names)}" for name, names in missing.items() if names
    ]


def test_an_option_at_its_default_has_no_conditions_and_needs():
    assert problems() == [] and problems(indent=2, log="none") == []


def test_the_outermost_condition_that_does_not_hold_is_reported():
    assert problems(indent=4) == ["indent without --server"]
    assert problems(indent=4, server=True, port=1) == ["indent without --log json"]
    assert problems(indent=4, server=True, port=1, log="json") == []


def test_a_need_may_be_that_of_one_value():
    assert problems(server=True) == ["server needs port"]
    assert problems(log="text") == ["log needs port"]
    assert problems(log="json") == []


def test_an_option_without_a_rule_for_resuming_is_refused():
    @dataclass(frozen=True)
    class Undeclared:
        """A stage without on_resume"""

        port: int = option(1, help="its port")

    Broken = dataclass(frozen=True)(type("Broken", (), {"__annotations__": {"stage": Undeclared}, "stage": None}))
    with pytest.raises(TypeError, match="--port declares no on_resume"):
        options_of(Broken)


@pytest.mark.parametrize(
    ("range_", "inside", "outside", "text", "short"),
    [
        (POSITIVE, (1, 1e-9), (0, -1), "a number above 0", "> 0"),
        (FRACTION, (0, 1), (-0.1, 1.1), "a number from 0 to 1", "in [0, 1]"),
        (POSITIVE_FRACTION, (0.1, 1), (0, 1.1), "a number above 0 and at most 1", "in (0, 1]"),
        (TOP_K, (-1, 1), (0, -2), "-1 (all tokens) or a number above 0", "-1 or > 0"),
        (Range(at_least=0, below=1), (0, 0.9), (1, -1), "0 or more and below 1", "in [0, 1)"),
        (Range(above=0, below=1), (0.5,), (0, 1), "a number between 0 and 1, both excluded", "in (0, 1)"),
        (Range(at_most=2), (2, -9), (3,), "at most 2", "<= 2"),
    ],
)
def test_a_range_accepts_its_numbers_and_names_them(range_, inside, outside, text, short):
    assert all(value in range_ for value in inside) and not any(value in range_ for value in outside)
    assert (str(range_), range_.short) == (text, short)


def test_the_reason_for_an_upper_bound_is_given_beyond_it_alone():
    bounded = Range(at_least=0, at_most=10, reason="nobody has more")
    assert bounded.expected(11) == "a number from 0 to 10: nobody has more"
    assert bounded.expected(-1) == "a number from 0 to 10"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--lr 1000", "--lr: found 1000.0, expected a number from 0 to 1: Adam moves every weight"),
        ("--rollout-temperature 1e6", "expected a number above 0 and at most 100: every token would be equally likely"),
        ("--seed 4294967296", "--seed: found 4294967296, expected a number from 0 to 2147483647: seeds have 31 bits"),
        ("--rollout-request-timeout-s 1e12", "that is three years"),
        ("--bucket-size 0", "--bucket-size (--ddp-bucket-size): found 0, expected a number above 0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_reason(arguments, sentence):
    (problem,) = check_options.check_ranges(parse(arguments.split()))
    assert sentence in problem


@pytest.mark.parametrize("arguments", ["--lr 1", "--opd-kl-coef 1000", "--seed 2147483647", "--rollout-top-k -1"])
def test_a_bound_of_a_range_is_accepted(arguments):
    assert check_options.check_ranges(parse(arguments.split())) == []


def test_every_default_is_in_the_range_and_a_choice():
    for declared in OPTIONS.values():
        within = declared.declaration.within
        assert within is None or declared.default is None or declared.default in within, declared.name
        assert not declared.choices or declared.default in (None, (), *declared.choices), declared.name


def test_declarations_name_options_that_exist():
    for declared in OPTIONS.values():
        needs = declared.declaration.needs
        needed = [name for names in needs.values() for name in names] if isinstance(needs, Mapping) else needs
        conditions = (*declared.stage_only_with, *declared.declaration.only_with)
        assert {*needed, *(name for condition in conditions for name in condition.names)} <= OPTIONS.keys()
        assert not isinstance(needs, Mapping) or set(needs) <= set(declared.choices)


@pytest.mark.parametrize(
    ("name", "implemented"),
    [
        ("advantage_estimator", advantages.ESTIMATORS),
        ("kl_loss_type", kl.ESTIMATORS),
        ("opd_divergence", (*KINDS, "token_reward_direct")),
        ("opd_top_k_strategy", candidates.STRATEGIES),
        ("opd_top_k_remainder", divergences.REMAINDERS),
        ("rm_type", REWARDS),
        ("eval_rm_type", REWARDS),
        ("update_weight_transport", ("auto", *TRANSPORTS)),
    ],
)
def test_choices_are_what_is_implemented(name, implemented):
    assert set(OPTIONS[name].choices) == set(implemented)


def test_help_shows_the_declarations():
    line = next(line for line in help_text(Config).splitlines() if line.startswith("  --opd-token-keep-fraction "))
    assert line.endswith("(default 0.5; in (0, 1]; only with --opd-token-weighting top)")


def test_the_page_of_flags_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run python tools/write_flags_page.py"


def test_the_page_has_every_option_that_is_not_megatrons():
    text = flags_page()
    assert all((f"| `{declared.flag}" in text) == (declared.stage != "megatron") for declared in OPTIONS.values())
