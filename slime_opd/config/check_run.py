"""Rules about the shape of a run: ranges, model, layout, batches, engines, checkpoints.

Each rule is a pure function from a Config to the sentences that say what is wrong.
"""

from __future__ import annotations

from slime_opd.config import megatron_options
from slime_opd.config.config import Config
from slime_opd.config.options import flag, options_of

POSITIVE = [
    "actor_num_nodes",
    "actor_num_gpus_per_node",
    "rollout_num_gpus_per_engine",
    "num_gpus_per_node",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "norm_epsilon",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "max_position_embeddings",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "recompute_num_layers",
    "global_batch_size",
    "num_steps_per_rollout",
    "micro_batch_size",
    "max_tokens_per_gpu",
    "log_probs_chunk_size",
    "distributed_timeout_minutes",
    "lr_decay_iters",
    "adam_eps",
    "save_interval",
    "rollout_max_prompt_len",
    "max_row_bytes",
    "num_epoch",
    "rollout_batch_size",
    "n_samples_per_prompt",
    "rollout_max_response_len",
    "rollout_max_context_len",
    "rollout_temperature",
    "rollout_top_p",
    "sglang_server_concurrency",
    "rollout_request_timeout_s",
    "eval_interval",
    "n_samples_per_eval_prompt",
    "eval_top_p",
    "eval_max_response_len",
    "eps_clip",
    "opd_teacher_timeout_s",
    "opd_teacher_concurrency",
    "opd_kl_clamp",
    "opd_temperature",
    "opd_reward_beta",
    "opd_token_keep_fraction",
    "update_weight_buffer_size",
]

NOT_NEGATIVE = [
    "rollout_num_gpus",
    "lr",
    "min_lr",
    "lr_warmup_iters",
    "weight_decay",
    "clip_grad",
    "ckpt_step",
    "keep_checkpoints",
    "save_interval_minutes",
    "exit_grace_s",
    "ref_ckpt_step",
    "num_rollout",
    "seed",
    "rollout_seed",
    "rollout_request_retries",
    "custom_function_timeout_s",
    "eval_temperature",
    "eps_clip_high",
    "kl_loss_coef",
    "opd_kl_coef",
    "opd_divergence_coef",
    "opd_log_prob_top_k",
    "opd_metrics_top_k",
    "opd_teacher_ckpt_step",
    "opd_teacher_retries",
    "opd_teacher_min_tokens_per_s",
    "opd_teacher_check_interval",
    "print_samples_interval",
    "max_skipped_steps",
    "watchdog_interval_s",
    "watchdog_timeout_s",
]

AT_MOST_ONE = [
    "attention_dropout",
    "hidden_dropout",
    "rotary_percent",
    "lr_warmup_fraction",
    "rollout_top_p",
    "eval_top_p",
    "opd_max_fallback_fraction",
    "opd_kl_discount",
    "opd_off_policy_fraction",
    "opd_token_keep_fraction",
]
FRACTIONS = [
    "attention_dropout",
    "hidden_dropout",
    "lr_warmup_fraction",
    "adam_beta1",
    "adam_beta2",
    "opd_max_fallback_fraction",
    "opd_kl_discount",
    "opd_off_policy_fraction",
]
BELOW_ONE = ["adam_beta1", "adam_beta2"]
TOP_K = ["rollout_top_k", "eval_top_k"]


