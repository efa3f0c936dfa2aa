#!/usr/bin/env bash
#SBATCH --job-name=baseline
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
# A row of Lp-Reg's Table 1 on Qwen3-14B-Base, or on Qwen2.5-32B with MODEL=qwen2.5_32b: METHOD is the name of a file in
# examples/lp_reg/MODEL, for example grpo_off, clip_higher_off, high_entropy_on, kl_cov_off, gspo_off. Several, with a
# comma between them, are a sweep.
#
#   bash slurm/baseline.sh METHOD[,METHOD ...] [key=value ...] [--seeds 0,1,2] [--dry-run] [--smoke]
#   sbatch slurm/baseline.sh METHOD [key=value ...]
[ -e slurm/launch.sh ] || cd "$(dirname "$0")/.." || exit
source slurm/launch.sh || { echo "submit it from the repository's folder" >&2; exit 2; }
case ${MODEL:=qwen3_14b} in
qwen3_14b) path=Qwen3-14B-Base ;;
qwen2.5_32b) path=Qwen2.5-32B ;;
*) fail "MODEL=$MODEL: qwen3_14b or qwen2.5_32b" ;;
esac
IFS=, read -r -a methods <<<"${1:-}"
for method in "${methods[@]:-}"; do
    configs+=("examples/lp_reg/$MODEL/$method.yaml")
    [ -e "${configs[-1]}" ] || fail "no method '$method'; there are: $(cd "examples/lp_reg/$MODEL" && echo *.yaml | sed 's/.yaml//g')"
done
overrides=(model.path="$MODELS/$path" data.path="$DATA/dapo_math_17k.parquet" data.eval_path="$DATA/aime24.jsonl")
launch "${@:2}"
