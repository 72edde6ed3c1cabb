#!/usr/bin/env bash
# What: two Ray nodes on this machine and a search on them; a rehearsal for a real cluster.
# Run:  bash configs/cluster/local_two_nodes.sh [more options of `ddray tune`]
# Edit: CPUS_PER_NODE and RAY_PORT (environment), the search at the end. `ddray` and `ray` must be on the PATH
#       (source .venv/bin/activate). Only the processes started here are stopped, other Ray instances stay.
set -euo pipefail

cpus="${CPUS_PER_NODE:-1}"
port="${RAY_PORT:-6390}"
export RAY_USAGE_STATS_ENABLED=0
# Ray listens on the machine's own address, not only on 127.0.0.1: without a token, whoever reaches it runs code as you.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
logs=$(mktemp -d "${TMPDIR:-/tmp}/ddray-two-nodes.XXXXXX")
pids=()

stop() {
    # --block makes `ray start` the parent of its node's processes: it ends them when it is told to end.
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

wait_for() {
    local what="$1" tries=0
    shift
    until "$@" 2>/dev/null; do
        tries=$((tries + 1))
        if [ "$tries" -gt 60 ] || ! kill -0 "${pids[-1]}" 2>/dev/null; then
            echo "error: $what did not come up, see $logs" >&2
            exit 1
        fi
        sleep 1
    done
}

# The head says in its log under which address it is reached.
found_address() {
    address=$(sed -n "s/.*ray start --address='\([^']*\)'.*/\1/p" "$logs/head.log" | head -n 1)
    [ -n "$address" ]
}

two_nodes() {
    [ "$(ray status --address "$address" 2>/dev/null | grep -c ' node_')" -ge 2 ]
}

ray start --head --block --port="$port" --num-cpus="$cpus" --num-gpus=0 --include-dashboard=false \
    --dashboard-agent-listen-port=0 >"$logs/head.log" 2>&1 &
pids+=($!)
wait_for "the head node" found_address
ray start --block --address="$address" --num-cpus="$cpus" --num-gpus=0 \
    --dashboard-agent-listen-port=0 >"$logs/second.log" 2>&1 &
pids+=($!)
wait_for "the second node" two_nodes
ray status --address "$address"

ddray tune --method datadam --dataset digits --ipc 1 --num-samples 4 --address "$address" "$@"
