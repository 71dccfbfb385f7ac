"""What is known of a rollout before its first optimizer step: other models' scores, and what every token's weight needs.

Teacher first, for all micro-batches, then the student: the two are never on the device at once, unless memory allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime_opd import schedule
from slime_opd.algorithm.kl import kl_estimate
from slime_opd.config import Config
from slime_opd.distill.comparison import DivergenceOptions
from slime_opd.distill.weights import keep_top, normalized, statistics, token_importance
from slime_opd.head.objective_head import HeadSettings, TeacherStates
from slime_opd.head.output_layer import chunks
from slime_opd.head.vocabulary import chunk_logits
from slime_opd.model import device
from slime_opd.objective.objective import PenaltyOptions, PolicyOptions
from slime_opd.observe.metrics import Last, Metric
from slime_opd.trainer.micro_batch import MicroBatch
from slime_opd.types import TrainBatch

if TYPE_CHECKING:
    from slime_opd.trainer.trainer import Trainer


@dataclass(frozen=True)
class ScoredBatch:
    """A rank's share of a rollout with every column that its steps need, and the teacher's hidden states, if any.

    weights: statistics of the distillation weights of each step, over all ranks.
    """

    batch: TrainBatch
    teacher: TeacherStates | None
    weights: tuple[dict[str, float], ...] = ()

    def weight_metrics(self, step: int) -> dict[str, Metric]:
        """Of the distillation weights of a step."""
        return {name: Last(value) for name, value in self.weights[step].items()} if self.weights else {}


def head_settings(config: Config, progress: float) -> HeadSettings:
    """How chunks are scored when `progress` (0 to 1) of the run's rollouts are done."""
    temperature, algorithm, options = config.rollout.rollout_temperature, config.algorithm, config.divergence
    if config.is_sft:
        return HeadSettings(None, temperature)
    factor = schedule.factor_at(schedule.parse_ramp(options.opd_coef_ramp), progress) if options.opd_coef_ramp else 1.0
    clip_high = algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high
    penalty = divergence = None
    if config.penalty_coefficient:
        penalty = PenaltyOptions(
            config.penalty_coefficient * factor, config.opd.opd_kl_clamp, config.opd.opd_refresh_student
        )
    if config.has_divergence:
        stages = schedule.parse_stages(options.opd_schedule) if options.opd_schedule else ()
        divergence = DivergenceOptions(
            kind=schedule.kind_at(stages, progress) if stages else options.opd_divergence,
            coefficient=options.opd_divergence_coef * factor,
            beta=options.opd_jsd_beta,
            strategy=options.opd_top_k_strategy,
            remainder=options.opd_top_k_remainder,
            weight_mode=options.opd_reward_weight_mode,
            clip_low=algorithm.eps_clip,
            clip_high=clip_high,
            dual_clip=algorithm.eps_clip_c,
        )
    policy = PolicyOptions(
        clip_low=algorithm.eps_clip,
        clip_high=clip_high,
        dual_clip=algorithm.eps_clip_c,
        entropy_coefficient=algorithm.entropy_coef,
        kl_coefficient=algorithm.kl_loss_coef if algorithm.use_kl_loss else None,
        kl_kind=algorithm.kl_loss_type,
        use_rollout_log_probs=algorithm.use_rollout_logprobs,
        penalty=penalty,
        divergence=divergence,
    )
    return HeadSettings(
        policy,
        temperature,
        config.teacher_temperature if config.opd.use_opd else temperature,
        top_k=options.opd_log_prob_top_k,
        metrics_top_k=options.opd_metrics_top_k,
    )


def score_batch(trainer: Trainer, batch: TrainBatch, settings: HeadSettings) -> ScoredBatch:
    """Reference and teacher over all micro-batches, then what the student's weights before the first step must tell."""
    teacher = None
    kept = [name for name in ("reference", "teacher") if name in trainer.snapshots]
    if kept:
        with trainer.snapshots.swapped_in(*kept) as in_turn:
            for name in in_turn:
                if name == "reference":
                    batch = _score_reference(trainer, batch, settings)
                else:
                    batch, teacher = _score_teacher(trainer, batch, settings)
    batch = _score_student(trainer, batch, settings, teacher)
    if settings.policy is None or not trainer.config.opd.use_opd or not trainer.layout.is_last_stage:
        return ScoredBatch(batch, teacher)
    return ScoredBatch(*_with_token_weights(trainer.config, batch, teacher))


