#!/bin/bash
# The one task of a node starts the ranks there:  node.sh RANKS LOGS COMMAND ...
# (torchrun would do that too, but ends with 1 whatever its ranks end with, and 85 is to be told from a failure.)
set -uo pipefail

ranks=$1 logs=$2
shift 2
export WORLD_SIZE=$((SLURM_STEP_NUM_TASKS * ranks)) LOCAL_WORLD_SIZE=$ranks
processes=()
for ((local_rank = 0; local_rank < ranks; local_rank++)); do
    rank=$((SLURM_PROCID * ranks + local_rank))
    RANK=$rank LOCAL_RANK=$local_rank "$@" >"$logs/rank_$rank.log" 2>&1 &
    processes+=($!)
done
trap : USR1 TERM INT # SLURM signals every process of a step, the ranks too

# As srun does: 60 seconds behind the first that ends, the rest is ended too.
running=("${processes[@]}") worst=0 mistake='' deadline=''
while ((${#running[@]})); do
    sleep 0.2
    still=()
    for process in "${running[@]}"; do
        if kill -0 "$process" 2>/dev/null; then
            still+=("$process")
            continue
        fi
        wait "$process"
        status=$?
        deadline=${deadline:-$((SECONDS + 60))}
        ((status == 2 || status == 93)) && mistake=$status
        ((status > worst)) && worst=$status
    done
    running=(${still[@]+"${still[@]}"})
    if [[ -n $deadline ]] && ((SECONDS > deadline && ${#running[@]})); then
        kill -KILL "${running[@]}" 2>/dev/null
    fi
done
exit "${mistake:-$worst}"
