"""Gradient buffers, optimizer and learning-rate schedule of one rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import local_multi_tensor_l2_norm

from slime_opd.checkpoint.formats.adam_state import use_fused_kernel
from slime_opd.config import Config
from slime_opd.model import device
from slime_opd.model.hidden_states import HiddenStatesModel
from slime_opd.model.options import settings
from slime_opd.model.transformer_config import parameter_dtype


class _HalfPrecision(Float16Module):
    """Megatron's cast to half precision. Hidden states stay in that dtype, which the output layer outside has, too."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return super().forward(*inputs, fp32_output=False, **options)


def gradient_settings(config: Config) -> DistributedDataParallelConfig:
    """Megatron's configuration of the gradient buffers."""
    in_fp32 = config.training.accumulate_allreduce_grads_in_fp32 or parameter_dtype(config) is torch.float32
    return DistributedDataParallelConfig(
        **{
            "use_distributed_optimizer": True,
            "grad_reduce_in_fp32": in_fp32,
            **settings(config, "gradients"),
            # Megatron's check ends the run on the rank that fails it; `finite.py` checks all ranks and skips the step.
            "check_for_nan_in_grad": False,
        }
    )


def wrap(config: Config, model: HiddenStatesModel) -> DistributedDataParallel:
    """The model inside Megatron's gradient buffers (and its cast to half precision, where it trains in that)."""
    dtype = parameter_dtype(config)
    architecture = model.config
    inner = model if dtype is torch.float32 else _HalfPrecision(architecture, model)
    wrapped = DistributedDataParallel(config=architecture, ddp_config=gradient_settings(config), module=inner)
    # Losses are already divided by the step's global denominators: there is no token count left to divide by.
    architecture.finalize_model_grads_func = lambda chunks, num_tokens=None, **groups: finalize_model_grads(
        chunks, None, **groups
    )
    architecture.no_sync_func = wrapped.no_sync
    return wrapped


def optimizer_settings(config: Config) -> OptimizerConfig:
    """Megatron's configuration of the optimizer."""
    options, dtype = config.optimizer, parameter_dtype(config)
    return OptimizerConfig(
        optimizer=options.optimizer,
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        # Megatron-LM's default: with --optimizer-cpu-offload the whole state is offloaded.
        **{"optimizer_offload_fraction": 1.0} | settings(config, "optimizer"),
    )


def make_optimizer(config: Config, wrapped: DistributedDataParallel) -> MegatronOptimizer:
    """The distributed optimizer over the gradient buffers."""
    optimizer = get_megatron_optimizer(optimizer_settings(config), [wrapped])
    if device.has_cuda():
        use_fused_kernel(optimizer)
        norm_without_waits()
    wrapped.module.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def finish_gathering_weights(wrapped: DistributedDataParallel) -> None:
    """Give every rank the weights of the last optimizer step, where --overlap-param-gather leaves that to the next
    forward.

    Call it on all ranks together, before anything but a forward reads the weights.
    """
    if not wrapped.ddp_config.overlap_param_gather:
        return
    for group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups:
        if not group.param_gather_dispatched or group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)


def norm_without_waits() -> None:
    """Replace Megatron's norm of the gradients where it is not Transformer Engine's or Apex's.

    Megatron's own reads a number back from the device for each parameter.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = gradient_norm


def gradient_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """The L2 norm [1] of all tensors of the first list, as Transformer Engine's `multi_tensor_l2norm` returns it."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def gradients(wrapped: DistributedDataParallel) -> list[torch.Tensor]:
    """This rank's gradient buffers, flat; after a step's backward its own share of them is reduced over the ranks."""
    return [buffer.grad_data for buffer in wrapped.buffers + wrapped.expert_parallel_buffers]


def loss_scale_can_fall(optimizer: MegatronOptimizer) -> bool:
    """Whether an overflow lowers the loss scale: float16's dynamic scale, above its minimum (--min-loss-scale)."""
    one = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    scaler = getattr(one, "grad_scaler", None)
    return isinstance(scaler, DynamicGradScaler) and bool(scaler.scale > scaler.min_scale)


def make_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The learning rate as a function of the number of optimizer steps."""
    options = config.optimizer
    total = max(1, (config.rollout.num_rollout or 1) * max(1, config.steps_per_rollout))
    decay_steps = options.lr_decay_iters or total
    if options.lr_warmup_fraction is not None:
        warmup_steps = round(options.lr_warmup_fraction * decay_steps)
    else:
        warmup_steps = options.lr_warmup_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=min(warmup_steps, decay_steps - 1),
        lr_decay_steps=decay_steps,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=total,
        wd_incr_style="constant",
        # A resumed run may have changed its flags; what the user says now wins over what the checkpoint holds.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def group_settings(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """What the options give each parameter group: learning rates, betas, weight decay; not its parameters and step
    count.
    """
    return [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in optimizer.param_groups
    ]


def restore_settings(
    optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, settings: list[dict[str, Any]]
) -> None:
    """Give the parameter groups `settings` back after a checkpoint was loaded, whose groups bring the saved run's.

    The schedule stays at the step of the checkpoint; the learning rate there is that of the present options.
    """
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    scheduler.step(increment=0)
