"""Rules that look at this machine: files, hooks and installed packages.

Nothing is imported or written, and no file larger than a model's config.json is read.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from importlib.machinery import PathFinder
from pathlib import Path

from slime_opd.config.check_learning import SLIME_FILTER
from slime_opd.config.check_run import model_layout_problems
from slime_opd.config.config import Config
from slime_opd.config.options import flag, suggestion


def check_checkpoints_exist(config: Config) -> list[str]:
    """Model directories that are not there. --load may be absent: training starts afresh."""
    checkpoint, problems = config.checkpoint, []
    directories = {
        "hf_checkpoint": config.model.hf_checkpoint,
        "ref_load": checkpoint.ref_load,
        "opd_teacher_load": config.opd.opd_teacher_load,
    }
    for name, found in directories.items():
        if found is None:
            continue
        if not Path(found).is_dir():
            problems.append(f"{flag(name)}: found no directory {found}, expected one with a checkpoint")
        elif name == "hf_checkpoint" and not (Path(found) / "config.json").is_file():
            problems.append(f"--hf-checkpoint: found no config.json in {found}, expected a Hugging Face checkpoint")
        elif not any(Path(found).iterdir()):
            problems.append(f"{flag(name)}: found the empty directory {found}, expected one with a checkpoint")
    problems += [
        f"{flag(name)}: found the file {found}, expected a directory"
        for name, found in (("load", checkpoint.load), ("save", checkpoint.save))
        if found is not None and Path(found).is_file()
    ]
    return problems


def check_data_exists(config: Config) -> list[str]:
    """Prompt files that are not there; `FILE@[a:b]` is a slice of FILE."""
    files = [("--prompt-data", config.data.prompt_data)]
    files += [("--eval-prompt-data", file) for file in config.evaluation.eval_prompt_data[1::2]]
    return [
        f"{name}: found no file {file}, expected a JSONL or Parquet file"
        for name, found in files
        if found is not None and not Path(file := _without_slice(found)).is_file()
    ]


def _without_slice(file: str) -> str:
    path, slice_mark, _ = file.rpartition("@[")
    return path if slice_mark and file.endswith("]") else file


def check_layout_of_checkpoint(config: Config) -> list[str]:
    """Parallel sizes that do not divide the architecture in --hf-checkpoint (bridge mode)."""
    if config.model.megatron_to_hf_mode != "bridge" or config.model.hf_checkpoint is None:
        return []
    try:
        architecture = _architecture(config)
    except ValueError as error:
        return [str(error)]
    if not architecture:
        return []
    return model_layout_problems(
        config,
        layers=architecture.get("num_hidden_layers"),
        heads=architecture.get("num_attention_heads"),
        groups=architecture.get("num_key_value_heads"),
    )


# Megatron's flags of the architecture, and the keys of a Hugging Face config that say the same.
_SAME = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "rotary_scaling_factor": "rope_scaling.factor",
}


def check_architecture_flags(config: Config) -> list[str]:
    """Flags that describe another model than --hf-checkpoint (raw mode)."""
    if config.model.megatron_to_hf_mode != "raw":
        return []
    try:
        architecture = _architecture(config)
    except ValueError:
        return []  # check_layout_of_checkpoint says so in bridge mode, and the tokenizer's loading here
    architecture = {**architecture.get("rope_parameters", {}), **architecture}
    differing = {
        name: (getattr(config.model, name), architecture[key])
        for name, key in _SAME.items()
        if architecture.get(key) is not None and getattr(config.model, name) not in (None, architecture[key])
    }
    if (
        not config.model.group_query_attention
        and architecture.get("num_key_value_heads") == config.model.num_attention_heads
    ):
        differing.pop("num_query_groups", None)
    scaling = architecture.get("rope_scaling") or {}
    if config.model.use_rope_scaling and scaling.get("factor") not in (None, config.model.rotary_scaling_factor):
        differing["rotary_scaling_factor"] = config.model.rotary_scaling_factor, scaling["factor"]
    file = f"{config.model.hf_checkpoint}/config.json"
    problems = [
        f"{flag(name)}: found {said}, but {file} has {_SAME[name]} {has}: take the MODEL_ARGS of its own model"
        for name, (said, has) in differing.items()
    ]
    return problems + [
        f"{flag(name)} is {'set' if getattr(config.model, name) else 'missing'}, but {file} has {has}: {'drop' if getattr(config.model, name) else 'add'} it"
        for name, wanted, has in _switches(architecture)
        if getattr(config.model, name) != wanted
    ]


def _switches(architecture: dict) -> list[tuple[str, bool, str]]:
    """Megatron's switches that a Hugging Face config decides: name, what it has to be, and what the config has."""
    found, kind = [], architecture.get("model_type")
    if isinstance(tied := architecture.get("tie_word_embeddings"), bool):
        found.append(("untie_embeddings_and_output_weights", not tied, f"tie_word_embeddings {str(tied).lower()}"))
    if kind in ("qwen2", "qwen3", "llama"):
        found.append(
            ("add_qkv_bias", kind == "qwen2" or bool(architecture.get("attention_bias")), f"model_type {kind}")
        )
        found.append(("qk_layernorm", kind == "qwen3", f"model_type {kind}"))
        scaling = architecture.get("rope_scaling") or {}
        rope = scaling.get("rope_type", scaling.get("type", "default"))
        found.append(("use_rope_scaling", rope == "llama3", f"rope_scaling of type {rope}"))
    return found


