"""A server that answers as sglang 0.5.9 does, of a small causal model of random numbers; and ways to falsify it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import httpx
import numpy as np

SIZE = 100
TEXTS = [f"<{i}>" for i in range(90)]


class Characters:
    """A tokenizer whose id i is the character `texts[i]`."""

    eos_token_id = 1

    def __init__(self, texts: Sequence[str] = TEXTS, special: Sequence[int] = (0, 1)) -> None:
        self._texts = texts
        self.all_special_ids = list(special)
        self.added_tokens_decoder = {}

    def __len__(self) -> int:
        return len(self._texts)

    def get_vocab(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self._texts)}

    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(self._texts[i] for i in sequence) for sequence in sequences]


@functools.cache
def log_probs_after(prefix: tuple[int, ...], model: int, size: int) -> np.ndarray:
    """What model number `model` expects after a prefix, of which it sees the last three tokens; float64 [size]."""
    logits = np.random.default_rng([model, *prefix[-3:]]).normal(scale=3.0, size=size)
    return logits - np.log(np.exp(logits).sum())


class ScriptedTeacher:
    """A server to put behind httpx.MockTransport.

    model: number of the model that it serves. noise: nats by which each request moves every log-prob, at random.
    lie: changes the rows `[log_prob, id, text]` of scores. largest_id: the largest id that was given to the model.
    """

    def __init__(
        self,
        *,
        model: int = 0,
        texts: Sequence[str] | None = TEXTS,
        size: int = SIZE,
        eos: tuple[int, ...] = (1,),
        top_k: int = SIZE,
        noise: float = 0.0,
        lie: Callable[[list], list] | None = None,
        max_input: int = 64,
        tokenizer_path: str | None = None,
    ) -> None:
        self.model, self.texts, self.size, self.eos, self.top_k = model, texts, size, eos, top_k
        self.noise, self.lie, self.max_input, self.largest_id = noise, lie, max_input, 0
        self.tokenizer_path = tokenizer_path
        self._random = np.random.default_rng(0)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/get_model_info":
            return httpx.Response(200, json={"model_path": "big", "tokenizer_path": self.tokenizer_path})
        if request.url.path == "/get_server_info":
            return httpx.Response(200, json={"max_req_input_len": self.max_input})
        body = json.loads(request.content)
        ids, sampling = body["input_ids"], body["sampling_params"]
        for biased in map(int, sampling.get("logit_bias", {})):
            if biased >= self.size:
                message = f"logit_bias must has keys in [0, {self.size - 1}], got {biased}."
                return httpx.Response(400, json={"error": {"message": message}})
            end = "stop" if biased in self.eos else "length"
            return httpx.Response(200, json={"meta_info": {"finish_reason": {"type": end}}})
        self.largest_id = max(self.largest_id, *ids)
        assert self.largest_id < self.size, "sglang would end here"
        generates = sampling["max_new_tokens"] > 0
        return httpx.Response(200, json={"meta_info": self._generated(body) if generates else self._scored(body)})

    def _after(self, prefix: Sequence[int]) -> np.ndarray:
        return log_probs_after(tuple(prefix), self.model, self.size)

    def _generated(self, body: dict) -> dict:
        tokens, rows = list(body["input_ids"]), []
        for _ in range(body["sampling_params"]["max_new_tokens"]):
            expected = self._after(tokens)
            tokens.append(int(expected[:-1].argmax()))
            rows.append([float(expected[tokens[-1]]), tokens[-1], None])
        return {"finish_reason": {"type": "length"}, "output_token_logprobs": rows}

    def _scored(self, body: dict) -> dict:
        ids, start = body["input_ids"], body["logprob_start_len"]
        text = lambda i: self.texts and self.texts[i] if body.get("return_text_in_logprobs") else None  # noqa: E731
        rows: list = [[None, ids[start], text(ids[start])]]
        for at in range(start + 1, len(ids)):
            moved = self.noise * self._random.normal()
            rows.append([min(0.0, float(self._after(ids[:at])[ids[at]] + moved)), ids[at], text(ids[at])])
        meta = {"input_token_logprobs": self.lie(rows) if self.lie else rows}
        if self.top_k and "top_logprobs_num" in body:
            count = min(self.top_k, body["top_logprobs_num"])
            expected = [self._after(ids[:at]) for at in range(start + 1, len(ids))]
            top = [[[float(row[i]), int(i), None] for i in np.argsort(-row)[:count]] for row in expected]
            meta["input_top_logprobs"] = [None, *top]
        return meta


def each(change: Callable[[float], float]) -> Callable[[list], list]:
    """A lie that changes every log-prob."""
    return lambda rows: [[None if row[0] is None else change(row[0]), *row[1:]] for row in rows]


def shifted(by: int) -> Callable[[list], list]:
    """A lie that gives every log-prob to the token `by` places later."""

    def lie(rows: list) -> list:
        values = np.roll([row[0] for row in rows[1:]], by).tolist()
        return [rows[0], *([value, *row[1:]] for value, row in zip(values, rows[1:], strict=True))]

    return lie


def one(index: int, value: object) -> Callable[[list], list]:
    """A lie about one row's log-prob."""

    def lie(rows: list) -> list:
        rows[index % len(rows)][0] = value
        return rows

    return lie
