"""How an option is declared: a dataclass field with its help beside it.

The flag is the field's name with dashes; its type is the field's annotation; a bool is a
switch. The parser, `--help`, the YAML reader and the printed difference to the defaults
are all made from these declarations, so an option exists in one place.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    nargs: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line option.

    `help` is one line: what it does, its unit, and the value that turns it off.
    `nargs` is argparse's, for options that take several words.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "nargs": nargs}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One declared option: field `name` of the stage that Config calls `stage`.

    `kind` is the type of one value; `optional` says that it may be unset (None), `many`
    that it is a tuple of values.
    """

    stage: str
    name: str
    kind: type
    optional: bool
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    metavar: str | None

    @property
    def flag(self) -> str:
        """The option as it is written on a command line."""
        return flag(self.name)

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.kind is bool

    @property
    def expected(self) -> str:
        """One value of this option, in words, for messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}[self.kind]

    def expected_instead_of(self, word: str) -> str:
        """`expected`, for a word that `value_of` refused; of a number, what kind of number."""
        try:
            number = self.kind(word) if self.kind in (int, float) and not self.choices else None
        except ValueError:
            number = None
        if number is None:
            return self.expected
        return "a finite number" if self.kind is float else "a whole number of at most 64 bits"

    def read(self, config: Any) -> Any:
        """This option's value in a Config."""
        return getattr(getattr(config, self.stage), self.name)

    def value_of(self, word: str) -> Any:
        """`word` as one value of this option. Raises ValueError where it is none."""
        if self.choices and word not in self.choices:
            raise ValueError(word)
        if self.kind is bool:
            return {"true": True, "false": False}[word] if word in ("true", "false") else _refuse(word)
        value = self.kind(word)
        # Beyond 64 bits no library below can take it.
        is_usable = self.kind is str or (math.isfinite(value) if self.kind is float else abs(value) < 2**63)
        return value if is_usable else _refuse(word)


def _refuse(word: str) -> typing.NoReturn:
    raise ValueError(word)


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return "--" + name.replace("_", "-")


@functools.cache
def stages_of(config_class: type) -> Mapping[str, type]:
    """The stage classes of a configuration class, by the field that holds each."""
    hints = typing.get_type_hints(config_class)
    return types.MappingProxyType({name: hint for name, hint in hints.items() if is_dataclass(hint)})


@functools.cache
def options_of(config_class: type) -> Mapping[str, Option]:
    """Every option that the stages of a configuration class declare, by name, in order."""
    found: dict[str, Option] = {}
    for stage, stage_class in stages_of(config_class).items():
        hints = typing.get_type_hints(stage_class)
        for row in fields(stage_class):
            if row.name in found:
                raise TypeError(f"{flag(row.name)} is declared by two stages: {found[row.name].stage} and {stage}")
            kind, optional, many = _read_annotation(hints[row.name])
            found[row.name] = Option(
                stage=stage,
                name=row.name,
                kind=kind,
                optional=optional,
                many=many,
                default=row.default,
                help=row.metadata["help"],
                choices=row.metadata["choices"],
                metavar=row.metadata["metavar"],
            )
    return types.MappingProxyType(found)


def _read_annotation(annotation: Any) -> tuple[type, bool, bool]:
    """(type of one value, may be None, is a tuple) of `X`, `X | None` or `tuple[X, ...]`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return kind, True, False
    if typing.get_origin(annotation) is tuple:
        return arguments[0], False, True
    return annotation, False, False


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the closest of `known`, or nothing."""
    close = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
