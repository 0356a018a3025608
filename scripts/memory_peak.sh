#!/usr/bin/env bash
# Measures the peak memory of a training step by dtype, gradient checkpointing and the number of
# positions whose logits are in memory at once. The base is a GPT-2 of 124 million random
# parameters, with four experts of rank 8 on c_attn. A step has 8 x 1024 tokens.
#
#     PYTHON=python3 scripts/memory_peak.sh DYLORA TEXT TOKENIZER     (PYTHON needs transformers)
set -euo pipefail
dylora=$1 text=$(realpath "$2") tokenizer=$(realpath "$3")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" - "$folder/gpt2" <<'PYTHON'
import sys
from transformers import GPT2Config, GPT2LMHeadModel
GPT2LMHeadModel(GPT2Config()).save_pretrained(sys.argv[1])
PYTHON
cat >"$folder/run.toml" <<TOML
[base]
source = { path = "$folder/gpt2" }
tokenizer = "$tokenizer"
[data]
seq_len = 1024
loss_on = "all"
[[data.domains]]
name = "text"
train = ["$text"]
[train]
duration = { steps = 4 }
micro_batch_size = 8
TOML
printf '| %-5s | %13s | %12s | %9s |\n|-------|---------------|--------------|-----------|\n' dtype checkpointing 'loss chunk' 'peak, GiB'
for dtype in f32 bf16; do
  for checkpointing in false true; do
    for chunk in 1024 4096 8192; do
      run=$folder/$dtype-$checkpointing-$chunk
      "$dylora" --quiet train --config "$folder/run.toml" --set run.dir="$run" --set base.dtype=$dtype \
        --set train.gradient_checkpointing=$checkpointing --set train.loss_chunk_tokens=$chunk >/dev/null
      peak=$(tail -1 "$run/metrics.jsonl" | sed 's/.*"peak_memory_bytes":\([0-9]*\).*/\1/')
      printf '| %-5s | %13s | %12s | %9.2f |\n' $dtype $checkpointing $chunk "$(awk "BEGIN { print $peak / 2^30 }")"
    done
  done
done
