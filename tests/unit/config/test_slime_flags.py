"""The flags of slime's run scripts: each is read, or refused by name with the reason."""

from __future__ import annotations

import pytest

from slime_opd.config import parse
from slime_opd.errors import ConfigError

# Every flag of slime's model scripts, standard recipes and distillation examples, with a value that they give it.
ARGUMENTS = """
# model architecture (scripts/models)
--add-qkv-bias
--attention-dropout 0.0
--disable-bias-linear
--ffn-hidden-size 18432
--group-query-attention
--hidden-dropout 0.0
--hidden-size 7168
--kv-channels 128
--kv-lora-rank 512
--make-vocab-size-divisible-by 64
--max-position-embeddings 32768
--moe-aux-loss-coeff 0
--moe-ffn-hidden-size 2048
--moe-grouped-gemm
--moe-layer-freq [0]*3+[1]*61
--moe-permute-fusion
--moe-router-bias-update-rate 0
--moe-router-dtype fp32
--moe-router-enable-expert-bias
--moe-router-group-topk 4
--moe-router-load-balancing-type seq_aux_loss
--moe-router-num-groups 8
--moe-router-pre-softmax
--moe-router-score-function sigmoid
--moe-router-topk 8
--moe-router-topk-scaling-factor 2.5
--moe-shared-expert-intermediate-size 2048
--moe-token-dispatcher-type alltoall
--moe-token-drop-policy probs
--mscale 1.0
--mscale-all-dim 1.0
--multi-latent-attention
--norm-epsilon 1e-6
--normalization RMSNorm
--num-attention-heads 128
--num-experts 128
--num-layers 64
--num-query-groups 8
--position-embedding-type rope
--post-mlp-layernorm
--post-self-attn-layernorm
--q-lora-rank 1536
--qk-head-dim 128
--qk-layernorm
--qk-pos-emb-head-dim 64
--rotary-base 10000
--rotary-interleaved
--rotary-percent 0.5
--rotary-scaling-factor 40
--spec slime_plugins.models.glm4 get_glm_spec
--swiglu
--untie-embeddings-and-output-weights
--use-rope-scaling
--use-rotary-position-embeddings
--v-head-dim 128
--vocab-size 129280
# parallelism and Megatron training
--accumulate-allreduce-grads-in-fp32
--attention-backend flash
--attention-softmax-in-fp32
--context-parallel-size 1
--deterministic-mode
--enable-mtp-training
--expert-model-parallel-size 1
--expert-tensor-parallel-size 1
--max-tokens-per-gpu 16384
--moe-enable-deepep
--mtp-loss-scaling-factor 0.2
--mtp-num-layers 1
--no-masked-softmax-fusion
--no-position-embedding
--no-rope-fusion
--pipeline-model-parallel-size 1
--recompute-granularity full
--recompute-method uniform
--recompute-num-layers 1
--seq-length 32768
--sequence-parallel
--tensor-model-parallel-size 2
--use-dynamic-batch-size
# optimizer
--adam-beta1 0.9
--adam-beta2 0.98
--lr 1e-6
--lr-decay-style constant
--lr-warmup-fraction 0.1
--min-lr 1e-6
--optimizer adam
--optimizer-cpu-offload
--use-precision-aware-optimizer
--weight-decay 0.1
# checkpoints
--hf-checkpoint Qwen3-8B
--load Qwen3-8B_slime/
--opd-teacher-load Qwen3-8B_torch_dist
--ref-load Qwen3-8B_torch_dist
--save Qwen3-8B_slime/
--save-interval 20
# cluster
--actor-num-gpus-per-node 8
--actor-num-nodes 1
--colocate
--rollout-num-gpus 4
--rollout-num-gpus-per-engine 1
# rollout and data
--apply-chat-template
--balance-data
--dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
--global-batch-size 64
--input-key prompt
--label-key label
--n-samples-per-prompt 4
--num-epoch 3
--num-rollout 300
--num-steps-per-rollout 4
--over-sampling-batch-size 256
--overlap-cpu-optimizer-d2h-h2d
--prompt-data dapo-math-17k/dapo-math-17k.jsonl
--rollout-batch-size 16
--rollout-function-path slime.rollout.sft_rollout.generate_rollout
--rollout-max-response-len 16384
--rollout-shuffle
--rollout-temperature 1
# evaluation
--eval-interval 20
--eval-max-response-len 16384
--eval-prompt-data aime aime-2024/aime-2024.jsonl
--eval-top-k 1
--eval-top-p 1
--n-samples-per-eval-prompt 16
# algorithm and OPD
--advantage-estimator grpo
--calculate-per-token-loss
--custom-reward-post-process-path slime.rollout.on_policy_distillation.post_process_rewards
--custom-rm-path slime.rollout.on_policy_distillation.reward_func
--disable-compute-advantages-and-returns
--entropy-coef 0.00
--eps-clip 0.2
--eps-clip-high 0.28
--kl-coef 0.00
--kl-loss-coef 0.00
--kl-loss-type low_var_kl
--loss-type sft_loss
--opd-kl-coef 1.0
--opd-type megatron
--rm-type math
--rm-url http://127.0.0.1:13141/generate
--use-kl-loss
--use-opd
# SGLang pass-through
--sglang-attention-backend fa3
--sglang-cuda-graph-bs 1 2 4 8 16 24
--sglang-enable-deterministic-inference
--sglang-mem-fraction-static 0.4
--sglang-speculative-algorithm EAGLE
--sglang-speculative-eagle-topk 1
--sglang-speculative-num-draft-tokens 4
--sglang-speculative-num-steps 3
# tracking and debugging
--debug-train-only
--use-wandb
--wandb-group qwen2.5-0.5B-gsm8k-deterministic
--wandb-host https://wandb.ai/
--wandb-project slime-dev
--wandb-team glm-zero
"""
FLAGS = [line for line in ARGUMENTS.splitlines() if line and not line.startswith("#")]
REFUSED = {
    "--enable-mtp-training": "is not supported: layers for multi-token prediction stay as they are",
}


@pytest.mark.parametrize("line", FLAGS, ids=lambda line: line.split()[0])
def test_every_flag_is_read_or_refused_with_the_reason(line):
    flag, *values = line.split()
    if reason := REFUSED.get(flag):
        with pytest.raises(ConfigError, match=f"{flag} {reason}"):
            parse([flag, *values])
    else:
        parse([flag, *values])


def test_all_of_them_together_are_read():
    values = [word for line in FLAGS if line.split()[0] not in REFUSED for word in line.split()]
    assert parse(values).model.spec == ("slime_plugins.models.glm4", "get_glm_spec")
