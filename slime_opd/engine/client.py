"""The async client of an SGLang server: connection pool, concurrency limit, timeouts and retries.

A request that fails at every attempt raises EngineError (or EngineTimeout) with the address and the last reason. It
never returns a default value.
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
    """Seconds to wait after failed attempt number `attempt` (from 0): 0.5, 1, 2, … 30, times 0.5 to 1 at random.

    The random factor keeps clients that failed together from retrying together.
    """
    return min(0.5 * 2**attempt, 30.0) * random.uniform(0.5, 1.0)


class EngineClient:
    """Client of one SGLang server, or of a router in front of several. It belongs to the event loop that first uses it.

    `concurrency`: maximum number of requests in flight; the wait for a slot counts towards no time limit.
    `timeout_s`: seconds of one attempt, from connecting to the last byte; with `min_tokens_per_s` it is extended while
    the server answers other requests (see TimeLimits).
    `retries`: attempts after the first. The client honours a busy server's `Retry-After`, in total for at most
    `retries` x `timeout_s`.
    `api_key` is sent as a bearer token, user info in `url` as basic authentication; both are removed from the attribute
    `url` and from messages.
    `vocabulary_size` of the model: ids beyond it are refused, and its last id is accepted when SGLang echoes it as 0.
    `transport`, `backoff_s` and `sleep` are for tests. `bytes_moved` counts the bodies of requests and answers.
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
        self.url, self._base_url, self._headers = address.redacted_url, address.base_url, address.headers
        self.vocabulary_size = vocabulary_size
        self._timeout_s = timeout_s
        self._limits, self._info_limits = TimeLimits(timeout_s, min_tokens_per_s), TimeLimits(_INFO_TIMEOUT_S)
        self._retries = retries
        self._backoff_s, self._sleep = backoff_s, sleep
        self._transport = transport
        self._slots = asyncio.Semaphore(concurrency)
        self._idle: list[httpx.AsyncClient] = []
        self.bytes_moved = 0

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, num_top_logprobs: int = 0
    ) -> Generation:
        """One response, with rows of the `num_top_logprobs` most likely tokens. Aborted responses are retried."""
        payload = protocol.generate_payload(input_ids, sampling, num_top_logprobs)
        limit = body_limit(sampling.max_new_tokens * (1 + num_top_logprobs))

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
        """Log-probs of `candidates` int32 [R, K] at each position of the response, float32 [R, K], at temperature 1.

        Only candidates that are not in `top` (from `score_top_k`) are requested.
        """
        known = top_k.lookup(candidates, top)
        segments = top_k.missing_segments(candidates, np.isnan(known))
        if not segments:
            return known
        payload = top_k.segments_payload(tokens, prompt_length, segments)
        limit = body_limit(top_k.num_rows(segments))

        async def once() -> np.ndarray:
            answers = await self._post(payload, limit)
            return top_k.fill(known, candidates, segments, answers, tokens, prompt_length, self.vocabulary_size)

        return await self._with_retries(once)

    async def post_generate(self, payload: dict[str, Any]) -> Any:
        """The JSON answer of `/generate` to a payload with a short answer."""
        return await self._with_retries(lambda: self._post(payload, body_limit(0)))

    async def model_info(self) -> ModelInfo:
        """The server's description of its model."""
        model = await self._with_retries(lambda: self._request("GET", "/get_model_info"))
        server = await self._with_retries(lambda: self._request("GET", "/get_server_info"))
        return protocol.parse_model_info(model, server)

    async def health(self) -> None:
        """Return when the server answers `/health`. Raises EngineError if it does not."""
        await self._with_retries(lambda: self._request("GET", "/health"))

    async def aclose(self) -> None:
        """Close the connections; no request may be in flight."""
        while self._idle:
            await self._idle.pop().aclose()

    async def _with_retries(self, once: Callable[[], Awaitable[_Answer]]) -> _Answer:
        wait_left_s, attempt = self._retries * self._timeout_s, 0
        while True:
            try:
                async with self._slots:
                    return await once()
            except _Transient as transient:
                failure = transient
            if attempt == self._retries:
                raise type(failure.error)(f"{failure.error} (attempts: {attempt + 1})")
            pause = min(failure.retry_after_s, wait_left_s)
            wait_left_s -= pause
            # The backoff is added, so that clients with the same Retry-After do not retry together.
            await self._sleep(pause + self._backoff_s(attempt))
            attempt += 1

    async def _post(self, payload: dict[str, Any], limit: int) -> Any:
        return await self._request("POST", "/generate", payload, limit)

    async def _request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None = None,
        limit: int = body_limit(0),
    ) -> Any:
        """One attempt. Raises _Transient if another attempt may succeed, else EngineError."""
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
        # One httpx client per connection: httpx's own pool walks all its connections for every request, which took
        # most of the time of a rollout of 128 short responses.
        return httpx.AsyncClient(
            transport=self._transport,
            headers=self._headers,
            verify=_ssl_context(),
            timeout=None,  # `limits` bounds the whole attempt; httpx's timeouts bound single reads and writes
            # Uvicorn closes a connection after 5 idle seconds; a request on a connection that is being closed fails.
            limits=httpx.Limits(max_connections=1, keepalive_expiry=2.0),
            trust_env=False,  # requests to the cluster must not go through a proxy for the internet
        )


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    """The trusted certificates, read once per process: reading them takes longer than a request."""
    return httpx.create_ssl_context(trust_env=False)


class _Transient(Exception):
    """A failed attempt that may be retried; `retry_after_s` is the server's `Retry-After`, else 0."""

    def __init__(self, error: EngineError, retry_after_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.retry_after_s = error, retry_after_s


def _failed(response: httpx.Response, message: str) -> Exception:
    """The exception for a failed response: _Transient if another attempt may succeed, else EngineError."""
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
