"""Logits of a micro-batch never exist at one time: what the chunked pass allocates, counted tensor by tensor."""

from __future__ import annotations

import weakref

import pytest
import torch
from brute_force import POLICY
from torch.utils._python_dispatch import TorchDispatchMode

from slime_opd.distill.comparison import DivergenceOptions
from slime_opd.head.objective_head import ObjectiveHead
from slime_opd.head.output_layer import chunked_objective
from slime_opd.head.settings import HeadSettings
from slime_opd.head.teacher_comparison import TeacherStates
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.objective.options import PolicyOptions
from slime_opd.objective.tokens import TokenColumns

TOKENS, HIDDEN, VOCABULARY = 512, 8, 4096
FLOAT = 4


class Allocations(TorchDispatchMode):
    """The most bytes of new storages that were alive at one time."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            return
        self._alive.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def peak_of(kind: str, top_k: int, chunk_size: int) -> int:
    """Bytes beside the inputs and their gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden, weight = draw(TOKENS, HIDDEN).requires_grad_(), draw(VOCABULARY, HIDDEN).requires_grad_()
    teacher = TeacherStates(draw(TOKENS, HIDDEN), draw(VOCABULARY, HIDDEN))
    ones = torch.ones(TOKENS)
    names = ("loss_mask", "policy_weights", "advantages", "divergence_base", "divergence_weights")
    columns = dict.fromkeys(names, ones) | {"ref_log_probs": -ones}
    options = DivergenceOptions(kind, 1.0)
    settings = HeadSettings(PolicyOptions(**POLICY, divergence=options), top_k=top_k, metrics_top_k=16)
    shard, targets = VocabularyShard(0, VOCABULARY), torch.zeros(TOKENS, dtype=torch.int64)
    head = ObjectiveHead(settings, shard, targets, TokenColumns.from_mapping(columns), teacher)
    inputs = [hidden, weight, teacher.hidden, teacher.weight, targets, *columns.values()]
    with Allocations(inputs) as allocations:
        chunked_objective(hidden, weight, shard, head, chunk_size).loss.backward()
    return allocations.peak - (hidden.numel() + weight.numel()) * FLOAT


@pytest.mark.parametrize(("kind", "top_k"), [("reverse_kl", 0), ("forward_kl", 0), ("jsd", 0), ("reverse_kl", 16)])
def test_extra_memory_is_a_few_buffers_of_a_chunks_logits(kind, top_k):
    whole_logits = TOKENS * VOCABULARY * FLOAT
    large, small = peak_of(kind, top_k, 64), peak_of(kind, top_k, 16)
    # Student's and teacher's log-probs and probabilities, and what an operation on them makes.
    assert large < 8 * 64 * VOCABULARY * FLOAT <= whole_logits
    # What does not shrink with the chunk is a few numbers per token, and the gradients.
    assert small < 0.4 * large