def check_ranges(config: Config) -> list[str]:
    """Numbers that are outside what they can be."""
    rules = (
        (POSITIVE, lambda value: value > 0, "a number above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (FRACTIONS, lambda value: value >= 0, "a share between 0 and 1"),
        (AT_MOST_ONE, lambda value: value <= 1, "at most 1"),
        (BELOW_ONE, lambda value: value < 1, "a number below 1"),
        (TOP_K, lambda value: value == -1 or value > 0, "-1 (all tokens) or a number above 0"),
        (["eps_clip_c"], lambda value: value > 1, "a number above 1"),
    )
    options = options_of(Config)
    problems = []
    for names, holds, expected in rules:
        for name in names:
            value = options[name].read(config)
            if value is not None and not holds(value):
                problems.append(f"{flag(name)}: found {value}, expected {expected}")
    return problems


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
    if (model.num_query_groups is not None) != model.group_query_attention:
        found = "only one of the two"
        problems.append(f"--group-query-attention and --num-query-groups: found {found}, expected both or neither")
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


def check_precision(config: Config) -> list[str]:
    """More than one precision."""
    given = [f"--{name}" for name in ("bf16", "fp16", "fp32") if getattr(config.training, name)]
    return [f"found {' and '.join(given)}, expected one precision"] if len(given) > 1 else []


def check_recompute(config: Config) -> list[str]:
    """Recomputation flags that Megatron would stop at."""
    layout = config.parallel
    details = (layout.recompute_method, layout.recompute_num_layers)
    if layout.recompute_granularity == "full" and None in details:
        return ["--recompute-granularity full needs --recompute-method and --recompute-num-layers"]
    if layout.recompute_granularity != "full" and details != (None, None):
        return ["--recompute-method and --recompute-num-layers have no effect without --recompute-granularity full"]
    return []


def check_megatron(config: Config) -> list[str]:
    """Options of Megatron-core that cannot be read, or that nothing reads."""
    return megatron_options.problems_of(config.megatron)


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


def check_dynamic_batch(config: Config) -> list[str]:
    """Packing without a size to pack to."""
    training = config.training
    if training.use_dynamic_batch_size and training.max_tokens_per_gpu is None:
        return ["--use-dynamic-batch-size needs --max-tokens-per-gpu: the tokens to pack a micro-batch up to"]
    return []


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
    """Engines that would need GPUs of several nodes."""
    cluster = config.cluster
    per_engine, ranks = cluster.rollout_num_gpus_per_engine, cluster.actor_num_gpus_per_node
    if per_engine > cluster.num_gpus_per_node:
        return [
            f"--rollout-num-gpus-per-engine {per_engine} is more than the GPUs of a node (--num-gpus-per-node {cluster.num_gpus_per_node}): engines over several nodes are not supported; use smaller engines, or set --num-gpus-per-node if nodes are larger"
        ]
    if cluster.colocate and cluster.actor_num_nodes > 1 and _indivisible(ranks, per_engine):
        return [
            f"--colocate: --rollout-num-gpus-per-engine {per_engine} does not divide --actor-num-gpus-per-node {ranks}, so an engine would need GPUs of two nodes"
        ]
    return []


def check_checkpoint(config: Config) -> list[str]:
    """Checkpoint flags that would do nothing."""
    checkpoint = config.checkpoint
    pairs = [(name, "save") for name in ("save_interval", "save_interval_minutes", "save_hf")]
    pairs.append(("ref_ckpt_step", "ref_load"))
    # Of a run in --save that is to go back, no --load is needed.
    if checkpoint.save is None:
        pairs.append(("ckpt_step", "load"))
    return [
        f"{flag(name)} has no effect without {flag(needed)}"
        for name, needed in pairs
        if getattr(checkpoint, name) is not None and getattr(checkpoint, needed) is None
    ]


def check_save_hf(config: Config) -> list[str]:
    """A path of Hugging Face checkpoints that would be the same for every step, or cannot be filled in."""
    path = config.checkpoint.save_hf
    if path is None:
        return []
    try:
        is_filled = path.format(rollout_id=1) != path.format(rollout_id=2)
    except (IndexError, KeyError, ValueError, AttributeError):
        is_filled = False
    return [] if is_filled else [f"--save-hf: found {path!r}, expected a path with {{rollout_id}} in it, for the step"]


def check_weight_transport(config: Config) -> list[str]:
    """A way of sending weights that cannot reach the engines, or a directory no one writes to."""
    weights, nodes = config.weights, config.cluster.actor_num_nodes
    problems = []
    if weights.update_weight_transport == "tensor" and nodes > 1 and not config.cluster.colocate:
        problems.append(
            f"--update-weight-transport tensor is shared memory on one node, found --actor-num-nodes {nodes}: use broadcast or disk, or --colocate"
        )
    if weights.update_weight_disk_dir is not None and weights.update_weight_transport != "disk":
        problems.append("--update-weight-disk-dir has no effect without --update-weight-transport disk")
    return problems


def _indivisible(number: int | None, divisor: int | None) -> bool:
    """Whether both are known and positive and `divisor` does not divide `number`."""
    return number is not None and divisor is not None and divisor > 0 and number % divisor != 0
