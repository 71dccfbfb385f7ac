"""The options of a run: one frozen dataclass per stage.

Each class is one group of `--help`; its docstring's first line is the group's title, and its `on_resume` is that of its
options where they declare none. Names are Megatron-LM's for Megatron's options and slime's for the rest. "GPU" in a
name means a training or serving process's device; on a machine without CUDA it means one CPU process.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from slime_opd.config.conditions import equals, is_set
from slime_opd.config.debug_stage import DebugConfig
from slime_opd.config.distillation_stages import DivergenceConfig, OPDConfig
from slime_opd.config.megatron_options import make_stage
from slime_opd.config.model_stages import ModelConfig, ParallelConfig
from slime_opd.config.options import option
from slime_opd.config.ranges import COEFFICIENT, NOT_NEGATIVE, POSITIVE, Range
from slime_opd.config.resume import HONOURED, OnResume
from slime_opd.config.rollout_stages import DataConfig, EvaluationConfig, RewardConfig, RolloutConfig
from slime_opd.config.training_stages import CheckpointConfig, OptimizerConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Cluster: how many processes of each kind, and where"""

    on_resume: ClassVar[OnResume] = HONOURED

    actor_num_nodes: int = option(1, help="nodes that train", within=POSITIVE)
    actor_num_gpus_per_node: int = option(1, help="training GPUs (on a CPU: processes) per node", within=POSITIVE)
    rollout_num_gpus: int | None = option(
        None,
        help="GPUs (on a CPU: processes) that generate; unset: one engine's worth, or the training GPUs with --colocate",
        within=NOT_NEGATIVE,
    )
    rollout_num_gpus_per_engine: int = option(
        1, help="GPUs of one SGLang engine: its tensor-parallel size", within=POSITIVE
    )
    num_gpus_per_node: int = option(
        8, help="accepted for slime's scripts, without effect: Ray knows the GPUs of each node", within=POSITIVE
    )
    colocate: bool = option(
        False, help="engines share the training GPUs, and their memory at the same time: nothing is released in between"
    )
    ray_address: str = option("auto", help="Ray cluster to join; 'local' starts one for this run alone")
    watchdog_interval_s: float = option(
        60.0,
        help="seconds without progress before a warning that names what the run waits for, repeated at growing intervals; 0: never",
        within=NOT_NEGATIVE,
    )
    watchdog_timeout_s: float = option(
        1800.0,
        help="seconds without progress (a sample, a micro-batch, a save) that end the run; 0: never",
        within=NOT_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Algorithm: advantages and the policy loss"""

    on_resume: ClassVar[OnResume] = HONOURED

    advantage_estimator: str = option(
        "grpo", choices=("grpo", "rloo"), help="base advantage; the OPD penalty is subtracted from any of them"
    )
    normalize_advantages: bool = option(
        False, help="whiten the base advantages over the whole rollout, before the OPD penalty is subtracted"
    )
    disable_rewards_normalization: bool = option(
        False, help="use rewards as advantages: no group mean, no group standard deviation"
    )
    disable_grpo_std_normalization: bool = option(
        False, help="subtract the group mean only", only_with=(equals("advantage_estimator", "grpo"),)
    )
    disable_compute_advantages_and_returns: bool = option(
        False, help="accepted for slime's scripts of supervised fine-tuning, which has no advantages"
    )
    kl_coef: float = option(
        0.0, help="accepted for slime's scripts, at 0: the KL to a reference is a loss, --kl-loss-coef"
    )
    eps_clip: float = option(0.2, help="PPO clip: lower bound 1 - this", within=POSITIVE)
    eps_clip_high: float | None = option(
        None, help="PPO clip: upper bound 1 + this; unset: --eps-clip", within=NOT_NEGATIVE
    )
    eps_clip_c: float | None = option(
        None, help="dual clip: bound of the ratio for negative advantages; unset: off", within=Range(above=1)
    )
    entropy_coef: float = option(
        0.0,
        help="coefficient of the entropy bonus",
        within=Range(at_most=1e4, reason="it would drown every other part of the loss"),
    )
    use_kl_loss: bool = option(False, help="add a KL loss to the reference model (--ref-load)", needs=("ref_load",))
    kl_loss_coef: float = option(
        0.0, help="coefficient of the KL loss", within=COEFFICIENT, only_with=(is_set("use_kl_loss"),)
    )
    kl_loss_type: str = option("k1", choices=("k1", "k2", "k3", "low_var_kl"), help="estimator of the KL loss")
    use_rollout_logprobs: bool = option(False, help="old log-probs are the engine's, instead of the trainer's")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Weights: from the trainer to the engines"""

    on_resume: ClassVar[OnResume] = HONOURED

    update_weight_transport: str = option(
        "auto",
        choices=("auto", "tensor", "broadcast", "disk"),
        help="tensor: memory that the engines open (by CUDA IPC with --colocate, on CPUs on one node); broadcast: a process group with the engines; disk: a Hugging Face directory; auto: tensor where it works, else broadcast",
    )
    update_weight_buffer_size: int = option(512 * 1024 * 1024, help="bytes of weights sent at a time", within=POSITIVE)
    update_weight_disk_dir: str | None = option(
        None,
        help="directory for disk updates; unset: in --run-dir",
        metavar="DIR",
        only_with=(equals("update_weight_transport", "disk"),),
        is_path=True,
    )
    check_weight_update_equal: bool = option(
        False,
        help="after each update, send the weights a second time and compare checksums, to prove that the engines serve exactly these",
    )


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """Watching a run"""

    on_resume: ClassVar[OnResume] = HONOURED

    run_dir: str | None = option(
        None,
        help="directory of metrics.jsonl, TensorBoard files and the resolved configuration; unset: SAVE/run, or runs/DATE",
        metavar="DIR",
        is_path=True,
    )
    no_tensorboard: bool = option(False, help="no TensorBoard files")
    use_wandb: bool = option(False, help="log to Weights & Biases too (needs the wandb extra)")
    wandb_mode: str = option(
        "online", choices=("online", "offline", "disabled"), help="offline: files for `wandb sync`"
    )
    wandb_project: str | None = option(None, help="project; unset: wandb's default", only_with=(is_set("use_wandb"),))
    wandb_group: str | None = option(
        None, help="group of runs, and the run's name with a random ending", only_with=(is_set("use_wandb"),)
    )
    wandb_team: str | None = option(None, help="entity; unset: your default", only_with=(is_set("use_wandb"),))
    wandb_host: str | None = option(
        None, help="address of the server; unset: wandb.ai", metavar="URL", only_with=(is_set("use_wandb"),)
    )
    wandb_dir: str | None = option(
        None,
        help="directory of wandb's files; unset: the run directory",
        metavar="DIR",
        only_with=(is_set("use_wandb"),),
        is_path=True,
    )
    print_samples_interval: int = option(10, help="rollouts between printed samples; 0: never", within=NOT_NEGATIVE)


STAGES: tuple[type, ...] = (
    ClusterConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    OptimizerConfig,
    CheckpointConfig,
    DataConfig,
    RolloutConfig,
    RewardConfig,
    EvaluationConfig,
    AlgorithmConfig,
    OPDConfig,
    DivergenceConfig,
    WeightsConfig,
    ObserveConfig,
    DebugConfig,
)

MegatronConfig = make_stage({row.name for stage in STAGES for row in fields(stage)})
# Pickle finds a class by its module and name.
MegatronConfig.__module__ = __name__
