#!/usr/bin/env python3
"""Walks through a user's first hour in a pseudo-terminal, and fails on any surprise.

    scripts/first_hour.py [--dylora BINARY] [--show]

Two domains of 30 records each, a CSV and a JSONL file that the script writes, go from `doctor` and
`init` over training to generation, export and report, with the commands of README's "Your own data".
The base is the demo's. A surprise is: another exit code than expected; a warning; a table or
help that is wider than the terminal's 80 columns; words of a library where a user expects ours; a colour in spite
of NO_COLOR; a file that is not there; and a next step that the output does not name. It takes a
minute.
"""

import argparse
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, SECONDS = 80, 240
# what the terminal does with a line, not what it shows
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# words of serde, clap's defaults and Rust that tell a user nothing
FOREIGN = ["missing field", "invalid type", "unknown variant", "panicked", "RUST_BACKTRACE", "Err(", "Some(", "NaN"]


class Surprise(Exception):
    """Something that a user would not expect."""


def asks(raw):
    """Whether the last thing that was shown is a question."""
    return CONTROL.sub("", raw.decode(errors="replace")).rstrip("\r").endswith(": ")


class Hour:
    def __init__(self, dylora, folder, show):
        self.dylora, self.folder, self.show = dylora, folder, show
        self.env = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                    "XDG_CACHE_HOME": str(folder / "cache"), "DYLORA_CACHE": str(folder / "cache")}

    def run(self, *arguments, typed=(), code=0):
        """Runs a command in a terminal, types `typed` when it asks, and returns what it shows."""
        arguments = [str(argument) for argument in arguments]
        line = " ".join(["dylora", *arguments])
        main, side = pty.openpty()
        ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        started = time.monotonic()
        process = subprocess.Popen([self.dylora, *arguments], cwd=self.folder, env=self.env, stdin=side, stdout=side,
                                   stderr=side, start_new_session=True)
        os.close(side)
        raw, typed = b"", list(typed)
        while True:
            if time.monotonic() - started > SECONDS:
                process.kill()
                raise Surprise(f"`{line}` does not end\n{raw.decode()}")
            ready, _, _ = select.select([main], [], [], 0.3)
            if not ready:
                # it waits for an answer
                if typed and process.poll() is None and asks(raw):
                    os.write(main, f"{typed.pop(0)}\n".encode())
                continue
            try:
                chunk = os.read(main, 1 << 16)
            except OSError:  # the other side is closed
                chunk = b""
            if not chunk:
                break
            raw += chunk
        os.close(main)
        found, seconds = process.wait(), time.monotonic() - started
        text = raw.decode()
        if self.show:
            print(f"\n$ {line}\n{CONTROL.sub('', text)}")
        self.judge(line, text, found, code)
        if typed:
            raise Surprise(f"`{line}` did not ask for {typed}\n{text}")
        print(f"ok   {line} ({seconds:.1f} s)")
        return CONTROL.sub("", text)

    def judge(self, line, text, found, code):
        if found != code:
            raise Surprise(f"`{line}` ended with {found}, not {code}:\n{text}")
        if COLOUR.search(text):
            raise Surprise(f"`{line}` shows colours in spite of NO_COLOR:\n{text!r}")
        plain = CONTROL.sub("", text)
        if " WARN " in plain:
            raise Surprise(f"`{line}` warns:\n{plain}")
        for word in FOREIGN:
            if word in plain:
                raise Surprise(f"`{line}` says `{word}`:\n{plain}")
        for shown in re.split(r"[\r\n]+", plain):
            # a terminal wraps sentences well, but neither tables nor help
            must_fit = shown.startswith(("|", "  ")) and max(map(len, shown.split())) < 35
            if must_fit and len(shown) > COLUMNS:
                raise Surprise(f"`{line}` shows a line of {len(shown)} columns:\n{shown}")

    def expect(self, text, *words):
        for word in words:
            if word not in text:
                raise Surprise(f"`{word}` is missing in:\n{text}")

    def file(self, name):
        path = self.folder / name
        if not path.exists():
            raise Surprise(f"there is no `{name}`")
        return path


