"""The wire: what SGLang's `/generate` is asked, and what its answers mean. Pure.

Prompts and responses travel as token ids, never as text, so that nobody tokenises anything
twice. SGLang's log-prob rows are `[log_prob, token_id, text or null]`. Two facts about their
temperature (sglang 0.5.9, measured): rows of *output* tokens are log-probs of the logits divided by the
request's temperature; rows of *input* tokens, which is how a sequence is scored, are always at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slime_opd.errors import EngineError


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled. `temperature` 0 is greedy, `top_k` -1 the whole vocabulary."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def payload(self) -> dict[str, Any]:
        """SGLang's `sampling_params`: the text keeps its special tokens and stop strings, as the ids do."""
        payload: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_new_tokens": self.max_new_tokens,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
        }
        if self.stop:
            payload["stop"] = list(self.stop)
        if self.stop_token_ids:
            payload["stop_token_ids"] = list(self.stop_token_ids)
        if self.seed is not None:
            payload["sampling_seed"] = self.seed
        return payload


@dataclass(frozen=True, eq=False)
class Generation:
    """One response.

    `log_probs`: float32 [number of tokens], at the sampling temperature (at 1 for greedy).
    `finish_reason`: "stop" (end of sequence, stop string or stop token), "length" or "abort".
    `weight_version`: the engine's label of the weights that ended the response. `top_rows`: the rows of the most likely
    tokens at each position, as they came, where they were asked for.
    """

    token_ids: tuple[int, ...]
    log_probs: np.ndarray
    finish_reason: str
    weight_version: str | None
    top_rows: Sequence[Any] | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What a server says about itself; None is what it does not say (sglang 0.5.9 names no vocabulary size)."""

    model_path: str
    tokenizer_path: str | None
    has_tokenizer: bool
    weight_version: str | None
    max_input_length: int | None
    vocab_size: int | None
    version: str | None


def generate_payload(input_ids: Sequence[int], sampling: SamplingParams, top_k: int = 0) -> dict[str, Any]:
    """The body of a request for one response to `input_ids`, with the `top_k` most likely tokens at each position."""
    payload = {"input_ids": list(input_ids), "sampling_params": sampling.payload(), "return_logprob": True}
    return payload | ({"top_logprobs_num": top_k} if top_k else {})


def parse_generation(answer: Mapping[str, Any]) -> Generation:
    """The response in an answer of `/generate`.

    Raises EngineError where a part is missing, or a log-prob is not a finite number (an
    aborted response is returned as it is, without that check).
    """
    meta = meta_info(answer)
    reason = (meta.get("finish_reason") or {}).get("type")
    if reason not in ("stop", "length", "abort"):
        raise EngineError(
            f"the engine ended a response with finish_reason {meta.get('finish_reason')!r}; expected type stop, length or abort"
        )
    if reason != "abort" and "output_token_logprobs" not in meta:
        raise EngineError("the engine returned no output_token_logprobs although return_logprob was set")
    token_ids, log_probs = _columns(meta.get("output_token_logprobs") or ())
    if reason != "abort":
        _check_finite(log_probs, "response")
    return Generation(token_ids, log_probs, reason, meta.get("weight_version"), meta.get("output_top_logprobs"))


def score_payload(tokens: Sequence[int], prompt_length: int, top_k: int = 0) -> dict[str, Any]:
    """The body of a request for the log-probs of `tokens[prompt_length:]`, and of the `top_k` most likely tokens there.

    The rows asked for start one before the response: SGLang gives its first row no log-prob. A
    start of 0 would serve as well, but it makes the engine recompute the prompt for
    every one of its responses, as cached prefixes are used up to the start only.
    """
    return {
        "input_ids": list(tokens),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": max(prompt_length - 1, 0),
    } | ({"top_logprobs_num": top_k} if top_k else {})


def parse_scores(answer: Mapping[str, Any], tokens: Sequence[int], prompt_length: int) -> np.ndarray:
    """Log-probs of `tokens[prompt_length:]` at temperature 1, float32 [response_length].

    Raises EngineError unless the rows are about exactly the tokens that were sent, each
    with a finite log-prob.
    """
    if prompt_length < 1:
        raise EngineError("a response without a prompt cannot be scored: nothing comes before its first token")
    rows = meta_info(answer).get("input_token_logprobs")
    sent = tuple(tokens[prompt_length - 1 :])
    if rows is None or len(rows) != len(sent):
        received = "none" if rows is None else str(len(rows))
        raise EngineError(
            f"the engine returned {received} of the {len(sent)} log-prob rows asked for (sequence of {len(tokens)} tokens, prompt {prompt_length})"
        )
    token_ids, log_probs = _columns(rows)
    differing = [i for i, (got, want) in enumerate(zip(token_ids, sent, strict=True)) if got != want]
    # SGLang (to 0.5.9 at least) echoes the last id of the vocabulary as 0; its log-prob is the right one.
    echoed_as_zero = {sent[i] for i in differing} == {max(sent)} and all(token_ids[i] == 0 for i in differing)
    if differing and not echoed_as_zero:
        place = differing[0]
        raise EngineError(
            f"the engine scored other tokens than were sent: id {token_ids[place]} instead of {sent[place]} at position {prompt_length - 1 + place}"
        )
    _check_finite(log_probs[1:], "scored response")
    return log_probs[1:]


def parse_model_info(model: Mapping[str, Any], server: Mapping[str, Any]) -> ModelInfo:
    """From the answers of `/model_info` and `/server_info`. Raises EngineError without a model path."""
    model_path = model.get("model_path")
    if not isinstance(model_path, str):
        raise EngineError(
            f"the server's model info has no model_path (its keys: {', '.join(sorted(model))}): is it an SGLang server?"
        )
    return ModelInfo(
        model_path=model_path,
        tokenizer_path=model.get("tokenizer_path"),
        has_tokenizer=not server.get("skip_tokenizer_init", False),
        weight_version=model.get("weight_version"),
        max_input_length=server.get("max_req_input_len"),
        vocab_size=model.get("vocab_size") or server.get("vocab_size"),
        version=server.get("version"),
    )


def meta_info(answer: Any) -> Mapping[str, Any]:
    """What an answer says beside its text. Raises EngineError where it has nothing."""
    meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
    if not isinstance(meta, Mapping):
        raise EngineError(f"the engine's answer has no meta_info: {str(answer)[:200]}")
    return meta


def _columns(rows: Sequence[Sequence[Any]]) -> tuple[tuple[int, ...], np.ndarray]:
    """Token ids and log-probs (float32; null becomes NaN) of log-prob rows."""
    try:
        log_probs = np.array([row[0] for row in rows], dtype=np.float32)
        return tuple(int(row[1]) for row in rows), log_probs
    except (TypeError, ValueError, IndexError) as error:
        raise EngineError(
            f"the engine returned log-prob rows that are not [log_prob, token_id, …]: {str(rows[:2])[:200]}"
        ) from error


def _check_finite(log_probs: np.ndarray, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(log_probs))
    if len(bad):
        raise EngineError(
            f"the engine returned no finite log-prob for {len(bad)} of {len(log_probs)} tokens of a {what} (first at {bad[0]})"
        )
