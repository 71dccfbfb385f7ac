"""Options of the SGLang engines, `--sglang-X`, against the installed SGLang's own argument parser."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slime_opd.config.config import Config
from slime_opd.config.options import suggestion

# Options of an engine that a run sets for it, and where the user sets them.
_SET_FOR_ENGINES = {
    "model-path": "use --hf-checkpoint",
    "model": "use --hf-checkpoint",
    "host": "each engine listens where it runs",
    "port": "each engine takes a free one",
    "tp-size": "use --rollout-num-gpus-per-engine",
    "tensor-parallel-size": "use --rollout-num-gpus-per-engine",
    "api-key": "a run makes a key of its own where engines are on several nodes, and keeps it out of logs",
    "admin-api-key": "updates of weights come without one",
    "custom-weight-loader": "weight updates need this package's own",
}

# What SGLang checks only after it has started: the values that can be meant, and their description.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "mem-fraction-static": (lambda value: 0 < value < 1, "a number between 0 and 1"),
    "max-running-requests": (lambda value: value > 0, "a number above 0"),
    "context-length": (lambda value: value > 0, "a number above 0"),
    "random-seed": (lambda value: 0 <= value < 2**32, "a number from 0 to 4294967295"),
}


@dataclass(frozen=True)
class EngineOption:
    """An option as SGLang declares it. `kind` is argparse's `type` where it is one that can be checked here."""

    kind: str | None
    nargs: str | None
    is_switch: bool
    choices: tuple[str, ...]

    def problem(self, values: tuple[str, ...]) -> str | None:
        """`expected …` for values that SGLang's parser refuses; None for those that it takes."""
        if self.is_switch:
            return "expected no value: it is a switch" if values else None
        if self.nargs is None and len(values) != 1:
            return f"expected {self._expected}"
        if self.nargs == "+" and not values:
            return f"expected {self._expected}, one or more"
        if all(self._takes(value) for value in values):
            return None
        return f"expected {self._expected}" + (suggestion(values[0], self.choices) if len(values) == 1 else "")

    def _takes(self, value: str) -> bool:
        if self.choices:
            return value in self.choices
        reader = _READERS.get(self.kind or "")
        try:
            return reader is None or reader(value)
        except (ValueError, RecursionError):
            return False

    @property
    def _expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return {"int": "a whole number", "float": "a number", "json.loads": "JSON"}.get(self.kind or "", "a value")


def _reads_json(text: str) -> bool:
    json.loads(text)
    return True


_READERS: dict[str, Callable[[str], bool]] = {
    "int": lambda text: abs(int(text)) < 2**63,
    "float": lambda text: math.isfinite(float(text)),
    "json.loads": _reads_json,
}


def check_sglang_options(config: Config) -> list[str]:
    """Engine options that the installed SGLang does not have, values that it refuses, and options that a run sets."""
    known = _options_of_sglang() if config.sglang else {}
    problems = []
    for name, values in config.sglang.items():
        flag = f"--sglang-{name}"
        if reason := _SET_FOR_ENGINES.get(name):
            problems.append(f"{flag} is set by this package: {reason}")
        elif known and name not in known:
            hint = suggestion(flag, [f"--sglang-{option}" for option in known])
            problems.append(f"{flag}: the installed SGLang has no --{name}{hint}")
        elif known and (expected := known[name].problem(values) or _out_of_range(name, values)):
            problems.append(
                f"{flag}: found {' '.join(values)!r}, {expected}" if values else f"{flag}: found no value, {expected}"
            )
    return problems


def _out_of_range(name: str, values: tuple[str, ...]) -> str | None:
    if name not in _RANGES or len(values) != 1:
        return None
    holds, expected = _RANGES[name]
    return None if holds(float(values[0])) else f"expected {expected}"


@functools.cache
def _options_of_sglang() -> dict[str, EngineOption]:
    """The installed SGLang's options by name, from its source, as importing takes seconds; {} if not installed."""
    spec = importlib.util.find_spec("sglang")
    file = Path(spec.origin).parent / "srt" / "server_args.py" if spec and spec.origin else None
    if file is None or not file.is_file():
        return {}
    module = ast.parse(file.read_text(encoding="utf-8"))
    constants = {
        target.id: statement.value
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    found = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            option = _declared(node, constants)
            for word in node.args:
                if isinstance(word, ast.Constant) and isinstance(word.value, str) and word.value.startswith("--"):
                    found[word.value.removeprefix("--")] = option
    return found


def _declared(call: ast.Call, constants: dict[str, ast.expr]) -> EngineOption:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    action = ast.unparse(keywords["action"]) if "action" in keywords else ""
    # An action of SGLang's own reads its values as it likes.
    is_known = action in ("", "'store_true'", "'store_false'")
    nargs = keywords.get("nargs")
    choices = keywords.get("choices")
    choices = constants.get(choices.id) if isinstance(choices, ast.Name) else choices
    literal = isinstance(choices, ast.List) and all(isinstance(one, ast.Constant) for one in choices.elts)
    return EngineOption(
        kind=ast.unparse(keywords["type"]) if "type" in keywords and is_known else None,
        nargs=(str(nargs.value) if isinstance(nargs, ast.Constant) else "*")
        if nargs is not None
        else None
        if is_known
        else "*",
        is_switch=action.startswith("'store_"),
        choices=tuple(str(one.value) for one in choices.elts) if literal and is_known else (),
    )
