"""The commands of `python -m slime_opd`, and what a shell is told may follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from slime_opd.__main__ import COMMANDS, main
from slime_opd.errors import ConfigError


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_it_shows_them(arguments, capsys):
    main(arguments)
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m slime_opd COMMAND") and all(f"\n  {name} " in said for name in COMMANDS)


def test_an_unknown_command_is_a_sentence():
    with pytest.raises(ConfigError, match="found the command 'trian', expected one of train, check, report"):
        main(["trian"])


def test_train_is_train(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help", "opd"])
    assert "--opd-kl-coef" in capsys.readouterr().out


def test_report_is_a_table_and_a_picture(tmp_path, capsys):
    records = [{"step": 0, "eval/a/accuracy": 0.5}, {"step": 1, "opd/reverse_kl": 0.25, "perf/step_time": 2.0}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    main(["report", str(tmp_path / "run"), str(tmp_path / "picture.png")])
    assert "| run | 50.0% | 50.0% | 0.250 | 0.250 | 2.00 |" in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for arguments in ([], [str(tmp_path / "gone")], ["a.png", "b.png"]):
        with pytest.raises(ConfigError, match=r"report: found|not found"):
            main(["report", *arguments])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slime_opd ", {"train", "check", "report"}),
        ("slime_opd train --opd-div", {"--opd-divergence", "--opd-divergence-coef"}),
        ("slime_opd check --opd-type ", {"sglang", "megatron"}),
        ("slime_opd train --moe-router-topk-l", {"--moe-router-topk-limited-devices"}),
    ],
)
def test_a_shell_gets_completions(line, expected, tmp_path):
    requested = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    answer = tmp_path / "answer"
    environment = {**os.environ, **requested, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-m", "slime_opd"], env=environment, check=True, timeout=60)
    assert {word.strip() for word in answer.read_text().split("\n")} >= expected
