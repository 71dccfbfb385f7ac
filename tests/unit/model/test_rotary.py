"""The rotation of packed rows is bit-identical to Megatron-core's, and never waits for the device."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch.utils._python_dispatch import TorchDispatchMode

from slime_opd.model import rotary

HEADS, WIDTH = 3, 16
ROWS = ([1], [7], [3, 5, 2], [4, 1, 1, 9], [6, 6])

# Rotated width, and the options that Megatron's attention gives: attention, and latent attention with yarn's scale.
KINDS = {
    "whole": (WIDTH, {}),
    "partial": (WIDTH // 2, {}),
    "interleaved": (WIDTH, {"rotary_interleaved": True}),
    "partial and interleaved": (WIDTH // 2, {"rotary_interleaved": True}),
    "latent": (WIDTH, {"multi_latent_attention": True}),
    "latent with yarn": (WIDTH, {"multi_latent_attention": True, "mscale": 1.37}),
}


class Group:
    """A context-parallel group, seen from its first rank."""

    def __init__(self, size: int = 1) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


class Calls(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def megatrons_own(monkeypatch):
    """Megatron-core's function, which `install` replaces; the test leaves Megatron as it was."""
    original = rotary._with_context_parallel
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_thd", original)
    return original


def row(lengths: list[int], width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """States, boundaries and frequencies of a packed row, as Megatron's attention has them."""
    generator = torch.Generator().manual_seed(sum(lengths))
    states = torch.randn(sum(lengths), HEADS, WIDTH, generator=generator).to(device, dtype)
    freqs = 9 * torch.rand(max(lengths), 1, 1, width, generator=generator)
    return states, torch.tensor([0, *lengths]).cumsum(0).int().to(device), freqs.to(device)


def rotated(function, states, *arguments, **options):
    """The output of a function, and its gradient for an uneven output gradient."""
    states = states.clone().requires_grad_()
    result = function(states, *arguments, **options)
    result.backward(torch.arange(result.numel()).view_as(result).to(result) / result.numel())
    return result.detach(), states.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_bit_identical_to_megatrons(kind, lengths, dtype, megatrons_own):
    width, options = KINDS[kind]
    arguments = row(lengths, width, dtype)
    expected = rotated(megatrons_own, *arguments, cp_group=Group(), **options)
    found = rotated(rotary.rotate_packed, *arguments, cp_group=Group(), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_back_from_the_device(kind, megatrons_own):
    # A meta tensor has no numbers, so whatever needs one on the host raises.
    width, options = KINDS[kind]
    arguments = row([3, 5, 2], width, device="meta")
    assert rotary.rotate_packed(*arguments, cp_group=Group(), **options).shape == (10, HEADS, WIDTH)
    with pytest.raises(NotImplementedError):
        megatrons_own(*arguments, cp_group=Group(), **options)


def test_positions_are_computed_once_per_row():
    states, boundaries, freqs = row([3, 5, 2], WIDTH)
    with Calls() as calls:
        for rotated_states in (states, -states, states + 1):
            rotary.rotate_packed(rotated_states, boundaries, freqs)
    assert calls.names.count("aten.searchsorted.Tensor") == 1


def test_positions_are_freed_with_their_row():
    rotary._positions_of_rows.clear()
    states, boundaries, freqs = row([3, 5, 2], WIDTH)
    rotary.rotate_packed(states, boundaries, freqs)
    assert len(rotary._positions_of_rows) == 1
    del boundaries
    assert len(rotary._positions_of_rows) == 0


def test_another_row_has_its_own_positions(megatrons_own):
    for lengths in ([4, 4], [1, 7], [8]):
        arguments = row(lengths, WIDTH)
        assert torch.equal(rotary.rotate_packed(*arguments), megatrons_own(*arguments, cp_group=Group()))


def test_megatrons_attention_calls_it_once_it_is_installed(megatrons_own):
    states, boundaries, freqs = row([3, 5, 2], WIDTH, device="meta")
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    rotate = lambda: rope_utils.apply_rotary_pos_emb(states, freqs, config, boundaries, cp_group=Group())  # noqa: E731
    with pytest.raises(NotImplementedError):
        rotate()
    rotary.install()
    assert rotate().shape == states.shape


def test_context_parallel_rows_are_left_to_megatron(megatrons_own):
    # Two ranks: this one has half of each segment.
    states, _, freqs = row([4, 6], WIDTH)
    whole = torch.tensor([0, 8, 20], dtype=torch.int32)
    freqs = torch.cat([freqs, freqs + 1])
    expected = megatrons_own(states, whole, freqs, cp_group=Group(2))
    assert torch.equal(rotary.rotate_packed(states, whole, freqs, cp_group=Group(2)), expected)
