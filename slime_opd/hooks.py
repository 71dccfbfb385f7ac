"""User functions, loaded by `MODULE.FUNCTION`, with the signature of this package or of slime.

Both `f(sample)` and slime's `f(args, sample)` are accepted; the number of required parameters decides. A function with
slime's signature gets samples with slime's attribute names.
"""

from __future__ import annotations

import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slime_opd.config.config import Config
from slime_opd.config.options import flag, options_of
from slime_opd.errors import ConfigError
from slime_opd.types import Sample, Status

_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Hook:
    """A user function, and whether its first parameter is slime's `args`."""

    function: Callable[..., Any]
    takes_args: bool

    def bind(self, config: Config) -> Callable[[Any], Any]:
        """The function of one argument, a sample or a sequence of samples."""
        if not self.takes_args:
            return self.function
        arguments = Arguments(config)
        return lambda about: self.function(arguments, _as_slime(about))


def load_hook(option: str, path: str, about: str) -> Hook:
    """Load the function `path` (MODULE.FUNCTION), the value of the flag `option`, that takes `about` ("sample").

    Raises ConfigError if it cannot be imported or has other parameters.
    """
    function = _import(option, path)
    expected = f"expected ({about}) or slime's (args, {about})"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, without a signature
        return Hook(function, takes_args=False)
    parameters = signature.parameters.values()
    required = [
        row for row in parameters if row.default is row.empty and row.kind not in (row.VAR_POSITIONAL, row.VAR_KEYWORD)
    ]
    positional = [row for row in required if row.kind is not row.KEYWORD_ONLY]
    accepts_one = positional or any(
        row.kind is not row.KEYWORD_ONLY and row.kind is not row.VAR_KEYWORD for row in parameters
    )
    if len(required) > len(positional) or len(positional) > 2 or not accepts_one:
        raise ConfigError(f"{option} {path}: takes {signature}, {expected}")
    if len(positional) == 2 and positional[0].name in ("sample", "samples"):
        raise ConfigError(f"{option} {path}: takes {signature}, {expected}: `args` comes first")
    return Hook(function, takes_args=len(positional) == 2)


def _import(option: str, path: str) -> Callable[..., Any]:
    module_name, _, function_name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{option} {path}: expected MODULE.FUNCTION")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ConfigError(
                f"{option} {path}: cannot import {module_name}: there is no module {error.name}; is its folder on PYTHONPATH?"
            ) from error
        raise ConfigError(
            f"{option} {path}: {module_name} imports {error.name}, which is not installed here"
        ) from error
    except SyntaxError as error:
        raise ConfigError(f"{option} {path}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except SystemExit as error:
        raise ConfigError(
            f"{option} {path}: importing {module_name} calls sys.exit; guard it with `if __name__ == '__main__'`"
        ) from error
    except Exception as error:  # importing a module can raise anything
        raise ConfigError(f"{option} {path}: importing {module_name} raises {described(error)}") from error
    if not hasattr(module, function_name):
        raise ConfigError(f"{option} {path}: {module_name} has no function {function_name!r}")
    function = getattr(module, function_name)
    if not callable(function):
        raise ConfigError(
            f"{option} {path}: {function_name!r} of {module_name} is {function!r:.40}, expected a function"
        )
    return function


def described(error: BaseException) -> str:
    """One line about an exception of user code: its type, its message, and the user's line that raised it."""
    message = " ".join(str(error).split())[:200]
    # The last frame in a file of the user, not in a library that it calls.
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", *_LIBRARIES))] or frames[-1:]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{message and f': {message}'}{where}"


class Arguments:
    """All resolved options in one read-only namespace, as slime passes them: `args.rollout_max_response_len`."""

    def __init__(self, config: Config) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        option = options_of(Config).get(name)
        if option is None or "_config" not in self.__dict__:
            raise AttributeError(f"slime_opd has no option {flag(name)}, so `args` has no {name!r}")
        return option.read(self._config)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"`args` is read-only: {name!r} cannot be set")

    def __dir__(self) -> list[str]:
        return list(options_of(Config))


@dataclass
class SlimeSample:
    """A copy of a sample with slime's attribute names; changes to it do not reach the sample."""

    prompt: str
    response: str
    label: str | None
    metadata: dict[str, Any]
    tokens: list[int]
    response_length: int
    status: Status
    reward: float | None
    group_index: int
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    Status: type[Status] = field(default=Status, repr=False)

    def get_reward_value(self, args: object) -> float | None:
        """The reward; slime's filters call this method."""
        return self.reward


def slime_sample(sample: Sample) -> SlimeSample:
    """Copy `sample` into slime's form."""
    values = {
        name: sample.values[name].tolist() for name in ("loss_mask", "rollout_log_probs") if name in sample.values
    }
    return SlimeSample(
        prompt=sample.prompt.text,
        response=sample.response,
        label=sample.prompt.label,
        metadata=dict(sample.prompt.metadata),
        tokens=list(sample.tokens),
        response_length=sample.response_length,
        status=sample.status,
        reward=sample.reward,
        group_index=sample.prompt.index,
        **values,
    )


def _as_slime(about: Sample | Sequence[Sample]) -> SlimeSample | list[SlimeSample]:
    return slime_sample(about) if isinstance(about, Sample) else [slime_sample(sample) for sample in about]
