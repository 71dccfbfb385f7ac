"""Each rule: one configuration that breaks it alone, and the sentence it gives."""

import copy
import shlex

import pytest

from slime_opd.config import parse
from slime_opd.config.checks import CHECKS, problems
from slime_opd.config.config import Config

# Four samples a rollout, one process, an SGLang teacher.
MODEL = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --vocab-size 64"
DATA = "--hf-checkpoint student --prompt-data train.jsonl --label-key label"
ROLLOUT = "--num-rollout 2 --rollout-batch-size 2 --n-samples-per-prompt 2 --rollout-max-response-len 8"
NO_SIGNAL = f"{MODEL} {DATA} {ROLLOUT}"
TEACHER = "--use-opd --opd-type sglang --rm-url http://localhost:1/generate"
GOOD = f"{NO_SIGNAL} {TEACHER}"
REWARDED = f"{NO_SIGNAL} --rm-type math"
MEGATRON = f"{NO_SIGNAL} --use-opd --opd-type megatron --opd-teacher-load t"
DIVERGING = f"{MEGATRON} --opd-divergence reverse_kl"
TOP_K = f"{GOOD} --opd-divergence reverse_kl --opd-log-prob-top-k 16"
EVALUATED = f"{GOOD} --eval-interval 1 --eval-prompt-data a a.jsonl"
EVALUATE_ONLY = f"{MODEL} --hf-checkpoint student --num-rollout 0 --label-key label --rollout-max-response-len 8"
SFT = f"{MODEL} --hf-checkpoint student --prompt-data a.jsonl --loss-type sft_loss --num-epoch 3 --rollout-batch-size 4"

# What slime's two scripts of on-policy distillation say, as they say it.
SLIME = """
    --swiglu --num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
    --rotary-base 1000000 --vocab-size 151936 --kv-channels 128 --qk-layernorm --untie-embeddings-and-output-weights
    --actor-num-nodes 1 --actor-num-gpus-per-node 2 --rollout-num-gpus 4 --hf-checkpoint Qwen3-8B --ref-load torch_dist
    --load slime/ --save slime/ --save-interval 20 --prompt-data dapo-math-17k.jsonl --input-key prompt
    --apply-chat-template --rollout-shuffle --num-rollout 300 --rollout-batch-size 16 --n-samples-per-prompt 4
    --rollout-max-response-len 16384 --rollout-temperature 1 --global-batch-size 64 --balance-data
    --advantage-estimator grpo --use-opd --opd-kl-coef 1.0 --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl
    --entropy-coef 0.00 --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1
    --context-parallel-size 1 --expert-model-parallel-size 1 --expert-tensor-parallel-size 1 --recompute-granularity full
    --recompute-method uniform --recompute-num-layers 1 --use-dynamic-batch-size --max-tokens-per-gpu 16384
    --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
    --rollout-num-gpus-per-engine 1 --sglang-mem-fraction-static 0.4 --attention-dropout 0.0 --hidden-dropout 0.0
    --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --attention-backend flash
"""
SLIME_SGLANG = f"""{SLIME} --opd-type sglang --rm-url http://127.0.0.1:13141/generate
    --custom-rm-path slime.rollout.on_policy_distillation.reward_func
    --custom-reward-post-process-path slime.rollout.on_policy_distillation.post_process_rewards"""
SLIME_MEGATRON = f"{SLIME} --opd-type megatron --opd-teacher-load torch_dist --rm-type math"


def config_of(arguments: str) -> Config:
    return parse(shlex.split(arguments))


