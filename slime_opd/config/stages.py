"""What a user can say: one frozen dataclass per stage of the run.

Each class is one group of `--help`; its docstring's first line is the group's title. Names are
Megatron-LM's for Megatron's options and slime's for the rest. "GPU" in a name means
a training or serving process's device; on a machine without CUDA it means one CPU process.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

from slime_opd.config.debug_stage import DebugConfig
from slime_opd.config.distillation_stages import DivergenceConfig, OPDConfig
from slime_opd.config.megatron_options import make_stage
from slime_opd.config.options import option

__all__ = ["DebugConfig", "DivergenceConfig", "OPDConfig"]  # the other stages are below


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Cluster: how many processes of each kind, and where"""

    actor_num_nodes: int = option(1, help="nodes that train")
    actor_num_gpus_per_node: int = option(1, help="training GPUs (on a CPU: processes) per node")
    rollout_num_gpus: int | None = option(
        None,
        help="GPUs (on a CPU: processes) that generate; unset: one engine's worth, or the training GPUs with --colocate",
    )
    rollout_num_gpus_per_engine: int = option(1, help="GPUs of one SGLang engine: its tensor-parallel size")
    num_gpus_per_node: int = option(8, help="GPUs of a node: the most that one engine may have")
    colocate: bool = option(
        False, help="engines share the training GPUs, and their memory at the same time: nothing is released in between"
    )
    ray_address: str = option("auto", help="Ray cluster to join; 'local' starts one for this run alone")
    watchdog_interval_s: float = option(
        60.0, help="seconds without progress after which a line says who is waited for, then ever more rarely; 0: never"
    )
    watchdog_timeout_s: float = option(
        1800.0, help="seconds without progress (a sample, a micro-batch, a save) that end the run; 0: never"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: where its architecture and tokenizer come from"""

    hf_checkpoint: str | None = option(
        None,
        help="Hugging Face directory of the student: tokenizer, config, and the engines' first weights",
        metavar="DIR",
    )
    megatron_to_hf_mode: str = option(
        "raw", choices=("raw", "bridge"), help="raw: architecture from the Megatron flags; bridge: from --hf-checkpoint"
    )
    num_layers: int | None = option(None, help="transformer layers")
    hidden_size: int | None = option(None, help="width of the model")
    ffn_hidden_size: int | None = option(None, help="width of the MLP")
    num_attention_heads: int | None = option(None, help="attention heads")
    group_query_attention: bool = option(False, help="share key and value heads between query heads")
    num_query_groups: int | None = option(None, help="key and value heads; with --group-query-attention")
    kv_channels: int | None = option(None, help="width of one head; unset: hidden size / heads")
    swiglu: bool = option(False, help="gated SiLU in the MLP")
    normalization: str = option("LayerNorm", choices=("LayerNorm", "RMSNorm"), help="kind of norm")
    norm_epsilon: float = option(1e-5, help="epsilon of the norms")
    qk_layernorm: bool = option(False, help="norm on queries and keys")
    add_qkv_bias: bool = option(False, help="bias in the query, key and value projections")
    disable_bias_linear: bool = option(False, help="no bias in the other linear layers")
    untie_embeddings_and_output_weights: bool = option(False, help="output layer with weights of its own")
    use_rotary_position_embeddings: bool = option(
        False, help="rotary position embeddings (same as --position-embedding-type rope)"
    )
    position_embedding_type: str = option("rope", choices=("rope",), help="kind of position embedding")
    no_position_embedding: bool = option(
        False, help="accepted for Megatron-LM's scripts: positions are rotary, and no other embedding is added"
    )
    rotary_base: int = option(10000, help="base of the rotary frequencies")
    rotary_percent: float = option(1.0, help="share of a head that is rotated")
    use_rope_scaling: bool = option(False, help="Llama 3's scaling of the rotary frequencies")
    rotary_scaling_factor: float = option(8.0, help="factor of --use-rope-scaling")
    max_position_embeddings: int | None = option(None, help="longest sequence; unset: the Hugging Face config's")
    vocab_size: int | None = option(None, help="vocabulary without padding")
    make_vocab_size_divisible_by: int = option(
        128, help="the vocabulary is padded to a multiple of this times the tensor-parallel size"
    )
    spec: tuple[str, ...] = option(
        (), help="accepted for slime's scripts: the layers that a family needs are known here", nargs="+"
    )
    post_self_attn_layernorm: bool = option(False, help="norm of the attention's output, before the residual (GLM-4)")
    post_mlp_layernorm: bool = option(False, help="norm of the MLP's output, before the residual (GLM-4)")
    mtp_num_layers: int | None = option(
        None, help="accepted for models that have layers for multi-token prediction; they stay as they are, untrained"
    )
    attention_dropout: float = option(0.0, help="dropout of attention weights")
    hidden_dropout: float = option(0.0, help="dropout of hidden states")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism: how the model is laid out over the training GPUs"""

    tensor_model_parallel_size: int = option(1, help="ranks that share each layer")
    pipeline_model_parallel_size: int = option(1, help="stages the layers are split into")
    context_parallel_size: int = option(1, help="ranks that share a sequence (needs Transformer Engine)")
    expert_model_parallel_size: int = option(1, help="ranks that share the experts")
    expert_tensor_parallel_size: int = option(1, help="ranks that share one expert (needs Transformer Engine)")
    sequence_parallel: bool = option(
        False, help="split norms and dropout over the tensor-parallel ranks; nothing where there is one"
    )
    recompute_granularity: str | None = option(
        None, choices=("full", "selective"), help="activations to recompute in the backward; unset: none"
    )
    recompute_method: str | None = option(
        None, choices=("uniform", "block"), help="which layers --recompute-granularity full recomputes"
    )
    recompute_num_layers: int | None = option(None, help="layers per recomputed block")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training: batches, precision and kernels"""

    loss_type: str = option(
        "policy_loss",
        choices=("policy_loss", "sft_loss"),
        help="policy_loss: train on rollouts; sft_loss: on the data set's own responses",
    )
    global_batch_size: int | None = option(None, help="samples per optimizer step; unset: all samples of a rollout")
    num_steps_per_rollout: int | None = option(
        None, help="optimizer steps per rollout; sets --global-batch-size from the other side"
    )
    micro_batch_size: int = option(1, help="samples per micro-batch, without --use-dynamic-batch-size")
    use_dynamic_batch_size: bool = option(False, help="pack micro-batches up to --max-tokens-per-gpu")
    max_tokens_per_gpu: int | None = option(None, help="tokens per micro-batch and GPU, with --use-dynamic-batch-size")
    seq_length: int | None = option(
        None, help="accepted for Megatron-LM's scripts: samples are packed, whatever their lengths"
    )
    balance_data: bool = option(
        False, help="accepted for slime's scripts: data-parallel ranks are always balanced by tokens"
    )
    calculate_per_token_loss: bool = option(
        False, help="mean over all tokens of a step; unset: mean over samples of each sample's mean"
    )
    bf16: bool = option(False, help="train in bfloat16 (the default where CUDA is)")
    fp16: bool = option(False, help="train in float16")
    fp32: bool = option(False, help="train in float32 (the default on a CPU)")
    accumulate_allreduce_grads_in_fp32: bool = option(False, help="accumulate and reduce gradients in float32")
    attention_softmax_in_fp32: bool = option(False, help="attention softmax in float32")
    attention_backend: str = option(
        "auto",
        choices=("auto", "flash", "fused", "unfused", "local"),
        help="attention kernel of Transformer Engine; local: this package's own",
    )
    log_probs_chunk_size: int | None = option(
        None,
        help="tokens whose logits exist at one time; unset: 1024 for each tensor-parallel rank, so that a rank's share takes the same memory at any size, in fewer kernels",
    )
    seed: int = option(1234, help="seed of the trainer")
    distributed_timeout_minutes: int = option(
        10,
        help="minutes before a stuck collective ends the run; while checkpoints are read or written, --watchdog-timeout-s decides",
    )
    max_skipped_steps: int = option(
        3,
        help="optimizer steps in a row that may be skipped for a loss or gradient that is not finite; 0: the first ends the run",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate"""

    optimizer: str = option(
        "adam", choices=("adam",), help="optimizer; Megatron's distributed optimizer takes Adam alone"
    )
    lr: float = option(1e-6, help="learning rate")
    min_lr: float = option(0.0, help="learning rate at the end of the decay")
    lr_decay_style: str = option(
        "constant", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"), help="shape of the decay"
    )
    lr_decay_iters: int | None = option(None, help="optimizer steps of the decay; unset: the whole run")
    lr_warmup_iters: int = option(0, help="optimizer steps of the warm-up")
    lr_warmup_fraction: float | None = option(None, help="warm-up as a share of the decay")
    weight_decay: float = option(0.01, help="weight decay")
    adam_beta1: float = option(0.9, help="Adam's beta1")
    adam_beta2: float = option(0.999, help="Adam's beta2")
    adam_eps: float = option(1e-8, help="Adam's epsilon")
    clip_grad: float = option(1.0, help="largest global gradient norm; 0: no clipping")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints"""

    load: str | None = option(
        None,
        help="checkpoint to continue from; where it holds none yet, training starts from --ref-load or --hf-checkpoint",
        metavar="DIR",
    )
    ckpt_step: int | None = option(None, help="step of --load (or of --save, to go back in a run); unset: the latest")
    save: str | None = option(
        None, help="directory of the run's checkpoints; the same command continues from the newest in it", metavar="DIR"
    )
    save_interval: int | None = option(None, help="rollouts between checkpoints; unset: only by time and at the end")
    save_interval_minutes: float | None = option(
        None, help="minutes between checkpoints; 0: never; unset: 30, or 0 with --save-interval"
    )
    save_hf: str | None = option(
        None,
        help="also write each checkpoint as a Hugging Face directory, at this path with {rollout_id} as its step",
        metavar="PATH",
    )
    keep_checkpoints: int = option(
        0, help="newest checkpoints to keep; 0: all, but of those written by time the newest 2"
    )
    exit_grace_s: float = option(
        60.0, help="seconds that a run told to end (SIGTERM, Ctrl-C) may take to save unsaved steps; 0: end at once"
    )
    no_save_optim: bool = option(False, help="save weights only")
    no_load_optim: bool = option(False, help="load weights only")
    finetune: bool = option(False, help="take the weights of --load and start from step 0")
    no_verify_checkpoint: bool = option(
        False, help="load checkpoints without comparing their files with the checksums in manifest.sha256"
    )
    ref_load: str | None = option(
        None, help="checkpoint of the reference model, and of the first weights", metavar="DIR"
    )
    ref_ckpt_step: int | None = option(None, help="step of --ref-load; unset: the latest")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts"""

    prompt_data: str | None = option(
        None,
        help="file of prompts: JSONL, a JSON array, CSV or Parquet; FILE@[a:b] is a slice of its rows",
        metavar="FILE",
    )
    input_key: str = option(
        "input", help="column of the prompt: a string or a list of chat messages; dots reach into nested columns"
    )
    label_key: str | None = option(None, help="column of the answer (with sft_loss: of the response)")
    metadata_key: str = option("metadata", help="column handed to custom rewards")
    apply_chat_template: bool = option(False, help="render the prompt with the tokenizer's chat template")
    apply_chat_template_kwargs: str = option(
        "{}", help="JSON object of arguments for the chat template", metavar="JSON"
    )
    rollout_shuffle: bool = option(False, help="shuffle the prompts of each epoch")
    rollout_seed: int = option(42, help="seed of the shuffle and of the engines' sampling")
    rollout_max_prompt_len: int | None = option(None, help="drop longer prompts, in tokens; unset: keep all")
    too_long_prompts: str = option(
        "refuse",
        choices=("refuse", "drop"),
        help="prompts, for training and evaluation, that leave no token for a response in the context (with sft_loss: with their response, longer than it or than --max-tokens-per-gpu): refuse to start, or drop and count them",
    )
    max_row_bytes: int = option(16 * 1024 * 1024, help="largest row of a data file, in bytes; a larger one is refused")
    num_epoch: int | None = option(None, help="epochs over the prompts; sets --num-rollout")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollout: how the student generates"""

    num_rollout: int | None = option(None, help="rollouts of the run; 0: evaluate only")
    rollout_batch_size: int | None = option(None, help="prompts per rollout")
    n_samples_per_prompt: int = option(1, help="responses per prompt")
    rollout_max_response_len: int | None = option(None, help="longest response, in tokens")
    rollout_max_context_len: int | None = option(
        None, help="longest prompt plus response, in tokens; unset: the model's"
    )
    rollout_temperature: float = option(1.0, help="sampling temperature")
    rollout_top_p: float = option(1.0, help="nucleus of the sampling; 1: all")
    rollout_top_k: int = option(-1, help="most likely tokens to sample from; -1: all")
    rollout_stop: tuple[str, ...] = option((), nargs="+", help="strings that end a response")
    rollout_stop_token_ids: tuple[int, ...] = option(
        (), nargs="+", help="token ids that end a response, beside the end-of-sequence token"
    )
    sglang_server_concurrency: int = option(512, help="requests in flight per engine")
    dynamic_sampling_filter_path: str | None = option(
        None,
        help="leave out groups of which `(samples) -> bool`, or slime's `(args, samples)`, is false, and generate others; slime's check_reward_nonzero_std is built in",
        metavar="MODULE.FUNCTION",
    )
    over_sampling_batch_size: int | None = option(
        None, help="prompts taken at a time, with --dynamic-sampling-filter-path; unset: --rollout-batch-size"
    )
    rollout_function_path: str | None = option(
        None,
        help="accepted for slime's scripts: its sft_rollout.generate_rollout is built in as --loss-type sft_loss",
        metavar="MODULE.FUNCTION",
    )
    rollout_request_timeout_s: float = option(600.0, help="seconds that one generation may take")
    rollout_request_retries: int = option(8, help="times a failed generation is sent again")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Reward"""

    rm_type: str | None = option(
        None,
        choices=("math", "deepscaler", "exact_match"),
        help="built-in verifier of a response against its label; unset: no task reward",
    )
    custom_rm_path: str | None = option(
        None,
        help="your reward: a function `(sample) -> float`, or slime's `(args, sample)`, async or not",
        metavar="MODULE.FUNCTION",
    )
    custom_function_timeout_s: float = option(
        60.0,
        help="seconds that --custom-rm-path and --dynamic-sampling-filter-path may take when they are tried on made-up responses before the run; 0: not tried",
    )
    custom_reward_post_process_path: str | None = option(
        None,
        help="accepted for slime's scripts: its on_policy_distillation.post_process_rewards is built in",
        metavar="MODULE.FUNCTION",
    )
    rm_url: str | None = option(None, help="endpoint of the SGLang teacher, http://HOST:PORT/generate", metavar="URL")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation"""

    eval_interval: int | None = option(
        None, help="rollouts between evaluations; unset: only before the first and after the last"
    )
    eval_prompt_data: tuple[str, ...] = option((), nargs="+", metavar="NAME FILE", help="pairs of a name and a file")
    skip_eval_before_train: bool = option(False, help="no evaluation before the first step")
    n_samples_per_eval_prompt: int = option(1, help="responses per evaluation prompt")
    eval_temperature: float = option(0.0, help="sampling temperature; 0: greedy")
    eval_top_p: float = option(1.0, help="nucleus of the sampling")
    eval_top_k: int = option(-1, help="most likely tokens to sample from; -1: all")
    eval_max_response_len: int | None = option(
        None, help="longest response, in tokens; unset: --rollout-max-response-len"
    )
    eval_input_key: str | None = option(None, help="column of the prompt; unset: --input-key")
    eval_label_key: str | None = option(None, help="column of the answer; unset: --label-key")
    eval_rm_type: str | None = option(
        None, choices=("math", "deepscaler", "exact_match"), help="verifier; unset: --rm-type, or math"
    )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Algorithm: advantages and the policy loss"""

    advantage_estimator: str = option(
        "grpo", choices=("grpo",), help="base advantage; the OPD penalty is added to any of them"
    )
    normalize_advantages: bool = option(
        False, help="whiten the base advantages over the whole rollout, before the OPD penalty"
    )
    disable_rewards_normalization: bool = option(
        False, help="use rewards as they are: no group mean, no group deviation"
    )
    disable_grpo_std_normalization: bool = option(False, help="subtract the group mean only")
    disable_compute_advantages_and_returns: bool = option(
        False, help="accepted for slime's scripts of supervised fine-tuning, which has no advantages"
    )
    kl_coef: float = option(
        0.0, help="accepted for slime's scripts, at 0: the KL to a reference is a loss, --kl-loss-coef"
    )
    eps_clip: float = option(0.2, help="PPO clip below 1")
    eps_clip_high: float | None = option(None, help="PPO clip above 1; unset: --eps-clip")
    eps_clip_c: float | None = option(None, help="dual clip, the lower bound for negative advantages; unset: off")
    entropy_coef: float = option(0.0, help="weight of the entropy bonus")
    use_kl_loss: bool = option(False, help="add a KL loss to the reference model (--ref-load)")
    kl_loss_coef: float = option(0.0, help="weight of the KL loss")
    kl_loss_type: str = option("k1", choices=("k1", "k2", "k3", "low_var_kl"), help="estimator of the KL loss")
    use_rollout_logprobs: bool = option(
        False, help="the engine's log-probs are the old policy's, instead of the trainer's"
    )


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Weights: from the trainer to the engines"""

    update_weight_transport: str = option(
        "auto",
        choices=("auto", "tensor", "broadcast", "disk"),
        help="tensor: memory that the engines open (by CUDA IPC with --colocate, on CPUs on one node); broadcast: a process group with the engines; disk: a Hugging Face directory; auto: tensor where it works, else broadcast",
    )
    update_weight_buffer_size: int = option(512 * 1024 * 1024, help="bytes sent at a time")
    update_weight_disk_dir: str | None = option(
        None, help="directory for disk updates; unset: in --run-dir", metavar="DIR"
    )
    check_weight_update_equal: bool = option(
        False,
        help="after each update, send the weights a second time and compare checksums, to prove that the engines serve exactly these",
    )


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """Watching a run"""

    run_dir: str | None = option(
        None,
        help="where metrics.jsonl, TensorBoard files and the resolved configuration go; unset: SAVE/run, or runs/DATE",
        metavar="DIR",
    )
    no_tensorboard: bool = option(False, help="no TensorBoard files")
    use_wandb: bool = option(False, help="log to Weights & Biases too (needs the wandb extra)")
    wandb_mode: str = option(
        "online", choices=("online", "offline", "disabled"), help="offline: files for `wandb sync`"
    )
    wandb_project: str | None = option(None, help="project; unset: wandb's default")
    wandb_group: str | None = option(None, help="group of runs, and the run's name with a random ending")
    wandb_team: str | None = option(None, help="entity; unset: your default")
    wandb_host: str | None = option(None, help="address of the server; unset: wandb.ai", metavar="URL")
    wandb_dir: str | None = option(None, help="where wandb writes; unset: the run directory", metavar="DIR")
    print_samples_interval: int = option(10, help="rollouts between printed samples; 0: never")


MegatronConfig = make_stage(
    {row.name for stage in list(vars().values()) if is_dataclass(stage) for row in fields(stage)}
)
# Pickle finds a class by its module and name.
MegatronConfig.__module__ = __name__
