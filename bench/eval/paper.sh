#!/usr/bin/env bash
# The paper's benchmarks, one after another. They need weights and a network, and a GPU to be done this year.
#
#   bench/eval/paper.sh llada                  all eight
#   bench/eval/paper.sh dream gsm8k math       some
#
# Variables: MODEL_ARGS (instead of those in the recipes), BATCH, LIMIT (problems a task, for a try), OUT (folder for
# the results), RANKS (processes, one a GPU), ALLOW_CODE=1 (run what the model writes: mbpp and humaneval), DRY=1 (only
# print the commands), PYTHON.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
family=${1:-}
if [[ ! -d $here/paper/$family || -z $family ]]; then
  echo "usage: $0 llada|dream [benchmark ...]" >&2
  exit 2
fi
shift
if (($# == 0)); then set -- gsm8k gpqa math mmlu mmlu_pro bbh mbpp humaneval; fi
for name in "$@"; do
  if [[ ! -f $here/paper/$family/$name.yaml ]]; then
    echo "error: no recipe $here/paper/$family/$name.yaml" >&2
    exit 2
  fi
done

python=${PYTHON:-python3}
start=("$python" -m)
if ((${RANKS:-1} > 1)); then start=("$python" -m torch.distributed.run --nproc_per_node "$RANKS" -m); fi

for name in "$@"; do
  command=("${start[@]}" sfs_triton.cli.evaluate run --config "$here/paper/$family/$name.yaml"
    --batch_size "${BATCH:-1}" --log_samples --output_path "${OUT:-eval-results}/$family/$name")
  if [[ -n ${MODEL_ARGS:-} ]]; then command+=(--model_args "$MODEL_ARGS"); fi
  if [[ -n ${LIMIT:-} ]]; then command+=(--limit "$LIMIT"); fi
  if [[ $name == mbpp || $name == humaneval ]]; then
    if [[ ${ALLOW_CODE:-} != 1 ]]; then
      echo "$name is left out: it runs what the model writes (ALLOW_CODE=1 allows it)" >&2
      continue
    fi
    export HF_ALLOW_CODE_EVAL=1
    command+=(--confirm_run_unsafe_code)
  fi
  printf '%q ' "${command[@]}"
  echo
  if [[ ${DRY:-} != 1 ]]; then "${command[@]}"; fi
done
