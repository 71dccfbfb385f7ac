"""Full-vocabulary divergence, loss and gradients from hidden states: our chunked pass against plain autograd.

    python benchmarks/full_vocabulary.py [--tokens 4096] [--vocabulary 151936] [--hidden 512] [--chunk 256]

Each implementation runs in a process of its own. Memory is the peak above that of the inputs: resident memory on a CPU,
allocated memory on a GPU. On a GPU, Liger-Kernel's fused linear JSD (beta 0.5) is measured too if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time

import torch
from torch import Tensor

from slime_opd.distill.comparison import DivergenceOptions
from slime_opd.head.objective_head import ObjectiveHead
from slime_opd.head.output_layer import chunked_objective
from slime_opd.head.settings import HeadSettings
from slime_opd.head.teacher_comparison import TeacherStates
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.objective.options import PolicyOptions
from slime_opd.objective.tokens import TokenColumns


def inputs(sizes: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """Hidden states and output layers of a student and of a similar teacher; bfloat16 on a GPU, as in training."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    hidden = draw(sizes.tokens, sizes.hidden)
    weight = draw(sizes.vocabulary, sizes.hidden) / sizes.hidden**0.5 * 2
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "teacher_hidden": (hidden + 0.3 * draw(sizes.tokens, sizes.hidden)).to(dtype),
        "teacher_weight": weight.detach().to(dtype).clone(),
    }


def ours(tensors: dict[str, Tensor], sizes: argparse.Namespace, kind: str) -> Tensor:
    """The trainer's chunked pass, with sampled log-probs and both entropies; --overlap adds the overlap metrics."""
    tokens, device = sizes.tokens, tensors["hidden"].device
    policy = PolicyOptions(0.2, 0.2, None, 0.0, None, "k1", False, divergence=DivergenceOptions(kind, 1.0))
    settings = HeadSettings(policy, metrics_top_k=sizes.overlap)
    ones = torch.ones(tokens, device=device)
    columns = {
        "loss_mask": ones,
        "policy_weights": ones / tokens,
        "advantages": torch.zeros(tokens, device=device),
        "divergence_base": ones / tokens,
        "divergence_weights": ones,
    }
    teacher = TeacherStates(tensors["teacher_hidden"], tensors["teacher_weight"])
    shard = VocabularyShard(0, sizes.vocabulary)
    head = ObjectiveHead(
        settings,
        shard,
        torch.zeros(tokens, dtype=torch.int64, device=device),
        TokenColumns.from_mapping(columns),
        teacher,
    )
    return chunked_objective(tensors["hidden"], tensors["weight"], shard, head, sizes.chunk).loss


def plain(tensors: dict[str, Tensor], sizes: argparse.Namespace, kind: str) -> Tensor:
    """All logits at once, and autograd."""
    log_p = torch.log_softmax((tensors["hidden"] @ tensors["weight"].T).float(), dim=-1)
    log_q = torch.log_softmax((tensors["teacher_hidden"] @ tensors["teacher_weight"].T).float(), dim=-1)
    if kind == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    student_terms, teacher_terms = log_p.exp() * (log_p - log_m), log_q.exp() * (log_q - log_m)
    return 0.5 * (student_terms + teacher_terms).sum(dim=-1).mean()


def liger(tensors: dict[str, Tensor], sizes: argparse.Namespace, kind: str) -> Tensor:
    """Liger-Kernel's fused linear JSD, for GPUs."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)
    return loss(tensors["hidden"], tensors["weight"], tensors["teacher_hidden"], tensors["teacher_weight"])


IMPLEMENTATIONS = {"ours": ours, "plain": plain, "liger": liger}


def measure(name: str, kind: str, sizes: argparse.Namespace) -> dict[str, float]:
    """Seconds and extra bytes of one loss and its gradients: the best of the repeats, after a warm-up on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = inputs(sizes, device)
    if device.type == "cpu":
        # Allocate torch's own buffers before the count starts.
        warm = argparse.Namespace(**{**vars(sizes), "tokens": 8, "vocabulary": 64, "hidden": 16})
        IMPLEMENTATIONS[name](inputs(warm, device), warm, kind).backward()
    before, seconds = memory(device), []
    for _ in range(sizes.repeats + (device.type == "cuda")):
        tensors["hidden"].grad = tensors["weight"].grad = None
        started = time.perf_counter()
        loss = IMPLEMENTATIONS[name](tensors, sizes, kind)
        loss.backward()
        value = loss.item()
        seconds.append(time.perf_counter() - started)
    norm = torch.linalg.vector_norm(tensors["weight"].grad.float()).item()
    return {"seconds": min(seconds), "bytes": peak(device) - before, "loss": value, "gradient": norm}


def memory(device: torch.device) -> int:
    """Bytes in use now; resets the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    return status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since the call of `memory`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def main() -> None:
    """Print seconds and memory of each implementation, and the ratio of ours to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--overlap", type=int, default=0, help="top-k of the overlap metrics (default: 0, none)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--kind", default=None, choices=("reverse_kl", "jsd"))
    parser.add_argument(
        "--only", default=None, choices=sorted(IMPLEMENTATIONS), help="measure one implementation in this process"
    )
    sizes = parser.parse_args()
    if sizes.only:
        print(json.dumps(measure(sizes.only, sizes.kind or "reverse_kl", sizes)))
        return
    has_liger = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    runs = [("ours", "reverse_kl"), ("plain", "reverse_kl")]
    runs += [("ours", "jsd"), ("plain", "jsd"), *([("liger", "jsd")] if has_liger else [])]
    runs = [run for run in runs if sizes.kind in (None, run[1])]
    print(f"{sizes.tokens} tokens, vocabulary {sizes.vocabulary}, hidden {sizes.hidden}, chunks of {sizes.chunk}")
    baselines: dict[str, dict[str, float]] = {}
    for name, kind in runs:
        argv = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--kind", kind]
        finished = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            print(f"{kind:<11} {name:<6} did not finish (exit status {finished.returncode}; -9: out of memory)")
            continue
        result = json.loads(finished.stdout)
        baselines.setdefault(kind, result)
        time_ratio, memory_ratio = (baselines[kind][key] / result[key] for key in ("seconds", "bytes"))
        print(
            f"{kind:<11} {name:<6} {result['seconds']:7.2f} s  {result['bytes'] / 2**20:8.0f} MiB  "
            f"loss {result['loss']:.6f}  gradient norm {result['gradient']:.6f}"
            + ("" if name == "ours" else f"  ours/{name}: time {time_ratio:.2f}, memory {memory_ratio:.3f}")
        )


if __name__ == "__main__":
    main()
