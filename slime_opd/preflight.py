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
from slime_opd.config.checks import CHECKS, notes, problems
from slime_opd.errors import SlimeOPDError

GIB = 2**30
_ROWS = 64


@dataclass
class Findings:
    """What was found: problems, what could not be checked and why, what was looked at and is in order, and figures."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    fine: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """As they are printed, the problems last."""
        yield from (f"ok           {line}" for line in self.fine)
        yield from (f"memory       {line}" for line in self.figures)
        yield from (f"not checked  {line}" for line in self.unchecked)
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
    if size := parameters(architecture):
        found.figures += memory(config, architecture, size)
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
    """The shapes in each checkpoint against those of --hf-checkpoint."""
    from slime_opd.megatron.checkpoint import shapes_at

    options = config.checkpoint
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
        differing = [
            f"{key} {shapes[key]} there, {architecture[key]} here"
            for key in shapes
            if architecture.get(key) not in (None, shapes[key])
        ]
        if differing:
            found.problems.append(f"{name} {path} is not of --hf-checkpoint's architecture: {'; '.join(differing)}")
        else:
            found.fine.append(f"{name} {path}: {', '.join(f'{key} {value}' for key, value in shapes.items())}")


@dataclass(frozen=True)
class Size:
    """Parameters of a dense model: of one layer, and of one embedding; `tied` shares the second with the output layer."""

    layer: int
    embedding: int
    layers: int
    tied: bool

    @property
    def total(self) -> int:
        return self.layer * self.layers + self.embedding * (1 if self.tied else 2)


def parameters(architecture: dict) -> Size | None:
    """From a Hugging Face config; None for what it does not tell, and for a mixture of experts."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    is_mixture = any(architecture.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    if is_mixture or not all(isinstance(architecture.get(key), int) for key in needed):
        return None
    hidden, layers, heads, ffn, vocabulary = (architecture[key] for key in needed)
    groups, head = architecture.get("num_key_value_heads", heads), architecture.get("head_dim") or hidden // heads
    attention = hidden * head * (heads + 2 * groups) + heads * head * hidden
    return Size(
        attention + 3 * hidden * ffn, vocabulary * hidden, layers, bool(architecture.get("tie_word_embeddings"))
    )


def memory(config: Config, architecture: dict, size: Size) -> list[str]:
    """Bytes per training rank, by what holds them, as lines; a rough figure, of the largest pipeline stage."""
    layout, training = config.parallel, config.training
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    layers = -(-size.layers // pipeline)
    own = (size.layer * layers + size.embedding * (1 if size.tied or pipeline > 1 else 2)) / tensor
    half = not training.fp32
    weights, gradients = (
        own * (2 if half else 4),
        own * (4 if training.accumulate_allreduce_grads_in_fp32 or not half else 2),
    )
    # Adam's two moments, and a copy of the weights in float32 where they are not.
    optimizer = own * (12 if half else 8) / max(1, config.data_parallel_size)
    tokens = training.max_tokens_per_gpu or training.micro_batch_size * (
        config.rollout.rollout_max_response_len or 4096
    )
    hidden, width = architecture["hidden_size"], 2 if half else 4
    kept = layers if layout.recompute_granularity == "full" else layers * 17
    activations = tokens * hidden * width * (kept + 17) / tensor
    # Student's and teacher's log-probs and probabilities of a chunk, in float32.
    logits = 4 * training.log_probs_chunk_size * architecture["vocab_size"] * 4 / tensor
    parts = {
        "weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations, "logits": logits,
    }  # fmt: skip
    if config.has_megatron_teacher and config.opd.opd_teacher_resident:
        parts["teacher"] = weights
    lines = [
        f"{size.total / 1e9:.2f}B parameters; about {sum(parts.values()) / GIB:.1f} GiB on each training rank: "
        + ", ".join(f"{name} {part / GIB:.1f}" for name, part in parts.items())
    ]
    engine = size.total * width / config.cluster.rollout_num_gpus_per_engine
    lines.append(
        f"about {engine / GIB:.1f} GiB of weights on each engine's GPU, beside its cache (--sglang-mem-fraction-static)"
    )
    return lines


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
