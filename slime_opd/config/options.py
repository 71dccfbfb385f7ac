"""How an option is declared: a dataclass field, with everything that is known about the option beside it.

The flag is the field's name with dashes; its type is the field's annotation; a bool is a switch. The parser, the YAML
reader, `--help`, docs/flags.md, the checks of single options and the rules for resumed runs read these declarations.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from slime_opd.config.conditions import Condition, flag
from slime_opd.config.ranges import Range
from slime_opd.config.resume import OnResume

# Names of other options that have to be set: whenever the option is given, or for each of its values.
Needs = tuple[str, ...] | Mapping[Any, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is known about an option beside its name, type and default.

    - `help`: one line: what the option does, its unit, and the value that turns it off.
    - `choices`: the values that it accepts; `within`: the numbers that it accepts.
    - `only_with`: conditions without which it has no effect, the outermost first.
    - `needs`: options that must be set where it is given, or where it has a value.
    - `on_resume`: what a resumed run does if it differs from the checkpoint's; None: what its stage declares.
    - `is_path`: a file or directory that other processes open, so a relative path is made absolute.
    - `metavar`: the value's placeholder in `--help`.
    - `aliases`: other flags for it, each with the value that it stands for, or None where it takes a value.
    - `is_implied`: whether a value is what the option means when it is not set; such a value does not count as given.
    """

    help: str
    choices: tuple[str, ...] = ()
    within: Range | None = None
    only_with: tuple[Condition, ...] = ()
    needs: Needs = ()
    on_resume: OnResume | None = None
    is_path: bool = False
    metavar: str | None = None
    aliases: tuple[tuple[str, str | None], ...] = ()
    is_implied: Callable[[Any], bool] | None = None


def option(default: Any = MISSING, **declaration: Any) -> Any:
    """A dataclass field that is also a command-line option; keywords are the fields of `Declaration`."""
    return field(default=default, metadata={"declaration": Declaration(**declaration)})


@dataclass(frozen=True)
class Option:
    """One declared option: field `name` of the stage that Config calls `stage`.

    `kind` is the type of one value; `optional` says that it may be unset (None), `many` that it is a tuple of values.
    `stage_only_with` are the conditions of the whole stage.
    """

    stage: str
    name: str
    kind: type
    optional: bool
    many: bool
    default: Any
    on_resume: OnResume
    stage_only_with: tuple[Condition, ...]
    declaration: Declaration

    @property
    def help(self) -> str:
        """One line: what the option does."""
        return self.declaration.help

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it accepts; empty for any of its type."""
        return self.declaration.choices

    @property
    def flag(self) -> str:
        """The option as it is written on a command line."""
        return flag(self.name)

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.kind is bool

    def is_given(self, config: Any) -> bool:
        """Whether a Config sets the option to anything but what it means when it is not set."""
        value, is_implied = self.read(config), self.declaration.is_implied
        return value != self.default and not (is_implied is not None and is_implied(value))

    def unmet_condition(self, config: Any) -> Condition | None:
        """The outermost condition without which the option has no effect, if it does not hold."""
        conditions = (*self.stage_only_with, *self.declaration.only_with)
        return next((condition for condition in conditions if not condition.holds(config)), None)

    def missing_needs(self, config: Any) -> list[Option]:
        """Options that the option's value in a Config needs and that are not set."""
        needs, options = self.declaration.needs, options_of(type(config))
        names = needs.get(self.read(config), ()) if isinstance(needs, Mapping) else needs
        return [options[name] for name in names if not options[name].read(config)]

    def format_flag(self, value: Any) -> str:
        """The option with a value as on a command line, and another flag for it in parentheses if there is one."""
        values = value if self.many else (value,)
        text = " ".join({"True": "true", "False": "false"}.get(str(one), f"{one}") for one in values)
        aliases = [alias for alias, implied in self.declaration.aliases if implied in (None, text)]
        shown = self.flag if value is True else f"{self.flag} {text}"
        return f"{shown} ({aliases[0]})" if aliases else shown

    @property
    def expected(self) -> str:
        """What one value of this option may be, for messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[self.kind]

    def expected_instead_of(self, text: str) -> str:
        """`expected`, for a text that `parse` refused; if it is a number, the kind of number."""
        try:
            number = self.kind(text) if self.kind in (int, float) and not self.choices else None
        except ValueError:
            number = None
        if number is None:
            return self.expected
        return "a finite number" if self.kind is float else "a whole number of at most 64 bits"

    def read(self, config: Any) -> Any:
        """This option's value in a Config."""
        return getattr(getattr(config, self.stage), self.name)

    def parse(self, text: str) -> Any:
        """One value of this option. Raises ValueError for a text that is none."""
        if self.choices and text not in self.choices:
            raise ValueError(text)
        if self.kind is bool:
            return {"true": True, "false": False}[text] if text in ("true", "false") else _refuse(text)
        value = self.kind(text)
        # Beyond 64 bits no library below can take it.
        is_usable = self.kind is str or (math.isfinite(value) if self.kind is float else abs(value) < 2**63)
        return value if is_usable else _refuse(text)


def _refuse(text: str) -> typing.NoReturn:
    raise ValueError(text)


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
            declaration: Declaration = row.metadata["declaration"]
            on_resume = declaration.on_resume or getattr(stage_class, "on_resume", None)
            if on_resume is None:
                raise TypeError(f"{flag(row.name)} declares no on_resume, and neither does its stage")
            found[row.name] = Option(
                stage=stage,
                name=row.name,
                kind=kind,
                optional=optional,
                many=many,
                default=row.default,
                on_resume=on_resume,
                # The switch that turns a stage on is one of its options.
                stage_only_with=tuple(
                    condition for condition in getattr(stage_class, "only_with", ()) if row.name not in condition.names
                ),
                declaration=declaration,
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
