#!/usr/bin/env bash
# Qwen3-8B learns from Qwen3-32B, which an SGLang server of this script serves.
# One node of eight 80 GB GPUs: four train, two generate, two serve the teacher.
# DRY_RUN=1 prints the flags of the run and starts nothing.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$ROOT/scripts/models/qwen3-8B.sh"

STUDENT=${STUDENT:-$BASE/Qwen3-8B}
STUDENT_MEGATRON=${STUDENT_MEGATRON:-${STUDENT}_torch_dist}
TEACHER=${TEACHER:-$BASE/Qwen3-32B}
SAVE=${SAVE:-$BASE/Qwen3-8B_slime_opd}
PROMPTS=${PROMPTS:-$BASE/dapo-math-17k.parquet}
MATH500=${MATH500:-$BASE/math500.parquet}

# Ray sees the first six GPUs only. The teacher's bfloat16 weights alone are 66 GB: two 80 GB
# GPUs leave room for long sequences; one of 141 GB does too (TEACHER_GPUS=7).
RAY_GPUS=${RAY_GPUS:-0,1,2,3,4,5}
TEACHER_GPUS=${TEACHER_GPUS:-6,7}
TEACHER_PORT=${TEACHER_PORT:-13141}
TEACHER_READY_SECONDS=${TEACHER_READY_SECONDS:-1200}

CLUSTER_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 4
   --rollout-num-gpus 2
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

# No --rm-type: the teacher is all there is to learn from.
OPD_ARGS=(
   --advantage-estimator grpo
   --use-opd
   --opd-type sglang
   --opd-kl-coef 1.0
   --rm-url "http://127.0.0.1:$TEACHER_PORT/generate"
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
   "${OPD_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${PRECISION_ARGS[@]}" "${SGLANG_ARGS[@]}" "$@"
)

if [ "${DRY_RUN:-0}" = 1 ]; then
   printf '%s\n' "${TRAIN_ARGS[@]}"
   exit 0
fi

require_directory STUDENT "the Hugging Face checkpoint of Qwen3-8B"
require_directory TEACHER "the Hugging Face checkpoint of Qwen3-32B"
require_file PROMPTS "DAPO-Math-17k as Parquet"
require_file MATH500 "MATH-500 as Parquet"
convert_once "$STUDENT" "$STUDENT_MEGATRON"

start "$LOGS/teacher.log" env CUDA_VISIBLE_DEVICES="$TEACHER_GPUS" "$PYTHON" -m sglang.launch_server \
   --model-path "$TEACHER" --tp "$(count_of "$TEACHER_GPUS")" --host 127.0.0.1 --port "$TEACHER_PORT" \
   --chunked-prefill-size 4096 --mem-fraction-static 0.8
wait_for_url "the teacher" "http://127.0.0.1:$TEACHER_PORT/health" "$PID" "$LOGS/teacher.log" "$TEACHER_READY_SECONDS"

start_ray "$RAY_GPUS"
train "${TRAIN_ARGS[@]}"
