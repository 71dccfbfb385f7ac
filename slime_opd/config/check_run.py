"""Rules between options: model, parallel layout, batches, engines, checkpoints."""

from __future__ import annotations

from slime_opd.config import megatron_options
from slime_opd.config.config import Config
from slime_opd.config.options import flag
from slime_opd.config.paths import names_each_rollout


def check_model(config: Config) -> list[str]:
    """Architecture flags that are missing or do not fit each other."""
    model = config.model
    problems = []
    if model.megatron_to_hf_mode == "raw":
        needed = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
        if missing := [flag(name) for name in needed if getattr(model, name) is None]:
            problems.append(
                f"--megatron-to-hf-mode raw needs {', '.join(missing)}: add the MODEL_ARGS of scripts/models, or take the architecture from --hf-checkpoint with --megatron-to-hf-mode bridge"
            )
    heads, groups = model.num_attention_heads, model.num_query_groups
    if _indivisible(heads, groups):
        problems.append(f"--num-attention-heads {heads} cannot be shared evenly by --num-query-groups {groups}")
    if model.kv_channels is None and _indivisible(model.hidden_size, heads):
        problems.append(
            f"--hidden-size {model.hidden_size} is no multiple of --num-attention-heads {heads}: give the width of a head with --kv-channels"
        )
    return problems


def check_layout(config: Config) -> list[str]:
    """Parallel sizes that the processes or the model cannot be divided by."""
    layout, world = config.parallel, config.world_size
    ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    problems = []
    if _indivisible(world, ranks):
        problems.append(
            f"{world} training processes (--actor-num-nodes × --actor-num-gpus-per-node) are no multiple of {ranks} (--tensor-model-parallel-size × --pipeline-model-parallel-size × --context-parallel-size)"
        )
    of_experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    if of_experts > 1 and _indivisible(world, of_experts * layout.pipeline_model_parallel_size):
        problems.append(
            f"{world} training processes (--actor-num-nodes × --actor-num-gpus-per-node) are no multiple of {of_experts * layout.pipeline_model_parallel_size} (--expert-model-parallel-size × --expert-tensor-parallel-size × --pipeline-model-parallel-size)"
        )
    model = config.model
    return problems + model_layout_problems(
        config, layers=model.num_layers, heads=model.num_attention_heads, groups=model.num_query_groups
    )


def model_layout_problems(config: Config, layers: int | None, heads: int | None, groups: int | None) -> list[str]:
    """What of a model's dimensions its tensor- or pipeline-parallel size does not divide."""
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    sizes = (("attention heads", heads), ("key-value heads (query groups)", groups))
    problems = [
        f"--tensor-model-parallel-size {tensor} does not divide the model's {count} {what}"
        for what, count in sizes
        if _indivisible(count, tensor)
    ]
    # Stages at the ends may be given a number of layers of their own.
    ends = (config.megatron.num_layers_in_first_pipeline_stage, config.megatron.num_layers_in_last_pipeline_stage)
    given = [count for count in ends if count is not None]
    if layers is None:
        return problems
    left, stages = layers - sum(given), pipeline - len(given)
    if given and (left < stages or (stages == 0 and left)):
        problems.append(
            f"--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers: found {' and '.join(map(str, given))} of the model's {layers} layers, which leaves {left} for the other {stages} of {pipeline} pipeline stages"
        )
    elif stages > 0 and _indivisible(left, stages):
        rest = f" that the {len(given)} stages with a number of their own leave" if given else ""
        problems.append(
            f"--pipeline-model-parallel-size {pipeline} does not divide the model's {layers} layers{rest}; --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers give the ends others"
        )
    return problems


def check_context_parallel(config: Config) -> list[str]:
    """What the packing of samples cannot lay out yet, with or without Transformer Engine."""
    size = config.parallel.context_parallel_size
    if size == 1:
        return []
    return [
        f"--context-parallel-size {size}: packed rows are not split over ranks yet, so the result would be wrong; set it to 1 and lower --max-tokens-per-gpu, or raise --tensor-model-parallel-size"
    ]


def check_precision(config: Config) -> list[str]:
    """More than one precision."""
    given = [f"--{name}" for name in ("bf16", "fp16", "fp32") if getattr(config.training, name)]
    return [f"found {' and '.join(given)}, expected one precision"] if len(given) > 1 else []


