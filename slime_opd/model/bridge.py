"""The adapter around mbridge: names and layouts of weights, between Megatron and Hugging Face.

mbridge's public methods load or export a whole model. This package converts one weight at a time, which only mbridge's
private methods do. No other file calls those; `families/` overrides the ones that mbridge means to be overridden. A
test fails where mbridge lacks one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mbridge.core.bridge import Bridge
from mbridge.core.parallel_states import ParallelStates
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from slime_opd.config import Config
from slime_opd.errors import ConfigError
from slime_opd.model import families
from slime_opd.model.layers import FUSED_NORMS, MLA_FUSED_NORMS
from slime_opd.model.options import settings
from slime_opd.model.transformer_config import parameter_dtype, run_settings
from slime_opd.model.vocabulary import VOCABULARY_WEIGHTS, padded_vocabulary, resize_rows


def make_bridge(config: Config, *, is_unsplit: bool = False) -> ModelBridge:
    """The bridge of the student, at this rank's parallel layout.

    `is_unsplit`: of whole parameters instead, which needs no process groups. Raises ConfigError for an unsupported
    model family.
    """
    layout = ParallelStates() if is_unsplit else None
    directory = config.model.hf_checkpoint
    if directory is None:
        raise ConfigError("--hf-checkpoint is missing; give the Hugging Face directory of the model")
    mbridge = families.make_mbridge(directory, parameter_dtype(config), layout)
    mla = settings(config, "latent_attention") if config.megatron.multi_latent_attention else {}
    mbridge.set_extra_args(**run_settings(config) | mla)
    return ModelBridge(mbridge, directory, padded_vocabulary(mbridge.hf_config.vocab_size, config))


class ModelBridge:
    """Converts one model family's weights between Megatron's and Hugging Face's names and layouts.

    `name` is everywhere a parameter's name in the whole Megatron model: layers and experts have their global indices.
    `directory`: the Hugging Face directory. `padded_vocab_size`: rows of Megatron's vocabulary weights; Hugging Face's
    have `vocab_size`.
    """

    def __init__(self, mbridge: Bridge, directory: str, padded_vocab_size: int) -> None:
        self._mbridge, self.directory = mbridge, directory
        self.vocab_size: int = mbridge.hf_config.vocab_size
        self.padded_vocab_size = padded_vocab_size
        # mbridge keeps this table on the class and edits it there for tied models: give the instance its own.
        output = "model.embed_tokens.weight" if self.is_tied else "lm_head.weight"
        mbridge._DIRECT_MAPPING = type(mbridge)._DIRECT_MAPPING | {"output_layer.weight": output}
        # mbridge knows the names of Transformer Engine's layers, which fuse norms into linear layers.
        self._fused_norms = dict(MLA_FUSED_NORMS if isinstance(self.config, MLATransformerConfig) else FUSED_NORMS)
        if any("pre_mlp_layernorm" in name for name in mbridge._MLP_MAPPING):
            del self._fused_norms["pre_mlp_layernorm."]

    @property
    def hf_config(self) -> PretrainedConfig:
        """The config of the Hugging Face directory."""
        return self._mbridge.hf_config

    @property
    def config(self) -> TransformerConfig:
        """Megatron's config, made from the Hugging Face config."""
        return self._mbridge.config

    @property
    def is_tied(self) -> bool:
        """Whether the output layer shares the embedding's weights."""
        return self.hf_config.tie_word_embeddings

    @property
    def has_post_norms(self) -> bool:
        """Whether a norm follows attention and MLP in each layer."""
        return getattr(self._mbridge, "has_post_norms", False)

    def gpt_model_arguments(self) -> dict[str, Any]:
        """Arguments of GPTModel that follow from the Hugging Face config: sequence length, embedding, rotary base."""
        return self._mbridge._get_gptmodel_args()

    def global_names(self, model: nn.Module, *, with_global_experts: bool) -> dict[str, str]:
        """Names in the whole model by the names in this rank's.

        `with_global_experts` False keeps the rank's own expert indices.
        """
        return self._mbridge._weight_name_mapping_mcore_local_to_global(model, consider_ep=with_global_experts)

    def hf_names(self, name: str) -> list[str]:
        """Names of the Hugging Face weights that make up a parameter."""
        return self._mbridge._weight_name_mapping_mcore_to_hf(self._fused(name))

    def to_megatron(self, name: str, weights: list[Tensor]) -> Tensor:
        """The parameter made of its Hugging Face weights, in the order of `hf_names`, before it is split over ranks.

        Vocabulary weights may have any number of rows: they are cut or padded to this model's.
        """
        if name in VOCABULARY_WEIGHTS:
            # A row past this model's vocabulary is padding, even if the weights have one there.
            weights = [resize_rows(resize_rows(weights[0], self.vocab_size), self.padded_vocab_size)]
        return self._mbridge._weight_to_mcore_format(self._fused(name), weights)

    def to_hugging_face(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face weights, by name, of a whole (unsplit) parameter, without padding of the vocabulary."""
        if name in VOCABULARY_WEIGHTS:
            weight = weight[: self.vocab_size]
        yield from zip(*self._mbridge._weight_to_hf_format(self._fused(name), weight), strict=True)

    def shard(self, name: str, weight: Tensor, parameter: Tensor) -> Tensor:
        """This rank's tensor-parallel shard of a whole `weight`.

        `parameter`: this rank's, whose marks say how it is split.
        """
        mpu = self._mbridge.mpu
        is_expert = ".mlp.experts.linear_fc" in name
        size, rank = (mpu.etp_size, mpu.etp_rank) if is_expert else (mpu.tp_size, mpu.tp_rank)
        return self._mbridge._weight_split_across_tp(name, weight, parameter, size)[rank]

    def _fused(self, name: str) -> str:
        for apart, fused in self._fused_norms.items():
            name = name.replace(f".{apart}", f".{fused}")
        return name
