#!/bin/bash
# Submit stages that follow one another, each when the one before it is done:
#
#   launch/slurm/chain.sh --account lab \
#       --stage --cpus-per-task=32 prepare --input 'corpus/*.jsonl.zst' --output prepared \
#       --stage --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 pretrain --deepspeed ds_configs/zero3.json --data prepared --output runs/x \
#       --stage --gpus-per-node=1 evaluate runs/x \
#       --stage export runs/x --output hf
#
# Before the first --stage: sbatch options for all stages, and --dry_run, which prints the commands and submits nothing.
# After each --stage: sbatch options for this stage alone, each one word (--nodes=8); the stage; its own arguments.
# A stage is prepare, pretrain (which may be a job array), or the name of a script launch/<stage>.py.
# If a stage fails, SLURM cancels the stages after it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

dry_run='' for_all=()
while (($#)) && [[ $1 != --stage ]]; do
    if [[ $1 == --dry_run ]]; then dry_run=yes; else for_all+=("$1"); fi
    shift
done
(($#)) || refuse "No --stage is given. Example: $0 --stage prepare --output prepared --stage pretrain --data prepared --output runs/x"

# Read the stages and call `$1 NAME SBATCH_ARGUMENTS ...` for each; the arguments lack only the dependency.
each_stage() {
    local do=$1 name options arguments script
    shift
    while (($#)); do
        shift # --stage
        options=() arguments=()
        while [[ $# -gt 0 && $1 == -* && $1 != --stage ]]; do options+=("$1"); shift; done
        [[ $# -gt 0 && $1 != --stage ]] || refuse "A --stage has no name; give prepare, pretrain or a script of launch/."
        name=$1
        shift
        while [[ $# -gt 0 && $1 != --stage ]]; do arguments+=("$1"); shift; done
        if [[ $name == prepare || $name == pretrain ]]; then
            script=("$here/$name.sbatch")
        elif [[ $name =~ ^[a-z_]+$ && -f $repository/launch/$name.py ]]; then
            script=("$here/door.sbatch" "launch/$name.py")
        else
            scripts=$(cd "$repository/launch" && printf '%s\n' [a-z]*.py | sed 's/\.py$//' | grep -vx pretrain | paste -sd' ')
            refuse "There is no stage \"$name\"; stages are: prepare pretrain $scripts. Write an option of sbatch as one word: --nodes=8."
        fi
        "$do" "$name" ${for_all[@]+"${for_all[@]}"} ${options[@]+"${options[@]}"} "${script[@]}" ${arguments[@]+"${arguments[@]}"}
    done
}

submitted=() before=()
submit() {
    local name=$1 id
    shift
    local command=(sbatch --parsable --job-name="$name" ${before[@]+"${before[@]}"} "$@")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${command[@]}"
        echo
        id=ID_OF_${name^^}
    elif id=$("${command[@]}"); then
        id=${id%%;*} # "id;cluster" if there are several clusters
        submitted+=("$id")
        echo "Job $id: $name"
    else
        ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
        refuse "sbatch refuses the stage $name (see above); the stages before it were cancelled."
    fi
    before=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
}

each_stage : "$@" # find a mistake in any stage before the first is submitted
each_stage submit "$@"
