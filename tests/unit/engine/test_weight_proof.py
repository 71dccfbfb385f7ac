"""The loader that notes which parameters loading changed."""

from __future__ import annotations

import pytest
import torch

from slime_opd.engine import weight_proof


class Fused(torch.nn.Module):
    """Loads q and k into one parameter, as an engine does."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.arange(8, dtype=torch.bfloat16).view(4, 2), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def load_weights(self, named_tensors) -> None:
        for name, tensor in named_tensors:
            target = {"q": self.qk[:2], "k": self.qk[2:], "norm": self.norm}[name]
            target.copy_(tensor)


def differing(model: Fused, tensors: dict[str, torch.Tensor]) -> list[str]:
    weight_proof.note_differing_weights(model, list(tensors.items()))
    return model.get_weights_by_name(weight_proof.REPORT, 0, tp_size=1)


def served() -> dict[str, torch.Tensor]:
    return {"q": torch.arange(4).view(2, 2), "k": torch.arange(4, 8).view(2, 2), "norm": torch.ones(2)}


def test_weights_that_are_served_already_change_nothing():
    assert differing(Fused(), served()) == []


def test_a_parameter_that_changes_is_named_and_then_has_the_given_value():
    model, tensors = Fused(), served()
    tensors["k"] = tensors["k"].flip(0)
    assert differing(model, tensors) == ["qk"]
    assert model.qk[2:].tolist() == [[6, 7], [4, 5]]
    assert differing(model, tensors) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_sees_one_bit_and_every_change_of_place(dtype, monkeypatch):
    monkeypatch.setattr(weight_proof, "_CHUNK", 8)  # several chunks
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)

    def checksum(tensor: torch.Tensor) -> int:
        holder = torch.nn.Module()
        holder.w = torch.nn.Parameter(tensor, requires_grad=False)
        return weight_proof.checksums(holder)["w"]

    original = checksum(values)
    assert checksum(values.clone()) == original
    assert checksum(values.flip(0)) != original
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for row in range(5):
        for column in range(7):
            changed = values.clone()
            changed.view(bits)[row, column] ^= 1
            assert checksum(changed) != original
