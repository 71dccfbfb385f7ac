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

from slime_opd.engine import rows as log_prob_rows
from slime_opd.engine.rows import brief
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
    top_rows: Any = None


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


def num_input_tokens(payload: Mapping[str, Any]) -> int:
    """Tokens that the server has to read for a request: of its one sequence, or of all of them."""
    ids = payload.get("input_ids", ())
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def generate_payload(input_ids: Sequence[int], sampling: SamplingParams, top_k: int = 0) -> dict[str, Any]:
    """The body of a request for one response to `input_ids`, with the `top_k` most likely tokens at each position."""
    payload = {"input_ids": list(input_ids), "sampling_params": sampling.payload(), "return_logprob": True}
    return payload | ({"top_logprobs_num": top_k} if top_k else {})


def parse_generation(answer: Any, vocabulary_size: int | None = None) -> Generation:
    """The response in an answer of `/generate`; an aborted one has no tokens, as it is asked for again.

    Raises EngineError where a part is missing, a token is not in the vocabulary, or a log-prob cannot be one.
    """
    meta = meta_info(answer)
    reason, version = finish_type(meta), meta.get("weight_version")
    if reason not in ("stop", "length", "abort"):
        raise EngineError(
            f"the engine ended a response with finish_reason {brief(meta.get('finish_reason'))}; expected type stop, length or abort"
        )
    if version is not None and not isinstance(version, str):
        raise EngineError(f"the engine's weight_version is {brief(version)}, expected a string")
    if reason == "abort":
        return Generation((), np.empty(0, np.float32), reason, version)
    if "output_token_logprobs" not in meta:
        raise EngineError("the engine returned no output_token_logprobs although return_logprob was set")
    ids, log_probs = log_prob_rows.columns(meta["output_token_logprobs"])
    log_prob_rows.check_ids(ids, vocabulary_size)
    log_probs = log_prob_rows.checked_log_probs(log_probs, "response")
    return Generation(tuple(ids.tolist()), log_probs, reason, version, meta.get("output_top_logprobs"))


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


def parse_scores(
    answer: Any, tokens: Sequence[int], prompt_length: int, vocabulary_size: int | None = None
) -> np.ndarray:
    """Log-probs of `tokens[prompt_length:]` at temperature 1, float32 [response_length].

    Raises EngineError unless the rows are about exactly the tokens that were sent, each
    with a log-prob that can be one.
    """
    if prompt_length < 1:
        raise EngineError("a response without a prompt cannot be scored: nothing comes before its first token")
    rows = meta_info(answer).get("input_token_logprobs")
    sent = np.array(tokens[prompt_length - 1 :], dtype=np.int64)
    if type(rows) is not list or len(rows) != len(sent):
        received = str(len(rows)) if type(rows) is list else "none"
        raise EngineError(
            f"the engine returned {received} of the {len(sent)} log-prob rows asked for (sequence of {len(tokens)} tokens, prompt {prompt_length})"
        )
    ids, log_probs = log_prob_rows.columns(rows)
    differs = ids != sent
    if vocabulary_size is not None:
        # SGLang (to 0.5.9 at least) echoes the last id of the vocabulary as 0; its log-prob is the right one.
        differs &= (sent != vocabulary_size - 1) | (ids != 0)
    if differs.any():
        first = int(differs.argmax())
        raise EngineError(
            f"the engine scored other tokens than were sent: id {ids[first]} instead of {sent[first]} at position {prompt_length - 1 + first}"
        )
    return log_prob_rows.checked_log_probs(log_probs[1:], "scored response")


def parse_model_info(model: Any, server: Any) -> ModelInfo:
    """From the answers of `/model_info` and `/server_info`. Raises EngineError without a model path, or where a value has another type."""
    if not isinstance(model, dict) or not isinstance(server, dict):
        raise EngineError(f"the server's model info is {brief(model)} and {brief(server)}: is it an SGLang server?")
    if not isinstance(model.get("model_path"), str):
        raise EngineError(
            f"the server's model info has no model_path (its keys: {', '.join(sorted(model))[:200]}): is it an SGLang server?"
        )
    return ModelInfo(
        model_path=model["model_path"],
        tokenizer_path=_optional(model, "tokenizer_path", str),
        has_tokenizer=not server.get("skip_tokenizer_init", False),
        weight_version=_optional(model, "weight_version", str),
        max_input_length=_optional(server, "max_req_input_len", int),
        vocab_size=_optional(model, "vocab_size", int) or _optional(server, "vocab_size", int),
        version=_optional(server, "version", str),
    )


def meta_info(answer: Any) -> Mapping[str, Any]:
    """What an answer says beside its text. Raises EngineError where it has nothing."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise EngineError(f"the engine's answer has no meta_info: {brief(answer)}")
    return meta


def finish_type(meta: Mapping[str, Any]) -> Any:
    """The type of the finish_reason, None where it has none."""
    reason = meta.get("finish_reason")
    return reason.get("type") if isinstance(reason, dict) else None


def _optional(answer: Mapping[str, Any], name: str, kind: type) -> Any:
    """A value of the server's description, None where it is not there."""
    value = answer.get(name)
    if value is not None and type(value) is not kind:
        raise EngineError(f"the server's {name} is {brief(value)}, expected a {kind.__name__}")
    return value
