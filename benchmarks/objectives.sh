#!/usr/bin/env bash
# Every kind of objective on the quickstart's task: final accuracy, rollouts to 90% of the teacher, seconds, bytes on the wire.
#
#   bash examples/quickstart/run.sh      # makes the teacher and the student
#   bash benchmarks/objectives.sh [NAME…]
#
# Each run starts from the quickstart's student and takes the same prompts, 128 responses and one optimizer step per rollout. What is
# finished under OUTPUT is not done again; names choose some of the runs. About two minutes each on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/../examples/common.sh"

VENV=${VENV:-$ROOT/.venv}
WORK=$(realpath -m "${WORK:-$ROOT/examples/quickstart/work}")
OUTPUT=$(realpath -m "${OUTPUT:-$ROOT/build/objectives}")
ROLLOUTS=${ROLLOUTS:-40}
LOGS=$OUTPUT/logs
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false PYTHONPATH=$ROOT
PATH=$(realpath "$VENV")/bin:$PATH
PYTHON=$(realpath "$VENV")/bin/python
NAMES=("$@")
require_directory WORK "the quickstart's results: run examples/quickstart/run.sh first"
require_directory VENV "the quickstart's environment"
mkdir -p "$LOGS"

learn() { # name, flags of the objective…
   local name=$1
   shift
   [[ ${#NAMES[@]} -eq 0 || " ${NAMES[*]} " == *" $name "* ]] || return 0
   [ -d "$OUTPUT/$name" ] && return
   rm -rf "$OUTPUT/$name.partial"
   echo "== $name: $*"
   train --megatron-to-hf-mode bridge --use-dynamic-batch-size --max-tokens-per-gpu 16384 --adam-beta2 0.98 \
      --calculate-per-token-loss --rollout-shuffle --input-key prompt --eval-prompt-data addition "$WORK/task/heldout.jsonl" \
      --eval-label-key label --eval-rm-type exact_match --eval-max-response-len 40 --hf-checkpoint "$WORK/student/hf" \
      --load "$WORK/student/torch_dist" --prompt-data "$WORK/task/worked.jsonl" --label-key label --rm-type exact_match \
      --num-rollout "$ROLLOUTS" --rollout-max-response-len 40 --eval-interval 2 --weight-decay 0 --print-samples-interval 0 \
      --rollout-batch-size 128 --n-samples-per-prompt 1 --lr 1e-4 --use-opd --opd-only-reward \
      --run-dir "$OUTPUT/$name.partial" "$@" >"$LOGS/$name.log" 2>&1 || { tail -n 20 "$LOGS/$name.log"; fail "$name failed; its log: $LOGS/$name.log"; }
   mv "$OUTPUT/$name.partial" "$OUTPUT/$name"
}

start_ray ""
PORT=$(free_port)
start "$LOGS/teacher.log" "$PYTHON" -m slime_opd.engine.cpu_launcher --model-path "$WORK/teacher/hf" --host 127.0.0.1 --port "$PORT"
wait_for_url "the teacher" "http://127.0.0.1:$PORT/health" "$PID" "$LOGS/teacher.log" 180
SERVER=(--opd-type sglang --rm-url "http://127.0.0.1:$PORT/generate")
MEGATRON=(--opd-type megatron --opd-teacher-load "$WORK/teacher/torch_dist")
TOP=(--opd-log-prob-top-k 4)
GROUPED=(--rollout-batch-size 16 --n-samples-per-prompt 8)

learn penalty "${SERVER[@]}"
learn penalty_discount "${MEGATRON[@]}" --opd-kl-discount 0.9
learn penalty_clamp "${MEGATRON[@]}" --opd-kl-clamp 5
learn penalty_megatron "${MEGATRON[@]}"
learn reverse_kl "${MEGATRON[@]}" --opd-divergence reverse_kl
learn forward_kl "${MEGATRON[@]}" --opd-divergence forward_kl
learn jsd "${MEGATRON[@]}" --opd-divergence jsd
learn forward_then_reverse "${MEGATRON[@]}" --opd-schedule forward_kl:0.4,reverse_kl:0.6
learn token_importance_soft "${MEGATRON[@]}" --opd-divergence reverse_kl --opd-token-weighting soft
learn token_importance_top "${MEGATRON[@]}" --opd-divergence reverse_kl --opd-token-weighting top
learn reward_weighted "${MEGATRON[@]}" --opd-divergence reverse_kl --opd-reward-beta 1
learn pass_rate_weighted "${MEGATRON[@]}" "${GROUPED[@]}" --opd-divergence reverse_kl --opd-pass-rate-weights 1 1
learn reverse_kl_top_student "${SERVER[@]}" "${TOP[@]}" --opd-divergence reverse_kl
learn forward_kl_top_teacher "${SERVER[@]}" "${TOP[@]}" --opd-divergence forward_kl --opd-top-k-strategy only_tch
learn jsd_top_union "${SERVER[@]}" "${TOP[@]}" --opd-divergence jsd --opd-top-k-strategy union
learn token_reward "${SERVER[@]}" "${TOP[@]}" --opd-divergence token_reward_direct
learn off_policy "${SERVER[@]}" "${TOP[@]}" --opd-divergence forward_kl --opd-top-k-strategy only_tch --opd-off-policy-fraction 0.25

run "$PYTHON" "$ROOT/benchmarks/objectives.py" "$OUTPUT" "$WORK/teacher_evaluated"
