"""Rows of the vocabulary: padding to Megatron's multiple, and this rank's shard of the output layer."""

from __future__ import annotations

import math

import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from slime_opd.config import Config
from slime_opd.head.vocabulary import VocabularyShard

# Parameters with one row for each token of the vocabulary.
VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")


def padded_vocabulary(size: int, config: Config) -> int:
    """`size` rounded up to Megatron's multiple: --make-vocab-size-divisible-by times the tensor-parallel size."""
    multiple = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return math.ceil(size / multiple) * multiple


def resize_rows(weight: Tensor, rows: int) -> Tensor:
    """A weight [V, H] cut to [rows, H], or padded with rows of zeros."""
    return weight[:rows] if len(weight) >= rows else F.pad(weight, (0, 0, 0, rows - len(weight)))


def vocabulary_shard(output_weight: Tensor, vocab_size: int) -> VocabularyShard:
    """This rank's rows of the output layer, `output_weight` [V/tp, H], for the chunked output layer."""
    group = parallel_state.get_tensor_model_parallel_group()
    return VocabularyShard(
        start=len(output_weight) * parallel_state.get_tensor_model_parallel_rank(),
        size=vocab_size,
        group=group if group.size() > 1 else None,
    )


def is_padding(name: str, weight: Tensor, vocab_size: int) -> bool:
    """Whether every row of this rank's shard of the parameter `name` is past the vocabulary."""
    first = len(weight) * parallel_state.get_tensor_model_parallel_rank()
    return name in VOCABULARY_WEIGHTS and first >= vocab_size
