#!/usr/bin/env bash
# Measures the time from the start of the process to the end of its first step. The base has GPT-2's
# shape with 124 million random parameters in f32 on the CPU, with four experts of rank 8 on all
# four linear layers. A step has 1 x 256 tokens. The caches (the files of the base and the tokens)
# are warm. In the table, `step` is the time of the first step alone, and `start` the time before
# it. Peak memory is that of the process up to the end of the step. Each binary runs RUNS times, in
# turn with the others. The medians are printed, and the range of the time to the first step.
#
#     PYTHON=python3 scripts/start_time.sh TEXT TOKENIZER DYLORA [OTHER_DYLORA..]
#
# PYTHON needs transformers. With BASE=FOLDER, an existing base is used. With UNALIGNED=1, the
# numbers in the base's file are shifted by a byte, so that they cannot be used in place.
set -euo pipefail
text=$(realpath "$1") tokenizer=$(realpath "$2")
shift 2
runs=${RUNS:-5}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
base=$(realpath "${BASE:-$folder/gpt2}")
[ -e "$base" ] || "${PYTHON:-python3}" - "$base" <<'PYTHON'
import sys
from transformers import GPT2Config, GPT2LMHeadModel
GPT2LMHeadModel(GPT2Config()).save_pretrained(sys.argv[1])
PYTHON
if [ -n "${UNALIGNED:-}" ]; then
  mkdir "$folder/unaligned"
  cp "$base/config.json" "$folder/unaligned"
  "${PYTHON:-python3}" - "$base/model.safetensors" "$folder/unaligned/model.safetensors" <<'PYTHON'
import struct, sys
data = open(sys.argv[1], "rb").read()
length, = struct.unpack("<Q", data[:8])
with open(sys.argv[2], "wb") as out:
    out.write(struct.pack("<Q", length + 1) + data[8:8 + length] + b" " + data[8 + length:])
PYTHON
  base=$folder/unaligned
fi
cat >"$folder/run.toml" <<TOML
[base]
source = { path = "$base" }
tokenizer = "$tokenizer"
[data]
seq_len = 256
loss_on = "all"
[[data.domains]]
name = "text"
train = ["$text"]
[lora]
rank = 8
num_experts = 4
target_modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
[train]
duration = { steps = 1 }
micro_batch_size = 1
TOML
for run in $(seq 0 "$runs"); do # run 0 warms the caches
  for dylora in "$@"; do
    rm -rf "$folder/run"
    started=$(date +%s.%N)
    "$dylora" --quiet train --config "$folder/run.toml" --set run.dir="$folder/run" >/dev/null
    # the metrics file is last written when the first step is done
    done=$(date -r "$folder/run/metrics.jsonl" +%s.%N)
    if [ "$run" -gt 0 ]; then
      echo "$dylora $started $done $(date +%s.%N) $(head -1 "$folder/run/metrics.jsonl")" >>"$folder/results"
    fi
  done
done
"${PYTHON:-python3}" - "$folder/results" <<'PYTHON'
import json, statistics, sys
rows = {}
for line in open(sys.argv[1]):
    name, started, done, ended, metrics = line.split(" ", 4)
    metrics = json.loads(metrics)
    total, step = float(done) - float(started), metrics["step_secs"]
    row = total, total - step, step, float(ended) - float(started), metrics["peak_memory_bytes"] / 2**20
    rows.setdefault(name, []).append(row)
print("| binary | to first step, s | least to most | start, s | step, s | whole process, s | peak, MiB |")
print("|---|--:|--:|--:|--:|--:|--:|")
for name, runs in rows.items():
    total, start, step, whole, peak = (statistics.median(column) for column in zip(*runs))
    least, most = min(run[0] for run in runs), max(run[0] for run in runs)
    print(f"| {name} | {total:.2f} | {least:.2f} to {most:.2f} | {start:.2f} | {step:.2f} | {whole:.2f} | {peak:.0f} |")
PYTHON
