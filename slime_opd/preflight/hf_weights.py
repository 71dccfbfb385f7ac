"""The weights of a Hugging Face directory against its own config.json, by the headers of its files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime_opd.checkpoint.safetensors_index import INDEX, read_index
from slime_opd.config.families import family_problem
from slime_opd.config.hf_config import read_hf_config
from slime_opd.errors import CheckpointError
from slime_opd.preflight.family_tensors import expected_tensors, may_be_extra
from slime_opd.preflight.safetensors_header import TensorInfo, printable, read_header

# What PyTorch can make parameters of.
_DTYPES = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
# Rows and columns of a block of fp8 weights that has a scale of its own (DeepSeek-V3).
_FP8_BLOCK = 128

# Problems of one kind are named up to this number.
_NAMED = 3


def weight_problems(directory: Path) -> tuple[list[str], str]:
    """What is wrong with the weights of a Hugging Face directory, and a summary of them.

    Reads config.json, the index and all headers, but no tensor. 40,000 tensors in 120 files take about a second.
    """
    try:
        config = read_hf_config(str(directory))
    except ValueError as error:
        return str(error).splitlines(), ""
    if not config:
        return [f"{directory} has no config.json"], ""
    if problem := family_problem(config.get("model_type")):
        return [problem], ""
    found, problems = _read_files(directory)
    if problems:
        return problems, ""
    try:
        expected = expected_tensors(config)
    except CheckpointError as error:
        return [f"{directory / 'config.json'}: {error}"], ""
    parameters = sum(math.prod(info.shape) for info in found.values())
    dtypes = ", ".join(sorted({info.dtype for info in found.values()}))
    return _differences(found, expected, config), f"{len(found)} tensors, {parameters:,} values in {dtypes}"


def _read_files(directory: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of all files, by name, and what is wrong with the files."""
    index = directory / INDEX
    try:
        weight_map = read_index(directory)
    except CheckpointError as error:
        return {}, [str(error)]
    names = sorted(set(weight_map.values())) if weight_map else sorted(p.name for p in directory.glob("*.safetensors"))
    if not names:
        others = any(directory.glob("*.bin"))
        return {}, [
            f"{directory} has no .safetensors file"
            + (
                ", only .bin: convert it with transformers' save_pretrained(…, safe_serialization=True)"
                if others
                else ""
            )
        ]
    if absent := [name for name in names if not (directory / name).is_file()]:
        return {}, [f"{index} names {_some(absent, 'files')} that {_are(absent)} not there: is the download complete?"]
    found: dict[str, TensorInfo] = {}
    file_of: dict[str, str] = {}
    problems = []
    for name in names:
        try:
            tensors = read_header(directory / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if twice := sorted(set(tensors) & set(found)):
            problems.append(f"{directory}: {_some(twice, 'tensors')} in both {file_of[twice[0]]} and {name}")
        found |= tensors
        file_of |= dict.fromkeys(tensors, name)
    if weight_map and not problems:
        elsewhere = sorted(name for name, file in weight_map.items() if file_of.get(name) != file)
        if elsewhere:
            problems.append(
                f"{index} names {_some(elsewhere, 'tensors')} that the file beside {_it(elsewhere)} does not have"
            )
        if unnamed := sorted(set(found) - set(weight_map)):
            problems.append(f"{index} does not name {_some(unnamed, 'tensors')} that the files have")
    return found, problems


def _differences(
    found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> list[str]:
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(
            f"it lacks {_some(missing, 'weights')} that config.json describes{_why_missing(missing, config)}"
        )
    if extra := [name for name in found if name not in expected and not may_be_extra(name, config)]:
        problems.append(f"it has {_some(extra, 'weights')} that config.json does not describe: is it of these weights?")
    wrong = [name for name, shape in expected.items() if name in found and found[name].shape != shape]
    if wrong:
        details = [f"{name} is {list(found[name].shape)}, expected {list(expected[name])}" for name in wrong[:_NAMED]]
        problems.append(
            f"{len(wrong)} {'weight has' if len(wrong) == 1 else 'weights have'} another shape than config.json describes: {'; '.join(details)}"
        )
    used = {name: found[name] for name in expected if name in found}
    return problems + _dtype_problems(used, found, config)


def _dtype_problems(
    used: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> list[str]:
    in_fp8 = [name for name, info in used.items() if info.dtype in _FP8]
    other = [name for name, info in used.items() if info.dtype not in (*_DTYPES, *_FP8)]
    problems = []
    if other:
        kind = used[other[0]].dtype
        problems.append(f"{_some(other, 'weights')} {_are(other)} in {kind}, expected one of {', '.join(_DTYPES)}")
    if in_fp8 and config["model_type"] != "deepseek_v3":
        problems.append(
            f"{_some(in_fp8, 'weights')} {_are(in_fp8)} in {used[in_fp8[0]].dtype}: weights in fp8 are read for deepseek_v3 alone; take the bf16 checkpoint"
        )
    elif in_fp8:
        unscaled = [name for name in in_fp8 if not _has_scales(name, found)]
        if unscaled:
            problems.append(
                f"{_some(unscaled, 'weights')} in fp8 {_are(unscaled)} without a NAME_scale_inv of one scale for each block of {_FP8_BLOCK} × {_FP8_BLOCK}"
            )
    return problems


def _has_scales(name: str, found: Mapping[str, TensorInfo]) -> bool:
    scales = found.get(f"{name}_scale_inv")
    return scales is not None and scales.shape == tuple(-(-size // _FP8_BLOCK) for size in found[name].shape)


def _why_missing(missing: list[str], config: Mapping[str, Any]) -> str:
    if missing == ["lm_head.weight"]:
        return " (is tie_word_embeddings true for this model?)"
    method = (config.get("quantization_config") or {}).get("quant_method")
    return f" (it is quantised by {printable(method)}, which is not supported)" if method not in (None, "fp8") else ""


def _some(names: list[str], what: str) -> str:
    """`3 weights (a, b, c)`, `1 weight (a)`, `9 weights (a, b, c, …)`."""
    shown = ", ".join(map(printable, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
    return f"{len(names)} {what.removesuffix('s') if len(names) == 1 else what} ({shown})"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"
