"""`--check`: everything about a run that can be found out without starting it.

The rules of `config.checks`, and what takes reading or asking: the data's first rows, the checkpoints' shapes, the teacher, the
disk. All problems are printed together; what could not be looked at is said too. An estimate of memory is no problem but a figure.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slime_opd.config import Config
from slime_opd.config.check_machine import architecture_flags
from slime_opd.config.checks import CHECKS, notes, problems
from slime_opd.errors import SlimeOPDError
from slime_opd.memory_estimate import GIB, Size, estimates, size_of

_ROWS = 64


@dataclass
class Findings:
    """What was found: problems, what could not be checked and why, what was looked at and is in order, figures, and a table of what differs."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    fine: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """As they are printed, the problems last."""
        yield from (f"ok           {line}" for line in self.fine)
        yield from (f"memory       {line}" for line in self.figures)
        yield from (f"not checked  {line}" for line in self.unchecked)
        yield from (f"differs      {line}" for line in self.differences)
        yield from (f"problem      {line}" for line in self.problems)


def preflight(config: Config, problems_of_words: list[str]) -> Findings:
    """Look at everything, whatever is wrong with the rest."""
    found = Findings([*problems_of_words, *problems(config, CHECKS)])
    found.fine += [f"note: {note}" for note in notes(config)]
    architecture = _json(config.model.hf_checkpoint, "config.json")
    architecture = architecture.get("text_config", architecture)
    tokenizer = _tokenizer(config, found)
    if tokenizer is not None:
        _look_at_data(config, tokenizer, found)
        _ask_teacher(config, tokenizer, found)
    _look_at_checkpoints(config, architecture, found)
    if size := size_of(architecture):
        found.figures += estimates(config, architecture, size)
        _look_at_disk(config, size, found)
    else:
        found.unchecked.append("memory and disk: no size could be read from --hf-checkpoint's config.json")
    return found


def _tokenizer(config: Config, found: Findings) -> Any | None:
    if not (config.model.hf_checkpoint and Path(config.model.hf_checkpoint).is_dir()):
        found.unchecked.append("data and teacher: --hf-checkpoint, whose tokenizer they need, is not there")
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model.hf_checkpoint)
    except (OSError, ValueError) as error:
        found.problems.append(
            f"--hf-checkpoint {config.model.hf_checkpoint}: no tokenizer can be loaded: {_line(error)}"
        )
        return None


def _look_at_data(config: Config, tokenizer: Any, found: Findings) -> None:
    """Render and tokenise the first rows of every file, with the columns that the run reads."""
    from slime_opd.data.source import PromptSource, read_eval_set

    def prompts() -> str:
        data = replace(config.data, prompt_data=_first_rows(config.data.prompt_data))
        source = PromptSource(data, tokenizer, is_sft=config.is_sft, response_key=config.divergence.opd_off_policy_key)
        longest = max(len(prompt.tokens) for prompt in source.take(len(source)))
        return f"--prompt-data {config.data.prompt_data}: first {len(source)} rows, longest prompt {longest} tokens"

    def evaluation(name: str, path: str) -> str:
        rows = read_eval_set(name, _first_rows(path), config.data, config.evaluation, tokenizer)
        return f"--eval-prompt-data {name}: first {len(rows)} rows"

    if config.data.prompt_data and _is_file(config.data.prompt_data):
        _attempt(found, prompts)
    words = config.evaluation.eval_prompt_data
    for name, path in zip(words[::2], words[1::2], strict=False):
        if _is_file(path):
            _attempt(found, lambda name=name, path=path: evaluation(name, path))


def _ask_teacher(config: Config, tokenizer: Any, found: Findings) -> None:
    """Everything that a run asks a teacher's server before its first rollout."""
    if not config.has_sglang_teacher or not config.reward.rm_url:
        return
    from slime_opd.teacher.probe import probe
    from slime_opd.teacher.sglang import make_teacher

    async def ask() -> str:
        hasty = replace(config, opd=replace(config.opd, opd_teacher_retries=0))
        teacher = make_teacher(hasty)
        try:
            return str(await probe(teacher.client, tokenizer, config.model.hf_checkpoint, teacher.wanted.asked))
        finally:
            await teacher.client.aclose()

    _attempt(found, lambda: asyncio.run(ask()))


