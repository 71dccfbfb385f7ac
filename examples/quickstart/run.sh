#!/usr/bin/env bash
# On-policy distillation from start to end on a machine with no GPU: real Megatron-core, SGLang and Ray.
#
#   bash examples/quickstart/run.sh
#
# Sets up .venv, teaches a tiny teacher and a careless student by supervised fine-tuning, then distils the student by OPD with an SGLang teacher,
# by OPD with a Megatron teacher, and by GRPO with the task reward alone. README.md beside this file tells the story.
# Everything is written under WORK; what is finished there is not done again.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

VENV=${VENV:-$ROOT/.venv}
WORK=$(realpath -m "${WORK:-$HERE/quickstart/work}")
ROLLOUTS=${ROLLOUTS:-60}
LOGS=$WORK/logs
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m%s\033[0m\n' "quickstart: $*"; }

say "1/7 setting up $VENV"
bash "$ROOT/tools/setup_cpu.sh" "$VENV"
PATH=$(realpath "$VENV")/bin:$PATH
PYTHON=$(realpath "$VENV")/bin/python
mkdir -p "$LOGS"

say "2/7 making the task: three-digit addition with worked columns"
[ -d "$WORK/task" ] || { run "$PYTHON" "$HERE/quickstart/task.py" "$WORK/task.partial" && mv "$WORK/task.partial" "$WORK/task"; }
head -n 1 "$WORK/task/worked.jsonl" "$WORK/task/careless.jsonl"

COMMON=(--megatron-to-hf-mode bridge --use-dynamic-batch-size --max-tokens-per-gpu 16384
   --adam-beta2 0.98 --calculate-per-token-loss --rollout-shuffle --input-key prompt)
EVALUATION=(--eval-prompt-data addition "$WORK/task/heldout.jsonl" --eval-label-key label
   --eval-rm-type exact_match --eval-max-response-len 40)

start_ray ""

# Fine-tune on a data set's responses, then write the result for Hugging Face and for Megatron. A name that exists is done.
fine_tune() { # name, starting model, data, rollouts of ten steps, learning rate
   [ -d "$WORK/$1" ] && return
   rm -rf "$WORK/$1.partial" "$WORK/$1.training"
   train "${COMMON[@]}" --loss-type sft_loss --hf-checkpoint "$2" --prompt-data "$3" --label-key response \
      --num-rollout "$4" --rollout-batch-size 640 --global-batch-size 64 \
      --lr "$5" --lr-decay-style cosine --lr-warmup-iters 20 --save "$WORK/$1.training"
   mkdir -p "$WORK/$1.partial"
   run "$PYTHON" "$ROOT/tools/convert_torch_dist_to_hf.py" --input-dir "$WORK/$1.training" \
      --output-dir "$WORK/$1.partial/hf" --origin-hf-dir "$2"
   run "$PYTHON" "$ROOT/tools/convert_hf_to_torch_dist.py" --hf-checkpoint "$WORK/$1.partial/hf" \
      --save "$WORK/$1.partial/torch_dist"
   mv "$WORK/$1.partial" "$WORK/$1"
}
export PYTHONPATH=$ROOT
say "3/7 the teacher: 450 steps on worked examples"
fine_tune teacher "$WORK/task/initial" "$WORK/task/worked.jsonl" 45 3e-3
say "4/7 the student: the teacher after 80 steps on careless examples (carries forgotten, columns miscounted)"
fine_tune student "$WORK/teacher/hf" "$WORK/task/careless.jsonl" 8 1e-3

# One run of 128 responses per rollout and one optimizer step each, from the same student on the same prompts.
learn() { # name, flags of the method…
   local name=$1
   shift
   [ -d "$WORK/$name" ] && return
   rm -rf "$WORK/$name.partial"
   train "${COMMON[@]}" "${EVALUATION[@]}" --hf-checkpoint "$WORK/student/hf" --load "$WORK/student/torch_dist" \
      --prompt-data "$WORK/task/worked.jsonl" --label-key label --rm-type exact_match \
      --num-rollout "$ROLLOUTS" --rollout-max-response-len 40 --eval-interval 5 --weight-decay 0 \
      --print-samples-interval 20 --run-dir "$WORK/$name.partial" "$@"
   mv "$WORK/$name.partial" "$WORK/$name"
}
OPD=(--use-opd --opd-only-reward --rollout-batch-size 128 --n-samples-per-prompt 1 --lr 1e-4)

say "5/7 OPD with an SGLang teacher"
if [ ! -d "$WORK/opd_sglang" ]; then
   PORT=$(free_port)
   start "$LOGS/teacher.log" "$PYTHON" -m slime_opd.engine.cpu_launcher \
      --model-path "$WORK/teacher/hf" --host 127.0.0.1 --port "$PORT"
   wait_for_url "the teacher" "http://127.0.0.1:$PORT/health" "$PID" "$LOGS/teacher.log" 180
   learn opd_sglang "${OPD[@]}" --opd-type sglang --rm-url "http://127.0.0.1:$PORT/generate"
fi
say "6/7 OPD with a Megatron teacher"
learn opd_megatron "${OPD[@]}" --opd-type megatron --opd-teacher-load "$WORK/teacher/torch_dist"
say "7/7 GRPO with the task reward alone"
learn grpo --advantage-estimator grpo --rollout-batch-size 16 --n-samples-per-prompt 8 --lr 2e-4

say "and the teacher itself, for comparison: an evaluation without training"
if [ ! -d "$WORK/teacher_evaluated" ]; then
   train "${COMMON[@]}" "${EVALUATION[@]}" --hf-checkpoint "$WORK/teacher/hf" --num-rollout 0 \
      --run-dir "$WORK/teacher_evaluated.partial"
   mv "$WORK/teacher_evaluated.partial" "$WORK/teacher_evaluated"
fi

say "done"
run "$PYTHON" "$HERE/quickstart/report.py" "$WORK"
