"""What was found is printed by kind, wrapped on a terminal, with one closing line, whatever happens in a look."""

from __future__ import annotations

import pytest

from slime_opd.errors import ConfigError
from slime_opd.preflight.findings import Findings, guarded


@pytest.mark.parametrize(
    ("found", "line", "code"),
    [
        (Findings(), "ready: no problem was found", 0),
        (Findings(unchecked=["a: b"]), "ready: no problem was found, 1 thing was not checked", 0),
        (Findings(problems=["a"]), "1 problem", 2),
        (Findings(problems=["a", "b", "a"], unchecked=["c", "d"]), "2 problems, 2 things were not checked", 2),
    ],
)
def test_the_closing_line_says_ready_or_how_many_problems(found, line, code):
    assert (found.closing_line, list(found.lines())[-1], found.exit_code) == (line, line, code)


def test_lines_stand_by_kind_with_the_problems_last():
    found = Findings(problems=["p"], unchecked=["u"], ok=["f"], notes=["n"], figures=["m"], differences=["d"])
    kinds = [line.split("  ")[0].strip() for line in found.lines()]
    assert kinds == ["ok", "note", "memory", "not checked", "differs", "problem", "1 problem, 1 thing was not checked"]


def test_on_a_terminal_sentences_are_wrapped_and_paths_stay_whole():
    path = "/a/very/long/path/that-has-hyphens/and/goes/on/and/on/for/more/than/eighty/columns/of/text"
    found = Findings(problems=[f"--save {path} is not writable because of this and that and some other reason"])
    lines = list(found.lines(80))
    assert path in "\n".join(lines) and all(len(line) <= 80 for line in lines if path not in line)
    assert all(line.startswith(" " * 13) for line in lines[1:-1]) and len(lines) > 3
    assert " ".join(" ".join(lines[:-1]).split()) == " ".join(next(iter(found.lines())).split())


def test_a_sentence_of_several_lines_or_with_half_a_character_is_one_line():
    assert next(iter(Findings(problems=["a\nb \ud800 c"]).lines())) == "problem      a b ? c"


def test_an_unexpected_error_of_an_inspection_is_a_problem_without_a_traceback():
    found = Findings()

    def look():
        raise KeyError("no\nsuch key")

    guarded(found, "weights", look)
    (error,) = found.internal_errors
    assert error.startswith("not checked: weights (internal error: KeyError: 'no\\nsuch key' at test_findings.py:")
    assert error.endswith("; please report it)")
    assert (found.exit_code, found.closing_line, found.problems) == (2, "1 problem", [])
    assert next(iter(found.lines())) == f"problem      {error}"


def test_an_expected_error_of_an_inspection_is_its_sentences():
    found = Findings()

    def look():
        raise ConfigError("one\ntwo")

    guarded(found, "weights", look)
    assert (found.problems, found.unchecked) == (["one", "two"], [])