def problems_of(arguments: str) -> list[str]:
    return problems(config_of(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        GOOD,
        REWARDED,
        EVALUATED,
        f"{GOOD} --eval-prompt-data a a.jsonl",
        f"{EVALUATE_ONLY} --eval-prompt-data a a.jsonl",
        SFT,
        f"{SFT} --rollout-num-gpus 0",
        f"{REWARDED} {TEACHER}",
        f"{GOOD} --opd-only-reward --opd-kl-coef 0",
        f"{GOOD} --rollout-temperature 0.8",
        f"{GOOD} --n-samples-per-prompt 1",
        f"{REWARDED} --n-samples-per-prompt 1 --disable-rewards-normalization",
        f"{NO_SIGNAL} --use-opd --opd-type megatron --opd-teacher-load t --opd-teacher-ckpt-step 3",
        f"{NO_SIGNAL} --custom-rm-path mine.reward",
        f"{GOOD} --use-kl-loss --kl-loss-coef 0.1 --ref-load r",
        f"{GOOD} --num-steps-per-rollout 2 --global-batch-size 2",
        f"{GOOD} --actor-num-gpus-per-node 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        f"{GOOD} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        f"{GOOD} --custom-reward-post-process-path slime.rollout.on_policy_distillation.post_process_rewards",
        f"{DATA} {ROLLOUT} {TEACHER} --megatron-to-hf-mode bridge",
        f"{GOOD} --rm-url https://[::1]:8000/v2/generate",
        f"{GOOD} --rm-url http://127.0.0.1:43777",
        f"{GOOD} --rm-url http://me:secret@127.0.0.1:43777/",
        f"{SFT} --rollout-function-path slime.rollout.sft_rollout.generate_rollout --debug-train-only --kl-coef 0.00",
        f"{SFT} --disable-compute-advantages-and-returns --no-position-embedding --seq-length 32768",
        f"{GOOD} --use-wandb --wandb-project p --wandb-group g --wandb-team t --wandb-host https://wandb.ai/",
        f"{GOOD} --opd-kl-clamp 5 --opd-kl-discount 0.9 --opd-refresh-student",
        f"{MEGATRON} --opd-temperature 0.7 --opd-token-weighting soft",
        f"{DIVERGING} --opd-teacher-resident --opd-teacher-hidden-on-host --opd-metrics-top-k 0",
        f"{DIVERGING} --opd-kl-coef 0.5 --opd-kl-clamp 5",
        f"{DIVERGING} --opd-token-weighting top --opd-token-keep-fraction 0.2",
        f"{MEGATRON} --opd-divergence jsd --opd-jsd-beta 0.1 --opd-log-prob-top-k 8 --opd-top-k-strategy union",
        f"{MEGATRON} --opd-schedule forward_kl:0.4,reverse_kl:0.6 --opd-coef-ramp 0:0,0.3:1",
        f"{TOP_K} --opd-top-k-remainder renormalized --opd-wire-dtype float16",
        f"{GOOD} --opd-divergence token_reward_direct --opd-log-prob-top-k 16 --opd-reward-weight-mode none",
        f"{TOP_K} --opd-off-policy-fraction 0.25 --opd-off-policy-unit rollouts",
        f"{TOP_K} --opd-off-policy-fraction 1 --opd-off-policy-source dataset --opd-off-policy-key answer",
        f"{REWARDED} {TEACHER} --opd-reward-beta 0.5 --opd-pass-rate-weights 1 1",
    ],
)
def test_a_run_that_makes_sense_has_no_problem(arguments):
    assert problems_of(arguments) == []


