"""The report of a rehearsed step, as text."""

from __future__ import annotations

from slime_opd.config import Config
from slime_opd.config.hf_config import architecture_of
from slime_opd.preflight.memory_estimate import bytes_text, count_text, size_of, step_bytes
from slime_opd.rehearsal.batch import Load, rollout_tokens, tokens_per_micro_batch
from slime_opd.rehearsal.step import NOT_COVERED, PHASES, SIMULATED, Rehearsed


def format_report(rehearsed: Rehearsed, config: Config, load: Load, *, holders: int = 4) -> str:
    """Memory, kernels and waits by phase, the simulated parts, and what is not covered."""
    phases = [rehearsed.memory.phases[name] for name in PHASES if name in rehearsed.memory.phases]
    lines = [
        "A rehearsal on simulated CUDA: nothing was computed, and no GPU was used.",
        f"{count_text(rehearsed.parameters)} parameters on this rank; micro-batches of {tokens_per_micro_batch(config):,} tokens in {load.sequences} sequences",
        "",
        f"{'phase':<10} {'peak':>10} {'after':>10} {'kernels':>9} {'collectives':>12}",
    ]
    for phase in phases:
        lines.append(
            f"{phase.name:<10} {bytes_text(phase.peak):>10} {bytes_text(phase.end):>10} {phase.kernels // rehearsed.steps:>9,} {phase.collectives // rehearsed.steps:>12,}"
        )
        lines += [f"{'':12}{bytes_text(size):>10}  {line}" for line, size in phase.holders.most_common(holders)]
    lines += [
        f"\npeak of a step {bytes_text(rehearsed.peak)}; host memory {bytes_text(rehearsed.memory.peak_bytes['cpu'])}"
    ]
    lines += _estimated(rehearsed, config, load)
    lines += ["", "Waits of the host for the device, per step:"]
    lines += [
        f"  {count:>6,}  {kind}: {line}" for (kind, line), count in sorted(rehearsed.syncs.items(), key=lambda i: -i[1])
    ]
    lines += ["", "Simulated: " + "; ".join(SIMULATED) + ".", "Not covered: " + "; ".join(NOT_COVERED) + "."]
    return "\n".join(lines)


def _estimated(rehearsed: Rehearsed, config: Config, load: Load) -> list[str]:
    architecture = architecture_of(config)
    size = size_of(architecture)
    if size is None:
        return []
    parts = step_bytes(config, architecture, size, rollout_tokens=rollout_tokens(config, load), with_engine=False)
    total = sum(parts.values())
    return [
        f"estimated {bytes_text(total)} ({(total / rehearsed.peak - 1) * 100:+.1f} %): "
        + ", ".join(f"{name} {bytes_text(part)}" for name, part in parts.items())
    ]
