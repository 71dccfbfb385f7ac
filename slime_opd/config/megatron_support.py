"""The support of every field of Megatron-core's dataclasses: works, needs something, or is refused, and why.

One entry per field, declared by groups. The parser, the checks, `--help megatron` and docs/megatron.md read this table.
A test compares it with the fields of the installed Megatron-core, and fails for a field of a new version.
Fields that are options of this package under the same name (`--tensor-model-parallel-size`, `--lr`) are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Answer(StrEnum):
    """How a flag for a field is answered."""

    WORKS = "works"
    MODEL = "part of the model"
    ENGINE = "needs Transformer Engine"
    ACCEPTED = "accepted, no effect"
    NO_EFFECT = "refused, no effect"
    REFUSED = "refused"
    MANAGED = "set by this package"


@dataclass(frozen=True)
class Support:
    """A field's answer and the reason for it; for what works, what shows it.

    `allowed`: of a refused field, the values that are accepted; Megatron's default is too, unless `refuses_default`.
    """

    answer: Answer
    reason: str
    allowed: tuple[object, ...] = ()
    refuses_default: bool = False

    @property
    def is_refused(self) -> bool:
        """Whether a value that differs from Megatron's default is refused on every machine."""
        return self.answer in (Answer.NO_EFFECT, Answer.REFUSED)


TRAINED = "a test trains with it"
BUILT = "a test builds with it; what it does in training was read in Megatron-core's source"

_NO_FAMILY = "no supported model family has it"
_ONE_CHUNK = "every rank holds one chunk of layers, there is no interleaved pipeline"
_FP8 = "rows are packed to any length, and Transformer Engine's fp8 kernels take multiples of 8 or 16 rows; use --bf16"
_FSDP = "weights are sharded by the distributed optimizer, not by FSDP"
_GRAPHS = "lengths vary from row to row, and a CUDA graph replays one shape"
_NO_CONTEXT_PARALLEL = "packed rows are not split over context-parallel ranks"
_OWN_HEAD = "the loss has an output layer of this package's own, which makes logits chunk by chunk"
_LOADED = "weights are loaded, never kept as initialised"
_NO_TIMERS = "Megatron's timers are not used"
_USERBUFFERS = "Transformer Engine's userbuffers are not initialised; use --sequence-parallel alone"
_GENERATES = "SGLang generates"
_SPEC = "the layers' spec comes from the model family"
_DROPS = "tokens would be dropped by how rows are packed, and log-probs would not be those of the engine"
_OTHER_ROUTE = "the trainer would route tokens otherwise than the engine that generated them"
_OFFLOAD_ACTIVATIONS = (
    "offloaded activations were never tried with packed rows; recompute them (--recompute-granularity)"
)
_TRAINING_LOOP = "the part of it that acts is in Megatron-LM's training loop, which is not used here"

