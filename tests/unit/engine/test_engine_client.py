"""The client against transports that fail in every way a server can."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from slime_opd.engine.address import Address
from slime_opd.engine.body import body_limit
from slime_opd.engine.client import EngineClient, exponential_backoff
from slime_opd.engine.protocol import SamplingParams
from slime_opd.engine.retry_after import MAX_WAIT_S, retry_after_s
from slime_opd.errors import ConfigError, EngineError, EngineTimeout

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
        headers = {name: value for name, value in response.headers.items() if name == "retry-after"}
        return httpx.Response(response.status_code, headers=headers, content=response.content)

    return answer, seen


OK = httpx.Response(200, json=generation())


def test_a_generation_request_has_token_ids():
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
def test_transient_failures_are_retried(failure):
    answer, seen = answers(failure, failure, OK)
    assert run(answer, lambda client: client.generate((5,), SAMPLING)).token_ids == (7, 1)
    assert len(seen) == 3


def test_the_error_of_the_last_attempt_is_raised():
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
        return await asyncio.gather(*(client.generate((5,), SAMPLING) for _ in range(42)))

    # Forty-two requests, three at a time, take fourteen times 0.05 s: more than the limit of each.
    results = run(slow, many, concurrency=3, timeout_s=0.6, retries=0)
    assert len(results) == 42
    assert most == 3


def test_a_request_that_waits_for_a_retry_frees_its_slot():
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


def test_health_raises_unless_the_server_is_healthy():
    answer, seen = answers(httpx.Response(200))
    run(answer, lambda client: client.health())
    assert seen[0].url.path == "/health"
    answer, _ = answers(httpx.Response(503))
    with pytest.raises(EngineError, match="503"):
        run(answer, lambda client: client.health(), retries=0)


def waits_after(*responses: httpx.Response, retries: int = 3, timeout_s: float = 100.0) -> list[float]:
    """What a client sleeps between its attempts; its own backoff is 1 s."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    answer, _ = answers(*responses)
    run(
        answer,
        lambda client: client.generate((5,), SAMPLING),
        sleep=sleep, backoff_s=lambda attempt: 1.0, retries=retries, timeout_s=timeout_s,
    )  # fmt: skip
    return waits


@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_is_retry_after_plus_backoff(status):
    assert waits_after(httpx.Response(status, headers={"Retry-After": "7"}), httpx.Response(500), OK) == [8.0, 1.0]


def test_retry_after_is_bounded_per_attempt_and_per_request():
    long = httpx.Response(503, headers={"Retry-After": "86400"})
    assert waits_after(long, OK) == [61.0]
    # Three retries of 30 s each are 90 s of patience.
    assert waits_after(long, long, long, OK, timeout_s=30.0) == [61.0, 31.0, 1.0]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        (" 12 ", 12.0),
        ("120", MAX_WAIT_S),
        ("9" * 5000, MAX_WAIT_S),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", MAX_WAIT_S),
        ("-5", None),
        ("1.5", None),
        ("١٢", None),
        ("soon", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert retry_after_s(header, now=1445412480.0) == seconds  # 2015-10-21 07:28:00 GMT


def test_a_redirect_is_not_followed():
    answer, seen = answers(httpx.Response(302, headers={"location": "http://elsewhere/"}), OK)
    with pytest.raises(EngineError, match="HTTP 302"):
        run(answer, lambda client: client.generate((5,), SAMPLING))
    assert len(seen) == 1


class Endless(httpx.AsyncByteStream):
    """A body that does not end; `read` counts what was taken of it."""

    read = 0

    async def __aiter__(self):
        while True:
            self.read += 1 << 20
            yield b" " * (1 << 20)


def test_a_body_is_read_up_to_what_the_request_can_return():
    body = Endless()

    async def answer(request):
        return httpx.Response(200, stream=body)

    with pytest.raises(EngineError, match=r"more than 4,194,688 bytes"):
        run(answer, lambda client: client.score((1, 2, 3), 2))
    assert body.read <= (5 << 20)


def test_a_longer_request_may_have_a_longer_body():
    tokens = list(range(100_000))
    rows = [[None if i == 0 else -12.345678901234567, i, None] for i in tokens]
    content = json.dumps({"meta_info": {"input_token_logprobs": rows}}, indent=1).encode()
    assert len(content) > body_limit(0)
    answer, _ = answers(httpx.Response(200, content=content))
    assert len(run(answer, lambda client: client.score(tokens, 1))) == 99_999


def test_a_body_that_is_announced_as_too_long_is_not_read():
    body = Endless()

    async def answer(request):
        return httpx.Response(200, headers={"content-length": str(10**12)}, stream=body)

    with pytest.raises(EngineError, match="more than"):
        run(answer, lambda client: client.score((1, 2, 3), 2))
    assert body.read == 0


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, gzip"])
def test_a_compressed_answer_is_not_requested_and_not_decompressed(encoding):
    seen, body = [], Endless()

    async def answer(request):
        seen.append(request)
        return httpx.Response(200, headers={"content-encoding": encoding}, stream=body)

    with pytest.raises(EngineError, match=f"compressed .content-encoding '{encoding}'"):
        run(answer, lambda client: client.score((1, 2, 3), 2))
    assert seen[0].headers["accept-encoding"] == "identity"
    assert body.read == 0 and len(seen) == 1


def test_a_compressed_error_page_of_a_busy_server_is_retried():
    async def answer(request):
        if seen.append(request) or len(seen) == 1:
            return httpx.Response(503, headers={"content-encoding": "gzip"}, stream=Endless())
        return httpx.Response(200, json=generation())

    seen = []
    assert run(answer, lambda client: client.generate((5,), SAMPLING)).token_ids == (7, 1)


def authorization_of(url: str, api_key: str | None = None) -> tuple[str | None, str]:
    """The Authorization header that a server at `url` sees, and what the client says when it fails."""
    seen = []

    async def main():
        async def answer(request):
            seen.append(request)
            return httpx.Response(404, text="nothing here")

        transport = httpx.MockTransport(answer)
        client = EngineClient(url, concurrency=1, timeout_s=5, retries=0, api_key=api_key, transport=transport)
        with pytest.raises(EngineError) as caught:
            await client.score((1, 2, 3), 2)
        assert "hunter" not in client.url
        return str(caught.value)

    message = asyncio.run(main())
    assert str(seen[0].url) == "http://h:1/v/generate"  # the user info is in a header alone
    return seen[0].headers.get("authorization"), message


def test_credentials_are_sent_and_never_shown():
    basic = "Basic " + base64.b64encode(b"me:hunter@2").decode()
    assert authorization_of("http://me:hunter%402@h:1/v/") == (
        basic,
        "http://***@h:1/v/generate: HTTP 404: nothing here",
    )
    assert authorization_of("http://h:1/v", "hunter")[0] == "Bearer hunter"
    assert authorization_of("http://h:1/v")[0] is None
    with pytest.raises(ConfigError, match=r"^http://\*\*\*@h:1 has a user and password, and an API key"):
        EngineClient("http://me:hunter@h:1", concurrency=1, timeout_s=1, retries=0, api_key="hunter")
    assert "hunter" not in repr(Address.parse("http://me:hunter@h:1"))