def _look_at_checkpoints(config: Config, architecture: dict, found: Findings) -> None:
    """The numbers of the architecture as flags, --hf-checkpoint and each checkpoint have them; those that differ, in one table."""
    from slime_opd.megatron.checkpoint import shapes_at

    options = config.checkpoint
    places: dict[str, dict[str, Any]] = {}
    if config.model.megatron_to_hf_mode == "raw":
        places["flags"] = architecture_flags(config)
    places["--hf-checkpoint"] = architecture
    for name, path in (
        ("--load", options.load),
        ("--ref-load", options.ref_load),
        ("--opd-teacher-load", config.opd.opd_teacher_load),
    ):
        if path is None or not Path(path).is_dir() or not architecture:
            continue
        shapes = _attempt(found, lambda path=path: shapes_at(path))
        if not shapes:
            continue
        places[name] = shapes
        differing = [
            f"{key} {shapes[key]} there, {architecture[key]} here"
            for key in shapes
            if architecture.get(key) not in (None, shapes[key])
        ]
        if differing:
            found.problems.append(f"{name} {path} is not of --hf-checkpoint's architecture: {'; '.join(differing)}")
        else:
            found.fine.append(f"{name} {path}: {', '.join(f'{key} {value}' for key, value in shapes.items())}")
    found.differences += _differences(places)


def _differences(places: dict[str, dict[str, Any]]) -> list[str]:
    """A table of the names whose values differ between places, as lines; none where nothing does."""
    names = dict.fromkeys(name for place in places.values() for name in place)
    rows = [[name, *(place.get(name) for place in places.values())] for name in names]
    # A place that says nothing of a name agrees with all.
    rows = [row for row in rows if len({value for value in row[1:] if isinstance(value, int | float | str)}) > 1]
    if not rows:
        return []
    words = [["", *places], *([str("–" if value is None else value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in words]


def _look_at_disk(config: Config, size: Size, found: Findings) -> None:
    """Room for a checkpoint where they are saved."""
    save, options = config.checkpoint.save, config.checkpoint
    if save is None:
        return
    place = next(path for path in (Path(save).absolute(), *Path(save).absolute().parents) if path.exists())
    one = size.total * ((4 if config.training.fp32 else 2) + (0 if options.no_save_optim else 12))
    count = options.keep_checkpoints or max(
        1, (config.rollout.num_rollout or 1) // (options.save_interval or config.rollout.num_rollout or 1)
    )
    free = shutil.disk_usage(place).free
    said = (
        f"--save {save}: {free / GIB:.1f} GiB free, a checkpoint takes about {one / GIB:.1f} and the run keeps {count}"
    )
    if free < one:
        found.problems.append(f"{said}: there is no room for one")
    elif free < one * count:
        found.problems.append(f"{said}: lower the number with --keep-checkpoints, or make room")
    else:
        found.fine.append(said)


def _attempt(found: Findings, look: Callable[[], Any]) -> Any:
    """What `look` gives; a sentence is noted as fine, an error as a problem."""
    try:
        result = look()
    except SlimeOPDError as error:
        found.problems += str(error).splitlines()
        return None
    if isinstance(result, str):
        found.fine.append(result)
    return result


def _first_rows(file: str | None) -> str | None:
    return file if file is None or file.endswith("]") else f"{file}@[0:{_ROWS}]"


def _is_file(file: str) -> bool:
    return Path(file.partition("@[")[0]).is_file()


def _json(directory: str | None, name: str) -> dict:
    try:
        return json.loads((Path(directory or "") / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