_DECLARED: tuple[tuple[Answer, str, str], ...] = (
    # Parallelism.
    (Answer.NO_EFFECT, "pipeline stages talk over the same backend as all ranks", "pipeline_model_parallel_comm_backend"),
    (
        Answer.REFUSED,
        _ONE_CHUNK,
        "virtual_pipeline_model_parallel_size overlap_p2p_comm overlap_param_gather_with_optimizer_step align_param_gather",
    ),
    (Answer.NO_EFFECT, _ONE_CHUNK, "overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage"),
    (
        Answer.NO_EFFECT,
        _NO_CONTEXT_PARALLEL,
        "hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel",
    ),
    (Answer.ACCEPTED, _NO_CONTEXT_PARALLEL, "cp_comm_type"),
    (Answer.NO_EFFECT, "Megatron-core no longer reads it", "moe_extended_tp moe_token_dropping"),
    (Answer.ACCEPTED, "Megatron-core no longer reads it", "async_tensor_model_parallel_allreduce moe_per_layer_logging"),
    (Answer.NO_EFFECT, "Megatron-core no longer reads it", "apply_residual_connection_post_layernorm"),
    (Answer.WORKS, TRAINED, "num_layers_in_first_pipeline_stage"),
    (Answer.WORKS, BUILT, "num_layers_in_last_pipeline_stage"),
    (
        Answer.REFUSED,
        "say how many layers the ends have with --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
        "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split",
    ),
    (Answer.WORKS, BUILT, "batch_p2p_sync clone_scatter_output_in_embedding"),
    (Answer.WORKS, TRAINED, "deallocate_pipeline_outputs"),
    (Answer.MANAGED, "sends between pipeline stages are batched on CUDA alone", "batch_p2p_comm"),
    (Answer.MANAGED, "Megatron sets it by the pipeline's layout", "mtp_standalone"),
    (Answer.REFUSED, "it needs a build of torch with a kernel of its own", "use_ring_exchange_p2p"),
    (
        Answer.REFUSED,
        "its schedule runs the parts of a layer apart from its forward, which packed rows here do not",
        "overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release",
    ),
    (Answer.REFUSED, _USERBUFFERS, "tp_comm_overlap"),
    (
        Answer.NO_EFFECT,
        "it is part of --tp-comm-overlap, which is not supported",
        "tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag "
        "tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 "
        "tp_comm_bootstrap_backend",
    ),
    (Answer.REFUSED, "it is for inference with symmetric memory", "symmetric_ar_type"),
    # Precision, determinism.
    (
        Answer.MANAGED,
        "use --bf16, --fp16 or --fp32",
        "params_dtype pipeline_dtype autocast_dtype enable_autocast",
    ),
    (Answer.MANAGED, "use --accumulate-allreduce-grads-in-fp32", "grad_reduce_in_fp32"),
    (Answer.WORKS, "a test trains with it on a CPU; on a GPU it chooses deterministic kernels of torch, flash-attn and Transformer Engine, which was only read", "deterministic_mode"),
    (Answer.WORKS, BUILT, "disable_bf16_reduced_precision_matmul"),
    (Answer.REFUSED, "its kernels are for inference with FlashAttention", "batch_invariant_mode"),
    (Answer.REFUSED, "the linear layers would get float32 activations for their bfloat16 weights", "fp32_residual_connection"),
    (Answer.ACCEPTED, "dropout draws from Megatron's own tracker of random states", "use_te_rng_tracker"),
    (Answer.REFUSED, _FP8, "fp8 fp4 fp8_param fp4_param fp8_param_gather activation_func_fp8_input_store"),
    (
        Answer.NO_EFFECT,
        "training in fp8 or fp4 is not supported",
        "fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
        "fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16 "
        "num_layers_at_end_in_bf16 fp4_recipe fp4_quantizer_factory moe_router_padding_for_quantization "
        "moe_router_padding_for_fp8 reuse_grad_buf_for_mxfp8_param_ag disable_parameter_transpose_cache",
    ),
    (Answer.REFUSED, "the package is NVIDIA's own", "use_kitchen use_kitchen_attention"),
    (Answer.NO_EFFECT, "--use-kitchen is not supported", "kitchen_attention_backend"),
    # Memory: recomputation and offloading.
    (Answer.WORKS, TRAINED, "recompute_modules distribute_saved_activations"),
    (
        Answer.REFUSED,
        "use --recompute-granularity selective --recompute-modules moe",
        "moe_layer_recompute",
    ),
    (
        Answer.REFUSED,
        "recomputation is the same for every micro-batch: their number is known only once a rollout is packed",
        "num_microbatches_with_partial_activation_checkpoints",
    ),
    (Answer.REFUSED, _OFFLOAD_ACTIVATIONS, "cpu_offloading fine_grained_activation_offloading"),
    (
        Answer.NO_EFFECT,
        _OFFLOAD_ACTIVATIONS,
        "cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering "
        "offload_modules min_offloaded_tensor_size",
    ),
    # Kernels. Which of them a machine can run is also a matter of its attention backend and Transformer Engine.
    (Answer.MANAGED, "use --attention-backend: local is this package's own, anything else Transformer Engine where it is", "transformer_impl"),
    (Answer.ENGINE, "the fused rotation is its kernel", "apply_rope_fusion"),
    (Answer.ENGINE, "layers without it run unfused", "bias_activation_fusion bias_dropout_fusion"),
    (Answer.ACCEPTED, "no attention here has Megatron's softmax", "masked_softmax_fusion"),
    (Answer.NO_EFFECT, "no layer here has Apex's norm", "persist_layer_norm memory_efficient_layer_norm"),
    (Answer.REFUSED, "it takes no packed rows", "fused_single_qkv_rope"),
    (Answer.REFUSED, "it needs Apex, which is not installed with this package", "gradient_accumulation_fusion"),
    (Answer.REFUSED, "it would take the place of --bias-activation-fusion and was never tried", "use_te_activation_func"),
    (Answer.REFUSED, _GRAPHS, "cuda_graph_impl enable_cuda_graph external_cuda_graph"),
    (
        Answer.NO_EFFECT,
        "CUDA graphs are not supported",
        "cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps cuda_graph_scope",
    ),
    (
        Answer.NO_EFFECT,
        _OWN_HEAD,
        "defer_embedding_wgrad_compute wgrad_deferral_limit",
    ),
    (Answer.ACCEPTED, _OWN_HEAD, "cross_entropy_loss_fusion cross_entropy_fusion_impl"),
    # The model.
    (
        Answer.MODEL,
        "checked in raw mode against --hf-checkpoint; in bridge mode the model is that of --hf-checkpoint",
        "num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_topk "
        "moe_router_num_groups moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor "
        "moe_router_score_function moe_router_enable_expert_bias rotary_interleaved multi_latent_attention q_lora_rank "
        "kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type original_max_position_embeddings beta_fast beta_slow "
        "mscale mscale_all_dim",
    ),
    (Answer.MANAGED, "use --norm-epsilon", "layernorm_epsilon"),
    (Answer.MANAGED, "use --disable-bias-linear", "add_bias_linear"),
    (Answer.MANAGED, "use --swiglu", "gated_linear_unit"),
    (
        Answer.REFUSED,
        _NO_FAMILY,
        "softmax_scale softmax_type window_size window_attn_skip_freq layernorm_zero_centered_gamma glu_linear_offset "
        "activation_func_clamp_value qk_l2_norm attention_output_gate no_rope_freq experimental_attention_variant "
        "linear_attention_freq mrope_section moe_shared_expert_gate moe_apply_probs_on_input moe_latent_size "
        "use_fused_weighted_squared_relu",
    ),
    (
        Answer.NO_EFFECT,
        _NO_FAMILY,
        "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
        "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path",
    ),
    (Answer.NO_EFFECT, "no attention here scales its scores by the layer's number", "apply_query_key_layer_scaling"),
    (Answer.REFUSED, _TRAINING_LOOP, "qk_clip log_max_attention_logit"),
    (Answer.NO_EFFECT, _TRAINING_LOOP, "qk_clip_alpha qk_clip_threshold"),
    (Answer.ACCEPTED, _LOADED, "init_method_std embedding_init_method_std"),
    (
        Answer.MANAGED,
        _LOADED,
        "use_cpu_initialization perform_initialization init_model_with_meta_device",
    ),
    (Answer.MANAGED, _SPEC, "heterogeneous_block_specs is_hybrid_model"),
    (Answer.REFUSED, "the keys of a checkpoint would be others", "hetereogenous_dist_checkpoint"),
    (Answer.ACCEPTED, "layers for multi-token prediction are not trained, so they have no loss", "mtp_loss_scaling_factor"),
    (
        Answer.MANAGED,
        _GENERATES,
        "flash_decode inference_rng_tracker use_inference_optimized_layers inference_fuse_tp_communication mlp_chunks_for_prefill",
    ),
    (Answer.MANAGED, "SGLang generates; its seed is --rollout-seed", "inference_sampling_seed"),
    (Answer.REFUSED, _GENERATES, "cache_mla_latents"),
    (Answer.MANAGED, "it is for Megatron-core's own tests", "test_mode"),
    (Answer.MANAGED, "samples are packed, so lengths always vary", "variable_seq_lengths"),
    # Mixtures of experts.
    (Answer.WORKS, TRAINED, "moe_router_dtype moe_router_bias_update_rate"),
    (Answer.ACCEPTED, "experts always run as one group here", "moe_grouped_gemm"),
    (Answer.REFUSED, "its weights have other names than those that are loaded and sent to the engines", "moe_use_legacy_grouped_gemm"),
    (
        Answer.REFUSED,
        "Megatron scales this loss for a later division by the step's tokens, and losses here are divided before: it would count "
        "once for every token; set it to 0",
        "moe_aux_loss_coeff moe_z_loss_coeff",
    ),
    (Answer.REFUSED, _OTHER_ROUTE, "moe_input_jitter_eps moe_router_force_load_balancing"),
    (Answer.NO_EFFECT, "no recorded routes are replayed", "moe_enable_routing_replay"),
    (Answer.REFUSED, "use --moe-router-num-groups and --moe-router-group-topk", "moe_router_topk_limited_devices"),
    (Answer.REFUSED, _DROPS, "moe_expert_capacity_factor moe_pad_expert_input_to_capacity"),
    (Answer.NO_EFFECT, "no token is dropped", "moe_token_drop_policy"),
    (Answer.ENGINE, "the kernel is its own", "moe_permute_fusion moe_router_fusion"),
    (Answer.ENGINE, "the overlap is of streams, which a CPU has not", "moe_shared_expert_overlap"),
    (Answer.ENGINE, "DeepEP's kernels are CUDA's", "moe_enable_deepep moe_deepep_num_sms"),
    (Answer.REFUSED, "the one backend of the flex dispatcher that is supported is deepep", "moe_flex_dispatcher_backend"),
    (Answer.NO_EFFECT, "hybridep is not supported", "moe_hybridep_num_sms"),
    # Optimizer.
    (Answer.ACCEPTED, "the optimizer is always distributed", "use_distributed_optimizer"),
    (Answer.WORKS, TRAINED, "loss_scale initial_loss_scale"),
    (
        Answer.WORKS,
        BUILT,
        "decoupled_lr decoupled_min_lr apply_wd_to_qk_layernorm decoupled_weight_decay min_loss_scale loss_scale_window hysteresis",
    ),
    (
        Answer.ENGINE,
        "Megatron asks for its Adam",
        "use_precision_aware_optimizer store_param_remainders main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
    ),
    (
        Answer.ENGINE,
        "it moves the optimizer's state out of a GPU's memory",
        "optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d "
        "pin_cpu_grads pin_cpu_params",
    ),
    (
        Answer.NO_EFFECT,
        "--optimizer has no muon",
        "muon_momentum muon_split_qkv muon_use_nesterov muon_scale_mode muon_fp32_matmul_prec muon_num_ns_steps muon_tp_mode "
        "muon_extra_scale_factor",
    ),
    (Answer.NO_EFFECT, "--optimizer has no sgd", "sgd_momentum"),
    (Answer.ACCEPTED, "the count is not reported", "log_num_zeros_in_grad"),
    # Gradient buffers.
    (Answer.WORKS, TRAINED, "overlap_grad_reduce overlap_param_gather bucket_size pad_buckets_for_high_nccl_busbw "
     "reduce_scatter_with_fp32_accumulation"),
    (Answer.WORKS, TRAINED, "check_for_nan_in_grad"),
    (Answer.REFUSED, _TRAINING_LOOP, "check_for_large_grads"),
    (Answer.REFUSED, "gradients are summed: losses are divided by the whole step's denominators before", "average_in_collective"),
    (Answer.REFUSED, "the process groups are of one instance", "num_distributed_optimizer_instances"),
    (Answer.REFUSED, _FSDP, "use_megatron_fsdp use_custom_fsdp"),
    (
        Answer.NO_EFFECT,
        _FSDP,
        "data_parallel_sharding_strategy gradient_reduce_div_fusion suggested_communication_unit_size preserve_fp32_weights "
        "keep_fp8_transpose_cache fsdp_double_buffer outer_dp_sharding_strategy fsdp_manual_registration "
        "disable_symmetric_registration",
    ),
    (Answer.REFUSED, "NCCL's registered buffers were never tried with weight updates", "nccl_ub"),
    # Timing and logging.
    (Answer.ACCEPTED, _NO_TIMERS, "barrier_with_L1_time"),
    (Answer.NO_EFFECT, "the run's resolved configuration is in --run-dir", "config_logger_dir"),
)  # fmt: skip


