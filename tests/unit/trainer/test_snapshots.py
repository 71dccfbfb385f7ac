"""Copies of weights that take turns in one model, by copying from the host or by changing places."""

from __future__ import annotations

import pytest
import torch

from slime_opd.model import device
from slime_opd.trainer import snapshots
from slime_opd.trainer.snapshots import WeightSnapshots


def model_of(value: float) -> torch.nn.Module:
    model = torch.nn.Linear(2, 3)
    model.register_buffer("scale", torch.empty(2))
    fill(model, value)
    return model


def fill(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def value_of(model: torch.nn.Module) -> float:
    values = torch.cat([tensor.detach().flatten() for tensor in (*model.parameters(), *model.buffers())])
    assert values.min() == values.max()
    return values[0].item()


@pytest.fixture(params=["resident", "host"])
def kept(request, monkeypatch):
    """A student of 3 with a reference of 1 and a teacher of 2, kept where a GPU's host or the device itself is."""
    if request.param == "host":
        # As on a GPU, whose host memory cannot be pinned here.
        monkeypatch.setattr(snapshots.device, "has_cuda", lambda: True)
        monkeypatch.setattr(device, "synchronize", lambda: None)
        monkeypatch.setattr(torch, "empty_like", lambda t, pin_memory=False, **rest: torch.zeros_like(t, **rest))
    model = model_of(1.0)
    copies = WeightSnapshots(model)
    copies.keep("reference")
    fill(model, 2.0)
    copies.keep("teacher", resident=request.param == "resident")
    fill(model, 3.0)
    return model, copies


def test_each_takes_its_turn_and_the_student_is_back(kept):
    model, copies = kept
    for _ in range(2):
        with copies.swapped_in("reference", "teacher") as in_turn:
            assert [(name, value_of(model)) for name in in_turn] == [("reference", 1.0), ("teacher", 2.0)]
        assert value_of(model) == 3.0
    assert "teacher" in copies and "other" not in copies


def test_an_error_in_a_turn_brings_the_student_back(kept):
    model, copies = kept
    with pytest.raises(RuntimeError), copies.swapped_in("teacher") as in_turn:
        for _ in in_turn:
            raise RuntimeError
    assert value_of(model) == 3.0


def test_a_model_that_moved_to_other_memory_still_takes_turns(kept):
    model, copies = kept
    for tensor in model.parameters():
        tensor.data = torch.full_like(tensor, 4.0)
    with torch.no_grad():
        model.scale.fill_(4.0)
    with copies.swapped_in("teacher") as in_turn:
        assert [value_of(model) for _ in in_turn] == [2.0]
    assert value_of(model) == 4.0
    fill(model, 5.0)
    with copies.swapped_in("teacher") as in_turn:
        assert [value_of(model) for _ in in_turn] == [2.0], "training the student must not train its teacher"


def test_keeping_a_name_again_replaces_what_was_kept():
    model = model_of(1.0)
    copies = WeightSnapshots(model)
    copies.keep("teacher")
    fill(model, 7.0)
    copies.keep("teacher")
    fill(model, 3.0)
    with copies.swapped_in("teacher") as in_turn:
        assert [value_of(model) for _ in in_turn] == [7.0]
