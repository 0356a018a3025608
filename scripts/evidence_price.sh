#!/usr/bin/env bash
# What the mixture of the recipe costs beside a single LoRA of the same total rank, in training and in
# generation: 4 experts of rank 8 with a router in each layer, and one LoRA of rank 32.
#
#     scripts/evidence_price.sh DYLORA [OPTION OF BENCH ..] >benchmarks/evidence/price.jsonl
#
# The base has the shape of SmolLM2-135M and random weights. The output is that of three calls of
# `dylora bench --json`: of each, a line with the settings and then a line for each row.
set -euo pipefail
cd "$(dirname "$0")/.."
dylora=$1
shift
bench() {
  "$dylora" -q bench --json --size smollm2-135m --modules all --seq-len "${SEQ_LEN:-256}" "$@"
}
mixture=(--experts 4 --rank 8 --alpha 16 --routers layer --set router.input=layer_input
  --set router.normalize_input=true --set router.detach_input=true)
bench "${mixture[@]}" --batch "${TRAIN_BATCH:-18,64}" --set train.loss_chunk_tokens=4096 \
  --rows base,single_lora,single_lora_wide,one_pass "$@"
bench "${mixture[@]}" --batch "${GENERATE_BATCH:-1,16,64}" --rows generate_base,generate "$@"
# a mixture of one expert has no router: it is the single LoRA
bench --experts 1 --rank 32 --alpha 64 --batch "${GENERATE_BATCH:-1,16,64}" --rows generate "$@"
