"""Estimates the size of a model and the memory of a training rank and an engine, from config.json, for `--check`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from slime_opd.config import Config
from slime_opd.config.families import number_of_experts
from slime_opd.config.options import flag

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

    `attention`, `mlp`, `shared` and `experts` are of one layer: `dense` layers have an MLP, the others shared experts
    with a router, and experts. `embedding` is of one; `tied` shares it with the output layer.
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


# Options of Megatron's that change what a rank holds, and are not in the estimate.
_NOT_COUNTED = (
    "optimizer_cpu_offload",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
    "main_grads_dtype",
    "main_params_dtype",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
)


def estimates(config: Config, architecture: dict, size: Size) -> list[str]:
    """Bytes of a training rank at the peak of a step, and of an engine's GPU, by what holds them, as lines."""
    parts = step_bytes(config, architecture, size)
    width = 4 if config.training.fp32 else 2
    engine = size.total * width / config.cluster.rollout_num_gpus_per_engine
    ignored = [flag(name) for name in _NOT_COUNTED if getattr(config.megatron, name) not in (None, False)]
    without = f"; without what {', '.join(ignored)} changes" if ignored else ""
    return [
        f"{count_text(size.total)} parameters; about {bytes_text(sum(parts.values()))} on each training rank: "
        + ", ".join(f"{name} {bytes_text(part)}" for name, part in parts.items() if part)
        + without,
        f"about {bytes_text(engine)} of weights on each engine's GPU, beside its cache (--sglang-mem-fraction-static)",
    ]


def step_bytes(
    config: Config,
    architecture: dict,
    size: Size,
    *,
    rollout_tokens: int | None = None,
    with_engine: bool | None = None,
) -> dict[str, float]:
    """Bytes of the fullest training rank at the peak of a step, by what holds them; their sum is the peak.

    rollout_tokens: response tokens of a rollout on each rank (by default what the flags allow at most), with_engine:
    whether layers are Transformer Engine's (by default where it is installed). What CUDA, NCCL and fragmentation take
    is not in it.
    """
    if with_engine is None:
        with_engine = config.training.attention_backend != "local" and find_spec("transformer_engine") is not None
    layout = config.parallel
    stages = layout.pipeline_model_parallel_size
    work = _Work(config, architecture, size, with_engine, rollout_tokens)
    found = [work.stage(is_first=True, is_last=stages == 1)]
    if stages > 1:
        found.append(work.stage(is_first=False, is_last=True))
    return max(found, key=lambda parts: sum(parts.values()))


