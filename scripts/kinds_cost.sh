#!/usr/bin/env bash
# Measures what different kinds of experts and router inputs cost in training. The base has GPT-2's
# shape with 124 million random parameters in bf16, with four experts of rank 8 on c_attn unless the
# row says otherwise. The text is packed. Each row is one run of STEPS steps. Without the first five
# steps, tokens/s is the median, and idle is the share of time in which the GPU has nothing to do
# (host_secs). Peak memory is that at the last step.
#
#     PYTHON=python3 scripts/kinds_cost.sh DYLORA [OLDER_DYLORA]     (PYTHON needs transformers)
#
# With an older binary, some rows are measured with both binaries, and the first row again at last.
set -euo pipefail
cd "$(dirname "$0")/.."
dylora=$1 older=${2:-}
steps=${STEPS:-25} batch=${BATCH:-8} seq_len=${SEQ_LEN:-1024}
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
tokenizer = "$PWD/demo/base/tokenizer.json"
dtype = "bf16"
[data]
seq_len = $seq_len
loss_on = "all"
[[data.domains]]
name = "text"
train = ["$PWD/demo/data/*.train.jsonl"]
[train]
duration = { steps = $steps }
micro_batch_size = $batch
loss_chunk_tokens = 4096
TOML
row() { # NAME BINARY OVERRIDE..
  local name=$1 binary=$2 run=$folder/run
  shift 2
  rm -rf "$run"
  "$binary" --quiet train --config "$folder/run.toml" --set run.dir="$run" --set run.tensorboard=false \
    "${@/#/--set=}" >/dev/null
  "${PYTHON:-python3}" - "$name" "$run/metrics.jsonl" "$folder/first" <<'PYTHON'
import json, os, statistics, sys
name, file, first = sys.argv[1:]
lines = [json.loads(line) for line in open(file)]
lines = [line for line in lines if line["kind"] == "train"]
speed = statistics.median(line["tokens_per_sec"] for line in lines[5:])
idle, busy = (statistics.median(line[key] for line in lines[5:]) for key in ["host_secs", "step_secs"])
if not os.path.exists(first):
    open(first, "w").write(str(speed))
ratio = float(open(first).read()) / speed
print(f"| {name:<58} | {speed:8,.0f} | {ratio:12.2f} | {lines[-1]['peak_memory_bytes'] / 2**30:9.2f} | {100 * idle / (idle + busy):7.2f} |")
PYTHON
}
all='lora.target_modules=["attn.c_attn","attn.c_proj","mlp.c_fc","mlp.c_proj"]'
printf '| %-58s | tokens/s | time, of 1st | peak, GiB | idle, %% |\n|%s|---------:|-------------:|----------:|--------:|\n' \
  "four experts, router on embeddings" "$(printf -- '-%.0s' {1..60})"
row "plain LoRA, even ranks" "$dylora"
[ -z "$older" ] || row "the same by the older binary" "$older"
row "one expert" "$dylora" lora.num_experts=1
row "ranks 4, 8, 8, 16" "$dylora" 'lora.experts=[{rank=4},{},{},{rank=16}]'
row "rsLoRA" "$dylora" lora.use_rslora=true
row "DoRA" "$dylora" lora.use_dora=true
row "DoRA, dropout 0.05" "$dylora" lora.use_dora=true lora.dropout=0.05
row "plain, dropout 0.05" "$dylora" lora.dropout=0.05
row "OLoRA" "$dylora" lora.init=olora
row "router on the base's last hidden state" "$dylora" router.input=base_hidden
row "a router in each layer" "$dylora" router.input=layer_input router.scope=layer
row "load-balancing loss, two micro-batches" "$dylora" router.load_balancing_coef=0.01 \
  train.micro_batch_size=$((batch / 2)) train.grad_accum_steps=2
row "load-balancing loss, two micro-batches, a router in each layer" "$dylora" router.load_balancing_coef=0.01 \
  router.input=layer_input router.scope=layer train.micro_batch_size=$((batch / 2)) train.grad_accum_steps=2
row "all four linears, r = 16, eight experts" "$dylora" "$all" lora.rank=16 lora.num_experts=8
row "all four linears, r = 16, eight experts, DoRA" "$dylora" "$all" lora.rank=16 lora.num_experts=8 lora.use_dora=true
[ -z "$older" ] || row "all four linears, r = 16, eight experts, older binary" "$older" "$all" lora.rank=16 lora.num_experts=8
[ -z "$older" ] || row "plain LoRA, even ranks, again" "$dylora"
[ -z "$older" ] || row "the same by the older binary, again" "$older"
