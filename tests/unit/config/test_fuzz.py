"""Whatever is said, the answer is a configuration or sentences: never a traceback."""

from __future__ import annotations

import contextlib
import io

from hypothesis import example, given, settings
from hypothesis import strategies as st

from slime_opd.config import parse
from slime_opd.config.checks import problems
from slime_opd.config.config import Config
from slime_opd.config.megatron_options import NAMES
from slime_opd.config.options import options_of
from slime_opd.config.parser import parse_all
from slime_opd.errors import ConfigError
from slime_opd.preflight.rules import notes

OPTIONS = list(options_of(Config).values())
FLAGS = [*(option.flag for option in OPTIONS), *NAMES, "--sglang-x", "--config", "--no-lr", "--"]
WORDS = st.one_of(
    st.sampled_from(
        ["0", "1", "-1", "2", "7", "1e-6", "inf", "nan", "0.5", "true", "false", "", "=", "x", "a.b", "[0]*3", "{}"]
    ),
    st.sampled_from(sorted({choice for option in OPTIONS for choice in option.choices})),
    st.text(max_size=8),
)
LINES = st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(WORDS, max_size=3)), max_size=12)


def parsed(arguments: list[str]) -> tuple[Config, list[str]] | None:
    """What `parse_all` makes of the arguments; None where they ask for help, and get it or a sentence."""
    try:
        return parse_all(arguments)
    except (SystemExit, ConfigError):
        assert {"--help", "-h"} & {word.partition("=")[0] for word in arguments}
        return None


@settings(max_examples=400, deadline=None)
@given(LINES)
@example([("--config", ["/"])])
@example([("--opd-schedule", ["forward_kl:"]), ("--opd-coef-ramp", ["0:0,"])])
@example([("--lr", ["-h", "0"])])
def test_any_arguments_are_a_configuration_or_sentences(lines):
    arguments = [word for flag, rest in lines for word in (flag, *rest)]
    with contextlib.redirect_stdout(io.StringIO()):
        found = parsed(arguments)
    if found is None:
        return
    config, said = found
    for line in [*said, *problems(config), *notes(config)]:
        assert line.strip() and "\n" not in line
    try:
        parse(arguments)
    except ConfigError as error:
        assert str(error).splitlines() == said


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=8))
def test_any_text_is_a_configuration_or_sentences(arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        found = parsed(arguments)
    assert found is None or all(isinstance(line, str) and line for line in found[1])
