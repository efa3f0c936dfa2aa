# shellcheck shell=bash
# Sourced by the scripts beside it. Each of them has two doors, and both read the same arguments (of tool.sh only
# what stands behind --; the rest is its program's):
#
#   bash slurm/X.sh ...     on a login node: reads the site file, plans, submits X.sh with the options that fit
#   sbatch slurm/X.sh ...   from the repository's folder, with the #SBATCH headers of X.sh; plans inside the job
#
#   [CONFIG ...]            where X.sh names none; several are a sweep
#   [key=value ...]         overrides, as for megatron_rlvr.train
#   [--seeds 0,1,2]         a job array: every config with every seed, each in RUN/seed_N
#   [--smoke]               the same script on the tiny countdown model: two steps on 2 nodes x 2 ranks, in RUN/smoke
#   [--dry-run]             show the plan, the resolved config and the sbatch command; submit nothing
#   [--no-plan]             go without planning
#   [-- OPTIONS ...]        further options of sbatch: -- --dependency=afterok:123

fail() { echo "error: $*" >&2; exit 2; }

# Of an array's last task, the job's own number is the array's: only ARRAY_TASK names that task alone.
JOB=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-${SLURM_JOB_ID:-}}
about_job() { scontrol show job "$JOB" | sed -n "s/^ *$1=//p"; } # StdOut, Command ...

everything=("$@") # what the script got, for the job to read again
configs=() overrides=() asked=() smoke=() seeds=() SBATCH_OPTIONS=() OVERRIDES=() # X.sh fills the first two
dry_run=no plan=${PLAN:-yes} # PLAN=no comes from the first door, which has planned

site=${SITE:-slurm/site.sh}
if [ -e "$site" ]; then
    source "$site"
elif [ -n "${SITE:-}" ]; then
    fail "SITE=$SITE: there is no such file; copy slurm/site.sh.example"
fi
: "${PYTHON:=.venv/bin/python}" "${LOGIN_PYTHON:=$PYTHON}" "${GPU_TYPE:=h100}" "${RANKS_PER_NODE:=8}"
: "${MODELS:=models}" "${DATA:=data}"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # LOGIN_PYTHON has not installed the package
script=slurm/${0##*/}
if [ "$script" = slurm/slurm_script ]; then # Slurm's own copy of it
    command=$(about_job Command)
    script=slurm/$(basename "${command%%.sh*}").sh
fi

SMOKE=(
    prepare=examples/countdown_cpu/prepare.py verifier=countdown
    model.path=examples/countdown_cpu/build/model
    model.dtype="$([ "$GPU_TYPE" = cpu ] && echo float32 || echo bfloat16)" # a GPU has other kernels for float32
    data.path=examples/countdown_cpu/build/train.jsonl data.sources=[] data.eval_path= data.eval_sources=[]
    data.prompt_field= data.answer_field= critic.path= trainer.keep_best=0 data.template=raw data.max_prompt_length=16
    parallel.tp=2 parallel.cp=1 parallel.pp=1 parallel.vpp=1 parallel.dp=2
    rollout.tp=1 rollout.max_response_length=7 rollout.prompts_per_step=16 rollout.responses_per_prompt=8
    rollout.kv_cache_mib=64 trainer.num_steps=2 trainer.microbatch_tokens=2048 critic.warmup_steps=0
)

launch() { # "$@" of the script, less what it has used up
    parse "$@"
    command -v "$LOGIN_PYTHON" >/dev/null ||
        fail "LOGIN_PYTHON=$LOGIN_PYTHON: there is no such program; name a Python 3.11 that has PyYAML in $site"
    [ ${#configs[@]} -gt 0 ] || fail "which config? For example: bash $script examples/countdown_cpu/config.yaml"
    tasks=$((${#configs[@]} * (${#seeds[@]} > 0 ? ${#seeds[@]} : 1)))
    if [ -n "${SLURM_JOB_ID:-}" ] && [ "$dry_run" = no ]; then
        source slurm/job.sh
        job
    else
        submit
    fi
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
        --seeds)
            IFS=, read -r -a seeds <<<"${2:-}"
            [ ${#seeds[@]} -gt 0 ] || fail "--seeds needs a list, for example --seeds 0,1,2"
            [ -z "$(printf '%s\n' "${seeds[@]}" | sort | uniq -d)" ] || fail "--seeds $2: each seed is one run, so once"
            shift
            ;;
        --smoke) smoke=("${SMOKE[@]}") RANKS_PER_NODE=2 ;;
        --dry-run) dry_run=yes ;;
        --no-plan) plan=no ;;
        --) shift && SBATCH_OPTIONS+=("$@") && break ;;
        -*) fail "unknown option $1; slurm/launch.sh lists them all" ;;
        *=*) asked+=("$1") ;;
        *) configs+=("$1") ;;
        esac
        shift
    done
}

