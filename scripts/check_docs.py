#!/usr/bin/env python3
"""Runs the commands of the README and the docs, and checks their samples of TOML, JSON and Python.

    scripts/check_docs.py [--jobs N] [PAGE..]

Each page gets a new folder with a copy of configs/ and links to demo/ and scripts/. Its ```sh blocks
run there one after another, with the `dylora` on PATH, on the CPU and without the Hub. All ```toml,
```json, ```jsonl and ```python blocks must parse. HTML comments right before a block, one a line,
change how the block is checked:

    <!-- not run: REASON -->      do not run the block
    <!-- run by: PYTHON -->       run the block of Python by $PYTHON, if it is set; it has torch,
                                  transformers and PEFT
    <!-- run with: ARGUMENTS -->  add arguments to each `dylora train` and `dylora add-expert`,
                                  to shorten the training
    <!-- before: COMMAND -->      run this command before the block, in the same folder
    <!-- file: NAME -->           write the block's text to this file
    <!-- config -->               the block is a whole config, which `dylora train --dry-run` must
                                  accept
    <!-- config part -->          the block is a part of a config, and is checked together with a
                                  small base and a domain
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ["demo", "scripts"]
SECONDS = 240  # the limit for one block
MARK = re.compile(r"^<!-- (not run|run with|run by|before|file|config part|config)(?:: (.*?))? ?-->$")
FENCE = re.compile(r"^(\s*)```(\S*)\s*$")
NEEDS_VALUE = ["not run", "run with", "run by", "before", "file"]
OTHER_SHELLS = ["bash", "console", "shell", "shell-session", "zsh"]
# completes a part of a config
MINIMAL = """
[base]
source = { path = "demo/base" }
[data]
seq_len = 64
[[data.domains]]
name = "code"
train = ["demo/data/code.train.jsonl"]
"""


class Fault(Exception):
    """A fault of a block; the message says what is wrong."""


@dataclass
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    marks: list[tuple[str, str]] = field(default_factory=list)

    def mark(self, name: str) -> str | None:
        """The value of the mark `name`, or None if the block does not have the mark."""
        return next((value for mark, value in self.marks if mark == name), None)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, with their marks."""
    found: list[Block] = []
    marks: list[tuple[str, str]] = []
    inside: list[str] | None = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if inside is not None:
            if fence and not fence.group(2):
                found[-1].text = textwrap.dedent("\n".join(inside)) + "\n"
                inside = None
            else:
                inside.append(line)
        elif fence:
            found.append(Block(number, fence.group(2), "", marks))
            marks, inside = [], []
        elif mark := MARK.match(line.strip()):
            marks.append((mark.group(1), (mark.group(2) or "").strip()))
        elif line.strip():
            marks = []
    return found


def check_marks(block: Block) -> None:
    """Refuses marks that lack their value, and the names of shells whose blocks would not run."""
    for name, value in block.marks:
        if name in NEEDS_VALUE and not value:
            raise Fault(f"`<!-- {name}: -->` needs a text after the colon")
    if block.language in OTHER_SHELLS:
        raise Fault(f"call it ```sh instead of ```{block.language}, so that it is run")


def check_sample(block: Block) -> None:
    """Parses a block of TOML, JSON, JSON Lines or Python."""
    try:
        match block.language:
            case "toml":
                tomllib.loads(block.text)
            case "json":
                json.loads(block.text)
            case "jsonl":
                for line in block.text.splitlines():
                    json.loads(line)
            case "python":
                compile(block.text, "<docs>", "exec")
    except (ValueError, SyntaxError) as error:
        raise Fault(f"does not parse: {error}") from error


def shortened(script: str, arguments: str | None) -> str:
    """The script with `arguments` added to each training, before a comment at the line's end."""
    if arguments is None:
        return script
    lines = script.replace("\\\n", " ").splitlines()
    train = re.compile(r"^(dylora (?:train|add-expert)\b[^#\n]*?)(\s*(?: #.*)?)$")
    return "\n".join(train.sub(lambda m: f"{m.group(1)} {arguments}{m.group(2)}", line) for line in lines) + "\n"


def shell(script: str, folder: Path, environment: dict[str, str]) -> None:
    """Runs a script, every command of which must succeed."""
    trap = "trap 'echo \"failed with $?: $BASH_COMMAND\" >&2' ERR\n"
    command = ["bash", "-euo", "pipefail", "-c", trap + script]
    try:
        run = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Fault(f"took more than {SECONDS} s:\n{script}") from error
    if run.returncode != 0:
        raise Fault(f"ended with {run.returncode}:\n{textwrap.indent(script + run.stdout, '    ')}")


def check_block(block: Block, folder: Path, environment: dict[str, str]) -> bool:
    """Checks one block, and returns whether anything was run."""
    check_marks(block)
    check_sample(block)
    if name := block.mark("file"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)
    if block.mark("not run") is not None:
        return False
    if before := block.mark("before"):
        shell(before + "\n", folder, environment)
    if block.language == "sh":
        shell(shortened(block.text, block.mark("run with")), folder, environment)
        return True
    if (by := block.mark("run by")) and environment.get(by):
        script = f"{environment[by]} - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK\n"
        shell(script, folder, environment)
        return True
    is_whole, is_part = (block.mark(name) is not None for name in ["config", "config part"])
    if is_whole or is_part:
        (folder / "sample.toml").write_text(block.text if is_whole else block.text + MINIMAL)
        shell("dylora train --config sample.toml --dry-run\n", folder, environment)
    return is_whole or is_part


def check_page(page: Path, temporary: Path) -> list[str]:
    """Checks a page's blocks in order up to the first fault, and returns its message, if any."""
    folder = Path(tempfile.mkdtemp(dir=temporary, prefix=f"{page.stem}-"))
    # the paths of configs begin at their folder, which must therefore be here
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "DYLORA_CACHE": str(temporary / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    said = []
    for block in blocks(page):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        started = time.monotonic()
        try:
            if check_block(block, folder, environment):
                print(f"ok   {place} ({time.monotonic() - started:.1f} s)", flush=True)
            elif reason := block.mark("not run"):
                print(f"skip {place}: {reason}", flush=True)
        except Fault as fault:
            said.append(f"FAIL {place} (```{block.language}): {fault}")
            break
    return said


def main() -> None:
    """Checks the given pages, or all pages if none is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="pages at a time")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    args = parser.parse_args()
    if shutil.which("dylora") is None:
        sys.exit("check_docs: no `dylora` on PATH; build it, and put target/debug before PATH")
    pages = [page.resolve() for page in args.pages] or [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    with tempfile.TemporaryDirectory(prefix="dylora-docs-") as temporary:
        with ThreadPoolExecutor(args.jobs) as pool:
            faults = [fault for said in pool.map(lambda page: check_page(page, Path(temporary)), pages) for fault in said]
    if faults:
        sys.exit("\n\n".join(faults))


if __name__ == "__main__":
    main()
