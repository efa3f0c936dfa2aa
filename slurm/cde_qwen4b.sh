#!/usr/bin/env bash
#SBATCH --job-name=cde_qwen4b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# CDE on Qwen3-4B-Base: PPO with both bonuses, on 64 GPUs (32 replicas of two). Wants $MODELS/Qwen3-4B-Base,
# $DATA/dapo_math_17k.parquet and $DATA/aime24.jsonl; slurm/site.sh says where MODELS and DATA are.
# One node is enough, too: bash slurm/cde_qwen4b.sh parallel.dp=4
#
#   bash slurm/cde_qwen4b.sh [key=value ...] [--seeds 0,1,2] [--dry-run] [--smoke]
#   sbatch slurm/cde_qwen4b.sh [key=value ...]
[ -e slurm/launch.sh ] || cd "$(dirname "$0")/.." || exit
source slurm/launch.sh || { echo "submit it from the repository's folder" >&2; exit 2; }
configs=(examples/cde/ppo_both.yaml)
overrides=(
    model.path="$MODELS/Qwen3-4B-Base" data.path="$DATA/dapo_math_17k.parquet" data.eval_path="$DATA/aime24.jsonl"
    parallel.dp=32
)
launch "$@"
