"""The wire protocol of SGLang's `/generate`: payloads of requests, and parsers of their answers. Pure.

Prompts and responses travel as token ids, never as text, so that nothing is tokenised twice. SGLang's log-prob rows are
`[log_prob, token_id, text or null]`. Their temperature (sglang 0.5.9, measured): rows of *output* tokens are log-probs
of the logits divided by the request's temperature; rows of *input* tokens, with which a sequence is scored, are always
at temperature 1.
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
    """Sampling parameters of one response. `temperature` 0 is greedy, `top_k` -1 the whole vocabulary."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def payload(self) -> dict[str, Any]:
        """SGLang's `sampling_params`; special tokens and stop strings stay in the text, as they stay in the ids."""
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

    `log_probs`: float32 [num_tokens], at the sampling temperature (at 1 for greedy).
    `finish_reason`: "stop" (end of sequence, stop string or stop token), "length" or "abort".
    `weight_version`: the engine's label of the weights that generated the last token. `top_rows`: the unparsed rows of
    the most likely tokens at each position, if the request has `num_top_logprobs`.
    """

    token_ids: tuple[int, ...]
    log_probs: np.ndarray
    finish_reason: str
    weight_version: str | None
    top_rows: Any = None


@dataclass(frozen=True)
class ModelInfo:
    """A server's description of its model; None for what it does not report (sglang 0.5.9: the vocabulary size)."""

    model_path: str
    tokenizer_path: str | None
    has_tokenizer: bool
    weight_version: str | None
    max_input_length: int | None
    vocab_size: int | None
    version: str | None


def num_input_tokens(payload: Mapping[str, Any]) -> int:
    """Number of input tokens of a request, over all its sequences."""
    ids = payload.get("input_ids", ())
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def generate_payload(input_ids: Sequence[int], sampling: SamplingParams, num_top_logprobs: int = 0) -> dict[str, Any]:
    """The body of a request for one response, with the `num_top_logprobs` most likely tokens at each position."""
    payload = {"input_ids": list(input_ids), "sampling_params": sampling.payload(), "return_logprob": True}
    return payload | ({"top_logprobs_num": num_top_logprobs} if num_top_logprobs else {})


def parse_generation(answer: Any, vocabulary_size: int | None = None) -> Generation:
    """The response in an answer of `/generate`; without tokens if it was aborted, since the client requests it again.

    Raises EngineError if a field is missing, a token is not in the vocabulary, or a log-prob is not valid.
    """
    meta = meta_info(answer)
    reason, version = finish_type(meta), meta.get("weight_version")
    if reason not in ("stop", "length", "abort"):
        raise EngineError(
            f"the engine ended a response with finish_reason {brief(meta.get('finish_reason'))}, "
            "expected type stop, length or abort"
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


def score_payload(tokens: Sequence[int], prompt_length: int, num_top_logprobs: int = 0) -> dict[str, Any]:
    """The body of a request for the log-probs of `tokens[prompt_length:]`.

    With `num_top_logprobs`, also those of the most likely tokens at each position. The requested rows start one token
    before the response, because SGLang's first row has no log-prob. They do not start at 0, because SGLang uses cached
    prefixes only up to the start and would recompute the prompt for each of its responses.
    """
    return {
        "input_ids": list(tokens),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": max(prompt_length - 1, 0),
    } | ({"top_logprobs_num": num_top_logprobs} if num_top_logprobs else {})


def parse_scores(
    answer: Any, tokens: Sequence[int], prompt_length: int, vocabulary_size: int | None = None
) -> np.ndarray:
    """Log-probs of `tokens[prompt_length:]` at temperature 1, float32 [response_length].

    Raises EngineError unless the rows are for exactly the tokens that were sent, each with a valid log-prob.
    """
    if prompt_length < 1:
        raise EngineError("a response without a prompt cannot be scored: nothing comes before its first token")
    rows = meta_info(answer).get("input_token_logprobs")
    sent = np.array(tokens[prompt_length - 1 :], dtype=np.int64)
    if type(rows) is not list or len(rows) != len(sent):
        num_received = str(len(rows)) if type(rows) is list else "none"
        raise EngineError(
            f"the engine returned {num_received} of the {len(sent)} requested log-prob rows "
            f"(sequence of {len(tokens)} tokens, prompt {prompt_length})"
        )
    ids, log_probs = log_prob_rows.columns(rows)
    differs = ids != sent
    if vocabulary_size is not None:
        # SGLang (up to 0.5.9 at least) echoes the last id of the vocabulary as 0; its log-prob is correct.
        differs &= (sent != vocabulary_size - 1) | (ids != 0)
    if differs.any():
        first = int(differs.argmax())
        raise EngineError(
            f"the engine scored other tokens than were sent: id {ids[first]} instead of {sent[first]} "
            f"at position {prompt_length - 1 + first}"
        )
    return log_prob_rows.checked_log_probs(log_probs[1:], "scored response")


def parse_model_info(model: Any, server: Any) -> ModelInfo:
    """ModelInfo from the answers of `/get_model_info` and `/get_server_info`.

    Raises EngineError if the model path is missing or a value has the wrong type.
    """
    if not isinstance(model, dict) or not isinstance(server, dict):
        raise EngineError(f"the server's model info is {brief(model)} and {brief(server)}: is it an SGLang server?")
    if not isinstance(model.get("model_path"), str):
        raise EngineError(
            f"the server's model info has no model_path (its keys: {', '.join(sorted(model))[:200]}): "
            "is it an SGLang server?"
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
    """An answer's `meta_info`. Raises EngineError if it is missing."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise EngineError(f"the engine's answer has no meta_info: {brief(answer)}")
    return meta


def finish_type(meta: Mapping[str, Any]) -> Any:
    """The type of the finish_reason; None without one."""
    reason = meta.get("finish_reason")
    return reason.get("type") if isinstance(reason, dict) else None


def _optional(answer: Mapping[str, Any], name: str, kind: type) -> Any:
    """A value of the server's description; None if it is missing. Raises EngineError for a value of another type."""
    value = answer.get(name)
    if value is not None and type(value) is not kind:
        raise EngineError(f"the server's {name} is {brief(value)}, expected a {kind.__name__}")
    return value