def check_top_k_of_vocabulary(config: Config) -> list[str]:
    """More tokens of a top-k than there are."""
    try:
        vocabulary = _architecture(config).get("vocab_size")
    except ValueError:
        return []  # check_layout_of_checkpoint says so
    top_k = config.divergence.opd_log_prob_top_k
    if vocabulary is None or top_k <= vocabulary:
        return []
    return [
        f"--opd-log-prob-top-k: found {top_k}, expected at most the vocabulary's {vocabulary} tokens ({config.model.hf_checkpoint}/config.json)"
    ]


def _architecture(config: Config) -> dict:
    """What --hf-checkpoint's config.json says; {} where there is none. Raises ValueError where it is not JSON."""
    file = Path(config.model.hf_checkpoint or "") / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}  # check_checkpoints_exist says so
    except ValueError:
        raise ValueError(f"--hf-checkpoint: {file} is not JSON") from None
    return found.get("text_config", found)


# Options of an engine that a run sets for it, and where the user says them.
_SET_FOR_ENGINES = {
    "model-path": "say --hf-checkpoint",
    "model": "say --hf-checkpoint",
    "host": "each engine listens where it runs",
    "port": "each engine takes a free one",
    "tp-size": "say --rollout-num-gpus-per-engine",
    "tensor-parallel-size": "say --rollout-num-gpus-per-engine",
    "custom-weight-loader": "weight updates need this package's own",
}


def check_sglang_options(config: Config) -> list[str]:
    """Words for the engines that the installed SGLang does not know, or that are not the user's to say."""
    known = _sglang_flags() if config.sglang else []
    problems = []
    for name in config.sglang:
        if reason := _SET_FOR_ENGINES.get(name):
            problems.append(f"--sglang-{name} is set by this package: {reason}")
        elif known and name not in known:
            problems.append(
                f"--sglang-{name}: the installed SGLang has no --{name}{suggestion(f'--sglang-{name}', [f'--sglang-{flag}' for flag in known])}"
            )
    return problems


def _sglang_flags() -> list[str]:
    """Names of the installed SGLang's options, read from its source (to import it takes seconds); none where it is not installed."""
    spec = importlib.util.find_spec("sglang")
    file = Path(spec.origin).parent / "srt" / "server_args.py" if spec and spec.origin else None
    if file is None or not file.is_file():
        return []
    calls = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    added = (node.args for node in calls if ast.unparse(node.func).endswith(".add_argument"))
    words = (word.value for arguments in added for word in arguments if isinstance(word, ast.Constant))
    return [word.removeprefix("--") for word in words if isinstance(word, str) and word.startswith("--")]


def check_context_parallel(config: Config) -> list[str]:
    """What the packing of samples cannot lay out yet, with or without Transformer Engine."""
    size = config.parallel.context_parallel_size
    if size == 1:
        return []
    return [
        f"--context-parallel-size {size}: packed rows are not split over ranks yet, so the result would be wrong; set it to 1 and lower --max-tokens-per-gpu, or raise --tensor-model-parallel-size"
    ]


def check_transformer_engine(config: Config) -> list[str]:
    """Layouts that only Transformer Engine's layers can run."""
    layout = config.parallel
    if importlib.util.find_spec("transformer_engine") is not None:
        return []
    reasons = (
        ("--sequence-parallel", layout.sequence_parallel, "its norms work on a part of a sequence"),
        ("--expert-model-parallel-size", layout.expert_model_parallel_size > 1, "its grouped layers hold the experts"),
        (
            "--expert-tensor-parallel-size",
            layout.expert_tensor_parallel_size > 1,
            "its grouped layers hold the experts",
        ),
    )
    return [
        f"{name} needs Transformer Engine ({reason}), and it is not installed here: drop the flag, or install the gpu extra on a machine with CUDA"
        for name, needed, reason in reasons
        if needed
    ]


def check_custom_functions(config: Config) -> list[str]:
    """Functions of the user's that are no `module.function`, or whose module is not there."""
    given = {
        "--custom-rm-path": config.reward.custom_rm_path,
        "--dynamic-sampling-filter-path": config.rollout.dynamic_sampling_filter_path,
    }
    problems = []
    for name, path in given.items():
        if path in (None, SLIME_FILTER):
            continue
        module, _, function = path.rpartition(".")
        if not module or not all(part.isidentifier() for part in path.split(".")):
            problems.append(f"{name}: found {path!r}, expected MODULE.FUNCTION")
        elif not _module_exists(module):
            problems.append(f"{name}: found no module {module!r} with {function!r}; is its folder on PYTHONPATH?")
    return problems


def _module_exists(name: str) -> bool:
    """Whether a module can be found, without importing any of its parents."""
    top, *inner = name.split(".")
    spec, found = importlib.util.find_spec(top), top
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        found = f"{found}.{part}"
        spec = PathFinder.find_spec(found, list(spec.submodule_search_locations))
    return spec is not None


def check_wandb_is_installed(config: Config) -> list[str]:
    """Weights & Biases without its package."""
    if not config.observe.use_wandb or importlib.util.find_spec("wandb") is not None:
        return []
    return [
        "--use-wandb needs the wandb package, and it is not installed here: pip install 'slime_opd[wandb]', or drop the flag"
    ]
