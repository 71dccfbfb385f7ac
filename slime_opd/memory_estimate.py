"""How large a model is, and what a training rank and an engine hold of it: rough figures from a config.json, for `--check`."""

from __future__ import annotations

from dataclasses import dataclass

from slime_opd.config import Config
from slime_opd.config.check_machine import number_of_experts

GIB = 2**30


def bytes_text(count: float) -> str:
    """A number of bytes for people: `12 MiB`, `1.5 GiB`, `1,024 GiB`."""
    if count >= GIB:
        return f"{count / GIB:,.1f} GiB"
    return f"{count / 2**20:.{0 if count >= 10 * 2**20 else 1}f} MiB"


def count_text(count: int) -> str:
    """A number of parameters for people: `0.3M`, `35M`, `8.19B`."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f}B"
    return f"{count / 1e6:.{0 if count >= 1e7 else 1}f}M"


@dataclass(frozen=True)
class Size:
    """Parameters of a model.

    `attention`, `mlp`, `shared` and `experts` are of one layer: `dense` layers have an MLP, the others shared experts with a router,
    and experts. `embedding` is of one; `tied` shares it with the output layer.
    """

    attention: int
    mlp: int
    shared: int
    experts: int
    embedding: int
    layers: int
    dense: int
    tied: bool

    @property
    def total(self) -> int:
        """Of the whole model."""
        embeddings = self.embedding * (1 if self.tied else 2)
        mixtures = (self.layers - self.dense) * (self.shared + self.experts)
        return embeddings + self.layers * self.attention + self.dense * self.mlp + mixtures


def size_of(architecture: dict) -> Size | None:
    """From a Hugging Face config; None for what it does not tell. Norms and biases are left out."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if not all(isinstance(architecture.get(key), int) for key in needed):
        return None
    hidden, layers, heads, ffn, vocabulary = (architecture[key] for key in needed)
    experts = number_of_experts(architecture) or 0
    width = architecture.get("moe_intermediate_size") or ffn
    return Size(
        attention=_attention(architecture, hidden, heads),
        mlp=3 * hidden * ffn,
        shared=experts * hidden + 3 * hidden * width * (architecture.get("n_shared_experts") or 0),
        experts=experts * 3 * hidden * width,
        embedding=vocabulary * hidden,
        layers=layers,
        dense=architecture.get("first_k_dense_replace", 0) if experts else layers,
        tied=bool(architecture.get("tie_word_embeddings")),
    )


def _attention(architecture: dict, hidden: int, heads: int) -> int:
    if latent := architecture.get("kv_lora_rank"):
        rotated = architecture["qk_rope_head_dim"]
        query, value = architecture["qk_nope_head_dim"] + rotated, architecture["v_head_dim"]
        compressed = architecture.get("q_lora_rank")
        queries = compressed * (hidden + heads * query) if compressed else hidden * heads * query
        return (
            queries + hidden * (latent + rotated) + latent * heads * (query - rotated + value) + heads * value * hidden
        )
    groups, head = architecture.get("num_key_value_heads") or heads, architecture.get("head_dim") or hidden // heads
    return hidden * head * (heads + 2 * groups) + heads * head * hidden


def estimates(config: Config, architecture: dict, size: Size) -> list[str]:
    """Bytes of a training rank on the largest pipeline stage, and of an engine's GPU, by what holds them, as lines."""
    layout, training = config.parallel, config.training
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    share = -(-size.layers // pipeline) / size.layers
    mixtures = size.layers - size.dense
    embeddings = size.embedding * (1 if size.tied or pipeline > 1 else 2)
    shared = share * (size.layers * size.attention + size.dense * size.mlp + mixtures * size.shared)
    own = (shared + embeddings) / tensor
    of_experts = share * mixtures * size.experts / layout.expert_model_parallel_size
    half = not training.fp32
    gradient = 4 if training.accumulate_allreduce_grads_in_fp32 or not half else 2
    # Adam's two moments, and a copy of the weights in float32 where they are not; sharded over the ranks that hold the same weights.
    moments = 12 if half else 8
    ranks = config.data_parallel_size * tensor / layout.expert_model_parallel_size
    optimizer = moments * (own / max(1, config.data_parallel_size) + of_experts / max(1, ranks))
    tokens = training.max_tokens_per_gpu or training.micro_batch_size * (
        config.rollout.rollout_max_response_len or 4096
    )
    hidden, width = architecture["hidden_size"], 2 if half else 4
    layers = share * size.layers
    kept = layers if layout.recompute_granularity == "full" else layers * 17
    parts = {
        "weights": (own + of_experts) * width,
        "gradients": (own + of_experts) * gradient,
        "optimizer": optimizer,
        "activations": tokens * hidden * width * (kept + 17) / tensor,
        # Student's and teacher's log-probs and probabilities of a chunk, in float32.
        "logits": 4 * training.log_probs_chunk_size * architecture["vocab_size"] * 4 / tensor,
    }
    if config.has_megatron_teacher and config.opd.opd_teacher_resident:
        parts["teacher"] = parts["weights"]
    engine = size.total * width / config.cluster.rollout_num_gpus_per_engine
    return [
        f"{count_text(size.total)} parameters; about {bytes_text(sum(parts.values()))} on each training rank: "
        + ", ".join(f"{name} {bytes_text(part)}" for name, part in parts.items()),
        f"about {bytes_text(engine)} of weights on each engine's GPU, beside its cache (--sglang-mem-fraction-static)",
    ]
