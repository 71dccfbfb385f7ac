"""Options that differ between a checkpoint's run and the one that continues it: each is honoured or refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_opd.config import Config
from slime_opd.config.options import flag, options_of

# Stages whose options reach nothing that a checkpoint holds: what is given now is what is done.
STATELESS_STAGES = (
    "cluster",
    "parallel",
    "checkpoint",
    "rollout",
    "reward",
    "evaluation",
    "algorithm",
    "opd",
    "divergence",
    "weights",
    "observe",
    "debug",
)

_ARCHITECTURE = "the model would be another: set it back, or start at step 0 from the weights with --finetune"
_PRECISION = "the optimizer's state is of that precision: set it back, or start its state afresh with --no-load-optim"
_ORDER = "the order of the prompts would change: set it back, or start at step 0 with --finetune"

# Options that a continued run refuses to change, and why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "group_query_attention",
            "num_query_groups",
            "kv_channels",
            "swiglu",
            "normalization",
            "norm_epsilon",
            "qk_layernorm",
            "add_qkv_bias",
            "disable_bias_linear",
            "untie_embeddings_and_output_weights",
            "position_embedding_type",
            "rotary_base",
            "rotary_percent",
            "use_rope_scaling",
            "rotary_scaling_factor",
            "vocab_size",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
            # Megatron-core's own.
            "num_moe_experts",
            "moe_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "moe_layer_freq",
            "moe_router_topk",
            "moe_router_score_function",
            "moe_router_pre_softmax",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_topk_scaling_factor",
            "multi_latent_attention",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_head_dim",
            "qk_pos_emb_head_dim",
            "v_head_dim",
            "layernorm_zero_centered_gamma",
            "rotary_interleaved",
            "softmax_scale",
        ),
        _ARCHITECTURE,
    ),
    **dict.fromkeys(("bf16", "fp16", "fp32"), _PRECISION),
    "optimizer": "the saved state is another optimizer's: set it back, or start its state afresh with --no-load-optim",
    "initial_loss_scale": "the loss scale continues from the checkpoint: set it back, or start its state afresh with --no-load-optim",
    "seed": "the random state continues from the checkpoint: set it back, or start at step 0 with --finetune",
    "loss_type": "the run would be another: give another --save, and start from these weights with --load and --finetune",
    "rollout_seed": _ORDER,
    "rollout_shuffle": _ORDER,
}
# Of those, the ones that are honoured where the optimizer's state is not loaded.
_OF_OPTIMIZER_STATE = ("bf16", "fp16", "fp32", "optimizer", "initial_loss_scale", "seed")

_HONOURED = "honoured"
_SCHEDULE = "honoured from the next step; the schedule keeps its position"
_COMPARED = "honoured; shapes are compared when the weights are loaded"
_PROMPTS = "honoured, if it gives the same prompts"
_ACCEPTED = "has no effect in any run"

# Options of the other stages (those with state) that a continued run honours, and how.
HONOURED: dict[str, str] = {
    **dict.fromkeys(("hf_checkpoint", "megatron_to_hf_mode", "make_vocab_size_divisible_by"), _COMPARED),
    **dict.fromkeys(("max_position_embeddings", "attention_dropout", "hidden_dropout"), _HONOURED),
    **dict.fromkeys(
        (
            "micro_batch_size",
            "use_dynamic_batch_size",
            "max_tokens_per_gpu",
            "calculate_per_token_loss",
            "accumulate_allreduce_grads_in_fp32",
            "attention_softmax_in_fp32",
            "attention_backend",
            "log_probs_chunk_size",
            "distributed_timeout_minutes",
            "max_skipped_steps",
        ),
        _HONOURED,
    ),
    **dict.fromkeys(("global_batch_size", "num_steps_per_rollout"), "honoured; schedules count optimizer steps"),
    **dict.fromkeys(
        (
            "lr",
            "min_lr",
            "lr_decay_style",
            "lr_decay_iters",
            "lr_warmup_iters",
            "lr_warmup_fraction",
            "weight_decay",
        ),
        _SCHEDULE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_eps", "clip_grad"), "honoured from the next step"),
    **dict.fromkeys(
        (
            "use_rotary_position_embeddings",
            "no_position_embedding",
            "spec",
            "mtp_num_layers",
            "seq_length",
            "balance_data",
        ),
        _ACCEPTED,
    ),
    # Of the stages above, those with something to add.
    "num_rollout": "honoured; schedules over the whole run are stretched to it",
}

# The start itself; the line about what is resumed says it.
_START = ("load", "ckpt_step", "finetune")


@dataclass(frozen=True)
class Difference:
    """One option whose value differs. `effect`: what is done about it."""

    name: str
    saved: Any
    now: Any
    effect: str
    is_refused: bool

    @property
    def flag(self) -> str:
        """The option as a command line has it."""
        return flag(self.name)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Options that differ, in the order of the options; both are `record.public_values`.

    An option that one of them lacks has its default there. Raises KeyError for an option that no table here classifies.
    """
    options = options_of(Config)
    names = dict.fromkeys((*options, *now, *saved))
    found = []
    for name in names:
        default = options[name].default if name in options else None
        default = list(default) if isinstance(default, tuple) else default
        before, after = saved.get(name, default), now.get(name, default)
        if before != after and name not in _START:
            effect, is_refused = effect_of(name, loads_optimizer=not now.get("no_load_optim"))
            found.append(Difference(name, before, after, effect, is_refused))
    return found


def effect_of(name: str, *, loads_optimizer: bool = True) -> tuple[str, bool]:
    """What a continued run does about a changed option, and whether it refuses. Raises KeyError for an unclassified one."""
    if name in REFUSED and not (name in _OF_OPTIMIZER_STATE and not loads_optimizer):
        return REFUSED[name], True
    if name in HONOURED:
        return HONOURED[name], False
    option = options_of(Config).get(name)
    if name in REFUSED or option is None:
        # Options of SGLang's engines, which start anew; or one that this version no longer has.
        return _HONOURED if name in REFUSED or name.startswith("sglang-") else "unknown to this version", False
    if option.stage == "megatron":
        return _COMPARED, False
    if option.stage == "data":
        # Whatever is read, and however: the prompts that come out are compared with the checkpoint's.
        return _PROMPTS, False
    if option.stage in STATELESS_STAGES:
        return _HONOURED, False
    raise KeyError(f"{flag(name)} is in neither REFUSED nor HONOURED of slime_opd/checkpoint/differences.py")


def table(found: list[Difference]) -> list[str]:
    """The differences as aligned lines, with a heading."""
    rows = [("option", "saved", "now", "on resume")]
    rows += [
        (one.flag, _shown(one.saved), _shown(one.now), f"refused: {one.effect}" if one.is_refused else one.effect)
        for one in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def refusals(found: list[Difference]) -> list[str]:
    """A sentence for each option that may not change."""
    return [
        f"{one.flag} is {_shown(one.now)}, the checkpoint was saved with {_shown(one.saved)}: {one.effect}"
        for one in found
        if one.is_refused
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"
