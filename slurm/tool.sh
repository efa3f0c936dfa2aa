#!/usr/bin/env bash
#SBATCH --job-name=tool
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=4:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# One Python program of the repository as a job, in the environment of the ranks: for what comes before and after training.
# It has 8 cores and a GPU, unless it asks for more: ... --tp 4 -- --gpus-per-node=4 --cpus-per-task=32
#
#   bash slurm/tool.sh tools/evaluate.py RUN --benchmarks aime24 --output RUN/evaluation [-- --dependency=afterok:123]
[ -e slurm/launch.sh ] || cd "$(dirname "$0")/.." || exit
source slurm/launch.sh || { echo "submit it from the repository's folder" >&2; exit 2; }
program=()
while [ $# -gt 0 ]; do
    [ "$1" != -- ] || { SBATCH_OPTIONS+=("${@:2}") && break; }
    program+=("$1") && shift
done
[ -e "${program[0]:-}" ] || fail "which program? For example: bash slurm/tool.sh tools/report.py runs/demo"
if [ -n "${SLURM_JOB_ID:-}" ]; then
    source slurm/job.sh
    share_cores
    container
    exec srun --ntasks=1 --input=none "${step[@]}" "${inside[@]}" "$PYTHON" "${program[@]}"
fi
send "runs/jobs/$(basename "${program[0]}" .py)_%j.log" $([ "$GPU_TYPE" != cpu ] && echo "${GPU_NAME:+--gpus-per-node=$GPU_NAME:1}" || echo --gpus-per-node=0)
