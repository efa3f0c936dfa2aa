#!/usr/bin/env bash
#SBATCH --job-name=train
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
# Any config. slurm/launch.sh lists the arguments; what your cluster needs goes into slurm/site.sh.
#
#   bash slurm/train.sh CONFIG [CONFIG ...] [key=value ...] [--seeds 0,1,2] [--dry-run] [--smoke]
#   sbatch slurm/train.sh CONFIG [key=value ...]
[ -e slurm/launch.sh ] || cd "$(dirname "$0")/.." || exit
source slurm/launch.sh || { echo "submit it from the repository's folder" >&2; exit 2; }
launch "$@"
