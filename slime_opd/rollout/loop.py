"""Asyncio for a driver that is not async: one event loop in a background thread, and many coroutines at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")

_SIGNAL_CHECK_S = 1.0


class BackgroundLoop:
    """An event loop in a background thread: `run` waits for a coroutine, `submit` does not.

    An exception in a coroutine is raised where its result is read. As a context manager it closes itself, which cancels
    the coroutines that still run. `check` is called every second while `run` waits, and ends the wait by raising.
    """

    def __init__(self, name: str = "rollout-loop", check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name=name, daemon=True)
        self._thread.start()
        started.result()

    async def _serve(self, started: concurrent.futures.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        started.set_result(None)
        # When this returns, asyncio.run cancels the tasks that are left and waits for them.
        await self._closing.wait()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        """Start `coroutine`. Cancelling the future cancels it."""
        if not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError("the background loop is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The result of `coroutine`. An interrupt while waiting (Ctrl-C), or what `check` raises, cancels it."""
        future = self.submit(coroutine)
        try:
            # In slices: Python notices a signal that comes just before a wait only when the wait ends.
            while not concurrent.futures.wait([future], timeout=_SIGNAL_CHECK_S).done:
                self._check()
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what still runs, wait until it has ended, and stop the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    def __enter__(self) -> BackgroundLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def gather(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order. The first error cancels the others, waits for them, and is raised alone."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
