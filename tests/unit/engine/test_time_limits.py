"""Time limits of requests that a server answers one after another, on a loop whose clock is set by hand."""

from __future__ import annotations

import asyncio
import selectors

import pytest

from slime_opd.engine.protocol import num_input_tokens
from slime_opd.engine.time_limits import TimeLimits


class _NoWaiting(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the loop's clock to it."""

    skipped = 0.0

    def select(self, timeout=None):
        self.skipped += timeout or 0.0
        return super().select(0)


class ScriptedLoop(asyncio.SelectorEventLoop):
    """A loop in which waiting takes no time."""

    def __init__(self) -> None:
        self._scripted = _NoWaiting()
        super().__init__(self._scripted)

    def time(self) -> float:
        return self._scripted.skipped


def run(main):
    with asyncio.Runner(loop_factory=ScriptedLoop) as runner:
        return runner.run(main)


async def ended_at(limits: TimeLimits, num_tokens: int, answered_after: float = 1e9) -> tuple[float, str]:
    """When a request that the server answers after so many seconds ended, and why."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with limits.request(num_tokens):
            await asyncio.sleep(answered_after)
    except TimeoutError as error:
        return loop.time() - started, str(error)
    limits.note_answer()
    return loop.time() - started, "answered"


def test_without_a_speed_the_limit_is_that_of_each_request():
    async def main():
        limits = TimeLimits(30.0)
        return await asyncio.gather(ended_at(limits, 10**6), ended_at(limits, 1, answered_after=20.0))

    (hung, reason), (answered, _) = run(main())
    assert hung == pytest.approx(30) and answered == pytest.approx(20)
    assert reason == "no answer within 30 s"


def test_a_long_queue_is_waited_for_while_the_server_answers():
    """64 responses of 16,000 tokens, one answered every 8 s, as by a server that reads 2,000 tokens per second."""

    async def main(min_tokens_per_s):
        limits = TimeLimits(30.0, min_tokens_per_s)
        return await asyncio.gather(*(ended_at(limits, 16_000, 8.0 * (1 + index)) for index in range(64)))

    assert {why for _, why in run(main(1000.0))} == {"answered"}
    # One limit for each request by itself gives up on nearly all of them.
    assert [why for _, why in run(main(None))].count("answered") == 3


def test_a_server_that_hangs_is_noticed_after_the_silence_and_the_tokens_of_one_request():
    async def main():
        limits = TimeLimits(30.0, 1000.0)
        hung = [ended_at(limits, 16_000) for _ in range(63)]
        return await asyncio.gather(ended_at(limits, 16_000, answered_after=8.0), *hung)

    (first, _), *hung = run(main())
    assert first == pytest.approx(8)
    assert [seconds for seconds, _ in hung] == pytest.approx([8 + 30 + 16] * 63)
    assert hung[0][1] == "no answer within 54 s (30 s and 16000 tokens at 1000 per second)"


def test_a_lost_request_ends_although_others_are_answered():
    async def main():
        limits = TimeLimits(30.0, 1000.0)

        async def others():
            while True:
                await ended_at(limits, 1000, answered_after=1.0)

        busy = asyncio.ensure_future(others())
        await asyncio.sleep(0.5)
        ended = await ended_at(limits, 5000)
        busy.cancel()
        return ended

    seconds, _ = run(main())
    # Its own tokens, and those of the one request that was in flight.
    assert seconds == pytest.approx(30 + 5 + 1)


def test_requests_that_have_ended_are_no_longer_counted():
    async def main():
        limits = TimeLimits(1.0, 1000.0)
        for _ in range(3):
            await ended_at(limits, 10**6, answered_after=0.5)
            await ended_at(limits, 10**6)
        lost, _ = await asyncio.gather(ended_at(limits, 0), ended_at(limits, 0, answered_after=0.5))
        return lost

    # With no token in flight an answer gives no more time.
    assert run(main())[0] == pytest.approx(1.0)


@pytest.mark.parametrize(("ids", "expected"), [([1, 2, 3], 3), ([[1, 2], [3]], 3), ([], 0)])
def test_the_tokens_of_a_request_are_those_of_all_its_sequences(ids, expected):
    assert num_input_tokens({"input_ids": ids}) == expected
    assert num_input_tokens({"text": "a"}) == 0
