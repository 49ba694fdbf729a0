#!/bin/bash
# Start the ranks of a node from its one task:  node.sh RANKS LOGS COMMAND ...
# (torchrun could start them too, but it ends with 1 for any status of its ranks, and status 85 must differ from a failure.)
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
trap : USR1 TERM INT # SLURM sends its signals to every process of a step, so to the ranks too

# Like srun --wait: 60 seconds after the first rank ends, kill the others.
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
