"""Words to Config: the command line, and a YAML file of the same options.

The command line wins over the file, the file over the defaults. `--sglang-X` words that
are not options of this package go to the SGLang engines as their `--X`. What is wrong
with the words is reported together, one line per problem; what is wrong with their
combination is for `checks`.
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

# slime reaches its SGLang teacher through this hook. Here that teacher is built in, so the words
# that ask for it mean what the default already does.
SLIME_TEACHER_HOOK = "slime.rollout.on_policy_distillation.reward_func"


@dataclass
class Given:
    """What one source says: option values, options of the engines, and what is wrong with it."""

    values: dict[str, Any] = field(default_factory=dict)
    sglang: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse(argv: list[str]) -> Config:
    """The configuration that the words of a command line describe.

    `--config FILE.yaml` reads the same options from a file first. `--help [GROUP]` prints
    and leaves with SystemExit(0). Raises ConfigError with one line per wrong word. The
    result still has to pass `validate`.
    """
    config, problems = parse_all(argv)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def parse_all(argv: list[str]) -> tuple[Config, list[str]]:
    """The configuration that the words which can be read describe, and one line per word that cannot."""
    options = options_of(Config)
    flags = _split(argv)
    for name, words in flags:
        if name in ("--help", "-h"):
            print_text(help_text(Config, words, terminal_width(sys.stdout)))
            raise SystemExit(0)
    files = [words for name, words in flags if name == "--config"]
    from_file = _read_files(files, options)
    given = _read_words([(name, words) for name, words in flags if name != "--config"], options)
    config = build({**from_file.values, **given.values}, {**from_file.sglang, **given.sglang})
    return config, from_file.problems + given.problems


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
    """Run `main` on the words of this process's command line and leave the process.

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
    """Each flag with the words up to the next one; words before the first come under ''."""
    flags: list[tuple[str, list[str]]] = [("", [])]
    for word in argv:
        if word == "-h" or word.startswith("--"):
            name, equals, value = word.partition("=")
            flags.append((name, [value] if equals else []))
        else:
            flags[-1][1].append(word)
    return flags


def _read_words(flags: list[tuple[str, list[str]]], options: Mapping[str, Option]) -> Given:
    given = Given()
    by_flag = {option.flag: option for option in options.values()}
    names = set(options)
    for name, words in flags:
        if name not in by_flag and (meant := megatron_options.spelled(name, names)):
            field_name, word = meant
            if words and word is not None:
                given.problems.append(f"{name}: found {' '.join(words)!r}, expected no value: it is a switch")
                continue
            name, words = options[field_name].flag, words if word is None else [word]
        if name == "":
            if words:
                given.problems.append(f"found {words[0]!r} before any flag, expected flags that start with --")
        elif option := by_flag.get(name):
            try:
                given.values[option.name] = _value(option, words)
            except ValueError as error:
                given.problems.append(str(error))
        elif name.removeprefix("--").startswith(SGLANG):
            given.sglang[name.removeprefix("--" + SGLANG)] = tuple(words)
        elif reason := megatron_support.MANAGED.get(name.removeprefix("--").replace("-", "_")):
            given.problems.append(f"{name} is set by this package: {reason}")
        elif reason := megatron_options.REFUSED.get(name):
            given.problems.append(f"{name} is not supported: {reason}")
        else:
            known = [*by_flag, *megatron_options.NAMES, "--config", "--help", "--check"]
            given.problems.append(f"{name}: unknown flag{synonym_hint(name) or suggestion(name, known)}")
    return given


def _value(option: Option, words: list[str]) -> Any:
    """The typed value of a flag's words. Raises ValueError with the sentence to print."""
    if option.is_switch and not words:
        return True
    if option.is_switch and (len(words) > 1 or words[0] not in ("true", "false")):
        raise ValueError(f"{option.flag}: found {' '.join(words)!r}, expected no value, true or false: it is a switch")
    if not words:
        raise ValueError(f"{option.flag}: found no value, expected {option.expected}")
    if len(words) > 1 and not option.many:
        raise ValueError(f"{option.flag}: found {len(words)} values {words}, expected {option.expected}")
    values = []
    for word in words:
        try:
            values.append(option.value_of(word))
        except ValueError:
            hint = suggestion(word, option.choices)
            raise ValueError(
                f"{option.flag}: found {word!r}, expected {option.expected_instead_of(word)}{hint}"
            ) from None
    return tuple(values) if option.many else values[0]


def _read_files(files: list[list[str]], options: Mapping[str, Option]) -> Given:
    if not files:
        return Given()
    if len(files) > 1 or len(files[0]) != 1:
        found = " ".join(word for words in files for word in words) or "no value"
        return Given(problems=[f"--config: found {found!r}, expected one YAML file"])
    given = Given()
    try:
        entries = yaml_file.read(files[0][0])
    except ConfigError as error:
        return Given(problems=[str(error)])
    seen: dict[str, int] = {}
    for entry in entries:
        name = entry.key.replace("-", "_")
        if name in seen:
            given.problems.append(f"{entry.where}: {entry.key!r} is also on line {seen[name]}, expected it once")
        seen[name] = entry.line
        _read_entry(entry, name, options, given)
    return given


def _read_entry(entry: yaml_file.Entry, name: str, options: Mapping[str, Option], given: Given) -> None:
    option = options.get(name)
    try:
        if option is not None:
            given.values[name] = yaml_file.value_of(option, entry)
        elif name.startswith(SGLANG.replace("-", "_")):
            words = yaml_file.words_of(entry)
            if words is not None:
                given.sglang[name.removeprefix(SGLANG.replace("-", "_")).replace("_", "-")] = words
        else:
            given.problems.append(
                f"{entry.where}: unknown option {entry.key!r}{synonym_hint(flag(name)) or suggestion(name, options)}"
            )
    except ValueError as error:
        given.problems.append(str(error))