@dataclass(frozen=True)
class _Work:
    """What a rank's step is made of."""

    config: Config
    architecture: dict
    size: Size
    with_engine: bool
    rollout_tokens: int | None

    def stage(self, *, is_first: bool, is_last: bool) -> dict[str, float]:
        """The parts of one pipeline stage."""
        size, config, layout = self.size, self.config, self.config.parallel
        tensor, experts_split = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
        share = -(-size.layers // layout.pipeline_model_parallel_size) / size.layers
        mixtures = size.layers - size.dense
        # With tied embeddings the last stage has a copy of the first one's.
        embeddings = size.embedding * (int(is_first) + int(is_last and not (size.tied and is_first)))
        own = (
            share * (size.layers * size.attention + size.dense * size.mlp + mixtures * size.shared) + embeddings
        ) / tensor
        of_experts = share * mixtures * size.experts / experts_split
        gradient = 4 if config.training.accumulate_allreduce_grads_in_fp32 or self._width == 4 else 2
        # Adam's two moments, and a float32 copy of half-precision weights; sharded over the ranks with the same
        # weights.
        moments = 8 if self._width == 4 else 12
        ranks = config.data_parallel_size * tensor / experts_split
        parts = {
            "weights": (own + of_experts) * self._width,
            "gradients": (own + of_experts) * gradient,
            "optimizer": moments * (own / max(1, config.data_parallel_size) + of_experts / max(1, ranks)),
        }
        if config.teacher.is_in_trainer and config.opd.opd_teacher_resident:
            parts["teacher's weights"] = parts["weights"]
        if is_last and config.teacher.is_in_trainer and config.has_divergence:
            parts["teacher's output layer"] = size.embedding / tensor * self._width
            parts["teacher's hidden states"] = self._teacher_states()
        at_head, in_backward = self._activations(share * size.layers, is_first, is_last)
        if sum(at_head.values()) > sum(in_backward.values()):
            return parts | at_head
        return parts | in_backward

    @property
    def _width(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.config.training.fp32 else 2

    @property
    def _tokens(self) -> int:
        """Of the largest micro-batch."""
        training, data = self.config.training, self.config.data
        longest = (self.config.rollout.rollout_max_response_len or 4096) + (data.rollout_max_prompt_len or 0)
        if training.use_dynamic_batch_size and training.max_tokens_per_gpu:
            # A sample that is longer is a micro-batch of its own.
            return max(training.max_tokens_per_gpu, longest)
        return training.micro_batch_size * longest

    @property
    def _hidden(self) -> float:
        """Bytes of one micro-batch's hidden states, whole."""
        return self._tokens * self.architecture["hidden_size"] * self._width

    def _teacher_states(self) -> float:
        if self.config.opd.opd_teacher_hidden_on_host:
            # A chunk's.
            return self.config.log_probs_chunk_size * self.architecture["hidden_size"] * self._width
        tokens = self.rollout_tokens
        if tokens is None:
            rollout = self.config.rollout
            samples = (rollout.rollout_batch_size or 1) * rollout.n_samples_per_prompt
            tokens = samples * (rollout.rollout_max_response_len or 4096) / self.config.data_parallel_size
        return tokens * self.architecture["hidden_size"] * self._width

    def _activations(self, layers: float, is_first: bool, is_last: bool) -> tuple[dict[str, float], dict[str, float]]:
        """What the layers keep and the head needs while the head runs, and what a layer's backward needs."""
        layout, tensor = self.config.parallel, self.config.parallel.tensor_model_parallel_size
        between = self._hidden / (tensor if layout.sequence_parallel else 1)
        whole = self._layer_keeps(between)
        kept, recomputed = layers * whole, 0.0
        if layout.recompute_granularity == "full":
            number = layout.recompute_num_layers or 1
            if layout.recompute_method == "block":
                kept, recomputed = min(number, layers) * between + max(0, layers - number) * whole, whole
            else:
                kept, recomputed = -(-layers // number) * between, min(number, layers) * whole
        if is_first:
            # 1F1B: the first stage has begun as many micro-batches as there are stages when its first backward comes.
            kept *= layout.pipeline_model_parallel_size
        # The buffer into which sequence parallelism gathers, and the embedding's output.
        kept += between + (self._hidden if layout.sequence_parallel else 0)
        backward = {"activations": kept, "a layer's backward": recomputed + self._layer_gradients(between)}
        head = {"activations": kept} | (self._head() if is_last else {})
        return head, backward

    def _layer_keeps(self, between: float) -> float:
        """Bytes that one layer's forward keeps for its backward.

        In elements of a token: q of the queries, k of the keys (and of the values), f of the MLP's inner width, h
        hidden. Read from what autograd keeps: 4h (two norms' inputs and outputs), and split over the tensor-parallel
        ranks

            own layers          qkv, q without a gap, rotated q and k, output                         5f: both halves of
            fc1, act, gate, product Transformer Engine  qkv, normed and rotated q and k, output
            3f: both halves of fc1, product
        """
        a, tensor = self.architecture, self.config.parallel.tensor_model_parallel_size
        queries, keys = _head_widths(a)
        inner = self._inner_width()
        if self.with_engine:
            elements = (queries + 2 * keys) + 2 * (queries + keys) + queries + 3 * inner
        else:
            elements = (queries + 2 * keys) + 2 * queries + keys + queries + 5 * inner
        return 4 * between + elements / tensor * self._tokens * self._width

    def _layer_gradients(self, between: float) -> float:
        """Bytes of the gradients that are there at one time in a layer's backward."""
        tensor = self.config.parallel.tensor_model_parallel_size
        # Gradients of the product, of both halves, and of these joined; and of the largest weight, before it is added.
        of_tokens = 5 * self._inner_width() / tensor * self._tokens * self._width
        of_weight = 2 * self._inner_width() / tensor * self.architecture["hidden_size"] * self._width
        return of_tokens + of_weight + 2 * between

    def _inner_width(self) -> float:
        """Of the MLP, for each token: of the experts that a token meets, in a mixture, with its copies for them."""
        a = self.architecture
        if not number_of_experts(a):
            return a["intermediate_size"]
        met = a.get("num_experts_per_tok") or 1
        width = a.get("moe_intermediate_size") or a["intermediate_size"]
        return (met + (a.get("n_shared_experts") or 0)) * width + met * a["hidden_size"] / 2

    def _head(self) -> dict[str, float]:
        """Bytes of the output layer's objective: float32 buffers of a chunk's logits, and of the weight's gradient."""
        tensor = self.config.parallel.tensor_model_parallel_size
        weight = self.size.embedding / tensor
        chunk = self.config.log_probs_chunk_size * self.architecture["vocab_size"] / tensor
        # Logits, probabilities and one more; with the whole vocabulary compared, as many of the teacher, and the slope.
        whole = self.config.has_divergence and self.config.teacher.is_in_trainer
        buffers = chunk * 4 * (5 if whole else 3) + chunk * self._width
        # A chunk's part of the weight's gradient is made in the weight's dtype before it is added.
        product = weight * self._width + chunk * self._width if self._width < 4 else 0
        return {
            "hidden states of the head": 2 * self._hidden,
            "output layer's gradient": weight * 4,
            "logits": max(buffers, product),
        }


def _head_widths(architecture: dict) -> tuple[float, float]:
    """Elements of a token's queries, and of its keys."""
    heads = architecture["num_attention_heads"]
    if architecture.get("kv_lora_rank"):
        query = architecture["qk_nope_head_dim"] + architecture["qk_rope_head_dim"]
        return heads * query, heads * (query + architecture["v_head_dim"]) / 2
    head = architecture.get("head_dim") or architecture["hidden_size"] // heads
    return heads * head, (architecture.get("num_key_value_heads") or heads) * head
