"""Time limits of requests to a server that answers them one after another.

A server that scores 64 sequences of 16,000 tokens is busy for minutes without being stuck. So the limit of a request
bounds the server's silence: each answer to another request renews it, up to the time that all requests that were in
flight when it was sent would take at an assumed lowest speed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Request:
    """`silence_s`: seconds without any answer before it ends. `latest`: the loop's time at which it must end."""

    silence_s: float
    latest: float
    timeout: asyncio.Timeout


class TimeLimits:
    """Time limits of one client's requests to one server.

    `timeout_s`: seconds that a request may take, without the time for its tokens. `min_tokens_per_s`: the lowest speed
    at which the server reads tokens; None: tokens are not counted, and `timeout_s` is the limit of each request.
    """

    def __init__(self, timeout_s: float, min_tokens_per_s: float | None = None) -> None:
        self._timeout_s, self._min_tokens_per_s = timeout_s, min_tokens_per_s
        self._tokens = 0
        self._waiting: set[_Request] = set()

    @asynccontextmanager
    async def request(self, num_tokens: int) -> AsyncIterator[None]:
        """Context of a request of `num_tokens` in flight. Raises TimeoutError, with the reason, at its limit."""
        now = asyncio.get_running_loop().time()
        self._tokens += num_tokens
        request = None
        try:
            async with asyncio.timeout_at(now + self._limit_s(num_tokens)) as timeout:
                request = _Request(self._limit_s(num_tokens), now + self._limit_s(self._tokens), timeout)
                self._waiting.add(request)
                yield
        except TimeoutError:
            waited = asyncio.get_running_loop().time() - now
            raise TimeoutError(self._reason(num_tokens, waited)) from None
        finally:
            self._tokens -= num_tokens
            self._waiting.discard(request)

    def note_answer(self) -> None:
        """Renew the limits of all requests in flight: the server has answered one."""
        if self._min_tokens_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        for request in self._waiting:
            if not request.timeout.expired():
                request.timeout.reschedule(min(now + request.silence_s, request.latest))

    def _limit_s(self, num_tokens: int) -> float:
        return self._timeout_s + (num_tokens / self._min_tokens_per_s if self._min_tokens_per_s else 0.0)

    def _reason(self, num_tokens: int, waited_s: float) -> str:
        if self._min_tokens_per_s is None:
            return f"no answer within {self._timeout_s:g} s"
        return (
            f"no answer within {waited_s:.3g} s "
            f"({self._timeout_s:g} s and {num_tokens} tokens at {self._min_tokens_per_s:g} per second)"
        )
