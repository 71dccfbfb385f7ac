"""Environment variables of trainer ranks and engines on GPUs. Pure, given the user's environment.

SGLang overrides some variables in each engine (`_set_envs_and_config` in its entrypoints/engine.py): it sets
CUDA_DEVICE_MAX_CONNECTIONS to 8, CUDA_MODULE_LOADING to AUTO, and NCCL_CUMEM_ENABLE and NCCL_NVLS_ENABLE by its
options, by default to 0. The first trainer rank and the engines share an NCCL communicator for the weights, whose ranks
must agree on these two, so the trainers follow the same rule. NCCL variables that the user has set are passed to every
rank and engine; those of Megatron and of torch's allocator to every rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from slime_opd.config import Config

# Architectures after Hopper, by Ray's names of accelerators.
_BLACKWELL_OR_LATER = re.compile(r"G?B\d00|RTX-PRO-6000|GeForce-RTX-50\d0")
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True)
class Devices:
    """The devices of a Ray cluster. `accelerators`: Ray's names of their types, such as H100; empty if unknown."""

    has_gpus: bool
    accelerators: frozenset[str] = frozenset()

    @staticmethod
    def of_resources(resources: Mapping[str, float]) -> Devices:
        """From the result of `ray.cluster_resources()`."""
        prefix = "accelerator_type:"
        types = frozenset(name.removeprefix(prefix) for name in resources if name.startswith(prefix))
        return Devices(bool(resources.get("GPU")), types)

    @property
    def are_blackwell_or_later(self) -> bool:
        """Whether all GPUs are Blackwell or later.

        They keep the order of kernels from several streams without CUDA_DEVICE_MAX_CONNECTIONS=1.
        """
        return bool(self.accelerators) and all(map(_BLACKWELL_OR_LATER.fullmatch, self.accelerators))


def trainer_environment(
    config: Config, devices: Devices, user: Mapping[str, str], *, has_engines: bool
) -> dict[str, str]:
    """Variables of each trainer rank; {} without GPUs. `user`: the environment of the driver."""
    if not devices.has_gpus:
        return {}
    layout = config.parallel
    variables = _set_by_user(user)
    if _CONNECTIONS in user:
        variables[_CONNECTIONS] = user[_CONNECTIONS]
    # Megatron overlaps collectives of tensor and context parallelism with matrix products that are launched later.
    if max(layout.tensor_model_parallel_size, layout.context_parallel_size) > 1 and not devices.are_blackwell_or_later:
        variables.setdefault(_CONNECTIONS, "1")
    if has_engines:
        variables |= _communicator_variables(config, user)
    # Micro-batches of different lengths fragment memory. CUDA IPC cannot share expandable segments.
    if allocator := {name: user[name] for name in _ALLOCATOR_VARIABLES if name in user}:
        variables |= allocator
    elif not shares_gpu_memory(config, has_engines=has_engines):
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return variables


def engine_environment(config: Config, devices: Devices, user: Mapping[str, str]) -> dict[str, str]:
    """Variables of each engine; {} without GPUs."""
    if not devices.has_gpus:
        return {}
    # Trainer ranks, such as pipeline stages, use different amounts of memory; SGLang refuses GPUs whose free memory
    # differs.
    colocated = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"} if config.cluster.colocate else {}
    return colocated | _set_by_user(user) | _communicator_variables(config, user)


def shares_gpu_memory(config: Config, *, has_engines: bool) -> bool:
    """Whether an engine may read the weights from the trainer's GPU memory by CUDA IPC."""
    return has_engines and (config.cluster.colocate or config.weights.update_weight_transport == "tensor")


def allocator_problem(config: Config, user: Mapping[str, str], *, has_engines: bool) -> str | None:
    """The reason why the user's setting of torch's allocator cannot work; None if it can."""
    for name in _ALLOCATOR_VARIABLES:
        if "expandable_segments:True" in user.get(name, "") and shares_gpu_memory(config, has_engines=has_engines):
            return (
                f"{name}={user[name]}: the engines read the weights from the trainer's GPU memory by CUDA IPC, "
                "which expandable segments do not allow; unset it"
            )
    return None


def _set_by_user(user: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in user.items() if name.startswith("NCCL_")}


def _communicator_variables(config: Config, user: Mapping[str, str]) -> dict[str, str]:
    """SGLang's rule for its two NCCL variables: on if an option turns it on, else the user's value, else off."""
    options = {name.replace("_", "-") for name in config.sglang}
    has_symmetric_memory = "enable-symm-mem" in options
    enabled_by_option = {
        "NCCL_CUMEM_ENABLE": has_symmetric_memory,
        "NCCL_NVLS_ENABLE": has_symmetric_memory or "enable-nccl-nvls" in options,
    }
    return {name: "1" if enabled else user.get(name, "0") for name, enabled in enabled_by_option.items()}
