"""The proof inside an engine: what it reports of weights that are sent a second time."""

from __future__ import annotations

import pytest
import torch
from scripted_engine import FusedModel, weights

from slime_opd.engine import weight_proof
from slime_opd.engine.weight_proof import CHANGED, DIFFERENT, MISSING


def begin(model: FusedModel, tensors: dict[str, torch.Tensor]) -> None:
    checksums = {name: weight_proof.checksum(tensor) for name, tensor in tensors.items()}
    weight_proof.begin(model, weight_proof.expected_tensors(checksums))


def finish(model: FusedModel) -> dict[str, list[str]]:
    return model.get_weights_by_name(weight_proof.REPORT, 0, tp_size=1)


def model_with(tensors: dict[str, torch.Tensor]) -> FusedModel:
    model = FusedModel()
    model.load_weights(tensors.items())
    return model


def test_weights_that_are_served_already_prove_themselves_in_any_number_of_buckets():
    model = model_with(weights())
    begin(model, weights())
    for name, tensor in weights().items():
        model.load_weights(iter([(name, tensor)]))
    assert finish(model) == {CHANGED: [], DIFFERENT: [], MISSING: []}


def test_a_parameter_that_was_not_what_is_loaded_is_named():
    model = model_with(weights())
    model.qk[3, 1] += 1
    begin(model, weights())
    model.load_weights(weights().items())
    assert finish(model) == {CHANGED: ["qk"], DIFFERENT: [], MISSING: []}


def test_weights_that_arrive_twice_with_the_same_wrong_values_are_no_proof():
    wrong = weights()
    wrong["k"] = wrong["k"].flip(0)
    model = model_with(wrong)
    begin(model, weights())
    model.load_weights(wrong.items())
    assert finish(model) == {CHANGED: [], DIFFERENT: ["k"], MISSING: []}


def test_a_weight_that_does_not_arrive_is_named():
    model = model_with(weights())
    begin(model, weights())
    model.load_weights([("q", weights()["q"])])
    assert finish(model) == {CHANGED: [], DIFFERENT: [], MISSING: ["k", "norm"]}


def test_a_proof_leaves_the_model_as_it_was_also_when_the_one_before_was_not_finished():
    model = model_with(weights())
    original = model.load_weights
    begin(model, weights(5))
    begin(model, weights())
    assert model.load_weights.load_weights == original
    model.load_weights(weights().items())
    assert finish(model) == {CHANGED: [], DIFFERENT: [], MISSING: []}
    assert model.load_weights == original and not hasattr(model, "get_weights_by_name")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_checksum_detects_a_changed_bit_and_a_changed_order(dtype, monkeypatch):
    monkeypatch.setattr(weight_proof, "_CHUNK", 8)  # several chunks
    values = (torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 50 + 128).to(dtype)

    def checksum(tensor: torch.Tensor) -> int:
        return weight_proof.checksum(tensor).item()

    original = checksum(values)
    assert checksum(values.clone()) == original
    assert checksum(values.flip(0)) != original
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[dtype.itemsize]
    for row in range(5):
        for column in range(7):
            changed = values.clone()
            changed.view(bits)[row, column] ^= 1
            assert checksum(changed) != original


def test_a_checksum_does_not_depend_on_strides_or_storage_offset():
    values = torch.arange(40, dtype=torch.bfloat16)
    for start in range(4):
        for end in range(30, 34):
            part = values[start:end]
            assert weight_proof.checksum(part) == weight_proof.checksum(part.clone())
    assert weight_proof.checksum(torch.zeros(2)) != weight_proof.checksum(torch.zeros(3))
    assert weight_proof.checksum(torch.zeros(0)) == weight_proof.checksum(torch.zeros(0, 5))
    transposed = values.view(8, 5).t()
    assert weight_proof.checksum(transposed) == weight_proof.checksum(transposed.contiguous())


def test_the_host_waits_once_for_all_parameters():
    # A tensor without values cannot be read: `.item()` and `.tolist()` raise, as they wait for a device.
    with torch.device("meta"):
        total = weight_proof.checksum(torch.empty(3 * weight_proof._CHUNK, dtype=torch.float32))
    assert (total.shape, total.dtype) == ((), torch.int64)
