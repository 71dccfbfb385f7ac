"""How long requests to one server are waited for, given that it answers them one after another.

A server that reads prompts has a queue: 64 sequences of 16,000 tokens take minutes, during which it is busy and not
stuck. So a request's limit is one on silence: as long as other requests are answered, the server lives. It is renewed with each answer, up to
the time that everything which was in flight when the request was sent would take at the lowest speed assumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Request:
    """`own_s`: seconds of silence that it allows; `latest`: when it ends whatever else is answered, in the loop's time."""

    own_s: float
    latest: float
    timeout: asyncio.Timeout


class TimeLimits:
    """The time limits of one client's requests to one server.

    `timeout_s`: seconds that a request may take beside its tokens. `min_tokens_per_s`: the lowest speed at which the server reads
    tokens; None: tokens are not counted, and `timeout_s` is the limit of each request by itself.
    """

    def __init__(self, timeout_s: float, min_tokens_per_s: float | None = None) -> None:
        self._timeout_s, self._min_tokens_per_s = timeout_s, min_tokens_per_s
        self._tokens = 0
        self._waiting: set[_Request] = set()

    @asynccontextmanager
    async def request(self, num_tokens: int) -> AsyncIterator[None]:
        """While inside, a request of `num_tokens` is in flight. Raises TimeoutError, with the reason, at its limit."""
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
        """The server has answered a request: it lives, and the others may take longer."""
        if self._min_tokens_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        for request in self._waiting:
            if not request.timeout.expired():
                request.timeout.reschedule(min(now + request.own_s, request.latest))

    def _limit_s(self, num_tokens: int) -> float:
        return self._timeout_s + (num_tokens / self._min_tokens_per_s if self._min_tokens_per_s else 0.0)

    def _reason(self, num_tokens: int, waited_s: float) -> str:
        if self._min_tokens_per_s is None:
            return f"no answer within {self._timeout_s:g} s"
        return f"no answer within {waited_s:.3g} s ({self._timeout_s:g} s and {num_tokens} tokens at {self._min_tokens_per_s:g} per second)"
