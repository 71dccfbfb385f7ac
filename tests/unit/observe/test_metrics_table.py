"""docs/metrics.md lists exactly what a run can log."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import torch
from brute_force import cases, problem
from objective_cases import objective_of

from slime_opd import fields
from slime_opd.objective.options import SupervisedOptions
from slime_opd.objective.supervised import supervised_objective
from slime_opd.objective.tokens import Terms, TokenColumns
from slime_opd.observe.metrics import batch_metrics
from slime_opd.rollout.evaluate import _means
from slime_opd.types import RolloutBatch

ROOT = Path(__file__).parents[3]
NAME = re.compile(r"(train|opd|rollout|perf)/[a-z0-9_]+(/[a-z]+)?")


def documented() -> list[str]:
    """The names in the first column of the table, in order."""
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def of_objectives() -> set[str]:
    """What every objective reports of itself, on small problems."""
    found: set[str] = set()
    for case in cases():
        given = problem(case)
        objective = objective_of(case, given, given["hidden"].requires_grad_(), given["weight"].requires_grad_())
        found |= {*objective.totals, *objective.means, *objective.histograms}
    columns, terms = (
        TokenColumns(torch.ones(1), torch.ones(1)),
        Terms(torch.zeros(1, requires_grad=True), torch.zeros(1)),
    )
    supervised = supervised_objective(columns, terms, SupervisedOptions())
    return found | {*supervised.totals, *supervised.means}


def of_rollouts() -> set[str]:
    """What is reported of a batch that has every column."""
    of_driver = [row for row in fields.TABLE if not row.wide]
    columns = {row.name: np.zeros(1, row.dtype) for row in of_driver}
    return {*batch_metrics(RolloutBatch(np.zeros(2, np.int64), np.ones(1, np.int64), np.ones(1, np.int64), columns))}


def in_the_source() -> set[str]:
    """Names written out anywhere in the package, and those of evaluations."""
    found = {f"eval/NAME/{name}" for name in _means([])}
    for file in (ROOT / "slime_opd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
                found.add(node.value)
    return found


def test_every_metric_is_in_the_table_once_and_nothing_else_is():
    names = documented()
    assert len(names) == len(set(names))
    assert set(names) == of_objectives() | of_rollouts() | in_the_source()
