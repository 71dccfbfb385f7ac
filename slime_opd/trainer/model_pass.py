"""Running the model's present weights over micro-batches: Megatron's schedule, and a function of the hidden states.

Notation: R response tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from slime_opd.config import Config
from slime_opd.head.output_layer import score
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.model import device
from slime_opd.model.hidden_states import HiddenStatesModel
from slime_opd.trainer.micro_batch import MicroBatch, micro_batches
from slime_opd.types import TrainBatch

# Called with hidden [R, H], at the positions that predict the response tokens, on the last pipeline stage.
HeadFunction = Callable[[Tensor, MicroBatch], Any]


class ModelPass:
    """The passes of one rank. `shard`: its rows of the output layer; None before the last pipeline stage.

    chunk_size: tokens whose logits exist at one time. num_micro_batches grows with every pass, forward-only ones too;
    another thread reads it to see that the rank advances.
    """

    def __init__(
        self, config: Config, model: HiddenStatesModel, wrapped: DistributedDataParallel, shard: VocabularyShard | None
    ) -> None:
        self.model, self.shard, self.chunk_size = model, shard, config.log_probs_chunk_size
        self.num_micro_batches = 0
        self._wrapped = wrapped
        layout = config.parallel
        self._length_multiple = layout.tensor_model_parallel_size if layout.sequence_parallel else 1

    def run(self, batch: TrainBatch, steps: slice, head: HeadFunction, *, forward_only: bool) -> list[Any]:
        """Run the schedule over the micro-batches of the chosen optimizer steps; returns what `head` returns, in order.

        Training: head returns (loss, result). Forward only: head returns the result. [] before the last stage.
        """

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro_batch = next(batches)
            self.num_micro_batches += 1
            hidden = model(micro_batch.tokens, micro_batch.position_ids, None, packed_seq_params=micro_batch.packed)
            return hidden, partial(finish, micro_batch)

        def finish(micro_batch: MicroBatch, hidden: Tensor, non_loss_data: bool = False) -> Any:
            hidden = self._whole_rows(hidden)[micro_batch.predicting]
            if non_loss_data:
                return head(hidden, micro_batch)
            loss, result = head(hidden, micro_batch)
            # The weights of the objective hold every denominator; Megatron is to divide by nothing.
            return loss, torch.ones((), dtype=torch.int, device=loss.device), result

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches(batch, device.device(), steps, multiple=self._length_multiple),
            model=[self._wrapped],
            num_microbatches=sum(len(sizes) for sizes in batch.steps[steps]),
            # Megatron asks for a sequence length and ignores it: shapes vary and are sent ahead of the tensors.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def score(self, batch: TrainBatch, head: HeadFunction) -> dict[str, Tensor]:
        """Run the model over the batch without gradients; `head` returns tensors by name.

        Returns them joined, in the batch's order, on the head's device; {} before the last stage.
        """
        self._wrapped.eval()
        with torch.no_grad():
            parts = self.run(batch, slice(None), head, forward_only=True)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def log_probs(
        self, hidden: Tensor, batch: MicroBatch, temperature: float, shard: VocabularyShard | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a micro-batch's response tokens under the model's present weights, both [R].

        NaN for a token that is not in the vocabulary of `shard`, by default the student's.
        """
        return score(
            hidden,
            self.model.output_weight(),
            batch.targets,
            self.shard if shard is None else shard,
            temperature=temperature,
            chunk_size=self.chunk_size,
        )

    def _whole_rows(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, H] on every tensor-parallel rank."""
        if self.model.config.sequence_parallel:
            # The output layer's backward sums over the ranks already.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)
