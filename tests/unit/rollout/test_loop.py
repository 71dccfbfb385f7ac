"""The background loop: results, errors, concurrency, interrupts and closing."""

import asyncio
import concurrent.futures
import threading

import pytest

from slime_opd.rollout.loop import BackgroundLoop


async def value(result):
    await asyncio.sleep(0)
    return result


async def failing():
    raise KeyError("inside")


@pytest.fixture
def loop():
    with BackgroundLoop() as loop:
        yield loop


def test_run_gives_the_result_and_raises_the_error_of_a_coroutine(loop):
    assert loop.run(value(3)) == 3
    with pytest.raises(KeyError, match="inside"):
        loop.run(failing())
    assert loop.run(value(4)) == 4


def test_everything_runs_on_one_loop_in_a_daemon_thread(loop):
    async def where():
        return asyncio.get_running_loop(), threading.current_thread()

    (first_loop, thread), (second_loop, _) = loop.run(where()), loop.submit(where()).result()
    assert first_loop is second_loop
    assert thread is not threading.current_thread() and thread.daemon


def test_submitted_work_runs_while_the_driver_waits_for_other_work(loop):
    async def make_event():
        return asyncio.Event()

    event = loop.run(make_event())

    async def wait():
        await event.wait()
        return "prefetched"

    async def release():
        event.set()

    future = loop.submit(wait())
    loop.run(release())
    assert future.result(timeout=10) == "prefetched"


def endless(started, ended):
    async def run():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    return run()


def test_closing_cancels_running_coroutines_waits_for_them_and_may_be_repeated():
    loop, started, ended = BackgroundLoop(), threading.Event(), threading.Event()
    future = loop.submit(endless(started, ended))
    assert started.wait(10)
    loop.close()
    assert ended.is_set()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(timeout=10)
    loop.close()
    with pytest.raises(RuntimeError, match="background loop is closed"):
        loop.submit(value(1))


def test_an_interrupt_while_waiting_cancels_the_coroutine_and_leaves_the_loop_usable(monkeypatch):
    started, ended = threading.Event(), threading.Event()

    def interrupted(*_, **__):
        assert started.wait(10)
        raise KeyboardInterrupt

    with BackgroundLoop() as loop:
        monkeypatch.setattr(concurrent.futures, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run(endless(started, ended))
        monkeypatch.undo()
        assert ended.wait(10)
        assert loop.run(value(1)) == 1
