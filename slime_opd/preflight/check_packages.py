"""Rules about installed code: Transformer Engine, DeepEP, wandb, and the user's functions. Nothing is imported."""

from __future__ import annotations

import importlib.util
from importlib.machinery import PathFinder

from slime_opd.config.check_learning import SLIME_FILTER
from slime_opd.config.check_megatron import flag_with_value, given_values, recomputed
from slime_opd.config.config import Config
from slime_opd.config.megatron_support import SUPPORT, Answer


def has_engine(config: Config) -> bool:
    """Whether layers will be Transformer Engine's, judging by this machine."""
    return importlib.util.find_spec("transformer_engine") is not None and config.training.attention_backend != "local"


def check_engine(config: Config) -> list[str]:
    """Options that only Transformer Engine's layers and optimizers implement."""
    if has_engine(config):
        return []
    needed = [
        (flag_with_value(name, value), SUPPORT[name].reason)
        for name, value in given_values(config).items()
        if SUPPORT[name].answer is Answer.ENGINE
    ]
    needed += [
        (f"--recompute-modules {name}", "Megatron recomputes it with its help") for name in recomputed(config, "engine")
    ]
    if config.megatron.moe_token_dispatcher_type == "flex":
        needed.append(("--moe-token-dispatcher-type flex", SUPPORT["moe_enable_deepep"].reason))
    if (size := config.parallel.expert_tensor_parallel_size) > 1:
        needed.append((f"--expert-tensor-parallel-size {size}", "its layers split an expert"))
    local = config.training.attention_backend == "local"
    why = "--attention-backend local is chosen" if local else "it is not installed here"
    return [
        f"{shown} needs Transformer Engine ({reason}), and {why}: drop the flag, or run on a machine with CUDA and Transformer Engine (tools/setup_gpu.sh)"
        for shown, reason in needed
    ]


def check_flex_dispatcher(config: Config) -> list[str]:
    """The flex dispatcher without DeepEP, or without ranks to dispatch to."""
    stage, layout, problems = config.megatron, config.parallel, []
    if stage.moe_token_dispatcher_type != "flex":
        return []
    if importlib.util.find_spec("deep_ep") is None:
        problems.append(
            "--moe-token-dispatcher-type flex needs the deep_ep package, which is not installed here: use alltoall"
        )
    if layout.expert_model_parallel_size * layout.expert_tensor_parallel_size == 1:
        problems.append("--moe-token-dispatcher-type flex needs --expert-model-parallel-size 2 or more: use alltoall")
    if stage.moe_shared_expert_overlap:
        problems.append("--moe-shared-expert-overlap needs --moe-token-dispatcher-type alltoall, found flex")
    return problems


def check_custom_functions(config: Config) -> list[str]:
    """Functions of the user that are no `module.function`, or whose module does not exist. Nothing is imported."""
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
    try:
        spec, found = importlib.util.find_spec(top), top
    except ValueError:  # a module without a specification, as __main__
        return False
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
