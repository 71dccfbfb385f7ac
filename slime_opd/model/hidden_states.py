"""A GPTModel that stops at its hidden states: logits are made chunk by chunk, in slime_opd/head."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor


class HiddenStatesModel(GPTModel):
    """A GPTModel whose forward returns the last hidden states [T, 1, H].

    It has the output layer's weights, and trains them.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.post_process:
            # The output layer itself is never called, so run what waits for its weights to be gathered: hooks before
            # its call.
            for hook in self.output_layer._forward_pre_hooks.values():
                hook(self.output_layer, ())
        return hidden_states

    def _apply(self, *args: Any, **kwargs: Any) -> HiddenStatesModel:
        # A router's bias for the choice of experts is float32 whatever the model computes in; a cast would round it.
        biases = {module: module.expert_bias for module in self.modules() if hasattr(module, "expert_bias")}
        super()._apply(*args, **kwargs)
        for module, bias in biases.items():
            if bias is not None:
                module.expert_bias = bias.to(module.expert_bias.device)
        return self

    def output_weight(self) -> Tensor:
        """The output layer's rows of this rank, [V/tp, H]; on the last pipeline stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight
