"""The async client of an SGLang server: pooled, bounded, patient and honest.

Every request has a time limit, a bounded number of attempts and a bounded share of the
server. A request that cannot be had raises EngineError (or EngineTimeout) with the
address and the last reason; it never comes back as a made-up value.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np

from slime_opd.engine import protocol, top_k
from slime_opd.engine.protocol import Generation, ModelInfo, SamplingParams
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
    byte. `retries`: attempts after the first. `transport` and `backoff_s` are there for tests. `bytes_moved` counts
    the bodies of requests and answers.

    The client belongs to the event loop that first uses it.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int,
        timeout_s: float,
        retries: int,
        transport: httpx.AsyncBaseTransport | None = None,
        backoff_s: Callable[[int], float] = exponential_backoff,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._transport = transport
        self._slots = asyncio.Semaphore(concurrency)
        self._ssl_context = httpx.create_ssl_context(trust_env=False)
        self._idle: list[httpx.AsyncClient] = []
        self.bytes_moved = 0

    async def generate(self, input_ids: Sequence[int], sampling: SamplingParams, most_likely: int = 0) -> Generation:
        """One response, with rows of the `most_likely` tokens. One that the engine aborted is asked for again."""
        payload = protocol.generate_payload(input_ids, sampling, most_likely)

        async def once() -> Generation:
            generation = protocol.parse_generation(await self._request("POST", "/generate", self._timeout_s, payload))
            if generation.finish_reason == "abort":
                raise _Transient(EngineError(f"{self.url}/generate: the engine aborted the response"))
            return generation

        return await self._with_retries(once)

    async def score(self, tokens: Sequence[int], prompt_length: int) -> np.ndarray:
        """Log-probs of `tokens[prompt_length:]` at temperature 1, float32 [response_length]."""
        payload = protocol.score_payload(tokens, prompt_length)

        async def once() -> np.ndarray:
            answer = await self._request("POST", "/generate", self._timeout_s, payload)
            return protocol.parse_scores(answer, tokens, prompt_length)

        return await self._with_retries(once)

    async def score_top_k(self, tokens: Sequence[int], prompt_length: int, k: int) -> tuple[np.ndarray, TopK]:
        """`score`, and the k most likely tokens at each position of the response, at temperature 1."""
        payload = protocol.score_payload(tokens, prompt_length, k)

        async def once() -> tuple[np.ndarray, TopK]:
            answer = await self._request("POST", "/generate", self._timeout_s, payload)
            log_probs = protocol.parse_scores(answer, tokens, prompt_length)
            return log_probs, top_k.parse_top_k(answer, len(log_probs), k)

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

        async def once() -> np.ndarray:
            answers = await self._request("POST", "/generate", self._timeout_s, payload)
            return top_k.fill(known, candidates, segments, answers, tokens, prompt_length)

        return await self._with_retries(once)

    async def post_generate(self, payload: dict[str, Any]) -> Any:
        """The JSON answer of `/generate` to a body of one's own; for questions that have no method here."""
        return await self._with_retries(lambda: self._request("POST", "/generate", self._timeout_s, payload))

    async def model_info(self) -> ModelInfo:
        """What the server says about its model."""
        model = await self._with_retries(lambda: self._request("GET", "/get_model_info", _INFO_TIMEOUT_S))
        server = await self._with_retries(lambda: self._request("GET", "/get_server_info", _INFO_TIMEOUT_S))
        return protocol.parse_model_info(model, server)

    async def health(self) -> None:
        """Returns when the server answers `/health`; raises EngineError when it does not."""
        await self._with_retries(lambda: self._request("GET", "/health", _INFO_TIMEOUT_S))

    async def aclose(self) -> None:
        """Close the connections; no request may be in flight."""
        while self._idle:
            await self._idle.pop().aclose()

    async def _with_retries(self, once: Callable[[], Awaitable[_Answer]]) -> _Answer:
        failure: EngineError | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(self._backoff_s(attempt - 1))
            try:
                async with self._slots:
                    return await once()
            except _Transient as transient:
                failure = transient.error
        raise type(failure)(f"{failure} (attempts: {self._retries + 1})")

    async def _request(self, method: str, path: str, timeout_s: float, payload: dict[str, Any] | None = None) -> Any:
        """One attempt. Raises _Transient where another may succeed, EngineError where none will."""
        address = f"{self.url}{path}"
        http = self._idle.pop() if self._idle else self._new_connection()
        try:
            async with asyncio.timeout(timeout_s):
                response = await http.request(method, address, json=payload)
        except TimeoutError:
            raise _Transient(EngineTimeout(f"{address}: no answer within {timeout_s:g} s")) from None
        except httpx.TransportError as error:
            raise _Transient(EngineError(f"{address}: {type(error).__name__}: {error}".rstrip(": "))) from error
        finally:
            self._idle.append(http)
        self.bytes_moved += len(response.request.content) + len(response.content)
        if response.is_success:
            return _json(response, address)
        error = EngineError(f"{address}: HTTP {response.status_code}: {response.text[:500]}")
        if response.status_code == 429 or response.status_code >= 500:
            raise _Transient(error)
        raise error

    def _new_connection(self) -> httpx.AsyncClient:
        # A client of one connection each: httpx's pool walks all its connections for every request, which took most
        # of the time of a rollout of 128 short responses.
        return httpx.AsyncClient(
            transport=self._transport,
            verify=self._ssl_context,
            timeout=None,  # the time limit is on the whole attempt; httpx's own are on its parts
            # Uvicorn closes a connection after 5 idle seconds: drop it earlier, or a request may meet the closing.
            limits=httpx.Limits(max_connections=1, keepalive_expiry=2.0),
            trust_env=False,  # a proxy meant for the internet must not catch requests to the cluster
        )


class _Transient(Exception):
    """A failed attempt that another attempt may mend."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error


def _json(response: httpx.Response, address: str) -> Any:
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError as error:
        raise EngineError(f"{address}: the answer is not JSON: {response.text[:200]!r}") from error
