"""The whole configuration of a run: the stages, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slime_opd import schedule
from slime_opd.config import stages
from slime_opd.config.teacher_kinds import NO_TEACHER, TEACHER_KINDS, TeacherKind


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every option of a run, by stage. Immutable; derived values are properties."""

    cluster: stages.ClusterConfig = field(default_factory=stages.ClusterConfig)
    model: stages.ModelConfig = field(default_factory=stages.ModelConfig)
    parallel: stages.ParallelConfig = field(default_factory=stages.ParallelConfig)
    training: stages.TrainingConfig = field(default_factory=stages.TrainingConfig)
    optimizer: stages.OptimizerConfig = field(default_factory=stages.OptimizerConfig)
    checkpoint: stages.CheckpointConfig = field(default_factory=stages.CheckpointConfig)
    data: stages.DataConfig = field(default_factory=stages.DataConfig)
    rollout: stages.RolloutConfig = field(default_factory=stages.RolloutConfig)
    reward: stages.RewardConfig = field(default_factory=stages.RewardConfig)
    evaluation: stages.EvaluationConfig = field(default_factory=stages.EvaluationConfig)
    algorithm: stages.AlgorithmConfig = field(default_factory=stages.AlgorithmConfig)
    opd: stages.OPDConfig = field(default_factory=stages.OPDConfig)
    divergence: stages.DivergenceConfig = field(default_factory=stages.DivergenceConfig)
    weights: stages.WeightsConfig = field(default_factory=stages.WeightsConfig)
    observe: stages.ObserveConfig = field(default_factory=stages.ObserveConfig)
    debug: stages.DebugConfig = field(default_factory=stages.DebugConfig)
    megatron: stages.MegatronConfig = field(default_factory=stages.MegatronConfig)
    # Options of the SGLang engines (`--sglang-X` is their `--X`), as strings.
    sglang: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Training processes."""
        return self.cluster.actor_num_nodes * self.cluster.actor_num_gpus_per_node

    @property
    def log_probs_chunk_size(self) -> int:
        """Tokens whose logits exist at one time."""
        given = self.training.log_probs_chunk_size
        return 1024 * self.parallel.tensor_model_parallel_size if given is None else given

    @property
    def data_parallel_size(self) -> int:
        """Ranks that train on different samples."""
        layout = self.parallel
        return self.world_size // (
            layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
        )

    @property
    def samples_per_rollout(self) -> int:
        """Samples of one rollout: prompts times responses per prompt."""
        per_prompt = 1 if self.is_sft else self.rollout.n_samples_per_prompt
        return (self.rollout.rollout_batch_size or 0) * per_prompt

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        if self.training.global_batch_size is not None:
            return self.training.global_batch_size
        return self.samples_per_rollout // (self.training.num_steps_per_rollout or 1)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.samples_per_rollout // self.global_batch_size if self.global_batch_size else 0

    @property
    def scores_old_policy(self) -> bool:
        """Whether a forward pass scores the policy before a rollout's first optimizer step.

        With one step per rollout the old policy is the present one, and the step's own forward has its log-probs.
        """
        return not self.is_sft and self.steps_per_rollout > 1

    @property
    def num_engines(self) -> int:
        """SGLang engines that generate."""
        gpus = self.cluster.rollout_num_gpus
        if gpus is None:
            gpus = self.world_size if self.cluster.colocate else self.cluster.rollout_num_gpus_per_engine
        return gpus // self.cluster.rollout_num_gpus_per_engine

    @property
    def is_sft(self) -> bool:
        """Whether the run trains on the data set's own responses."""
        return self.training.loss_type == "sft_loss"

    @property
    def has_reward(self) -> bool:
        """Whether samples are rewarded."""
        return self.reward.rm_type is not None or self.reward.custom_rm_path is not None

    @property
    def replays(self) -> bool:
        """Whether the rollouts are read from recordings instead of being generated."""
        return self.debug.load_debug_rollout_data is not None

    @property
    def generates(self) -> bool:
        """Whether the engines generate the rollouts that the run trains on, and a teacher's server scores them."""
        return not self.is_sft and not self.replays

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates the student."""
        return bool(self.evaluation.eval_prompt_data) and not (self.replays or self.debug.debug_train_only)

    @property
    def needs_engines(self) -> bool:
        """Whether anything is generated: by a rollout, or by an evaluation."""
        return self.generates or self.evaluates

    @property
    def teacher(self) -> TeacherKind:
        """What the run's teacher can do."""
        return TEACHER_KINDS.get(self.opd.opd_type, NO_TEACHER) if self.opd.use_opd else NO_TEACHER

    @property
    def has_divergence(self) -> bool:
        """Whether the loss has a divergence between the models' distributions."""
        return self.opd.use_opd and (
            self.divergence.opd_divergence is not None or self.divergence.opd_schedule is not None
        )

    @property
    def divergence_kinds(self) -> frozenset[str]:
        """The run's divergences: --opd-divergence, and those of --opd-schedule if that can be read."""
        options = self.divergence
        try:
            scheduled = schedule.parse_stages(options.opd_schedule) if options.opd_schedule is not None else ()
        except ValueError:  # reported by a check
            scheduled = ()
        kinds = {stage.kind for stage in scheduled}
        return frozenset(kinds if options.opd_divergence is None else kinds | {options.opd_divergence})

    @property
    def penalty_coefficient(self) -> float:
        """Coefficient of the penalty on the sampled tokens."""
        if not self.opd.use_opd:
            return 0.0
        if self.opd.opd_kl_coef is not None:
            return self.opd.opd_kl_coef
        return 0.0 if self.has_divergence else 1.0

    @property
    def teacher_temperature(self) -> float:
        """The temperature at which the teacher is compared with the student."""
        if self.teacher.fixed_temperature is not None:
            return self.teacher.fixed_temperature
        temperature = self.divergence.opd_temperature
        return self.rollout.rollout_temperature if temperature is None else temperature

    @property
    def teacher_top_k(self) -> int:
        """Tokens of the teacher's own top-k that its server's scores keep, at each position.

        The student's candidates are found among them, so that the overlap metrics need no further request.
        """
        options = self.divergence
        are_used = options.opd_top_k_strategy != "only_stu" or options.opd_metrics_top_k > 0
        is_scored = self.teacher.scores_rollouts and self.has_divergence
        return options.opd_log_prob_top_k if is_scored and are_used else 0

    @property
    def student_top_k(self) -> int:
        """Tokens of the student's top-k that the teacher's server scores, at each position."""
        by_student = self.divergence.opd_top_k_strategy not in ("only_tch", "intersection")
        is_scored = self.teacher.scores_rollouts and self.has_divergence
        return self.divergence.opd_log_prob_top_k if is_scored and by_student else 0