# Task T of the sweep is config T / seeds with seed T % seeds. Sets `arguments` for megatron_rlvr.train, NAME, RUN_DIR,
# RANKS; what the command line says comes last, so it wins.
choose() {
    local task=$1 seed='' config folder
    if [ ${#seeds[@]} -gt 0 ]; then
        seed=${seeds[task % ${#seeds[@]}]} task=$((task / ${#seeds[@]}))
    elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ ${#configs[@]} -eq 1 ]; then
        seed=$task task=0 # sbatch --array=0-2 slurm/X.sh: the tasks are the seeds
    fi
    config=${configs[task]:-}
    [ -n "$config" ] || fail "task $1 of the array has no config: there are ${#configs[@]}"
    arguments=("$config" "${overrides[@]}" "${smoke[@]}" "${OVERRIDES[@]}" "${asked[@]}")
    resolve
    folder=$RUN_DIR${smoke:+/smoke}${seed:+/seed_$seed}
    [ -z "$seed" ] || arguments+=("seed=$seed")
    [ "$folder" = "$RUN_DIR" ] || arguments+=("run.dir=$folder")
    resolve
}

resolve() { # sets NAME, RUN_DIR, RANKS
    local answer
    answer=$("$LOGIN_PYTHON" -m megatron_rlvr.launch.resolve "${arguments[@]}" --shell) || exit
    eval "$answer"
}

show_plan() { # ends the script where the plan says no
    [ "$plan" = yes ] || return 0
    local machine=(--gpus "$RANKS" --gpu "$GPU_TYPE" --gpus-per-node "$RANKS_PER_NODE")
    "$LOGIN_PYTHON" tools/plan.py "${arguments[@]}" "${machine[@]}" && return
    [ $? -eq 2 ] || fail "tools/plan.py could not plan, see above; --no-plan goes without"
    fail "the plan says no to ${arguments[0]}; --no-plan goes on all the same"
}

submit() { # the first door
    local index each=$((tasks / ${#configs[@]})) first='' array=() id=%j log
    local -A in_folder=()
    for index in "${!configs[@]}"; do
        choose $((index * each))
        [ -z "${in_folder[$RUN_DIR]:-}" ] ||
            fail "${configs[index]} and ${in_folder[$RUN_DIR]} would both run in $RUN_DIR: give each a name of its own"
        in_folder[$RUN_DIR]=${configs[index]}
        show_plan
        [ "$dry_run" = no ] || "$LOGIN_PYTHON" -m megatron_rlvr.launch.resolve "${arguments[@]}"
        [ "${first:-$RANKS}" = "$RANKS" ] || fail "the configs of a sweep must take as many ranks each: $first and $RANKS"
        first=$RANKS
    done
    [ "$tasks" -eq 1 ] && [ ${#seeds[@]} -eq 0 ] || array=(--array="0-$((tasks - 1))") id=%A_%a
    shape
    echo "megatron_rlvr.train $(printf '%q ' "${arguments[@]}")"
    log=${RUN_DIR%/seed_*}/job_$id.log
    [ ${#configs[@]} -eq 1 ] || NAME=$(basename "$script" .sh) log=runs/jobs/$(basename "$script" .sh)_$id.log
    PLAN=no send "$log" --job-name="$NAME" "${shape[@]}" "${array[@]}"
}

send() { # LOG OPTIONS ...: the script itself, with what the site and the command line add
    local log=$1 number command
    command=(
        sbatch --parsable --output="$log" "${@:2}" ${ACCOUNT:+--account="$ACCOUNT"}
        ${PARTITION:+--partition="$PARTITION"} ${QOS:+--qos="$QOS"} ${TIME_LIMIT:+--time="$TIME_LIMIT"}
        "${SBATCH_OPTIONS[@]}" "$script" "${everything[@]}"
    )
    printf '%q ' "${command[@]}" && echo
    [ "$dry_run" = no ] || return 0
    mkdir -p "$(dirname "$log")"
    number=$("${command[@]}") || exit
    log=${log//%[jA]/$number}
    echo "submitted job $number; its log is ${log//%a/*}"
}

shape() { # sets the options that say how many nodes, ranks and GPUs
    local nodes=1 per_node=$RANKS gpus
    if [ "$RANKS" -gt "$RANKS_PER_NODE" ]; then
        [ $((RANKS % RANKS_PER_NODE)) -eq 0 ] ||
            fail "$RANKS ranks do not fill nodes of $RANKS_PER_NODE: change parallel.*, or RANKS_PER_NODE in $site"
        nodes=$((RANKS / RANKS_PER_NODE)) per_node=$RANKS_PER_NODE
    fi
    gpus=$([ "$GPU_TYPE" = cpu ] && echo 0 || echo "${GPU_NAME:+$GPU_NAME:}$per_node")
    shape=(--nodes="$nodes" --ntasks-per-node="$per_node" --gpus-per-node="$gpus")
}
