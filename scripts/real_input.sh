#!/usr/bin/env bash
# The real-input study: a base from random weights, then mixtures and single LoRAs of the same trainable
# size on four domains, evaluated on the validation files.
#
#     scripts/real_input.sh DYLORA [SEED..]
#
# Wants data/{math,code_alpaca,data2text,shakespeare,wiki,instruct_small}.{train,validation}.jsonl and
# GPT-2's data/tokenizer.json in the working folder. Writes runs/real-input/*.
set -euo pipefail
dylora=$1
shift
seeds=("${@:-0}")
configs=$(dirname "$0")/../benchmarks/real-input
out=runs/real-input
data=()
for domain in math code_alpaca data2text shakespeare; do
  data+=(--data "$domain=data/$domain.validation.jsonl")
done
if [ ! -e $out/base/model/config.json ]; then
  "$dylora" train --config "$configs/base.toml"
fi
"$dylora" eval --base $out/base/model --dtype bf16 --seq-len 256 "${data[@]}" --json >$out/base.json
for seed in ${seeds[@]}; do
  "$dylora" train --config "$configs/mixture.toml" --set run.seed="$seed" --set run.dir="$out/mixture-$seed"
  "$dylora" train --config "$configs/mixture.toml" --set run.seed="$seed" --set run.dir="$out/single-$seed" \
    --set lora.num_experts=1 --set lora.rank=32 --set lora.alpha=64
  for run in mixture single; do
    "$dylora" eval --checkpoint "$out/$run-$seed" --json >"$out/$run-$seed.json"
  done
done
"$dylora" eval --checkpoint "$out/mixture-${seeds[0]}"
