#!/usr/bin/env bash
#SBATCH --job-name=lpreg_qwen32b
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
# Lp-Reg on Qwen2.5-32B, on-policy: the row of the paper's Table 1, on 64 GPUs of 80 GB. Wants $MODELS/Qwen2.5-32B,
# $DATA/dapo_math_17k.parquet and $DATA/aime24.jsonl; slurm/site.sh says where MODELS and DATA are.
#
#   bash slurm/lpreg_qwen32b.sh [key=value ...] [--seeds 0,1,2] [--dry-run] [--smoke]
#   sbatch slurm/lpreg_qwen32b.sh [key=value ...]
[ -e slurm/launch.sh ] || cd "$(dirname "$0")/.." || exit
source slurm/launch.sh || { echo "submit it from the repository's folder" >&2; exit 2; }
configs=(examples/lp_reg/qwen2.5_32b/lp_reg_on.yaml)
overrides=(model.path="$MODELS/Qwen2.5-32B" data.path="$DATA/dapo_math_17k.parquet" data.eval_path="$DATA/aime24.jsonl")
launch "$@"