RULES = {
    # The three errors of the field's FAQ.
    "opd without a type": (f"{NO_SIGNAL} --use-opd", "--use-opd needs --opd-type: sglang: teacher server"),
    "megatron without a teacher": (
        f"{NO_SIGNAL} --use-opd --opd-type megatron",
        "--opd-type megatron needs --opd-teacher-load: the teacher's checkpoint",
    ),
    "sglang with a teacher checkpoint": (
        f"{GOOD} --opd-teacher-load t",
        "--opd-teacher-load has no effect without --opd-type megatron",
    ),
    # The teacher.
    "sglang without an address": (
        f"{NO_SIGNAL} --use-opd --opd-type sglang",
        "--opd-type sglang needs --rm-url: endpoint of the SGLang teacher",
    ),
    "address without a teacher": (
        f"{REWARDED} --rm-url http://h:1/generate",
        "no effect without --use-opd --opd-type sglang",
    ),
    "address with a megatron teacher": (
        f"{GOOD} --opd-type megatron --opd-teacher-load t",
        "no effect without --use-opd --opd-type sglang",
    ),
    "address that is no URL": (
        f"{NO_SIGNAL} --use-opd --opd-type sglang --rm-url localhost",
        "--rm-url: found 'localhost', expected the server's address",
    ),
    "loss scale of float32": (f"{GOOD} --hysteresis 3", "--hysteresis 3 needs --fp16"),
    "teacher step without a checkpoint": (f"{GOOD} --opd-teacher-ckpt-step 1", "no effect without --opd-teacher-load"),
    "opd option without opd": (f"{REWARDED} --opd-kl-coef 0.5", "--opd-kl-coef 0.5 has no effect without --use-opd"),
    "pure distillation without opd": (
        f"{REWARDED} --opd-only-reward",
        "--opd-only-reward has no effect without --use-opd",
    ),
    "teacher of sft": (f"{SFT} {TEACHER}", "--loss-type sft_loss has none"),
    "nucleus with opd": (f"{GOOD} --rollout-top-p 0.9", "--rollout-top-p 0.9 with --use-opd"),
    "top-k with opd": (f"{GOOD} --rollout-top-k 20", "--rollout-top-k 20 with --use-opd"),
    # Divergences.
    "divergence without opd": (
        f"{REWARDED} --opd-divergence jsd",
        "--opd-divergence jsd has no effect without --use-opd",
    ),
    "two divergences": (
        f"{DIVERGING} --opd-schedule jsd:1",
        "--opd-divergence and --opd-schedule: found both, expected one",
    ),
    "a schedule that cannot be read": (
        f"{MEGATRON} --opd-schedule forward_kl",
        "--opd-schedule: found 'forward_kl', expected pairs such as forward_kl:0.4,reverse_kl:0.6",
    ),
    "a ramp that cannot be read": (f"{GOOD} --opd-coef-ramp 0:0,2:1", "--opd-coef-ramp: found '0:0,2:1', expected"),
    "server teacher without top-k": (
        f"{GOOD} --opd-divergence reverse_kl",
        "--opd-divergence with --opd-type sglang needs --opd-log-prob-top-k",
    ),
    "token rewards without top-k": (
        f"{MEGATRON} --opd-divergence token_reward_direct",
        "token_reward_direct needs --opd-log-prob-top-k",
    ),
    "remainder of token rewards": (
        f"{TOP_K} --opd-divergence token_reward_direct --opd-top-k-remainder truncated",
        "--opd-top-k-remainder truncated has no effect with --opd-divergence token_reward_direct",
    ),
    "jsd beta of one": (
        f"{MEGATRON} --opd-divergence jsd --opd-jsd-beta 1",
        "--opd-jsd-beta: found 1.0, expected a number between 0 and 1",
    ),
    "temperature of a server teacher": (f"{GOOD} --opd-temperature 0.7", "a server always scores at temperature 1"),
    "divergence coefficient without a divergence": (
        f"{GOOD} --opd-divergence-coef 2",
        "no effect without --opd-divergence or",
    ),
    "top-k strategy without top-k": (
        f"{DIVERGING} --opd-top-k-strategy union",
        "no effect without --opd-log-prob-top-k",
    ),
    "wire dtype without top-k": (f"{DIVERGING} --opd-wire-dtype float16", "no effect without --opd-log-prob-top-k"),
    "resident teacher without a Megatron teacher": (
        f"{GOOD} --opd-teacher-resident",
        "no effect without --opd-type megatron",
    ),
    "clamp without a penalty": (
        f"{DIVERGING} --opd-kl-clamp 5",
        "has no effect without a penalty (--opd-kl-coef above 0)",
    ),
    "reward weights without token rewards": (
        f"{DIVERGING} --opd-reward-weight-mode none",
        "without --opd-divergence token_reward_direct",
    ),
    "jsd beta without jsd": (f"{DIVERGING} --opd-jsd-beta 0.1", "--opd-jsd-beta 0.1 has no effect without"),
    "keep fraction without top weighting": (
        f"{GOOD} --opd-token-keep-fraction 0.1",
        "--opd-token-keep-fraction 0.1 has no effect without --opd-token-weighting top",
    ),
    "off-policy column without off-policy samples": (
        f"{TOP_K} --opd-off-policy-key a",
        "no effect without --opd-off-policy-fraction",
    ),
    "off-policy data set without a column": (
        f"{TOP_K} --opd-off-policy-fraction 0.1 --opd-off-policy-source dataset",
        "--opd-off-policy-source dataset needs --opd-off-policy-key",
    ),
    "off-policy column with a teacher": (
        f"{TOP_K} --opd-off-policy-fraction 0.1 --opd-off-policy-key a",
        "--opd-off-policy-key has no effect without --opd-off-policy-source dataset",
    ),
    "off-policy teacher that cannot generate": (
        f"{DIVERGING} --opd-off-policy-fraction 0.1",
        "--opd-off-policy-source teacher needs --opd-type sglang",
    ),
    "off-policy samples without a divergence": (
        f"{GOOD} --opd-off-policy-fraction 0.1",
        "no effect without --opd-divergence or",
    ),
    "weights without a reward": (f"{GOOD} --opd-reward-beta 1", "--opd-reward-beta needs a reward"),
    "pass rates without a reward": (f"{GOOD} --opd-pass-rate-weights 1 1", "--opd-pass-rate-weights needs a reward"),
    "pass rates of one answer": (
        f"{REWARDED} {TEACHER} --n-samples-per-prompt 1 --opd-pass-rate-weights 1 1",
        "one response has no pass rate",
    ),
    "one exponent": (f"{REWARDED} {TEACHER} --opd-pass-rate-weights 1", "found 1, expected two numbers of 0 or more"),
    "a filter without a reward": (f"{GOOD} --dynamic-sampling-filter-path a.b", "needs a reward"),
    "a filter of groups of one": (
        f"{REWARDED} {TEACHER} --n-samples-per-prompt 1 --dynamic-sampling-filter-path a.b",
        "a group of one has one reward",
    ),
    "over-sampling below the batch size": (
        f"{REWARDED} --dynamic-sampling-filter-path a.b --over-sampling-batch-size 1",
        "--over-sampling-batch-size: found 1, expected at least --rollout-batch-size 2",
    ),
    "over-sampling without a filter": (
        f"{REWARDED} --over-sampling-batch-size 4",
        "no effect without --dynamic-sampling-filter",
    ),
    "off-policy rollouts with a filter": (
        f"{REWARDED} {TEACHER} --opd-divergence jsd --opd-log-prob-top-k 4 --dynamic-sampling-filter-path a.b "
        "--opd-off-policy-fraction 0.5 --opd-off-policy-unit rollouts",
        "--opd-off-policy-unit rollouts with --dynamic-sampling-filter-path",
    ),
    # slime's flags.
    "custom rollout function": (f"{GOOD} --rollout-function-path a.b", "custom rollout functions are not supported"),
    "fine-tuning's rollout": (
        f"{GOOD} --rollout-function-path slime.rollout.sft_rollout.generate_rollout",
        "--rollout-function-path is for supervised fine-tuning: add --loss-type sft_loss",
    ),
    "train only without rollouts": (
        f"{GOOD} --debug-train-only",
        "found nothing to train on, expected --load-debug-rollout-data",
    ),
    "replay by epochs": (
        f"{GOOD.replace('--num-rollout', '--num-epoch')} --load-debug-rollout-data b{{rollout_id}}",
        "--num-epoch counts prompts, which a replay does not read: give --num-rollout",
    ),
    "recording path without a number": (
        f"{GOOD} --save-debug-rollout-data rollouts.parquet",
        "--save-debug-rollout-data: found 'rollouts.parquet', expected a path with {rollout_id} in it",
    ),
    "recording path with another brace": (f"{GOOD} --save-debug-rollout-data {{rollout_id}}{{x}}", "no other braces"),
    "recording a replay": (
        f"{GOOD} --save-debug-rollout-data a{{rollout_id}} --load-debug-rollout-data b{{rollout_id}}",
        "the rollouts are recorded already",
    ),
    "rollout only with a replay": (
        f"{GOOD} --debug-rollout-only --load-debug-rollout-data b{{rollout_id}}",
        "--debug-rollout-only with --load-debug-rollout-data: nothing would be done",
    ),
    "rollout only with fine-tuning": (f"{SFT} --debug-rollout-only", "--debug-rollout-only with --loss-type sft_loss"),
    "no advantages": (f"{GOOD} --disable-compute-advantages-and-returns", "is for supervised fine-tuning"),
    "kl in the reward": (f"{GOOD} --kl-coef 0.1", "use --use-kl-loss --kl-loss-coef 0.1"),
    "wandb project without wandb": (f"{GOOD} --wandb-project p", "--wandb-project has no effect without --use-wandb"),
    # Ranges.
    "clamp of zero": (f"{GOOD} --opd-kl-clamp 0", "--opd-kl-clamp: found 0.0, expected a number above 0"),
    "discount above one": (
        f"{GOOD} --opd-kl-discount 1.5",
        "--opd-kl-discount: found 1.5, expected a number from 0 to 1",
    ),
    "keep fraction of zero": (
        f"{GOOD} --opd-token-weighting top --opd-token-keep-fraction 0",
        "--opd-token-keep-fraction: found 0.0, expected a number above 0",
    ),
    "a negative top-k": (f"{MEGATRON} --opd-metrics-top-k -1", "--opd-metrics-top-k: found -1, expected 0 or more"),
    "negative coefficient": (
        f"{GOOD} --opd-kl-coef -1",
        "--opd-kl-coef: found -1.0, expected a number from 0 to 10000",
    ),
    "fraction above one": (
        f"{GOOD} --opd-max-fallback-fraction 1.5",
        "--opd-max-fallback-fraction: found 1.5, expected a number from 0 to 1",
    ),
    "fraction below zero": (f"{GOOD} --opd-max-fallback-fraction -0.1", "expected a number from 0 to 1"),
    "teacher timeout of zero": (
        f"{GOOD} --opd-teacher-timeout-s 0",
        "--opd-teacher-timeout-s: found 0.0, expected a number above 0",
    ),
    "negative generation timeout": (f"{GOOD} --rollout-request-timeout-s -1", "expected a number above 0"),
    "temperature of zero": (
        f"{GOOD} --rollout-temperature 0",
        "--rollout-temperature: found 0.0, expected a number above 0",
    ),
    "top-k of zero": (
        f"{EVALUATED} --eval-top-k 0",
        "--eval-top-k: found 0, expected -1 (all tokens) or a number above 0",
    ),
    "dual clip below one": (f"{GOOD} --eps-clip-c 0.5", "--eps-clip-c: found 0.5, expected a number above 1"),
    "beta of one": (f"{GOOD} --adam-beta2 1", "--adam-beta2: found 1.0, expected 0 or more and below 1"),
    # What a run needs.
    "no student": (f"{MODEL} --prompt-data a --label-key l {ROLLOUT} {TEACHER}", "--hf-checkpoint: found none"),
    "no prompts": (f"{MODEL} --hf-checkpoint a {ROLLOUT} {TEACHER}", "--prompt-data: found none"),
    "no length of the run": (
        f"{MODEL} {DATA} {TEACHER} --rollout-batch-size 2 --rollout-max-response-len 8",
        "--num-rollout: found none",
    ),
    "two lengths of the run": (f"{GOOD} --num-epoch 1", "--num-rollout and --num-epoch: found both"),
    "no batch": (
        f"{MODEL} {DATA} {TEACHER} --num-rollout 1 --rollout-max-response-len 8",
        "--rollout-batch-size: found none",
    ),
    "learning rate of a thousand": (
        f"{GOOD} --lr 1000",
        "--lr: found 1000.0, expected a number from 0 to 1: Adam moves every weight",
    ),
    "no response length": (
        f"{MODEL} {DATA} {TEACHER} --num-rollout 1 --rollout-batch-size 2",
        "--rollout-max-response-len: found none",
    ),
    # The model and its layout.
    "no architecture": (
        f"{DATA} {ROLLOUT} {TEACHER} --num-layers 2",
        "needs --hidden-size, --num-attention-heads, --vocab-size",
    ),
    "groups without their switch": (
        f"{GOOD} --num-query-groups 2",
        "--num-query-groups 2 has no effect without --group-query-attention",
    ),
    "switch without its groups": (
        f"{GOOD} --group-query-attention",
        "--group-query-attention needs --num-query-groups: key and value heads",
    ),
    "heads and groups": (
        f"{GOOD} --group-query-attention --num-query-groups 3",
        "--num-attention-heads 4 cannot be shared evenly by --num-query-groups 3",
    ),
    "width and heads": (f"{GOOD} --hidden-size 33", "--hidden-size 33 is no multiple of --num-attention-heads 4"),
    "processes and layout": (
        f"{GOOD} --actor-num-gpus-per-node 3 --tensor-model-parallel-size 2",
        "3 training processes",
    ),
    "heads and tensor parallel": (
        f"{GOOD} --actor-num-gpus-per-node 8 --tensor-model-parallel-size 8",
        "--tensor-model-parallel-size 8 does not divide the model's 4 attention heads",
    ),
    "groups and tensor parallel": (
        f"{GOOD} --group-query-attention --num-query-groups 2 --actor-num-gpus-per-node 4 --tensor-model-parallel-size 4",
        "does not divide the model's 2 key-value heads",
    ),
    "layers and pipeline": (
        f"{GOOD} --actor-num-gpus-per-node 3 --pipeline-model-parallel-size 3",
        "--pipeline-model-parallel-size 3 does not divide the model's 4 layers",
    ),
    "layers that the last stage leaves": (
        f"{GOOD} --actor-num-gpus-per-node 3 --pipeline-model-parallel-size 3 --decoder-last-pipeline-num-layers 1",
        "does not divide the model's 4 layers that the 1 stages with a number of their own leave",
    ),
    "processes and experts": (
        f"{GOOD} --num-experts 4 --actor-num-gpus-per-node 2 --expert-model-parallel-size 4",
        "2 training processes (--actor-num-nodes × --actor-num-gpus-per-node) are no multiple of 4 (--expert-model-parallel-size",
    ),
    "context parallelism": (
        f"{GOOD} --actor-num-gpus-per-node 2 --context-parallel-size 2",
        "--context-parallel-size 2: packed rows are not split over ranks yet",
    ),
    "two precisions": (f"{GOOD} --bf16 --fp32", "found --bf16 and --fp32, expected one precision"),
    "full recomputation without a method": (f"{GOOD} --recompute-granularity full", "needs --recompute-method"),
    "recomputation without a kind": (
        f"{GOOD} --recompute-method block",
        "no effect without --recompute-granularity full",
    ),
    "two warm-ups": (f"{GOOD} --lr-warmup-iters 1 --lr-warmup-fraction 0.1", "found both, expected one"),
    # Batches.
    "batch and rollout": (
        f"{GOOD} --global-batch-size 3",
        "--global-batch-size 3 does not divide the 4 samples of a rollout",
    ),
    "batch and ranks": (
        f"{GOOD} --actor-num-gpus-per-node 4 --global-batch-size 2",
        "--global-batch-size 2 is no multiple of the 4 data-parallel ranks",
    ),
    "default batch and ranks": (
        f"{GOOD} --actor-num-gpus-per-node 8",
        "the global batch of 4 samples is no multiple of the 8",
    ),
    "steps and batch": (
        f"{GOOD} --num-steps-per-rollout 4 --global-batch-size 2",
        "--num-steps-per-rollout 4 and --global-batch-size 2 contradict each other",
    ),
    "steps and rollout": (
        f"{GOOD} --num-steps-per-rollout 3",
        "--num-steps-per-rollout 3 does not divide the 4 samples",
    ),
    "dynamic batches without a size": (
        f"{GOOD} --use-dynamic-batch-size",
        "--use-dynamic-batch-size needs --max-tokens-per-gpu",
    ),
    # Engines, checkpoints, weights.
    "engines and gpus": (
        f"{GOOD} --rollout-num-gpus 3 --rollout-num-gpus-per-engine 2",
        "--rollout-num-gpus 3 is no multiple",
    ),
    "no engine": (f"{GOOD} --rollout-num-gpus 0", "--rollout-num-gpus: found 0"),
    "colocated engines": (f"{GOOD} --colocate --rollout-num-gpus-per-engine 2", "--colocate: the 1 training GPUs"),
    "a colocated engine over nodes": (
        f"{GOOD} --colocate --actor-num-nodes 2 --actor-num-gpus-per-node 1 --rollout-num-gpus-per-engine 2",
        "does not divide --actor-num-gpus-per-node 1",
    ),
    "more engines than shared gpus": (f"{GOOD} --colocate --rollout-num-gpus 2", "more than the 1 training GPUs"),
    "save interval without save": (f"{GOOD} --save-interval 1", "--save-interval 1 has no effect without --save"),
    "checkpoint step without a checkpoint": (
        f"{GOOD} --ckpt-step 1",
        "--ckpt-step 1 has no effect without --load or --save",
    ),
    "save minutes without save": (
        f"{GOOD} --save-interval-minutes 5",
        "--save-interval-minutes 5.0 has no effect without",
    ),
    "export path without a step": (f"{GOOD} --save s --save-hf out", "--save-hf: found 'out', expected a path with"),
    "export path with an unknown name": (f"{GOOD} --save s --save-hf out_{{step}}", "--save-hf: found 'out_{step}'"),
    "shared memory of two nodes": (
        f"{GOOD} --actor-num-nodes 2 --update-weight-transport tensor",
        "--update-weight-transport tensor is shared memory on one node",
    ),
    "disk directory without the disk transport": (
        f"{GOOD} --update-weight-disk-dir d",
        "no effect without --update-weight-transport disk",
    ),
    "unreadable layer pattern": (
        f"{GOOD} --moe-layer-freq x",
        "--moe-layer-freq: found 'x', expected a whole number",
    ),
    "latent rank without latent attention": (
        f"{GOOD} --q-lora-rank 8",
        "--q-lora-rank 8 has no effect without --multi-latent-att",
    ),
    # Data, reward, evaluation, algorithm.
    "template arguments": (f"{GOOD} --apply-chat-template --apply-chat-template-kwargs [1]", "expected a JSON object"),
    "broken template arguments": (
        f"{GOOD} --apply-chat-template --apply-chat-template-kwargs x",
        "expected a JSON object",
    ),
    "template arguments of no template": (
        f"{GOOD} --apply-chat-template-kwargs '{{\"a\": 1}}'",
        "no effect without --apply-chat-template",
    ),
    "two rewards": (f"{REWARDED} --custom-rm-path a.b", "--rm-type and --custom-rm-path: found both"),
    "reward without answers": (
        f"{MODEL} --hf-checkpoint s --prompt-data a {ROLLOUT} --rm-type math",
        "--rm-type math needs --label-key",
    ),
    "hook of another": (
        f"{GOOD} --custom-reward-post-process-path a.b",
        "--custom-reward-post-process-path: found 'a.b'",
    ),
    "nothing to learn from": (NO_SIGNAL, "nothing to learn from"),
    "group of one": (f"{REWARDED} --n-samples-per-prompt 1", "its group of one is always 0"),
    "kl without a reference": (f"{GOOD} --use-kl-loss", "--use-kl-loss needs --ref-load"),
    "option of Megatron that is refused": (f"{GOOD} --tp-comm-overlap", "--tp-comm-overlap is not supported: "),
    "number of Megatron out of range": (
        f"{GOOD} --overlap-grad-reduce --bucket-size 0",
        "--bucket-size (--ddp-bucket-size): found 0, expected a number above 0",
    ),
    "option of Megatron without another": (
        f"{GOOD} --overlap-param-gather",
        "--overlap-param-gather has no effect without --overlap-grad-reduce",
    ),
    "weight of no loss": (f"{GOOD} --kl-loss-coef 0.1", "--kl-loss-coef 0.1 has no effect without --use-kl-loss"),
    "mask of a redacted file": (
        f"{MODEL} --hf-checkpoint s --prompt-data a {ROLLOUT} --use-opd --opd-type sglang --rm-url http://***@h:1/generate",
        "--rm-url: found '***' where a secret belongs",
    ),
    "interval without data": (f"{GOOD} --eval-interval 1", "--eval-interval needs --eval-prompt-data"),
    "evaluation without data": (EVALUATE_ONLY, "found no --eval-prompt-data"),
    "odd number of evaluation values": (
        f"{EVALUATED} --eval-prompt-data a b c",
        "found 3 values ['a', 'b', 'c'], expected pairs of NAME FILE",
    ),
    "one name for two files": (f"{EVALUATED} --eval-prompt-data a b a c", "found the name a twice"),
    "evaluation without answers": (
        f"{MODEL} --hf-checkpoint s --prompt-data a {ROLLOUT} {TEACHER} --eval-interval 1 --eval-prompt-data a b",
        "needs --eval-label-key or --label-key",
    ),
    "evaluation without a length": (
        f"{MODEL} --hf-checkpoint s --num-rollout 0 --label-key l --eval-prompt-data a b",
        "needs --eval-max-response-len",
    ),
}


