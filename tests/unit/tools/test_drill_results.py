"""The file of a drill's outcomes: a drill that was cut short goes on, and failed kills are done again."""

from __future__ import annotations

import pytest
from drill.results import FINISHED, Result, ResultFile

PLAN = {"seed": 0, "kills": 3, "kinds": ["driver-kill"], "stacks": ["sft"]}


def result(number: int, *problems: str) -> Result:
    return Result(number, "driver-kill" if number else FINISHED, "sft", "train", problems=list(problems))


def test_failed_kills_are_repeated(tmp_path):
    path = tmp_path / "results.json"
    ResultFile(path, PLAN).add([result(1), result(2, "hung"), result(0)])
    again = ResultFile(path, PLAN)
    assert again.done == {1}
    again.add([result(2), result(0)])
    assert ResultFile(path, PLAN).done == {1, 2}
    assert [one.number for one in ResultFile(path, PLAN).results] == [1, 0, 2, 0]


def test_a_file_of_another_drill_is_refused(tmp_path):
    ResultFile(tmp_path / "results.json", PLAN).add([result(1)])
    with pytest.raises(ValueError, match="use another file"):
        ResultFile(tmp_path / "results.json", {**PLAN, "seed": 1})
