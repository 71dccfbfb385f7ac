"""Reads options from a YAML file, and writes a Config as one.

A file is one flat mapping from option names (dashes or underscores) to values; a switch is true or false, null is
"unset", and `sglang-X` is an option of the engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from slime_opd.config.config import Config
from slime_opd.config.options import Option, options_of, stages_of
from slime_opd.config.redact import redacted
from slime_opd.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One `key: value` of a file."""

    file: str
    line: int
    key: str
    value: Any

    @property
    def where(self) -> str:
        """The entry's file and line, for messages."""
        return f"{self.file}:{self.line}"


def read(file: str) -> list[Entry]:
    """The entries of a YAML mapping, in order. Raises ConfigError for anything else."""
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"--config {file}: found a {root.id}, expected a mapping of option names to values")
        loader = yaml.SafeLoader("")
        return [
            Entry(file, key.start_mark.line + 1, str(key.value), loader.construct_object(value, deep=True))
            for key, value in root.value
        ]
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {file}: not UTF-8 text, at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml(file, text, error)) from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # a date that is none, or brackets without end
        raise ConfigError(f"--config {file}: not YAML that can be read: {' '.join(str(error).split())}") from None


def _not_yaml(file: str, text: str, error: yaml.YAMLError) -> str:
    """Where a file stops being YAML, and why."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"--config {file}: not YAML: {' '.join(str(error).split())}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if line[mark.column : mark.column + 1] == "\t":
        return f"{file}:{mark.line + 1}: found a tab, expected spaces: YAML takes no tabs before a key or a value"
    reason = getattr(error, "problem", None) or "it cannot be read"
    return f"{file}:{mark.line + 1}: not YAML: {' '.join(reason.split())}"


def value_of(option: Option, entry: Entry) -> Any:
    """The entry as a typed value of `option`. Raises ValueError with the sentence to print."""
    if entry.value is None and option.optional:
        return None
    if not option.many:
        return _one(option, entry, entry.value)
    values = entry.value if isinstance(entry.value, list) else [entry.value]
    return tuple(_one(option, entry, value) for value in values)


def _one(option: Option, entry: Entry, value: Any) -> Any:
    # YAML 1.1 reads 1e-6 as a string, so values are parsed as on a command line.
    is_scalar = isinstance(value, str | int | float) and isinstance(value, bool) == option.is_switch
    try:
        if is_scalar:
            return option.parse(str(value).lower() if isinstance(value, bool) else str(value))
    except ValueError:
        pass
    expected = option.expected_instead_of(str(value)) if is_scalar else option.expected
    raise ValueError(f"{entry.where}: {entry.key}: found {_shown(value)}, expected {expected}") from None


def _shown(value: Any) -> str:
    """A value of a file, as a file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int | float) else repr(value)


def engine_values(entry: Entry) -> tuple[str, ...] | None:
    """The values of an engine option: () for true; None, not given, for false or null."""
    if entry.value is True:
        return ()
    if entry.value is False or entry.value is None:
        return None
    values = entry.value if isinstance(entry.value, list) else [entry.value]
    if any(isinstance(value, dict | list) for value in values):
        raise ValueError(f"{entry.where}: {entry.key}: found {entry.value!r}, expected a value or a list of values")
    return tuple(str(value) for value in values)


def to_yaml(config: Config) -> str:
    """Every option with its value, by stage. `--config` of this text gives an equal Config, except for its secrets."""
    options, config = options_of(Config).values(), redacted(config)
    parts = []
    for stage, stage_class in stages_of(Config).items():
        values = {option.name: option.read(config) for option in options if option.stage == stage}
        if stage == "megatron":
            # There are hundreds; those that are not set are Megatron's defaults.
            values = {name: value for name, value in values.items() if value not in (None, ())}
        if values:
            parts.append(f"# {(stage_class.__doc__ or stage).splitlines()[0]}\n{_dump(values)}")
    if config.sglang:
        engines = {f"sglang-{name}": values or True for name, values in config.sglang.items()}
        parts.append(f"# Options of the SGLang engines\n{_dump(engines)}")
    return "\n".join(parts)


def _dump(values: dict[str, Any]) -> str:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, width=10**6, default_flow_style=False)
