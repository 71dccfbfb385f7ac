# Shared functions of the run scripts: check input, start processes, wait for them with a deadline,
# and stop exactly those. Sourced, not run.

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/.." && pwd)
BASE=$(realpath -m "${BASE:-$PWD}")  # checkpoints, data and results; the scripts' paths may be set one by one, too
LOGS=$(realpath -m "${LOGS:-$BASE/logs}")
PYTHON=${PYTHON:-python}
STARTED=()  # process groups of this script
JOB=        # the Ray job that is running
RAY_DIRECTORY=  # where its cluster keeps sessions and logs
JOBS=0
# The token of this script's Ray cluster, which exists only in the environment of its processes: without a token Ray
# runs the code of anyone who reaches its ports. Both variables are needed: Ray's job client does not send a token that
# is in the home directory.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
unset RAY_AUTH_TOKEN_PATH

fail() {
   echo "error: $*" >&2
   exit 1
}

require_directory() { # VARIABLE, description
   [ -d "${!1}" ] || fail "$1: found no directory ${!1}, expected $2"
}

require_file() { # VARIABLE, description
   [ -f "${!1}" ] || fail "$1: found no file ${!1}, expected $2"
}

count_of() { # a comma-separated list
   local items=()
   IFS=, read -ra items <<<"$1"
   echo "${#items[@]}"
}

free_port() {
   PYTHONPATH="$ROOT" "$PYTHON" -m slime_opd.engine.ports
}

# Run a command in its own process group and wait for it. A signal to this script then stops it at once, while bash
# would wait for a command in the foreground.
run() { # command…
   setsid "$@" &
   STARTED+=("$!")
   wait "$!"
   unset 'STARTED[-1]'
}

# Start a command in its own process group, with its output in a file. Sets PID.
start() { # LOG, command…
   local log=$1
   shift
   mkdir -p "$(dirname "$log")"
   setsid "$@" >"$log" 2>&1 &
   PID=$!
   STARTED+=("$PID")
}

# Stop the job and the process groups of this script, last first. Ray's logs are kept if the script failed.
stop_started() {
   local status=$? index pid deadline
   if [ -n "$JOB" ]; then
      timeout 130 ray job stop --address "$RAY_DASHBOARD" "$JOB" >/dev/null 2>&1 || true
      JOB=
   fi
   for ((index = ${#STARTED[@]} - 1; index >= 0; index--)); do
      pid=${STARTED[index]}
      kill -TERM -- "-$pid" 2>/dev/null || continue
      deadline=$((SECONDS + 30))
      { # without the messages that bash prints when a process ends
         while kill -0 -- "-$pid" && ((SECONDS < deadline)); do sleep 0.5; done
         kill -KILL -- "-$pid" || true
         wait "$pid" || true
      } 2>/dev/null
   done
   STARTED=()
   [ "$status" != 0 ] || rm -rf "$RAY_DIRECTORY"
}
trap stop_started EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

wait_for_url() { # name, URL, process id, its log, seconds
   local name=$1 url=$2 pid=$3 log=$4 deadline=$((SECONDS + $5))
   command -v curl >/dev/null || fail "found no curl, which is needed to wait for $name"
   echo "waiting for $name at $url (log: $log)"
   until curl --silent --fail --max-time 5 --output /dev/null "$url"; do
      if ! kill -0 "$pid" 2>/dev/null; then
         tail -n 30 "$log" >&2
         fail "$name ended before it was ready; the end of $log is above"
      elif ((SECONDS >= deadline)); then
         tail -n 30 "$log" >&2
         fail "$name was not ready after $5 seconds; the end of $log is above"
      fi
      sleep 2
   done
}

# Convert a Hugging Face checkpoint for Megatron, unless that is done. An interrupted conversion leaves no directory
# with the final name. Needs MODEL_ARGS.
convert_once() { # Hugging Face directory, Megatron directory
   [ -d "$2" ] && return
   echo "converting $1 to $2"
   rm -rf "$2.partial"
   run env PYTHONPATH="$ROOT" "$PYTHON" "$ROOT/tools/convert_hf_to_torch_dist.py" "${MODEL_ARGS[@]}" \
      --hf-checkpoint "$1" --save "$2.partial"
   mv "$2.partial" "$2"
}

# Start a Ray cluster for this script only: with its own ports and directory and only the given GPUs, so that Ray
# neither joins another cluster nor uses other GPUs. `ray stop` would stop every Ray on this host; with --block, ending
# this process ends its cluster, at once because draining is off. Sets RAY_DASHBOARD.
start_ray() { # comma-separated GPUs; "" without GPUs
   local dashboard_port
   dashboard_port=$(free_port)
   RAY_DIRECTORY=$(mktemp -d /tmp/slime_opd.XXXXXX)  # a short path, because Ray creates sockets in it
   # A stopped job may save first; by default Ray kills it after 3 seconds.
   start "$LOGS/ray.log" env CUDA_VISIBLE_DEVICES="$1" RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_JOB_STOP_WAIT_TIME_S=120 \
      ray start --head --block --num-gpus "$(count_of "$1")" --temp-dir "$RAY_DIRECTORY" --disable-usage-stats \
      --port "$(free_port)" --ray-client-server-port "$(free_port)" \
      --dashboard-host 127.0.0.1 --dashboard-port "$dashboard_port" --dashboard-agent-listen-port "$(free_port)"
   RAY_DASHBOARD=http://127.0.0.1:$dashboard_port
   wait_for_url "the Ray head" "$RAY_DASHBOARD/api/gcs_healthz" "$PID" "$LOGS/ray.log" 120
}

# The job's process outlives its cluster, so an early end of the script stops the job by its id.
train() { # flags of slime_opd.train
   JOB=slime_opd_$$_$((JOBS += 1))
   run ray job submit --address "$RAY_DASHBOARD" --submission-id "$JOB" \
      --runtime-env-json "{\"env_vars\": {\"PYTHONPATH\": \"$ROOT\"}}" \
      -- "$PYTHON" -m slime_opd.train "$@"
   JOB=
}
