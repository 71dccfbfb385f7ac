"""Rehearses steps of a shallow model with Qwen3-8B's widths, and prints what they did as JSON: a process of its own."""

import json
import sys
from pathlib import Path

from slime_opd.rehearsal import simulated_cuda

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip

BASE = (
    "--megatron-to-hf-mode bridge --bf16 --accumulate-allreduce-grads-in-fp32 --use-dynamic-batch-size --max-tokens-per-gpu 4096 "
    "--rollout-max-response-len 4096 --lr 1e-6 --use-opd"
)
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SERVER = "--opd-type sglang --rm-url http://teacher/generate --opd-kl-coef 1"
WHOLE = "--opd-type megatron --opd-teacher-load teacher --opd-kl-coef 0 --opd-divergence reverse_kl --opd-teacher-hidden-on-host"

# Name: the flags, and whether a save is rehearsed too.
CASES = {
    "penalty": (f"--tensor-model-parallel-size 2 --sequence-parallel --actor-num-gpus-per-node 2 {SERVER}", False),
    "divergence": (f"--actor-num-gpus-per-node 8 {RECOMPUTE} {WHOLE}", True),
}


def known() -> dict:
    """What is recorded of a few operations that can be counted by hand."""
    import torch

    from slime_opd.rehearsal.memory import LiveMemory
    from slime_opd.rehearsal.syncs import FakeDevice, FakeTensors, HostSyncs

    memory, syncs = LiveMemory(), HostSyncs()
    with FakeDevice(syncs), FakeTensors(allow_non_fake_inputs=True), syncs, memory:
        with memory.phase("four and eight MiB") as phase:
            first = torch.empty(2**20, device="cuda")
            second = (first + 1).view(1024, 1024)
            del first
            third = second[0]
        waits = {}
        for name, operation in {
            "item": lambda: third[0].item(),
            "bool": lambda: bool(third[0] > 0),
            "tolist": lambda: third.tolist(),
            "cpu": lambda: third.cpu(),
            "tensor of a tensor": lambda: torch.tensor([third[0], third[1]]),
            "to the device": lambda: torch.ones(3).to("cuda"),
            "to the device later": lambda: torch.ones(3).to("cuda", non_blocking=True),
            "synchronize": torch.cuda.synchronize,
            "on the host": lambda: torch.arange(3).tolist(),
            "on the device": lambda: third.sum() + 1,
        }.items():
            syncs.counts.clear()
            operation()
            waits[name] = {kind: count for (kind, _), count in syncs.counts.items()}
    return {"peak": phase.peak, "end": phase.end, "kernels": phase.kernels, "waits": waits}


def main(directory: Path) -> None:
    """Rehearse every case."""
    simulated_cuda.load()
    simulated_cuda.install()
    from slime_opd.preflight.memory_estimate import size_of, step_bytes
    from slime_opd.rehearsal.batch import Load, rehearsed_config, rollout_tokens
    from slime_opd.rehearsal.step import rehearse

    (directory / "config.json").write_text(json.dumps(QWEN3_8B))
    found, load = {"known": known()}, Load()
    for name, (flags, with_save) in CASES.items():
        config = rehearsed_config([*f"--hf-checkpoint {directory} {BASE} {flags}".split()], load)
        rehearsed = rehearse(config, load, with_save=with_save)
        found[name] = {
            "waits": [[kind, line.name, count] for (kind, line), count in rehearsed.syncs.items()],
            "peaks": {phase.name: phase.peak for phase in rehearsed.memory.phases.values()},
            "after": {phase.name: phase.end for phase in rehearsed.memory.phases.values()},
            "counts": {phase: rehearsed.kernels(phase) for phase in rehearsed.memory.phases},
            "kernels": sorted(rehearsed.memory.kernels),
            "parameters": rehearsed.parameters,
            "peak": rehearsed.peak,
            "estimate": step_bytes(config, QWEN3_8B, size_of(QWEN3_8B), rollout_tokens=rollout_tokens(config, load)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
