"""The environment of trainer ranks and engines, as a table of devices, options and what the user has set."""

from __future__ import annotations

import pytest

from slime_opd.cluster.environment import Devices, allocator_problem, engine_environment, trainer_environment
from slime_opd.config import parse

CPU, HOPPER, UNKNOWN = Devices(False), Devices(True, frozenset({"H100"})), Devices(True)
BLACKWELL, MIXED = Devices(True, frozenset({"GB200", "B300"})), Devices(True, frozenset({"B200", "H100"}))
OFF = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ONE_CONNECTION = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
TP2 = "--actor-num-gpus-per-node 2 --tensor-model-parallel-size 2"


@pytest.mark.parametrize(
    ("devices", "flags", "user", "expected"),
    [
        (CPU, TP2, {}, {}),
        (CPU, TP2, {"NCCL_CUMEM_ENABLE": "1"}, {}),
        (HOPPER, "", {}, OFF | EXPANDABLE),
        (HOPPER, TP2, {}, OFF | EXPANDABLE | ONE_CONNECTION),
        (UNKNOWN, TP2, {}, OFF | EXPANDABLE | ONE_CONNECTION),
        (MIXED, TP2, {}, OFF | EXPANDABLE | ONE_CONNECTION),
        (BLACKWELL, TP2, {}, OFF | EXPANDABLE),
        (HOPPER, "--actor-num-gpus-per-node 2 --context-parallel-size 2", {}, OFF | EXPANDABLE | ONE_CONNECTION),
        (HOPPER, TP2, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, OFF | EXPANDABLE | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
        # CUDA IPC of the trainer's memory.
        (HOPPER, "--colocate", {}, OFF),
        (HOPPER, "--update-weight-transport tensor", {}, OFF),
        (HOPPER, "--update-weight-transport disk", {}, OFF | EXPANDABLE),
        # What the user has set stays, under either of torch's names.
        (HOPPER, "", {"PYTORCH_ALLOC_CONF": "x"}, OFF | {"PYTORCH_ALLOC_CONF": "x"}),
        (HOPPER, "--colocate", {"PYTORCH_CUDA_ALLOC_CONF": "x"}, OFF | {"PYTORCH_CUDA_ALLOC_CONF": "x"}),
        (HOPPER, "", {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "HOME": "/"}, OFF | EXPANDABLE | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
        (HOPPER, "", {"NCCL_DEBUG": "INFO"}, OFF | EXPANDABLE | {"NCCL_DEBUG": "INFO"}),
        (HOPPER, "", {"NCCL_NVLS_ENABLE": "1"}, {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"} | EXPANDABLE),
        # As SGLang has it: an option of its engines turns a variable on, whatever the user has set.
        (HOPPER, "--sglang-enable-nccl-nvls", {}, OFF | {"NCCL_NVLS_ENABLE": "1"} | EXPANDABLE),
        (HOPPER, "--sglang-enable-symm-mem", {"NCCL_CUMEM_ENABLE": "0"}, dict.fromkeys(OFF, "1") | EXPANDABLE),
    ],
)  # fmt: skip
def test_the_environment_of_a_trainer_rank(devices, flags, user, expected):
    assert trainer_environment(parse(flags.split()), devices, user, has_engines=True) == expected


def test_without_engines_nccl_keeps_its_defaults():
    config = parse(["--loss-type", "sft_loss", "--colocate"])
    assert trainer_environment(config, HOPPER, {}, has_engines=False) == EXPANDABLE


def test_what_a_user_sets_of_nccl_reaches_runs_without_engines_and_engines():
    user = {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_CUMEM_ENABLE": "1"}
    assert trainer_environment(parse([]), HOPPER, user, has_engines=False) == EXPANDABLE | user
    assert engine_environment(parse([]), HOPPER, user) == OFF | user
    colocated = engine_environment(parse(["--colocate"]), HOPPER, {})
    assert colocated == OFF | {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}


def test_expandable_segments_are_refused_where_an_engine_opens_the_trainers_memory():
    config = parse(["--colocate"])
    assert "unset it" in allocator_problem(config, EXPANDABLE, has_engines=True)
    assert allocator_problem(config, EXPANDABLE, has_engines=False) is None
    assert allocator_problem(parse([]), EXPANDABLE, has_engines=True) is None
    assert allocator_problem(config, {}, has_engines=True) is None


@pytest.mark.parametrize("user", [{}, {"NCCL_CUMEM_ENABLE": "1"}])
@pytest.mark.parametrize("flags", ["", "--sglang-enable-nccl-nvls", "--sglang-enable-symm-mem"])
def test_trainers_and_engines_agree_on_what_their_communicator_depends_on(flags, user):
    config = parse(flags.split())
    trainer = trainer_environment(config, HOPPER, user, has_engines=True)
    engine = engine_environment(config, HOPPER, user)
    assert set(engine) == set(OFF) and engine.items() <= trainer.items()
    assert engine_environment(config, CPU, user) == {}


def test_an_engine_keeps_what_sglang_would_set_itself():
    """SGLang's own rule, from its source, run on what it is given here."""
    import ast
    import importlib.util
    from pathlib import Path
    from types import SimpleNamespace

    package = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    tree = ast.parse((package / "srt/entrypoints/engine.py").read_text())
    (rule,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_set_envs_and_config")
    for flags in ("", "--sglang-enable-nccl-nvls", "--sglang-enable-symm-mem"):
        config = parse(flags.split())
        arguments = SimpleNamespace(
            enable_symm_mem="symm" in flags, enable_nccl_nvls="nvls" in flags, enable_metrics=False
        )
        for user in ({}, {"NCCL_CUMEM_ENABLE": "1"}, {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}):
            expected = engine_environment(config, HOPPER, user)
            environment = dict(expected)
            # Its first two statements set what NCCL reads.
            statements = ast.Module([s for s in rule.body if isinstance(s, ast.If) and "NCCL" in ast.unparse(s)], [])
            assert len(statements.body) == 2
            scope = {"os": SimpleNamespace(environ=environment), "server_args": arguments}
            exec(compile(statements, "sglang", "exec"), scope)
            assert environment == expected, (flags, user)


def test_devices_are_read_from_rays_resources():
    resources = {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0, "node:10.0.0.1": 1.0}
    assert Devices.of_resources(resources) == HOPPER
    assert Devices.of_resources({"CPU": 8.0}) == CPU
