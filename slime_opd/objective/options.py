"""What an optimizer step minimises, as coefficients and choices: one dataclass per objective."""

from __future__ import annotations

from dataclasses import dataclass

from slime_opd import schedule
from slime_opd.config import Config
from slime_opd.distill.comparison import DivergenceOptions
from slime_opd.distill.penalty import PenaltyOptions


@dataclass(frozen=True)
class PolicyOptions:
    """Coefficients of the policy objective; a stream whose options are None is left out.

    penalty_in_step: the step subtracts the penalty from the advantages, because the student's log-probs are its own;
    else they were scored before the first step, and the advantages hold the penalty already.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coefficient: float
    kl_coefficient: float | None
    kl_kind: str
    use_rollout_log_probs: bool
    penalty: PenaltyOptions | None = None
    penalty_in_step: bool = True
    divergence: DivergenceOptions | None = None


@dataclass(frozen=True)
class SupervisedOptions:
    """The negative log-likelihood of the response tokens; there is nothing to choose."""


Options = PolicyOptions | SupervisedOptions


def objective_options(config: Config, progress: float) -> Options:
    """The objective of a rollout that begins when `progress` (0 to 1) of the run's rollouts are done."""
    if config.is_sft:
        return SupervisedOptions()
    algorithm = config.algorithm
    penalty = _penalty(config, progress) if config.penalty_coefficient else None
    return PolicyOptions(
        clip_low=algorithm.eps_clip,
        clip_high=_clip_high(config),
        dual_clip=algorithm.eps_clip_c,
        entropy_coefficient=algorithm.entropy_coef,
        kl_coefficient=algorithm.kl_loss_coef if algorithm.use_kl_loss else None,
        kl_kind=algorithm.kl_loss_type,
        use_rollout_log_probs=algorithm.use_rollout_logprobs,
        penalty=penalty,
        penalty_in_step=penalty is not None and (penalty.refresh_student or not config.scores_old_policy),
        divergence=_divergence(config, progress) if config.has_divergence else None,
    )


def _ramp_factor(config: Config, progress: float) -> float:
    ramp = config.divergence.opd_coef_ramp
    return schedule.factor_at(schedule.parse_ramp(ramp), progress) if ramp else 1.0


def _clip_high(config: Config) -> float:
    algorithm = config.algorithm
    return algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high


def _penalty(config: Config, progress: float) -> PenaltyOptions:
    return PenaltyOptions(
        coefficient=config.penalty_coefficient * _ramp_factor(config, progress),
        clamp=config.opd.opd_kl_clamp,
        discount=config.opd.opd_kl_discount,
        refresh_student=config.opd.opd_refresh_student,
    )


def _divergence(config: Config, progress: float) -> DivergenceOptions:
    options = config.divergence
    stages = schedule.parse_stages(options.opd_schedule) if options.opd_schedule else ()
    return DivergenceOptions(
        kind=schedule.kind_at(stages, progress) if stages else options.opd_divergence,
        coefficient=options.opd_divergence_coef * _ramp_factor(config, progress),
        beta=options.opd_jsd_beta,
        strategy=options.opd_top_k_strategy,
        remainder=options.opd_top_k_remainder,
        weight_mode=options.opd_reward_weight_mode,
        clip_low=config.algorithm.eps_clip,
        clip_high=_clip_high(config),
        dual_clip=config.algorithm.eps_clip_c,
    )
