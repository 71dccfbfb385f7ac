#!/usr/bin/env bash
# Qwen3-8B-Base learns from Qwen3-8B, which the trainer itself holds and forwards (a Megatron
# teacher has the student's architecture), with the math verifier's reward beside it.
# One node of eight 80 GB GPUs: four train, four generate.
# DRY_RUN=1 prints the flags of the run and starts nothing.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$ROOT/scripts/models/qwen3-8B.sh"

STUDENT=${STUDENT:-$BASE/Qwen3-8B-Base}
STUDENT_MEGATRON=${STUDENT_MEGATRON:-${STUDENT}_torch_dist}
TEACHER=${TEACHER:-$BASE/Qwen3-8B}
TEACHER_MEGATRON=${TEACHER_MEGATRON:-${TEACHER}_torch_dist}
SAVE=${SAVE:-$BASE/Qwen3-8B_slime_opd_megatron}
PROMPTS=${PROMPTS:-$BASE/dapo-math-17k.parquet}
MATH500=${MATH500:-$BASE/math500.parquet}
RAY_GPUS=${RAY_GPUS:-0,1,2,3,4,5,6,7}

CLUSTER_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 4
   --rollout-num-gpus 4
   --rollout-num-gpus-per-engine 1
   --update-weight-transport broadcast
)

CHECKPOINT_ARGS=(
   --hf-checkpoint "$STUDENT"
   --ref-load "$STUDENT_MEGATRON"
   --load "$SAVE"
   --save "$SAVE"
   --save-interval 20
)

ROLLOUT_ARGS=(
   --prompt-data "$PROMPTS"
   --input-key prompt
   --label-key reward_model.ground_truth
   --apply-chat-template
   --rollout-shuffle
   --num-rollout 300
   --rollout-batch-size 16
   --n-samples-per-prompt 4
   --rollout-max-response-len 16384
   --rollout-temperature 1
   --global-batch-size 64
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 20
   --eval-prompt-data math500 "$MATH500"
   --eval-label-key reward_model.ground_truth
   --eval-rm-type math
   --n-samples-per-eval-prompt 1
   --eval-max-response-len 16384
   --eval-temperature 0.6
   --eval-top-p 0.95
)

REWARD_ARGS=(
   --rm-type math
)

OPD_ARGS=(
   --advantage-estimator grpo
   --use-opd
   --opd-type megatron
   --opd-kl-coef 1.0
   --opd-teacher-load "$TEACHER_MEGATRON"
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
)

PARALLEL_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

PRECISION_ARGS=(
   --bf16
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --attention-backend auto
)

SGLANG_ARGS=(
   --sglang-mem-fraction-static 0.7
)

TRAIN_ARGS=(
   "${MODEL_ARGS[@]}" "${CLUSTER_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}"
   "${REWARD_ARGS[@]}" "${OPD_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${PRECISION_ARGS[@]}"
   "${SGLANG_ARGS[@]}" "$@"
)

if [ "${DRY_RUN:-0}" = 1 ]; then
   printf '%s\n' "${TRAIN_ARGS[@]}"
   exit 0
fi

require_directory STUDENT "the Hugging Face checkpoint of Qwen3-8B-Base"
require_directory TEACHER "the Hugging Face checkpoint of Qwen3-8B"
require_file PROMPTS "DAPO-Math-17k as Parquet"
require_file MATH500 "MATH-500 as Parquet"
convert_once "$STUDENT" "$STUDENT_MEGATRON"
convert_once "$TEACHER" "$TEACHER_MEGATRON"

start_ray "$RAY_GPUS"
train "${TRAIN_ARGS[@]}"
