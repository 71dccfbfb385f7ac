"""Options of the engines, against the installed SGLang's parser."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from slime_opd.config import parse
from slime_opd.preflight import check_sglang


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (
            "--sglang-mem-fraction-statik",
            "the installed SGLang has no --mem-fraction-statik; did you mean --sglang-mem-fraction-static?",
        ),
        ("--sglang-api-key", "--sglang-api-key is set by this package: a run makes a key of its own"),
        ("--sglang-port", "--sglang-port is set by this package: each engine takes a free one"),
        ("--sglang-tp-size", "use --rollout-num-gpus-per-engine"),
    ],
)
def test_an_option_that_the_engines_do_not_know_is_refused(flag, sentence):
    (problem,) = check_sglang.check_sglang_options(parse([flag, "0.5"]))
    assert sentence in problem


def test_known_engine_options_pass_and_without_sglang_any_option_passes(monkeypatch):
    arguments = "--sglang-mem-fraction-static 0.7 --sglang-cuda-graph-bs 1 2 4 --sglang-attention-backend fa3 --sglang-enable-deterministic-inference"
    assert check_sglang.check_sglang_options(parse(arguments.split())) == []
    check_sglang._options_of_sglang.cache_clear()
    monkeypatch.setattr(check_sglang.importlib.util, "find_spec", lambda name: None)
    assert check_sglang.check_sglang_options(parse(["--sglang-no-such-thing", "1"])) == []
    check_sglang._options_of_sglang.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--sglang-mem-fraction-static five", "found 'five', expected a number"),
        ("--sglang-mem-fraction-static 5", "found '5', expected a number between 0 and 1"),
        ("--sglang-mem-fraction-static nan", "found 'nan', expected a number"),
        ("--sglang-mem-fraction-static", "found no value, expected a number"),
        ("--sglang-mem-fraction-static 0.1 0.2", "found '0.1 0.2', expected a number"),
        ("--sglang-max-running-requests 2.5", "found '2.5', expected a whole number"),
        ("--sglang-attention-backend tritom", "did you mean triton?"),
        ("--sglang-schedule-policy first", "expected one of lpm, random, fcfs"),
        ("--sglang-enable-deterministic-inference yes", "expected no value: it is a switch"),
        ("--sglang-cuda-graph-bs 1 two", "found '1 two', expected a whole number"),
        ("--sglang-cuda-graph-bs", "found no value, expected a whole number, one or more"),
        ("--sglang-json-model-override-args", "found no value, expected a value"),
    ],
)
def test_a_value_that_the_engines_would_refuse_is_refused(arguments, sentence):
    (problem,) = check_sglang.check_sglang_options(parse(arguments.split()))
    assert problem.startswith(f"{arguments.split()[0]}: ") and sentence in problem


def test_every_option_of_the_installed_sglang_takes_its_own_default():
    options = check_sglang._options_of_sglang()
    assert len(options) > 250
    source = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "server_args.py"
    (fields,) = (
        node.body
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "ServerArgs"
    )
    defaults = {
        field.target.id.replace("_", "-"): field.value.value
        for field in fields
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant)
    }
    taken = {name: str(value) for name, value in defaults.items() if type(value) in (int, float, str)}
    checked = {name: options[name].problem((value,)) for name, value in taken.items() if name in options}
    assert len(checked) > 80
    # Its default is 10.0 and its type int: argparse converts no default that is not text.
    assert {name for name, problem in checked.items() if problem} == {"mm-per-request-timeout"}