def _score_reference(trainer: Trainer, batch: TrainBatch, settings: HeadSettings) -> TrainBatch:
    def head(hidden: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        return {"ref_log_probs": trainer.scores(hidden, micro_batch, settings.temperature)[0]}

    return _with_columns(batch, trainer.score_pass(batch, head))


def _score_teacher(
    trainer: Trainer, batch: TrainBatch, settings: HeadSettings
) -> tuple[TrainBatch, TeacherStates | None]:
    """The teacher's log-probs of the sampled tokens, or, where distributions are compared, its hidden states."""
    compares = settings.policy.divergence is not None
    samples = settings.policy.penalty is not None or not compares
    states = None

    def head(hidden: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        nonlocal states
        found = {}
        if samples:
            found["teacher_log_probs"] = trainer.scores(
                hidden, micro_batch, settings.teacher_temperature, trainer.teacher_shard
            )[0]
        if compares:
            if states is None:
                states = _hidden_buffer(hidden, batch, on_host=trainer.config.opd.opd_teacher_hidden_on_host)
            # Later work of this stream comes after the copy, so nobody has to wait for it.
            states[micro_batch.rows].copy_(hidden, non_blocking=True)
        return found

    found = trainer.score_pass(batch, head)
    teacher = None if states is None else TeacherStates(states, trainer.teacher_weight)
    return _with_columns(batch, found), teacher


def _hidden_buffer(hidden: Tensor, batch: TrainBatch, *, on_host: bool) -> Tensor:
    """Memory for the hidden states [R, H] of all response tokens of a batch, made once: joining parts would need it twice.

    On the device of `hidden`, which is one micro-batch's, or in pinned memory of the host, to and from which copies need not wait.
    """
    shape = (int(batch.samples.response_lengths.sum()), hidden.shape[1])
    if on_host:
        return torch.empty(shape, dtype=hidden.dtype, pin_memory=device.has_cuda())
    return torch.empty(shape, dtype=hidden.dtype, device=hidden.device)


def _score_student(
    trainer: Trainer, batch: TrainBatch, settings: HeadSettings, teacher: TeacherStates | None
) -> TrainBatch:
    """What the steps need of the policy that they start from, in one pass; no pass where that is nothing.

    With one step per rollout the old policy is the policy itself, and the step's own forward gives its log-probs.
    """
    if settings.policy is None:
        return batch
    several_steps = len(batch.steps) > 1
    divergence = settings.policy.divergence
    weighs_tokens = trainer.config.divergence.opd_token_weighting is not None
    fixes_candidates = several_steps and divergence is not None and divergence.kind == "token_reward_direct"
    if not (several_steps or weighs_tokens):
        return batch

    def head(hidden: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        found = {}
        at_teachers, entropies = trainer.scores(
            hidden, micro_batch, settings.teacher_temperature, trainer.teacher_shard
        )
        if several_steps:
            found["log_probs"] = at_teachers
            if settings.teacher_temperature != settings.temperature or trainer.teacher_shard != trainer.shard:
                found["penalty_log_probs"] = at_teachers
                found["log_probs"] = trainer.scores(hidden, micro_batch, settings.temperature)[0]
        if divergence is not None and (weighs_tokens or fixes_candidates):
            found |= _compare(trainer, hidden, micro_batch, settings, teacher, fixes_candidates)
        elif weighs_tokens:
            teachers = micro_batch.columns["teacher_log_probs"]
            found["student_entropy"] = entropies
            found["token_divergence"] = kl_estimate(at_teachers, teachers, kind="low_var_kl")
        return found

    return _with_columns(batch, trainer.score_pass(batch, head))


def _compare(
    trainer: Trainer,
    hidden: Tensor,
    micro_batch: MicroBatch,
    settings: HeadSettings,
    teacher: TeacherStates | None,
    with_candidates: bool,
) -> dict[str, Tensor]:
    """Entropy and divergence of each token, and the candidates as the policy has them before the first step."""
    head = trainer.head(micro_batch, settings, teacher, hidden)
    weight, parts = trainer.model.output_weight(), []
    for rows in chunks(len(hidden), trainer.chunk_size):
        entropies, side = head.compare(chunk_logits(hidden[rows], weight, trainer.shard), rows)
        comparison = side.comparison
        part = {"student_entropy": entropies, "token_divergence": comparison.reverse_kl.clamp(min=0)}
        if with_candidates:
            over = comparison.candidates
            part["candidate_ids"] = torch.where(over.valid, side.ids, -1)
            part["candidate_log_probs"] = over.log_p.detach()
            part["candidate_teacher_log_probs"] = over.log_q
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _with_columns(batch: TrainBatch, found: dict[str, Tensor]) -> TrainBatch:
    samples = batch.samples
    for name, values in found.items():
        samples = samples.with_column(name, (values.float() if values.is_floating_point() else values).cpu().numpy())
    return TrainBatch(samples, batch.steps)


def _with_token_weights(
    config: Config, batch: TrainBatch, teacher: TeacherStates | None
) -> tuple[TrainBatch, TeacherStates | None, tuple[dict[str, float], ...]]:
    """The batch with its distillation weights times each token's importance, and the weights' statistics.

    The importance of a token is relative to every token of its step, on all data-parallel ranks; so they are gathered.
    """
    samples, found = batch.samples, []
    pairs = [("penalty_weights", "policy_weights"), ("divergence_weights", "divergence_base")]
    active = [pair for pair in pairs if pair[0] in samples.columns]
    names = {"loss_mask", *(name for pair in active for name in pair)}
    weighting = config.divergence.opd_token_weighting
    if weighting is not None:
        names |= {"student_entropy", "token_divergence"}
    changed = {weights: [] for weights, _ in active}
    start = sample = 0
    for sizes in batch.steps:
        count = int(samples.response_lengths[sample : sample + sum(sizes)].sum())
        own, place = _gathered({name: samples.columns[name][start : start + count] for name in sorted(names)})
        start, sample = start + count, sample + sum(sizes)
        importance = torch.ones_like(own["loss_mask"]) if weighting is None else _importance(own, config)
        step_statistics = {}
        for weights, base in active:
            relative = own[weights]
            if weighting is not None:
                relative = relative * normalized(importance, own[base] * own[weights])
            changed[weights].append(relative[place])
            seen = statistics(relative, own[base])
            step_statistics = {
                "opd/weight_min": seen.minimum,
                "opd/weight_max": seen.maximum,
                "opd/weight_effective_share": seen.effective_share,
            }
        found.append(step_statistics)
    for name, parts in changed.items():
        samples = samples.with_column(name, torch.cat(parts).numpy())
    return TrainBatch(samples, batch.steps), teacher, tuple(found)


def _importance(columns: dict[str, Tensor], config: Config) -> Tensor:
    divergences = columns["token_divergence"]
    scored = ~divergences.isnan() & (columns["loss_mask"] > 0)
    scores = token_importance(columns["student_entropy"], torch.where(scored, divergences, 0.0))
    if config.divergence.opd_token_weighting == "soft":
        return torch.where(scored, scores, 0.0)
    return keep_top(scores, scored, config.divergence.opd_token_keep_fraction)


def _gathered(columns: dict) -> tuple[dict[str, Tensor], slice]:
    """The columns of all data-parallel ranks joined, and where this rank's lie in them."""
    group = parallel_state.get_data_parallel_group()
    own = {name: torch.from_numpy(values) for name, values in columns.items()}
    if group.size() == 1:
        return own, slice(None)
    of_ranks: list = [None] * group.size()
    dist.all_gather_object(of_ranks, own, group=group)
    before = sum(len(of_rank["loss_mask"]) for of_rank in of_ranks[: group.rank()])
    joined = {name: torch.cat([of_rank[name] for of_rank in of_ranks]) for name in own}
    return joined, slice(before, before + len(own["loss_mask"]))
