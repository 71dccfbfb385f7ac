"""Length limits of prompts: which rows exceed a limit, and whether they are dropped or refused. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from slime_opd.config import Config
from slime_opd.config.lengths import context_length
from slime_opd.errors import DataError

# Reasons to drop a row. Rows beyond PROMPT_LIMIT are always dropped; for the others --too-long-prompts decides.
PROMPT_LIMIT, NO_RESPONSE, CONTEXT, MICRO_BATCH = "prompt_limit", "no_response", "context", "micro_batch"


@dataclass(frozen=True)
class LengthLimits:
    """Limits in tokens; None: no limit.

    `max_prompt`: longer prompts are dropped (--rollout-max-prompt-len).
    `context`: prompt plus response; a generated response needs at least 1 token.
    `max_sample`: prompt plus the data set's response, in supervised fine-tuning (--max-tokens-per-gpu).
    `drop`: rows beyond `context` or `max_sample` are dropped instead of refused (--too-long-prompts).
    """

    max_prompt: int | None = None
    context: int | None = None
    max_sample: int | None = None
    drop: bool = False

    def exceeded(self, prompt: int, response: int | None) -> str | None:
        """The limit that a row exceeds; None if it exceeds none. `prompt`, `response`: numbers of tokens.

        `response` is None if the response is generated, or cut to fit.
        """
        if self.max_prompt is not None and prompt > self.max_prompt:
            return PROMPT_LIMIT
        if response is None:
            return NO_RESPONSE if self.context is not None and prompt >= self.context else None
        if self.context is not None and prompt + response > self.context:
            return CONTEXT
        return MICRO_BATCH if self.max_sample is not None and prompt + response > self.max_sample else None


def training_limits(config: Config) -> LengthLimits:
    """The limits of `--prompt-data`."""
    packs = config.is_sft and config.training.use_dynamic_batch_size
    return LengthLimits(
        max_prompt=config.data.rollout_max_prompt_len,
        context=context_length(config),
        max_sample=config.training.max_tokens_per_gpu if packs else None,
        drop=config.data.too_long_prompts == "drop",
    )


def evaluation_limits(config: Config) -> LengthLimits:
    """The limits of `--eval-prompt-data`, to which --rollout-max-prompt-len does not apply."""
    return LengthLimits(context=context_length(config), drop=config.data.too_long_prompts == "drop")


@dataclass
class Excluded:
    """The rows of one file that exceed a limit: the number for each limit, and the first row."""

    limits: LengthLimits
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, int]] = field(default_factory=dict)
    shortest: int | None = None

    def excludes(self, where: str, prompt: int, response: int | None) -> bool:
        """Whether a row exceeds a limit; if so, it is counted."""
        reason = self.limits.exceeded(prompt, response)
        if reason is None:
            return False
        self.counts[reason] += 1
        self.first.setdefault(reason, (where, prompt + (response or 0)))
        self.shortest = min(prompt, prompt if self.shortest is None else self.shortest)
        return True

    def check(self, path: str, total: int) -> None:
        """Raise DataError for rows that must not be dropped, and if no row of `total` is left."""
        refused = [] if self.limits.drop else [self._sentence(path, reason, total) for reason in self._too_long()]
        if refused:
            raise DataError("\n".join(refused))
        if total and self.counts.total() == total:
            flags, limit = " and ".join(self._flags()), self.limits.context
            remedy = "raise it" if not self._too_long() else f"the context is {limit}, see --rollout-max-context-len"
            raise DataError(
                f"{path}: {flags} drops all {total} prompts (the shortest has {self.shortest} tokens); {remedy}"
            )

    def notes(self, path: str, total: int) -> list[str]:
        """One sentence for each flag that dropped rows."""
        notes = []
        if count := self.counts[PROMPT_LIMIT]:
            notes.append(
                f"{path}: {count} of {total} prompts dropped by --rollout-max-prompt-len {self.limits.max_prompt}"
            )
        if reasons := self._too_long():
            count = sum(self.counts[reason] for reason in reasons)
            notes.append(
                f"{path}: {count} of {total} prompts dropped by --too-long-prompts drop; "
                f"{self._first(reasons[0], path)}"
            )
        return notes

    def _too_long(self) -> list[str]:
        return [reason for reason in self.counts if reason != PROMPT_LIMIT]

    def _flags(self) -> list[str]:
        flags = [f"--rollout-max-prompt-len {self.limits.max_prompt}"] if self.counts[PROMPT_LIMIT] else []
        return flags + (["--too-long-prompts drop"] if self._too_long() else [])

    def _first(self, reason: str, path: str) -> str:
        where, tokens = self.first[reason]
        return f"the first is {where.removeprefix(path + ', ')} with {tokens} tokens"

    def _sentence(self, path: str, reason: str, total: int) -> str:
        context = "raise --rollout-max-context-len, up to the model's own limit"
        what, remedy = {
            NO_RESPONSE: (f"leaving no token for a response in a context of {self.limits.context}", context),
            CONTEXT: (f"with their response longer than the context of {self.limits.context}", context),
            MICRO_BATCH: (
                f"with their response longer than --max-tokens-per-gpu {self.limits.max_sample}",
                "raise --max-tokens-per-gpu",
            ),
        }[reason]
        return (
            f"{path}: {self.counts[reason]} of {total} prompts are too long, {what}; {self._first(reason, path)}: "
            f"drop them with --too-long-prompts drop, or {remedy}"
        )
