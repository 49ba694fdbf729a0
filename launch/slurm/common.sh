# Functions that the batch scripts share; they source this file. Sets: repository, python.

# Write a line to the job's log.
log() {
    printf '%s  %s\n' "$(date '+%F %T')" "$*"
}

# Report a user's mistake and exit: status 2, or in a job 93, "do not requeue".
refuse() {
    echo "$*" >&2
    exit "$([[ -n ${SLURM_JOB_ID:-} ]] && echo 93 || echo 2)"
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

python=$repository/.venv/bin/python
if [[ ! -x $python ]]; then
    python=$(command -v python || command -v python3) || refuse "No Python: neither $repository/.venv nor python on PATH exists."
fi

# Set the environment that every job needs.
prepare_environment() {
    # Run the code that was submitted, also where it is not installed, for example in a container.
    export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONUNBUFFERED=1
    # Variables that an outer torchrun, deepspeed or mpirun has left would contradict SLURM.
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK ROLE_RANK TORCHELASTIC_RUN_ID
    unset "${!OMPI_COMM_WORLD_@}" PMI_RANK PMI_SIZE
    # Compile on a disk of the node: in a home that all nodes share, one would lock the folder and the others wait.
    local node_folder=${TMPDIR:-/tmp}/megabatch-$(id -u)
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$node_folder/torch_extensions}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$node_folder/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$node_folder/inductor}
}

# Run a script of this repository, as one process or through `launcher` if that is set. A user's mistake ends the job with 93.
launcher=()
run_alone() {
    local script=$1 status=0
    shift
    local command=(${launcher[@]+"${launcher[@]}"} "$python" "$repository/$script" "$@")
    prepare_environment
    log "$(printf '%q ' "${command[@]}")"
    "${command[@]}" || status=$?
    log "Ended with status $status."
    exit "$((status == 2 ? 93 : status))"
}