@pytest.mark.parametrize("arguments, sentence", RULES.values(), ids=RULES)
def test_a_rule_that_is_broken_alone_gives_one_sentence(arguments, sentence):
    (problem,) = problems_of(arguments)
    assert sentence in problem
    assert "\n" not in problem


def test_every_rule_is_broken_by_a_test():
    broken = {check for arguments, _ in RULES.values() for check in CHECKS if check(config_of(arguments))}
    assert broken == set(CHECKS)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:13141/generate",
        "http://localhost:port/generate",
        "http://localhost:13141/generate?key=1",
        "http://localhost:99999/generate",
        "http:///generate",
        "ftp://h:1/generate",
        "http://h:1/v1/completions",
        "http://h:1 /generate",
        "http://[::1/generate",
    ],
)
def test_a_malformed_teacher_address_is_refused(url):
    arguments = [*shlex.split(GOOD), "--rm-url", url]
    (problem,) = problems(parse(arguments))
    assert problem.startswith("--rm-url: found ") and "expected the server's address, http://HOST:PORT" in problem


def test_slimes_script_for_an_sglang_teacher_is_accepted_as_it_is():
    assert problems_of(SLIME_SGLANG) == []


def test_slimes_script_for_a_megatron_teacher_lacks_only_its_label_key():
    """slime's own script rewards every answer with 0, because it names no answers."""
    (problem,) = problems_of(SLIME_MEGATRON)
    assert problem.startswith("--rm-type math needs --label-key")
    assert problems_of(f"{SLIME_MEGATRON} --label-key label") == []


def test_no_check_edits_the_configuration():
    for arguments, _ in RULES.values():
        config = config_of(arguments)
        before = copy.deepcopy(config)
        problems(config)
        assert config == before
