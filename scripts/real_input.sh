#!/usr/bin/env bash
# The real-input study. It trains a base from random weights, and on it a mixture and single LoRAs
# with the same number of LoRA parameters on four domains. The single LoRAs are trained with the
# mixture's learning rate and with half of it. All are evaluated on the validation files. The
# mixture is exported and, if PYTHON is set, compared with real PEFT.
#
#     [PYTHON=python3] scripts/real_input.sh DYLORA [SEED..]
#
# Needs data/NAME.{train,validation}.jsonl, where NAME is math, code_alpaca, data2text, shakespeare,
# wiki and instruct_small, and GPT-2's data/tokenizer.json in the repository's root. Writes
# runs/real-input/* there.
set -euo pipefail
dylora=$(realpath "$1")
shift
seeds=("${@:-0}")
cd "$(dirname "$0")/.."
here=scripts
configs=benchmarks/real-input
out=runs/real-input
data=()
for domain in math code_alpaca data2text shakespeare; do
  data+=(--data "$domain=data/$domain.validation.jsonl")
done
evaluate() { # evaluate NAME ARGUMENT..: with the loss on completions and on all tokens
  local name=$1
  shift
  "$dylora" eval "$@" "${data[@]}" --seq-len 256 --json >"$out/$name.json"
  "$dylora" eval "$@" "${data[@]}" --seq-len 256 --loss-on all --json >"$out/$name.all-tokens.json"
}
if [ ! -e $out/base/model/config.json ]; then
  "$dylora" train --config "$configs/base.toml"
fi
evaluate base --base $out/base/model --dtype bf16
single=(--set lora.num_experts=1 --set lora.rank=32 --set lora.alpha=64)
for seed in "${seeds[@]}"; do
  train() { # train NAME ARGUMENT..
    local name=$1-$seed
    shift
    "$dylora" train --config "$configs/mixture.toml" --set run.seed="$seed" --set run.dir="$out/$name" "$@"
    evaluate "$name" --checkpoint "$out/$name"
  }
  train mixture
  train single "${single[@]}"
  train single-half-lr "${single[@]}" --set optimizer.adapters.learning_rate=3e-3
done
"$dylora" eval --checkpoint "$out/mixture-${seeds[0]}"
"$dylora" export-adapters --checkpoint "$out/mixture-${seeds[0]}" --out "$out/export" --overwrite
if [ -n "${PYTHON:-}" ]; then
  DYLORA=$dylora "$PYTHON" "$here/check_peft.py" "$out/mixture-${seeds[0]}" "$out/export" "$out/base/model"
fi