def _entries() -> Iterator[tuple[str, Support]]:
    for answer, reason, names in _DECLARED:
        for name in names.split():
            yield name, Support(answer, reason)
    # Fields of which some values work.
    yield (
        "moe_router_load_balancing_type",
        Support(
            Answer.REFUSED,
            "experts are not balanced; none, aux_loss and seq_aux_loss are accepted and route alike",
            (("none",), ("aux_loss",), ("seq_aux_loss",)),
        ),
    )
    yield (
        "moe_token_dispatcher_type",
        Support(Answer.REFUSED, "it takes no rows of varying length; use alltoall", ("alltoall", "flex"), True),
    )


def _table() -> dict[str, Support]:
    found: dict[str, Support] = {}
    for name, support in _entries():
        if name in found:
            raise TypeError(f"{name} has two entries")
        found[name] = support
    return found


SUPPORT = _table()
# Fields that this package sets by itself, and why; a flag for one of them is refused with the reason.
MANAGED = {name: support.reason for name, support in SUPPORT.items() if support.answer is Answer.MANAGED}
# Fields that Megatron is not given: those that do nothing, and those that a Hugging Face config decides in bridge mode.
NOT_PASSED = frozenset(name for name, support in SUPPORT.items() if support.answer is Answer.ACCEPTED)
OF_MODEL = frozenset(name for name, support in SUPPORT.items() if support.answer is Answer.MODEL)