def check_layer_patterns(config: Config) -> list[str]:
    """Options of Megatron-core with a value for each layer that cannot be read."""
    return megatron_options.pattern_problems(config.megatron)


def check_warmup(config: Config) -> list[str]:
    """Two lengths of one warm-up."""
    optimizer = config.optimizer
    if optimizer.lr_warmup_iters and optimizer.lr_warmup_fraction is not None:
        return ["--lr-warmup-iters and --lr-warmup-fraction: found both, expected one"]
    return []


def check_batches(config: Config) -> list[str]:
    """Batch sizes that do not divide each other, or contradict."""
    samples, training = config.samples_per_rollout, config.training
    if samples <= 0:
        return []
    what = f"the {samples} samples of a rollout (--rollout-batch-size × --n-samples-per-prompt)"
    if config.is_sft:
        what = f"the {samples} samples of a step of data (--rollout-batch-size)"
    steps = training.num_steps_per_rollout
    if _indivisible(samples, steps):
        return [f"--num-steps-per-rollout {steps} does not divide {what}"]
    batch = config.global_batch_size
    if batch <= 0:
        return []
    if _indivisible(samples, batch):
        return [f"--global-batch-size {batch} does not divide {what}: some would never be trained on"]
    named = f"--global-batch-size {batch}" if training.global_batch_size else f"the global batch of {batch} samples"
    problems = []
    if steps is not None and steps * batch != samples:
        problems.append(
            f"--num-steps-per-rollout {steps} and --global-batch-size {batch} contradict each other: {what} make {samples // batch} steps of {batch}; give one of the two"
        )
    ranks = config.data_parallel_size
    if _indivisible(batch, ranks):
        problems.append(f"{named} is no multiple of the {ranks} data-parallel ranks that share each optimizer step")
    return problems


def check_engines(config: Config) -> list[str]:
    """GPUs for the engines that cannot be shared out evenly."""
    cluster = config.cluster
    per_engine, given = cluster.rollout_num_gpus_per_engine, cluster.rollout_num_gpus
    if given == 0:
        return [] if config.is_sft else ["--rollout-num-gpus: found 0, expected at least one engine's worth"]
    problems = []
    if _indivisible(given, per_engine):
        problems.append(f"--rollout-num-gpus {given} is no multiple of --rollout-num-gpus-per-engine {per_engine}")
    if cluster.colocate and given is None and _indivisible(config.world_size, per_engine):
        problems.append(
            f"--colocate: the {config.world_size} training GPUs are no multiple of --rollout-num-gpus-per-engine {per_engine}"
        )
    if cluster.colocate and given is not None and given > config.world_size:
        problems.append(
            f"--rollout-num-gpus {given} is more than the {config.world_size} training GPUs that --colocate shares"
        )
    return problems


def check_engine_fits_node(config: Config) -> list[str]:
    """Colocated engines that would need GPUs of several nodes; others are placed where Ray finds a node for them."""
    cluster = config.cluster
    per_engine, ranks = cluster.rollout_num_gpus_per_engine, cluster.actor_num_gpus_per_node
    if cluster.colocate and cluster.actor_num_nodes > 1 and _indivisible(ranks, per_engine):
        return [
            f"--colocate: --rollout-num-gpus-per-engine {per_engine} does not divide --actor-num-gpus-per-node {ranks}, so an engine would need GPUs of two nodes"
        ]
    return []


def check_save_hf(config: Config) -> list[str]:
    """A path of Hugging Face checkpoints that would be the same for every step, or cannot be filled in."""
    path = config.checkpoint.save_hf
    if path is None or names_each_rollout(path):
        return []
    return [f"--save-hf: found {path!r}, expected a path with {{rollout_id}} in it, for the step"]


def check_weight_transport(config: Config) -> list[str]:
    """A weight transport that cannot reach the engines."""
    nodes = config.cluster.actor_num_nodes
    if config.weights.update_weight_transport != "tensor" or nodes == 1 or config.cluster.colocate:
        return []
    return [
        f"--update-weight-transport tensor is shared memory on one node, found --actor-num-nodes {nodes}: use broadcast or disk, or --colocate"
    ]


def _indivisible(number: int | None, divisor: int | None) -> bool:
    """Whether both are known and positive and `divisor` does not divide `number`."""
    return number is not None and divisor is not None and divisor > 0 and number % divisor != 0
