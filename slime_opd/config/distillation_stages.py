"""The options of distillation: the teacher and the penalty, and the divergences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slime_opd.config.conditions import Condition, equals, is_set
from slime_opd.config.options import option
from slime_opd.config.ranges import (
    COEFFICIENT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    SECONDS,
    TEMPERATURE,
    Range,
)
from slime_opd.config.resume import HONOURED, OnResume
from slime_opd.config.teacher_kinds import TEACHER_KINDS


def divergence_is(kind: str) -> Condition:
    """The run's divergence, or one of its schedule's, is of this kind."""
    return Condition(f"--opd-divergence {kind}", lambda config: kind in config.divergence_kinds)


SGLANG_TEACHER = Condition("--use-opd --opd-type sglang", lambda config: config.teacher.scores_rollouts)
MEGATRON_TEACHER = equals("opd_type", "megatron")
PENALTY = Condition("a penalty (--opd-kl-coef above 0)", lambda config: config.penalty_coefficient > 0)
DIVERGENCE = is_set("opd_divergence", "opd_schedule")
TOP_K_DIVERGENCE = is_set("opd_log_prob_top_k")


@dataclass(frozen=True, kw_only=True)
class OPDConfig:
    """On-policy distillation: the teacher, and the penalty on the sampled tokens"""

    only_with: ClassVar[tuple[Condition, ...]] = (is_set("use_opd"),)
    on_resume: ClassVar[OnResume] = HONOURED

    use_opd: bool = option(
        False, help="learn from a teacher: by the reverse-KL penalty, or by --opd-divergence", needs=("opd_type",)
    )
    opd_type: str | None = option(
        None,
        choices=tuple(TEACHER_KINDS),
        help="sglang: teacher server at --rm-url, scored during rollout; megatron: teacher forward in the trainer",
        needs={"sglang": ("rm_url",), "megatron": ("opd_teacher_load",)},
    )
    opd_only_reward: bool = option(False, help="zero the base advantage: pure distillation")
    opd_kl_coef: float | None = option(
        None, help="coefficient of the penalty; unset: 1, or 0 with --opd-divergence", within=COEFFICIENT
    )
    opd_kl_clamp: float | None = option(
        None,
        help="clamp each token's log-ratio in the penalty to [-this, this]; unset: no clamp",
        within=POSITIVE,
        only_with=(PENALTY,),
    )
    opd_kl_discount: float = option(
        0.0,
        help="discount of the return-to-go of log-ratios within a response; 0: each token's own log-ratio",
        within=FRACTION,
        only_with=(PENALTY,),
    )
    opd_refresh_student: bool = option(
        False,
        help="compute the penalty with the current policy at each optimizer step, not with the policy at the rollout's first step",
        only_with=(PENALTY,),
    )
    opd_teacher_load: str | None = option(
        None,
        help="the teacher's checkpoint, torch_dist or Hugging Face",
        metavar="DIR",
        only_with=(MEGATRON_TEACHER,),
        is_path=True,
    )
    opd_teacher_ckpt_step: int | None = option(
        None,
        help="step of --opd-teacher-load; unset: the latest",
        within=NOT_NEGATIVE,
        only_with=(is_set("opd_teacher_load"),),
    )
    opd_teacher_resident: bool = option(
        False,
        help="keep the Megatron teacher's weights on the GPU; unset: in host memory, swapped in to score",
        only_with=(MEGATRON_TEACHER,),
    )
    opd_teacher_hidden_on_host: bool = option(
        False,
        help="keep the Megatron teacher's hidden states in host memory between its forward and the student's",
        only_with=(MEGATRON_TEACHER,),
    )
    opd_teacher_timeout_s: float = option(
        30.0,
        help="time limit of a teacher request in seconds, in addition to the time for its tokens",
        within=SECONDS,
    )
    opd_teacher_min_tokens_per_s: float = option(
        1000.0,
        help="lowest assumed prefill speed of the teacher: a request's time limit grows by its tokens, and those of the requests ahead of it, at this speed; 0: --opd-teacher-timeout-s alone",
        within=NOT_NEGATIVE,
    )
    opd_teacher_retries: int = option(2, help="retries of a failed teacher request", within=NOT_NEGATIVE)
    opd_teacher_concurrency: int = option(64, help="teacher requests in flight", within=POSITIVE)
    opd_teacher_check_interval: int = option(
        10,
        help="rollouts between checks that the teacher's server still has the same model, by its log-probs of fixed sequences; 0: never",
        within=NOT_NEGATIVE,
    )
    opd_max_fallback_fraction: float = option(
        0.1,
        help="largest fraction of a rollout's samples without teacher scores; above it the run stops",
        within=FRACTION,
    )


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Distillation by a divergence: a loss on the whole distributions, over the vocabulary or over top-k tokens"""

    only_with: ClassVar[tuple[Condition, ...]] = (is_set("use_opd"),)
    on_resume: ClassVar[OnResume] = HONOURED

    opd_divergence: str | None = option(
        None,
        choices=("reverse_kl", "forward_kl", "jsd", "token_reward_direct"),
        help="add this divergence to the loss; token_reward_direct: thunlp/OPD's reward on top-k tokens; unset: the penalty alone",
    )
    opd_divergence_coef: float = option(
        1.0, help="coefficient of the divergence", within=COEFFICIENT, only_with=(DIVERGENCE,)
    )
    opd_jsd_beta: float = option(
        0.5,
        help="weight of the teacher in the mixture of jsd",
        within=Range(above=0, below=1),
        only_with=(DIVERGENCE, divergence_is("jsd")),
    )
    opd_temperature: float | None = option(
        None,
        help="temperature of both models in the divergence; unset: the rollout's, or 1 with an SGLang teacher",
        within=TEMPERATURE,
    )
    opd_log_prob_top_k: int = option(
        0,
        help="top-k tokens of each model that the divergence is computed on; 0: the whole vocabulary (needs a Megatron teacher)",
        within=NOT_NEGATIVE,
        only_with=(DIVERGENCE,),
    )
    opd_top_k_strategy: str = option(
        "only_stu",
        choices=("only_stu", "only_tch", "intersection", "union", "union-intersection"),
        help="candidate tokens: the student's top-k, the teacher's, tokens in both, in either, or in exactly one",
        only_with=(TOP_K_DIVERGENCE,),
    )
    opd_top_k_remainder: str = option(
        "tail",
        choices=("tail", "truncated", "renormalized"),
        help="probability mass outside the top-k: kept as one more entry, dropped, or dropped and the rest renormalized",
        only_with=(TOP_K_DIVERGENCE,),
    )
    opd_reward_weight_mode: str = option(
        "student_p",
        choices=("student_p", "teacher_p", "none"),
        help="weights of the tokens of token_reward_direct: the student's or the teacher's probabilities, or uniform",
        only_with=(DIVERGENCE, divergence_is("token_reward_direct")),
    )
    opd_schedule: str | None = option(
        None,
        metavar="KIND:SHARE,...",
        help="divergences in sequence, each for a fraction of the run: forward_kl:0.4,reverse_kl:0.6",
    )
    opd_coef_ramp: str | None = option(
        None,
        metavar="AT:FACTOR,...",
        help="factor on both distillation coefficients, piecewise linear in the progress of the run: 0:0,0.3:1",
    )
    opd_off_policy_fraction: float = option(
        0.0,
        help="fraction of the samples with a response that the student did not write; only the divergence trains on them",
        within=FRACTION,
        only_with=(DIVERGENCE,),
    )
    opd_off_policy_source: str = option(
        "teacher",
        choices=("teacher", "dataset"),
        help="source of off-policy responses: the teacher, or a column of the data set",
        only_with=(is_set("opd_off_policy_fraction"),),
        needs={"dataset": ("opd_off_policy_key",)},
    )
    opd_off_policy_unit: str = option(
        "samples",
        choices=("samples", "rollouts"),
        help="unit of --opd-off-policy-fraction: samples within each rollout, or whole rollouts",
        only_with=(is_set("opd_off_policy_fraction"),),
    )
    opd_off_policy_key: str | None = option(
        None,
        help="column of the off-policy responses",
        only_with=(is_set("opd_off_policy_fraction"), equals("opd_off_policy_source", "dataset")),
    )
    opd_reward_beta: float | None = option(
        None,
        help="weight samples by softmax(correct / this): a small value trusts correct ones alone; unset: uniform",
        within=POSITIVE,
    )
    opd_pass_rate_weights: tuple[float, ...] = option(
        (),
        metavar="ALPHA BETA",
        help="weight prompts by p^ALPHA (1-p)^BETA of their pass rate p (PACED: 1 1); unset: uniform",
    )
    opd_token_weighting: str | None = option(
        None,
        choices=("soft", "top"),
        help="weight tokens by student entropy and divergence (TIP): soft: by the score; top: the highest scores alone; unset: uniform",
    )
    opd_token_keep_fraction: float = option(
        0.5,
        help="fraction of the tokens that are kept",
        within=POSITIVE_FRACTION,
        only_with=(equals("opd_token_weighting", "top"),),
    )
    opd_wire_dtype: str = option(
        "float32",
        choices=("float32", "float16"),
        help="dtype in which top-k log-probs of an SGLang teacher are kept",
        only_with=(TOP_K_DIVERGENCE,),
    )
    opd_metrics_top_k: int = option(
        16,
        help="top-k tokens of each model for the overlap metrics; 0: no such metrics",
        within=NOT_NEGATIVE,
    )
