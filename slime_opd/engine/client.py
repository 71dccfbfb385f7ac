"""The async client of an SGLang server: pooled, bounded, patient and honest.

Every request has a time limit, a bounded number of attempts and a bounded share of the
server. A request that cannot be had raises EngineError (or EngineTimeout) with the
address and the last reason; it never comes back as a made-up value.
"""

from __future__ import annotations

import asyncio
import functools
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np

from slime_opd.engine import protocol, top_k
from slime_opd.engine.address import Address
from slime_opd.engine.body import body_limit, excerpt, parse_json, read_body
from slime_opd.engine.protocol import Generation, ModelInfo, SamplingParams
from slime_opd.engine.retry_after import retry_after_s
from slime_opd.engine.time_limits import TimeLimits
from slime_opd.engine.top_k import TopK
from slime_opd.errors import EngineError, EngineTimeout

_INFO_TIMEOUT_S = 30.0
_Answer = TypeVar("_Answer")


def exponential_backoff(attempt: int) -> float:
    """Seconds to wait after failed attempt `attempt` (from 0): 0.5, 1, 2, … 30, less up to half of it.

    The random part keeps clients that failed together from coming back together.
    """
    return min(0.5 * 2**attempt, 30.0) * random.uniform(0.5, 1.0)


class EngineClient:
    """Asks one SGLang server (or a router before several).

    `concurrency`: requests in flight; more wait their turn, and the wait is in no time
    limit. `timeout_s`: seconds that one attempt may take, from connecting to the last
    byte; with `min_tokens_per_s` longer while the server answers others (see TimeLimits). `retries`: attempts after the first. A busy server's `Retry-After` is waited for, in all at most `retries` x `timeout_s`.
    `api_key` is sent as a bearer token, user info in `url` as basic authentication; `url` and all messages are without them.
    `vocabulary_size` of the model: ids beyond it are refused, and its last id is recognised where SGLang echoes it as 0.
    `transport`, `backoff_s` and `sleep` are there for tests. `bytes_moved` counts the bodies of requests and answers.

    The client belongs to the event loop that first uses it.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int,
        timeout_s: float,
        retries: int,
        min_tokens_per_s: float | None = None,
        api_key: str | None = None,
        vocabulary_size: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        backoff_s: Callable[[int], float] = exponential_backoff,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        address = Address.parse(url.rstrip("/"), api_key)
        self.url, self._base_url, self._headers = address.shown, address.base_url, address.headers
        self.vocabulary_size = vocabulary_size
        self._timeout_s = timeout_s
        self._limits, self._info_limits = TimeLimits(timeout_s, min_tokens_per_s), TimeLimits(_INFO_TIMEOUT_S)
        self._retries = retries
        self._backoff_s, self._sleep = backoff_s, sleep
        self._transport = transport
        self._slots = asyncio.Semaphore(concurrency)
        self._idle: list[httpx.AsyncClient] = []
        self.bytes_moved = 0

    async def generate(self, input_ids: Sequence[int], sampling: SamplingParams, most_likely: int = 0) -> Generation:
        """One response, with rows of the `most_likely` tokens. One that the engine aborted is asked for again."""
        payload = protocol.generate_payload(input_ids, sampling, most_likely)
        limit = body_limit(sampling.max_new_tokens * (1 + most_likely))

        async def once() -> Generation:
            answer = await self._post(payload, limit)
            generation = protocol.parse_generation(answer, self.vocabulary_size)
            if generation.finish_reason == "abort":
                raise _Transient(EngineError(f"{self.url}/generate: the engine aborted the response"))
            return generation

        return await self._with_retries(once)

    async def score(self, tokens: Sequence[int], prompt_length: int) -> np.ndarray:
        """Log-probs of `tokens[prompt_length:]` at temperature 1, float32 [response_length]."""
        payload = protocol.score_payload(tokens, prompt_length)
        limit = body_limit(len(tokens))

        async def once() -> np.ndarray:
            answer = await self._post(payload, limit)
            return protocol.parse_scores(answer, tokens, prompt_length, self.vocabulary_size)

        return await self._with_retries(once)

    async def score_top_k(self, tokens: Sequence[int], prompt_length: int, k: int) -> tuple[np.ndarray, TopK]:
        """`score`, and the k most likely tokens at each position of the response, at temperature 1."""
        payload = protocol.score_payload(tokens, prompt_length, k)
        limit = body_limit(len(tokens) * (1 + k))

        async def once() -> tuple[np.ndarray, TopK]:
            answer = await self._post(payload, limit)
            log_probs = protocol.parse_scores(answer, tokens, prompt_length, self.vocabulary_size)
            return log_probs, top_k.parse_top_k(answer, log_probs, k, self.vocabulary_size)

        return await self._with_retries(once)

    async def score_candidates(
        self, tokens: Sequence[int], prompt_length: int, candidates: np.ndarray, top: TopK
    ) -> np.ndarray:
        """Log-probs of candidates int32 [R, K] at each position of the response, float32 [R, K], at temperature 1.

        What `top`, from `score_top_k`, has of them is not asked for again.
        """
        known = top_k.find(candidates, top)
        segments = top_k.segments_of(candidates, np.isnan(known))
        if not segments:
            return known
        payload = top_k.segments_payload(tokens, prompt_length, segments)
        limit = body_limit(top_k.num_rows(segments))

        async def once() -> np.ndarray:
            answers = await self._post(payload, limit)
            return top_k.fill(known, candidates, segments, answers, tokens, prompt_length, self.vocabulary_size)

        return await self._with_retries(once)

    async def post_generate(self, payload: dict[str, Any]) -> Any:
        """The JSON answer of `/generate` to a short request that has no method here."""
        return await self._with_retries(lambda: self._post(payload, body_limit(0)))

    async def model_info(self) -> ModelInfo:
        """The server's description of its model."""
        model = await self._with_retries(lambda: self._request("GET", "/get_model_info"))
        server = await self._with_retries(lambda: self._request("GET", "/get_server_info"))
        return protocol.parse_model_info(model, server)

    async def health(self) -> None:
        """Returns when the server answers `/health`; raises EngineError when it does not."""
        await self._with_retries(lambda: self._request("GET", "/health"))

    async def aclose(self) -> None:
        """Close the connections; no request may be in flight."""
        while self._idle:
            await self._idle.pop().aclose()

    async def _with_retries(self, once: Callable[[], Awaitable[_Answer]]) -> _Answer:
        failure: _Transient | None = None
        patience = self._retries * self._timeout_s
        for attempt in range(self._retries + 1):
            if failure is not None:
                pause = min(failure.retry_after_s, patience)
                patience -= pause
                # The backoff comes on top: clients that were sent away together come back one by one.
                await self._sleep(pause + self._backoff_s(attempt - 1))
            try:
                async with self._slots:
                    return await once()
            except _Transient as transient:
                failure = transient
        raise type(failure.error)(f"{failure.error} (attempts: {self._retries + 1})")

    async def _post(self, payload: dict[str, Any], limit: int) -> Any:
        return await self._request("POST", "/generate", payload, limit)

    async def _request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None = None,
        limit: int = body_limit(0),
    ) -> Any:
        """One attempt. Raises _Transient where another may succeed, EngineError where none will."""
        address = f"{self.url}{path}"
        http = self._idle.pop() if self._idle else self._new_connection()
        request = http.build_request(method, f"{self._base_url}{path}", json=payload)
        try:
            limits = self._info_limits if payload is None else self._limits
            async with limits.request(protocol.num_input_tokens(payload or {})):
                response = await http.send(request, stream=True)
                try:
                    body = await read_body(response, limit)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise _Transient(EngineTimeout(f"{address}: {error}")) from None
        except httpx.HTTPError as error:
            raise _Transient(EngineError(f"{address}: {type(error).__name__}: {error}".rstrip(": "))) from error
        except EngineError as error:
            raise _failed(response, f"{address}: HTTP {response.status_code}: {error}") from None
        finally:
            self._idle.append(http)
        limits.note_answer()
        self.bytes_moved += len(request.content) + len(body)
        if response.is_success:
            return _json(body, address)
        raise _failed(response, f"{address}: HTTP {response.status_code}: {excerpt(body, 500)}")

    def _new_connection(self) -> httpx.AsyncClient:
        # A client of one connection each: httpx's pool walks all its connections for every request, which took most
        # of the time of a rollout of 128 short responses.
        return httpx.AsyncClient(
            transport=self._transport,
            headers=self._headers,
            verify=_ssl_context(),
            timeout=None,  # the time limit is on the whole attempt; httpx's own are on its parts
            # Uvicorn closes a connection after 5 idle seconds: drop it earlier, or a request may meet the closing.
            limits=httpx.Limits(max_connections=1, keepalive_expiry=2.0),
            trust_env=False,  # a proxy meant for the internet must not catch requests to the cluster
        )


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    """The trusted certificates, read once per process: it takes longer than a request."""
    return httpx.create_ssl_context(trust_env=False)


class _Transient(Exception):
    """A failed attempt that another attempt may mend, after `retry_after_s` seconds if the server names some."""

    def __init__(self, error: EngineError, retry_after_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.retry_after_s = error, retry_after_s


def _failed(response: httpx.Response, message: str) -> Exception:
    """The error of a response, by whether another attempt may succeed."""
    if response.status_code == 429 or response.status_code >= 500:
        wait_s = retry_after_s(response.headers.get("retry-after"), time.time())
        return _Transient(EngineError(message), wait_s or 0.0)
    return EngineError(message)


def _json(body: bytes, address: str) -> Any:
    if not body:
        return None
    try:
        return parse_json(body)
    except EngineError as error:
        raise EngineError(f"{address}: {error}") from None
