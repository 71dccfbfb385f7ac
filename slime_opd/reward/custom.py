"""A user's reward function: `--custom-rm-path MODULE.FUNCTION`."""

from __future__ import annotations

import asyncio
import inspect

from slime_opd.config import Config
from slime_opd.hooks import load_hook
from slime_opd.types import Sample

OPTION = "--custom-rm-path"


class CustomReward:
    """Calls `function(sample)`, or slime's `function(args, sample)`. A function that is not async runs in a thread."""

    def __init__(self, path: str, config: Config) -> None:
        """Import the function. Raises ConfigError if it cannot be imported or takes other arguments."""
        self.name = path
        hook = load_hook(OPTION, path, "sample")
        self._is_async = inspect.iscoroutinefunction(hook.function)
        self._function = hook.bind(config)

    async def __call__(self, sample: Sample) -> float:
        if self._is_async:
            return await self._function(sample)
        value = await asyncio.to_thread(self._function, sample)
        return await value if inspect.isawaitable(value) else value

    def close(self) -> None:
        """Nothing to end."""
