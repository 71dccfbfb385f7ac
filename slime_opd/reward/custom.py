"""A reward of the user's own: `--custom-rm-path MODULE.FUNCTION`."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from slime_opd.errors import ConfigError
from slime_opd.types import Sample


class CustomReward:
    """Calls `MODULE.FUNCTION(sample) -> float`; one that is not async runs in a thread."""

    def __init__(self, path: str) -> None:
        """Import the function. Raises ConfigError where it cannot be had."""
        self.name = path
        self._function = _imported(path)

    async def __call__(self, sample: Sample) -> float:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(sample)
        value = await asyncio.to_thread(self._function, sample)
        return await value if inspect.isawaitable(value) else value

    def close(self) -> None:
        """Nothing to end."""


def _imported(path: str) -> Callable[[Sample], Any]:
    module_name, _, function_name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"--custom-rm-path {path}: expected MODULE.FUNCTION")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"--custom-rm-path {path}: cannot import {module_name} ({error}); is it on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"--custom-rm-path {path}: {module_name} has no function {function_name!r}")
    return function
