#!/usr/bin/env python3
"""Measures how many tokens a second `dylora serve` answers with, beside transformers.

    scripts/compare_serve [--base DIR] [--streams N,..] [--requests N] [--tokens N] [--rounds N]
                          [--device cpu] [--dtype f32]

Clients, each a thread with a connection of its own, ask for greedy completions of prompts of uneven
lengths, and each asks again as soon as it has its answer. The time is that from the first request to
the last answer; a round before it is not counted. The opponents answer the same prompts with the same
number of tokens in one process, without HTTP:

    one by one    `generate` in a loop, one request after the other
    batches       `generate` on as many requests at a time as there are clients, padded on the left; a
                  batch begins when the one before it has ended

DYLORA names the binary.
"""
import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
WORDS = Path("demo/data/verse.validation.jsonl")


def prompts(number):
    """Prompts of 20 to 200 characters from the demo's data."""
    text = " ".join(json.loads(line)["text"] for line in WORDS.read_text().splitlines())
    return [text[97 * i % 9000 :][: 20 + 60 * (i % 4)] for i in range(number)]


class Served:
    """A running `dylora serve`."""

    def __init__(self, args):
        line = [os.environ.get("DYLORA", "target/release/dylora"), "serve", "--base", args.base, "--port", "0"]
        line += ["--no-auth", "--device", args.device, "--dtype", args.dtype, "--max-batch", "64", "--model-name", "m"]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r":(\d+)", self.process.stdout.readline())[1])

    def ask(self, connection, prompt, tokens):
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        if "usage" not in answer:
            sys.exit(f"dylora serve: {answer}")
        return answer["usage"]["completion_tokens"]

    def run(self, asked, streams, tokens):
        """The number of tokens that `streams` clients get."""
        waiting, counts, lock = list(asked), [], threading.Lock()

        def client():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
            while True:
                with lock:
                    if not waiting:
                        return
                    prompt = waiting.pop()
                counts.append(self.ask(connection, prompt, tokens))

        threads = [threading.Thread(target=client) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts)


class Transformers:
    """The base in transformers."""

    def __init__(self, args):
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{args.base}/tokenizer.json", padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0)
        model = AutoModelForCausalLM.from_pretrained(args.base, dtype=DTYPES[args.dtype], attn_implementation="sdpa")
        self.model = model.to(args.device).eval()

    @torch.no_grad()
    def run(self, asked, at_once, tokens):
        """The number of tokens of all answers, `at_once` prompts at a time."""
        for first in range(0, len(asked), at_once):
            inputs = self.tokenizer(asked[first : first + at_once], return_tensors="pt", padding=True)
            inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            done = self.model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
            done.cpu()
        return len(asked) * tokens


def rate(run):
    """Tokens a second."""
    start = time.perf_counter()
    count = run()
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="demo/base")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="f32", choices=DTYPES)
    args = parser.parse_args()
    where = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.base} in {args.dtype} on {args.device} ({where}): {args.requests} requests of {args.tokens} tokens")
    print("| clients | dylora serve, tokens/s | transformers, one by one | ratio | transformers, batches | ratio |")
    print("|--:|--:|--:|--:|--:|--:|")
    served, opponent = Served(args), Transformers(args)
    try:
        for streams in map(int, args.streams.split(",")):
            # what answers one request at a time need not answer all to be measured
            asked = prompts(args.requests if streams > 1 else 8)
            alone = asked[:8]
            rates = {"served": [], "loop": [], "batches": []}
            for round in range(args.rounds + 1):
                found = {
                    "served": rate(lambda: served.run(asked, streams, args.tokens)),
                    "loop": rate(lambda: opponent.run(alone, 1, args.tokens)),
                    "batches": rate(lambda: opponent.run(asked, streams, args.tokens)),
                }
                for name, value in found.items():
                    rates[name] += [value] if round else []
            ours, loop, batches = (statistics.median(rates[name]) for name in ("served", "loop", "batches"))
            cells = [f"{streams}", f"{ours:,.0f}", f"{loop:,.0f}", f"{ours / loop:.2f}", f"{batches:,.0f}"]
            print(f"| {' | '.join(cells)} | {ours / batches:.2f} |", flush=True)
    finally:
        served.process.terminate()
        served.process.wait()


if __name__ == "__main__":
    main()
