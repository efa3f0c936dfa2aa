# shellcheck shell=bash
# The second door, inside the job (sourced by launch.sh): plan, check the nodes, start one srun of all ranks, and end as
# they do. Exit codes are those of megatron_rlvr.train; a run that was asked to save goes on in the same job, requeued.

job() {
    [ "$tasks" -eq 1 ] || [ -n "${SLURM_ARRAY_TASK_ID:-}" ] ||
        fail "$tasks runs, but the job is no array: bash $script makes it one, or sbatch --array=0-$((tasks - 1))"
    choose "${SLURM_ARRAY_TASK_ID:-0}"
    [ "$RANKS" = "${SLURM_NTASKS:-}" ] ||
        fail "the job has ${SLURM_NTASKS:-no} tasks, but parallel.tp * cp * pp * dp = $RANKS:" \
            "outside of a job, bash $script submits one of as many"
    show_plan
    meeting_point
    share_cores
    container
    mkdir -p "$RUN_DIR/logs"
    ranks -m megatron_rlvr.launch.health "$RUN_DIR" --device "$([ "$GPU_TYPE" = cpu ] && echo cpu || echo gpu)"
    "${srun[@]}" || fail "not fit to train: see above; bash $script ... -- --exclude=NODE goes without one"
    # A requeued job goes on; a new one that finds a run in its folder is a mistake, and train.py says so.
    [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || arguments+=(run.resume=auto)
    train
}

# What torchrun would set. The address is the one at which Slurm itself reaches the first node.
meeting_point() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT WORLD_SIZE=$RANKS OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# srun would give a task one core, for itself, its engine and its verifiers.
share_cores() { export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE * SLURM_JOB_NUM_NODES / SLURM_NTASKS)); }

container() { # sets what comes before a rank's command, and what srun itself must know
    step=() inside=()
    case ${CONTAINER:+${CONTAINER_RUNTIME:-pyxis}} in
    '') ;;
    pyxis) step=(--container-image="$CONTAINER" --container-mounts="$PWD,${MOUNTS:-$PWD}" --container-workdir="$PWD") ;;
    apptainer) inside=(apptainer exec --nv --pwd "$PWD" --bind "$PWD,${MOUNTS:-$PWD}" "$CONTAINER") ;;
    *) fail "CONTAINER_RUNTIME=$CONTAINER_RUNTIME: pyxis or apptainer" ;;
    esac
}

# One srun of every rank: sets `srun` to the command, so that a signal to its process reaches srun and no shell between.
ranks() { # what Python gets
    # shellcheck disable=SC2016  # the rank's own shell reads them
    srun=(
        srun --kill-on-bad-exit=1 --label --input=none "${step[@]}" bash -c
        'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank "${inside[@]}" "$PYTHON" "$@"
    )
}

newest_checkpoint() { ls -d "$RUN_DIR"/checkpoints/step_* 2>/dev/null | grep -E 'step_[0-9]+$' | sort -V | tail -n 1; }

train() {
    local code pid tee_pid errors first before
    before=$(newest_checkpoint)
    errors=$(mktemp)
    exec 3> >(tee "$errors" >&2)
    tee_pid=$!
    ranks -m megatron_rlvr.train "${arguments[@]}"
    "${srun[@]}" 2>&3 &
    pid=$!
    exec 3>&-
    # USR1 comes ahead of the time limit, to this shell alone: srun passes it on. TERM, at preemption or scancel, reaches
    # the ranks by itself. Either interrupts `wait`.
    trap 'kill -USR1 "$pid"' USR1
    trap : TERM
    wait "$pid" && code=0 || code=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done
    wait "$tee_pid"
    first=$(grep -m 1 '^srun: error: .*task' "$errors")
    rm "$errors"
    case $first in
    *"exit code 138" | *"User defined signal 1") # 128 + USR1: saved, or not even begun
        [ "$(newest_checkpoint)" != "$before" ] || [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] ||
            fail "requeued, and again no step was saved before the time limit: ask for more, -- --time=HH:MM:SS"
        scontrol requeue "$JOB" && sleep 60 ;; # which ends this shell
    *"exit code 143" | '') ;; # told to stop by TERM, and saved; or no rank failed
    *) first_error_on_top "$first" ;;
    esac
    exit "$code"
}

# srun reports the tasks in the order in which they end: the first is the cause, the others lost their peer.
first_error_on_top() {
    local first=$1 log rank whole
    whole=$(mktemp)
    rank=$(sed -E 's/.*tasks? ([0-9]+).*/\1/' <<<"$first")
    log=$(about_job StdOut)
    {
        echo "rank $rank ended first: ${first#srun: error: }. The end of $RUN_DIR/logs/rank_$rank.log:"
        tail -n 25 "$RUN_DIR/logs/rank_$rank.log" 2>/dev/null | sed 's/^/    /'
        echo "What the job printed:"
        cat "$log"
    } >"$whole"
    cat "$whole" >"$log" # in place: Slurm goes on appending to it
    rm "$whole"
}
