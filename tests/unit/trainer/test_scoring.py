"""The teacher's hidden states between its forward and the student's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slime_opd.trainer.scoring import Scorer, TeacherLayer
from slime_opd.types import RolloutBatch, TrainBatch

LENGTHS, HIDDEN = np.array([3, 1, 4]), 5


class Passes:
    """Passes over micro-batches of one sample, with the hidden states that it was made with."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden

    def score(self, batch, head):
        ends = np.cumsum(LENGTHS)
        for start, end in zip(ends - LENGTHS, ends, strict=True):
            rows = slice(int(start), int(end))
            assert head(self.hidden[rows].clone(), SimpleNamespace(rows=rows)) == {}
        return {}


def scored(on_host: bool, monkeypatch) -> tuple[torch.Tensor, list[tuple[int, ...]], torch.Tensor]:
    made = []
    empty = torch.empty

    def recorded(shape, **options):
        made.append(tuple(shape))
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    monkeypatch.setattr(torch, "cat", lambda *args, **options: pytest.fail("parts are joined"))
    hidden = torch.randn(int(LENGTHS.sum()), HIDDEN, dtype=torch.bfloat16)
    samples = RolloutBatch(np.zeros(LENGTHS.sum() + 3, np.int64), np.ones(3, np.int64), LENGTHS, {})
    config = SimpleNamespace(opd=SimpleNamespace(opd_teacher_hidden_on_host=on_host))
    settings = SimpleNamespace(divergence=object(), objective=SimpleNamespace(penalty=None))
    scorer = Scorer(config, Passes(hidden), {}, TeacherLayer(torch.ones(2, HIDDEN), None))
    _, teacher = scorer._score_teacher(TrainBatch(samples, ((1, 1, 1),)), settings)
    return teacher.hidden, made, hidden


@pytest.mark.parametrize("on_host", [True, False])
def test_hidden_states_are_copied_once_into_memory_made_once(on_host, monkeypatch):
    kept, made, expected = scored(on_host, monkeypatch)
    assert made == [(8, HIDDEN)] and kept.dtype is torch.bfloat16
    assert torch.equal(kept, expected)
