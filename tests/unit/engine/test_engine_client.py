"""The client against transports that fail in every way a server can."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from slime_opd.engine.client import EngineClient, exponential_backoff
from slime_opd.engine.protocol import SamplingParams
from slime_opd.errors import EngineError, EngineTimeout

SAMPLING = SamplingParams(1.0, 1.0, -1, 4)


def generation(finish: str = "stop") -> dict:
    rows = [[-0.5, 7, None], [-1.5, 1, None]]
    return {"meta_info": {"finish_reason": {"type": finish}, "output_token_logprobs": rows, "weight_version": "3"}}


def run(answer: Callable, call: Callable, **options):
    """The result of `call(client)` on a server that answers each request with `await answer(request)`."""

    async def main():
        options.setdefault("backoff_s", lambda attempt: 0.0)
        settings = {"concurrency": 4, "timeout_s": 5.0, "retries": 3} | options
        client = EngineClient("http://engine:1/", transport=httpx.MockTransport(answer), **settings)
        try:
            return await call(client)
        finally:
            await client.aclose()

    return asyncio.run(main())


def answers(*responses: httpx.Response | Exception):
    """A server that gives `responses` in order, then its last one for ever, and the list of requests it saw."""
    seen: list[httpx.Request] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        response = responses[min(len(seen), len(responses)) - 1]
        if isinstance(response, Exception):
            raise response
        return httpx.Response(response.status_code, content=response.content)

    return answer, seen


OK = httpx.Response(200, json=generation())


def test_a_generation_is_asked_for_by_token_ids():
    answer, seen = answers(OK)
    result = run(answer, lambda client: client.generate((5, 6), SAMPLING))
    assert result.token_ids == (7, 1)
    np.testing.assert_array_equal(result.log_probs, np.float32([-0.5, -1.5]))
    assert (result.finish_reason, result.weight_version) == ("stop", "3")
    assert str(seen[0].url) == "http://engine:1/generate"
    assert json.loads(seen[0].content)["input_ids"] == [5, 6]


@pytest.mark.parametrize(
    "failure",
    [
        httpx.Response(500, text="out of memory"),
        httpx.Response(503),
        httpx.Response(429),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("gone"),
        httpx.Response(200, json=generation("abort")),
    ],
)
def test_what_may_pass_is_tried_again(failure):
    answer, seen = answers(failure, failure, OK)
    assert run(answer, lambda client: client.generate((5,), SAMPLING)).token_ids == (7, 1)
    assert len(seen) == 3


def test_the_last_reason_is_told_when_all_attempts_failed():
    answer, seen = answers(httpx.Response(500, text="out of memory"))
    with pytest.raises(EngineError, match=r"http://engine:1/generate: HTTP 500: out of memory \(attempts: 3\)"):
        run(answer, lambda client: client.generate((5,), SAMPLING), retries=2)
    assert len(seen) == 3


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_final(status):
    answer, seen = answers(httpx.Response(status, text="too long"), OK)
    with pytest.raises(EngineError, match=f"HTTP {status}: too long"):
        run(answer, lambda client: client.generate((5,), SAMPLING))
    assert len(seen) == 1


def test_waits_grow_between_attempts():
    waits = []
    answer, _ = answers(httpx.Response(500))
    with pytest.raises(EngineError):
        run(
            answer,
            lambda client: client.generate((5,), SAMPLING),
            backoff_s=lambda attempt: waits.append(attempt) or 0.0,
        )
    assert waits == [0, 1, 2]
    for attempt, full in [(0, 0.5), (1, 1.0), (3, 4.0), (20, 30.0)]:
        drawn = [exponential_backoff(attempt) for _ in range(50)]
        assert full / 2 <= min(drawn) < max(drawn) <= full


def test_a_server_that_hangs_costs_one_time_limit_per_attempt():
    async def hang(request):
        await asyncio.sleep(60)

    start = time.monotonic()
    with pytest.raises(EngineTimeout, match=r"no answer within 0\.05 s \(attempts: 2\)"):
        run(hang, lambda client: client.generate((5,), SAMPLING), timeout_s=0.05, retries=1)
    assert 0.1 <= time.monotonic() - start < 5


def test_the_time_limit_is_on_the_whole_answer_and_not_on_its_parts():
    class Dripping(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                await asyncio.sleep(0.01)
                yield b" "

    async def drip(request):
        return httpx.Response(200, stream=Dripping())

    with pytest.raises(EngineTimeout):
        run(drip, lambda client: client.generate((5,), SAMPLING), timeout_s=0.1, retries=0)


def test_requests_in_flight_are_bounded_and_waiting_costs_no_time_limit():
    in_flight, most = 0, 0

    async def slow(request):
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.05)
        in_flight -= 1
        return httpx.Response(200, json=generation())

    async def many(client):
        return await asyncio.gather(*(client.generate((5,), SAMPLING) for _ in range(12)))

    # Twelve requests, three at a time, take four times 0.05 s: more than the limit of each.
    results = run(slow, many, concurrency=3, timeout_s=0.15, retries=0)
    assert len(results) == 12
    assert most == 3


def test_an_attempt_that_waits_for_its_turn_again_leaves_its_place_to_others():
    first = True

    async def fail_once(request):
        nonlocal first
        if first:
            first = False
            return httpx.Response(500)
        return httpx.Response(200, json=generation())

    order = []

    async def both(client):
        async def ask(name):
            await client.generate((5,), SAMPLING)
            order.append(name)

        await asyncio.gather(ask("failed first"), ask("second"))

    run(fail_once, both, concurrency=1, backoff_s=lambda attempt: 0.05)
    assert order == ["second", "failed first"]


def test_an_answer_that_is_not_json_is_final():
    answer, seen = answers(httpx.Response(200, text="<html>"))
    with pytest.raises(EngineError, match="not JSON: '<html>'"):
        run(answer, lambda client: client.generate((5,), SAMPLING))
    assert len(seen) == 1


def test_scores_of_other_tokens_are_final_errors():
    rows = [[None, 2, None], [-1.0, 9, None]]
    answer, seen = answers(httpx.Response(200, json={"meta_info": {"input_token_logprobs": rows}}))
    with pytest.raises(EngineError, match="id 9 instead of 3"):
        run(answer, lambda client: client.score((1, 2, 3), 2))
    assert len(seen) == 1


def test_health_is_the_servers_word():
    answer, seen = answers(httpx.Response(200))
    run(answer, lambda client: client.health())
    assert seen[0].url.path == "/health"
    answer, _ = answers(httpx.Response(503))
    with pytest.raises(EngineError, match="503"):
        run(answer, lambda client: client.health(), retries=0)