def write_data(folder):
    """30 records of each domain, as a user might have them."""
    things = ["order", "refund", "password", "invoice", "parcel", "account"]
    rows = ["question,answer"]
    for index in range(30):
        thing = things[index % len(things)]
        rows.append(f'"Where is my {thing}, number {index}?","Your {thing} {index} is on its way, and you will hear from us."')
    (folder / "support.csv").write_text("\n".join(rows) + "\n")
    dishes = ["soup", "bread", "rice", "salad", "cake"]
    records = [{"prompt": f"Recipe {index} for {dishes[index % 5]}:\n",
                "completion": f"Take {index + 2} spoons of flour, some water and salt. Stir, wait, and bake."}
               for index in range(30)]
    (folder / "recipes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def walk(hour):
    expect, base = hour.expect, ROOT / "demo" / "base"
    expect(hour.run("--help"), "init", "doctor", "demo", "data", "train")
    hour.run("--version")
    expect(hour.run("doctor"), "everything that dylora needs is there")
    # columns of other names are no reason to guess
    text = hour.run("init", "--base", base, "--data", "support.csv", code=1)
    expect(text, "its columns are `question`, `answer`", "--fields prompt=question,completion=answer")
    text = hour.run("init", "--base", base, "--data", "support.csv", "recipes=recipes.jsonl",
                    "--fields", "prompt=question,completion=answer")
    expect(text, "support.csv", "csv", "recipes.jsonl", "jsonl", "a mixture of 2 experts",
           "dylora train --config dylora.toml")
    config = hour.file("dylora.toml").read_text()
    for wanted in ("#:schema ./dylora.schema.json", 'prompt = "question"', "num_experts = 2"):
        if wanted not in config:
            raise Surprise(f"`{wanted}` is missing in:\n{config}")
    hour.file("dylora.schema.json")
    expect(hour.run("init", "--base", base, "--data", "support.csv", code=2), "exists already", "--force")
    text = hour.run("init", "--out", "asked.toml", typed=[base, "recipes.jsonl", ""])
    expect(text, "domain `recipes`: 30", "a single LoRA", "wrote asked.toml")
    text = hour.run("data", "preview", "--config", "dylora.toml")
    expect(text, "support: 30 records", "recipes: 30 records", "⟦", "leaks", "median")
    # the answers of the table begin without a space, as the preview says
    template = 'template = { completion = " {completion}" }'
    expect(text, "support: a completion follows its prompt without a space", template)
    hour.file("dylora.toml").write_text(config.replace("fields = {", f"{template}\nfields = {{"))
    text = hour.run("data", "preview", "--config", "dylora.toml")
    expect(text, "?⟦ Your ")
    if "without a space" in text:
        raise Surprise(f"the preview still complains:\n{text}")
    expect(hour.run("train", "--config", "dylora.toml", "--dry-run"), "memory", "100 steps")
    # a wrong guess is answered with the right key
    text = hour.run("train", "--config", "dylora.toml", "--set", "train.max_steps=40", code=2)
    expect(text, "train.duration")
    expect(hour.run("config", "explain", "train.duration"), "steps", "epochs")
    text = hour.run("train", "--config", "dylora.toml", "--set", "train.duration.steps=60", "--set", "train.eval_every_steps=20")
    expect(text, "validation loss", "completed after step 60", "checkpoint:")
    expect(hour.run("train", "--config", "dylora.toml", code=1), "--resume", "--overwrite")
    text = hour.run("eval", "--checkpoint", "runs/dylora")
    expect(text, "support", "recipes", "mean routing weight", "mean of domains")
    losses = json.loads(subprocess.run([hour.dylora, "eval", "--checkpoint", "runs/dylora", "--json"], env=hour.env,
                                       cwd=hour.folder, capture_output=True, check=True).stdout)
    learned = {domain["name"]: domain["loss"] for domain in losses["domains"]}
    if not all(loss < 1.5 for loss in learned.values()):
        raise Surprise(f"60 steps do not learn 30 records: {learned}")
    text = hour.run("generate", "--checkpoint", "runs/dylora", "--prompt", "Recipe 31 for soup:\n", "--max-new-tokens", "12")
    expect(text, "Take")
    expect(hour.run("export-adapters", "--checkpoint", "runs/dylora", "--out", "experts"), "wrote `experts`")
    for name in ("expert_0/adapter_model.safetensors", "expert_1/adapter_config.json", "router.safetensors"):
        hour.file(f"experts/{name}")
    expect(hour.run("report", "runs/dylora"), "report.html")
    if "<svg" not in hour.file("report.html").read_text():
        raise Surprise("the report has no charts")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dylora", default=str(ROOT / "target/debug/dylora"))
    parser.add_argument("--show", action="store_true", help="show what the terminal shows")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_data(folder)
        try:
            walk(Hour(args.dylora, folder, args.show))
        except Surprise as surprise:
            sys.exit(f"surprise: {surprise}")
    print(f"no surprises in {time.monotonic() - started:.0f} s")


main()
