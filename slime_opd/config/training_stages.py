"""Options of training: batches and precision, the optimizer, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slime_opd.config.conditions import is_set
from slime_opd.config.options import option
from slime_opd.config.ranges import FRACTION, LEARNING_RATE, NOT_NEGATIVE, POSITIVE, SEED, Range
from slime_opd.config.resume import (
    BATCH_SIZE,
    HONOURED,
    LOSS,
    LR_SCHEDULE,
    NEXT_STEP,
    NO_EFFECT,
    OPTIMIZER,
    PRECISION,
    RANDOM_STATE,
    START,
    OnResume,
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training: batches, precision and kernels"""

    on_resume: ClassVar[OnResume] = HONOURED

    loss_type: str = option(
        "policy_loss",
        choices=("policy_loss", "sft_loss"),
        help="policy_loss: train on rollouts; sft_loss: on the data set's own responses",
        on_resume=LOSS,
    )
    global_batch_size: int | None = option(
        None, help="samples per optimizer step; unset: all samples of a rollout", within=POSITIVE, on_resume=BATCH_SIZE
    )
    num_steps_per_rollout: int | None = option(
        None,
        help="optimizer steps per rollout; sets --global-batch-size to the samples of a rollout divided by it",
        within=POSITIVE,
        on_resume=BATCH_SIZE,
    )
    micro_batch_size: int = option(1, help="samples per micro-batch, without --use-dynamic-batch-size", within=POSITIVE)
    use_dynamic_batch_size: bool = option(
        False, help="pack micro-batches up to --max-tokens-per-gpu", needs=("max_tokens_per_gpu",)
    )
    max_tokens_per_gpu: int | None = option(
        None, help="most tokens of a packed micro-batch on one GPU", within=POSITIVE
    )
    seq_length: int | None = option(
        None, help="accepted for Megatron-LM's scripts: samples are packed, whatever their lengths", on_resume=NO_EFFECT
    )
    balance_data: bool = option(
        False,
        help="accepted for slime's scripts: data-parallel ranks are always balanced by tokens",
        on_resume=NO_EFFECT,
    )
    calculate_per_token_loss: bool = option(
        False, help="mean over all tokens of a step; unset: mean over samples of each sample's mean"
    )
    bf16: bool = option(False, help="train in bfloat16 (the default where CUDA is)", on_resume=PRECISION)
    fp16: bool = option(False, help="train in float16", on_resume=PRECISION)
    fp32: bool = option(False, help="train in float32 (the default on a CPU)", on_resume=PRECISION)
    accumulate_allreduce_grads_in_fp32: bool = option(False, help="accumulate and reduce gradients in float32")
    attention_softmax_in_fp32: bool = option(False, help="attention softmax in float32")
    attention_backend: str = option(
        "auto",
        choices=("auto", "flash", "fused", "unfused", "local"),
        help="attention kernel of Transformer Engine; local: this package's own",
    )
    log_probs_chunk_size: int | None = option(
        None,
        help="tokens whose logits are computed at a time; unset: 1024 times the tensor-parallel size, which takes the same memory on a rank at any size",
        within=POSITIVE,
    )
    seed: int = option(1234, help="seed of the trainer", within=SEED, on_resume=RANDOM_STATE)
    distributed_timeout_minutes: int = option(
        10,
        help="minutes before a stuck collective ends the run; while checkpoints are read or written, --watchdog-timeout-s decides",
        within=Range(above=0, at_most=10**6, reason="that is two years"),
    )
    max_skipped_steps: int = option(
        3,
        help="optimizer steps in a row that may be skipped for a loss or gradient that is not finite; 0: the first ends the run",
        within=NOT_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate"""

    optimizer: str = option(
        "adam",
        choices=("adam",),
        help="optimizer; Megatron's distributed optimizer takes Adam alone",
        on_resume=OPTIMIZER,
    )
    lr: float = option(1e-6, help="learning rate", within=LEARNING_RATE, on_resume=LR_SCHEDULE)
    min_lr: float = option(
        0.0, help="learning rate at the end of the decay", within=LEARNING_RATE, on_resume=LR_SCHEDULE
    )
    lr_decay_style: str = option(
        "constant",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
        help="shape of the decay",
        on_resume=LR_SCHEDULE,
    )
    lr_decay_iters: int | None = option(
        None, help="optimizer steps of the decay; unset: the whole run", within=POSITIVE, on_resume=LR_SCHEDULE
    )
    lr_warmup_iters: int = option(0, help="optimizer steps of the warm-up", within=NOT_NEGATIVE, on_resume=LR_SCHEDULE)
    lr_warmup_fraction: float | None = option(
        None, help="warm-up as a fraction of the decay", within=FRACTION, on_resume=LR_SCHEDULE
    )
    weight_decay: float = option(
        0.01,
        help="weight decay",
        within=Range(at_least=0, at_most=10, reason="it would erase the weights"),
        on_resume=LR_SCHEDULE,
    )
    adam_beta1: float = option(0.9, help="Adam's beta1", within=Range(at_least=0, below=1), on_resume=NEXT_STEP)
    adam_beta2: float = option(0.999, help="Adam's beta2", within=Range(at_least=0, below=1), on_resume=NEXT_STEP)
    adam_eps: float = option(1e-8, help="Adam's epsilon", within=POSITIVE, on_resume=NEXT_STEP)
    clip_grad: float = option(
        1.0, help="largest global gradient norm; 0: no clipping", within=NOT_NEGATIVE, on_resume=NEXT_STEP
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints"""

    on_resume: ClassVar[OnResume] = HONOURED

    load: str | None = option(
        None,
        help="checkpoint to resume from; if there is none yet, training starts from --ref-load or --hf-checkpoint",
        metavar="DIR",
        on_resume=START,
        is_path=True,
    )
    ckpt_step: int | None = option(
        None,
        help="step of --load (or of --save, to go back in a run); unset: the latest",
        within=NOT_NEGATIVE,
        only_with=(is_set("load", "save"),),
        on_resume=START,
    )
    save: str | None = option(
        None,
        help="directory of the run's checkpoints; the same command resumes from the newest in it",
        metavar="DIR",
        is_path=True,
    )
    save_interval: int | None = option(
        None,
        help="rollouts between checkpoints; unset: only by time and at the end",
        within=POSITIVE,
        only_with=(is_set("save"),),
    )
    save_interval_minutes: float | None = option(
        None,
        help="minutes between checkpoints; 0: never; unset: 30, or 0 with --save-interval",
        within=NOT_NEGATIVE,
        only_with=(is_set("save"),),
    )
    save_hf: str | None = option(
        None,
        help="also write each checkpoint as a Hugging Face directory, at this path with {rollout_id} as its step",
        metavar="PATH",
        only_with=(is_set("save"),),
        is_path=True,
    )
    keep_checkpoints: int = option(
        0,
        help="number of newest checkpoints to keep; 0: all, and of those saved by time the newest 2",
        within=NOT_NEGATIVE,
    )
    exit_grace_s: float = option(
        60.0,
        help="seconds after SIGTERM or Ctrl-C in which a run may save unsaved steps; 0: end at once",
        within=NOT_NEGATIVE,
    )
    no_save_optim: bool = option(False, help="save weights only")
    no_load_optim: bool = option(False, help="load weights only")
    finetune: bool = option(False, help="start from step 0 with the weights of --load", on_resume=START)
    no_verify_checkpoint: bool = option(
        False, help="load checkpoints without comparing their files with the checksums in manifest.sha256"
    )
    ref_load: str | None = option(
        None, help="checkpoint of the reference model, and of the first weights", metavar="DIR", is_path=True
    )
    ref_ckpt_step: int | None = option(
        None, help="step of --ref-load; unset: the latest", within=NOT_NEGATIVE, only_with=(is_set("ref_load"),)
    )
