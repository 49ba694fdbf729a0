# What the batch scripts share; to be sourced. Sets: repository, python.

# A line of the job's log.
say() {
    printf '%s  %s\n' "$(date '+%F %T')" "$*"
}

# A person's mistake: one sentence; in a job 93, "do not requeue".
refuse() {
    echo "$*" >&2
    exit "$([[ -n ${SLURM_JOB_ID:-} ]] && echo 93 || echo 2)"
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

python=$repository/.venv/bin/python
if [[ ! -x $python ]]; then
    python=$(command -v python || command -v python3) || refuse "There is neither $repository/.venv nor a python on PATH."
fi

# What every job needs in its environment.
prepare_environment() {
    # The code that was submitted is the code that runs, also where nothing is installed (in a container, say).
    export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONUNBUFFERED=1
    # What an outer torchrun, deepspeed or mpirun has left in the environment would contradict SLURM.
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK ROLE_RANK TORCHELASTIC_RUN_ID
    unset "${!OMPI_COMM_WORLD_@}" PMI_RANK PMI_SIZE
    # What is compiled goes to a disk of the node: in a home that all share, one would lock it and the rest wait.
    local node_folder=${TMPDIR:-/tmp}/megabatch-$(id -u)
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$node_folder/torch_extensions}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$node_folder/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$node_folder/inductor}
}

# Run a door of this repository, as the one process of a job where no `launcher` is set; a person's mistake ends the job with 93.
launcher=()
run_alone() {
    local door=$1 status=0
    shift
    local command=(${launcher[@]+"${launcher[@]}"} "$python" "$repository/$door" "$@")
    prepare_environment
    say "$(printf '%q ' "${command[@]}")"
    "${command[@]}" || status=$?
    say "Ended with status $status."
    exit "$((status == 2 ? 93 : status))"
}
