"""Parses the command line, and a YAML file of the same options, into a Config.

The command line wins over the file, the file over the defaults. `--sglang-X` goes to the SGLang engines as their `--X`.
Arguments that cannot be parsed are reported together, one line per problem; how options fit together is for `checks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from slime_opd.config import megatron_options, megatron_support, yaml_file
from slime_opd.config.config import Config
from slime_opd.config.help import help_text
from slime_opd.config.options import Option, flag, options_of, stages_of, suggestion
from slime_opd.config.output import INTERRUPTED, print_text, terminal_width
from slime_opd.config.redact import redact_urls
from slime_opd.config.synonyms import synonym_hint
from slime_opd.errors import ConfigError

SGLANG = "sglang-"

# slime reaches its SGLang teacher through this hook. Here that teacher is built in, so the hook is the default.
SLIME_TEACHER_HOOK = "slime.rollout.on_policy_distillation.reward_func"


@dataclass
class Parsed:
    """What was parsed from one source: option values, options of the engines, and problems."""

    values: dict[str, Any] = field(default_factory=dict)
    sglang: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse(argv: list[str]) -> Config:
    """The configuration of a command line, which still has to pass `validate`.

    `--config FILE.yaml` reads the same options from a file first. `--help [GROUP]` prints and raises SystemExit(0).
    Raises ConfigError with one line per argument that cannot be parsed.
    """
    config, problems = parse_all(argv)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def parse_all(argv: list[str]) -> tuple[Config, list[str]]:
    """The configuration of the arguments that can be parsed, and one line for each of the others."""
    options = options_of(Config)
    flags = _split(argv)
    for name, values in flags:
        if name in ("--help", "-h"):
            print_text(help_text(Config, values, terminal_width(sys.stdout)))
            raise SystemExit(0)
    files = [values for name, values in flags if name == "--config"]
    from_file = _read_files(files, options)
    parsed = _read_arguments([(name, values) for name, values in flags if name != "--config"], options)
    config = build({**from_file.values, **parsed.values}, {**from_file.sglang, **parsed.sglang})
    return config, from_file.problems + parsed.problems


def build(values: Mapping[str, Any], sglang: Mapping[str, tuple[str, ...]] | None = None) -> Config:
    """A Config of typed option values by field name; the rest keep their defaults."""
    if values.get("custom_rm_path") == SLIME_TEACHER_HOOK:
        values = {**values, "custom_rm_path": None}
    options = options_of(Config)
    stages = {
        stage: stage_class(**{name: value for name, value in values.items() if options[name].stage == stage})
        for stage, stage_class in stages_of(Config).items()
    }
    return Config(**stages, sglang=dict(sglang or {}))


def command_line(main: Callable[[list[str]], object]) -> NoReturn:
    """Run `main` on this process's command-line arguments and exit.

    A ConfigError goes to stderr, one `slime_opd: error:` line per problem, and the exit
    code is 2; Ctrl-C ends it with 130. A program that wants `--help` to be fast imports what is heavy inside
    `main`, after it has parsed and validated.
    """
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        for line in redact_urls(str(error)).splitlines():
            print(f"slime_opd: error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("slime_opd: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(0)


def _split(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag with its values; values before the first flag come under ''."""
    flags: list[tuple[str, list[str]]] = [("", [])]
    for argument in argv:
        if argument == "-h" or argument.startswith("--"):
            name, equals, value = argument.partition("=")
            flags.append((name, [value] if equals else []))
        else:
            flags[-1][1].append(argument)
    return flags


def _read_arguments(flags: list[tuple[str, list[str]]], options: Mapping[str, Option]) -> Parsed:
    parsed = Parsed()
    by_flag = {option.flag: option for option in options.values()}
    names = set(options)
    for name, values in flags:
        if name not in by_flag and (alias := megatron_options.resolve_alias(name, names)):
            field_name, implied = alias
            if values and implied is not None:
                parsed.problems.append(f"{name}: found {' '.join(values)!r}, expected no value: it is a switch")
                continue
            name, values = options[field_name].flag, values if implied is None else [implied]
        if name == "":
            if values:
                parsed.problems.append(f"found {values[0]!r} before any flag, expected flags that start with --")
        elif option := by_flag.get(name):
            try:
                parsed.values[option.name] = _value(option, values)
            except ValueError as error:
                parsed.problems.append(str(error))
        elif name.removeprefix("--").startswith(SGLANG):
            parsed.sglang[name.removeprefix("--" + SGLANG)] = tuple(values)
        elif reason := megatron_support.MANAGED.get(name.removeprefix("--").replace("-", "_")):
            parsed.problems.append(f"{name} is set by this package: {reason}")
        elif reason := megatron_options.REFUSED.get(name):
            parsed.problems.append(f"{name} is not supported: {reason}")
        else:
            known = [*by_flag, *megatron_options.NAMES, "--config", "--help", "--check"]
            parsed.problems.append(f"{name}: unknown flag{synonym_hint(name) or suggestion(name, known)}")
    return parsed


def _value(option: Option, arguments: list[str]) -> Any:
    """The typed value of a flag's arguments. Raises ValueError with the sentence to print."""
    if option.is_switch and not arguments:
        return True
    text = " ".join(arguments)
    if option.is_switch and text not in ("true", "false"):
        raise ValueError(f"{option.flag}: found {text!r}, expected no value, true or false: it is a switch")
    if not arguments:
        raise ValueError(f"{option.flag}: found no value, expected {option.expected}")
    if len(arguments) > 1 and not option.many:
        raise ValueError(f"{option.flag}: found {len(arguments)} values {arguments}, expected {option.expected}")
    values = []
    for argument in arguments:
        try:
            values.append(option.parse(argument))
        except ValueError:
            hint = suggestion(argument, option.choices)
            expected = option.expected_instead_of(argument)
            raise ValueError(f"{option.flag}: found {argument!r}, expected {expected}{hint}") from None
    return tuple(values) if option.many else values[0]


def _read_files(files: list[list[str]], options: Mapping[str, Option]) -> Parsed:
    if not files:
        return Parsed()
    if len(files) > 1 or len(files[0]) != 1:
        found = " ".join(value for values in files for value in values) or "no value"
        return Parsed(problems=[f"--config: found {found!r}, expected one YAML file"])
    parsed = Parsed()
    try:
        entries = yaml_file.read(files[0][0])
    except ConfigError as error:
        return Parsed(problems=[str(error)])
    seen: dict[str, int] = {}
    for entry in entries:
        name = entry.key.replace("-", "_")
        if name in seen:
            parsed.problems.append(f"{entry.where}: {entry.key!r} is also on line {seen[name]}, expected it once")
        seen[name] = entry.line
        _read_entry(entry, name, options, parsed)
    return parsed


def _read_entry(entry: yaml_file.Entry, name: str, options: Mapping[str, Option], parsed: Parsed) -> None:
    option = options.get(name)
    try:
        if option is not None:
            parsed.values[name] = yaml_file.value_of(option, entry)
        elif name.startswith(SGLANG.replace("-", "_")):
            values = yaml_file.engine_values(entry)
            if values is not None:
                parsed.sglang[name.removeprefix(SGLANG.replace("-", "_")).replace("_", "-")] = values
        else:
            parsed.problems.append(
                f"{entry.where}: unknown option {entry.key!r}{synonym_hint(flag(name)) or suggestion(name, options)}"
            )
    except ValueError as error:
        parsed.problems.append(str(error))
