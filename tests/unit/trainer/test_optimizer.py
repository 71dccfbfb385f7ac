"""What a GPU's optimizer step is made of, compared on the CPU with what it replaces."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from slime_opd.checkpoint.formats.adam_state import prepare_to_load, separate_steps, use_fused_kernel
from slime_opd.trainer.optimizer import gradient_norm, norm_without_waits


def adam() -> tuple[SimpleNamespace, list[torch.Tensor]]:
    """Megatron's optimizer around torch's AdamW of two parameters, as far as it is looked at."""
    torch.manual_seed(0)
    parameters = [torch.randn(5, 3).requires_grad_(), torch.randn(7).requires_grad_()]
    inner = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.2}], lr=0.1)
    return SimpleNamespace(optimizer=inner), parameters


def test_the_fused_kernel_takes_the_same_steps():
    (plain, expected), (fused, parameters) = adam(), adam()
    use_fused_kernel(fused)
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    for number in range(3):
        for one, tensors in ((plain, expected), (fused, parameters)):
            for tensor in tensors:
                tensor.grad = torch.sin(tensor.detach() + number)
            one.optimizer.step()
    for got, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-7)


def test_step_counts_are_where_the_fused_kernel_reads_them():
    inner = torch.optim.AdamW([torch.zeros(3, device="meta", requires_grad=True) for _ in range(2)])
    optimizer = SimpleNamespace(optimizer=inner)
    prepare_to_load(optimizer)
    shared = torch.ones((), device="cpu")
    for state in inner.state.values():
        assert state["step"].device.type == "meta"
        state["step"] = shared
    separate_steps(optimizer)
    first, second = (state["step"] for state in inner.state.values())
    assert first.device.type == second.device.type == "meta" and first is not second


def test_the_norm_of_the_gradients_is_that_of_all_of_them():
    gradients = [torch.randn(64, 32), torch.randn(128), torch.zeros(3)]
    norm, _ = gradient_norm(2048, torch.zeros(1), [gradients], False)
    assert norm.shape == (1,)
    expected = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("is_megatrons", [True, False])
def test_only_megatrons_own_norm_is_replaced(is_megatrons, monkeypatch):
    engines = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm if is_megatrons else engines)
    norm_without_waits()
    assert clip_grads.l2_norm_impl is (gradient_norm if is_megatrons else engines)
