#!/usr/bin/env python3
"""Runs studies with `dylora study` on a real base, several at a time, and collects what they find.

    scripts/evidence_studies.py run DYLORA --base DIR --data DIR --device cuda --jobs 8 [--minutes 9]
    scripts/evidence_studies.py plan DYLORA --base DIR --data DIR [--device cpu]
    scripts/evidence_studies.py checkpoints DYLORA --base DIR --data DIR --device cuda
    scripts/evidence_studies.py table

There are three items, each of several studies (`STUDIES`):

    routing     four domains: all arms, five seeds
    sizes       six domains of unequal sizes, mixed in proportion or equally: what small domains lose
    capacity    the four domains with other ranks and other layers: where routing pays

--data is a folder with NAME.train.jsonl and NAME.validation.jsonl for each domain. The studies' folders
are in --out. The row of each run is appended to ROWS/ITEM.jsonl, and what each study found to
ROWS/studies.jsonl (--rows, benchmarks/evidence by default). A run that has a row is not made again, even
if --out is empty. `plan` counts the runs and checks all configs. `checkpoints` prints the folders of the
best runs with the first seed (`KEPT`), and makes again those whose checkpoints are lost. `table` prints
the rows as markdown.
"""
import argparse
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

from evidence_tables import ALL, arms_of, print_tables, recovery, selection_loss
from resumable import ROOT, Dylora, domain, domains

CONFIG = ROOT / "benchmarks/recipe/equal-documents.toml"
# links to the base and the data. A run's hash covers their paths, which must therefore be the same on
# each machine
LINKS = pathlib.Path(tempfile.gettempdir()) / "dylora-evidence"
# seconds between two looks at the studies, and for a stopped study to save
POLL, SAVE = 1.0, 40

# the blocks of each domain in a step of 18 blocks, so that each gives about as many documents
FOUR = {"math": 6, "code": 3, "data2text": 2, "shakespeare": 7}
SIX = ["math", "code_alpaca", "data2text", "shakespeare", "wiki", "code_mbpp"]
# the order of the domains in tables
COLUMNS = ["math", "code", *SIX[1:]]
# the names of files that differ from those of their domains
FILES = {"code": "code_alpaca"}

MAIN = ["single", "supervised", "oracle"]
# the arms of `routing` whose best checkpoints with the first seed are kept
KEPT = MAIN


def linked(name, weight=1, expert=None):
    """The entry of a domain whose files are in the linked folder."""
    file = LINKS / "data" / FILES.get(name, name)
    return domain(name, f"{file}.train.jsonl", f"{file}.validation.jsonl", weight, expert)


FOUR_SETS = [domains(linked(name, weight) for name, weight in FOUR.items())]


def six(mixing, *sets, experts=None):
    """The overrides for six domains.

    - sets: more overrides, which go before those of six experts
    - experts: the expert of each domain, unless each has its own
    """
    entries = domains(linked(name, 1, experts and experts[name]) for name in SIX)
    return [entries, f"data.mixing={mixing}", "lora.num_experts=6", *sets]


# the two domains of code share an expert
ALIKE = dict(zip(SIX, [0, 1, 2, 3, 4, 1]))
MIXINGS = {"proportional": "proportional", "equal": "weights"}


@dataclass
class Spec:
    """A study: its arms, the factors of 2e-3 that they try, and its overrides of the config."""

    item: str
    name: str
    text: str
    arms: list
    rates: list
    seeds: int
    sets: list
    keep: bool = False
    # the study whose single LoRA it is compared with, if it has none
    single_of: str | None = None

    @property
    def folder(self):
        return f"{self.item}/{self.name}"

    @property
    def id(self):
        """What the study is, by which its summary is found again."""
        return [self.item, self.name, sorted(self.arms), sorted(self.rates), self.seeds]


def sizes(arms, name, text, sets=(), experts=None, ranks=()):
    """A study of six domains for each mixing."""
    return [
        Spec(
            "sizes", mixing + name, f"{mixing} mixing, {text}", arms, [0.5, 0.7, 1.0], 3,
            six(value, *sets, experts=experts), single_of=None if "single" in arms else mixing,
        )
        for mixing, value in MIXINGS.items()
    ]


def capacity(name, text, rates, *sets):
    return [Spec("capacity", name, text, MAIN, rates, 3, [*FOUR_SETS, *sets])]


ROUTING = ("routing", "four", "four domains, total rank 32")
ROUTING_RATES = [0.35, 0.5, 0.7, 1.0]

# in the order in which they are made
STUDIES = [
    Spec(*ROUTING, MAIN, ROUTING_RATES, 5, FOUR_SETS, keep=True),
    Spec(*ROUTING, ALL, ROUTING_RATES, 5, FOUR_SETS),
    *sizes(MAIN, "", "six experts of rank 8"),
    *sizes(
        ["supervised"], "-shared", "six experts of rank 6 and a part of rank 12 that is always on",
        ["lora.rank=6", "lora.alpha=12", "lora.shared_rank=12"],
    ),
    *sizes(
        ["supervised"], "-alike", "five experts of rank 9, one for both domains of code",
        ["lora.num_experts=5", "lora.rank=9", "lora.alpha=18"], ALIKE,
    ),
    *capacity("rank-8", "total rank 8", [0.7, 1.0, 1.4], "lora.rank=2", "lora.alpha=4"),
    *capacity("rank-128", "total rank 128", [0.25, 0.35, 0.5], "lora.rank=32", "lora.alpha=64"),
    *capacity(
        "attention", "total rank 32, attention alone", [0.7, 1.0, 1.4],
        'lora.target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]',
    ),
    *sizes(["supervised"], "-by-size", "six experts with ranks by size", ['lora.capacity="by_domain"']),
]


# --- rows ---


class Rows:
    """The rows of runs by item, and what the studies found."""

    def __init__(self, dir):
        self.dir = pathlib.Path(dir)
        self.lock = threading.Lock()
        self.runs = {item: self.read(item) for item in dict.fromkeys(spec.item for spec in STUDIES)}
        self.studies = self.read("studies")

    def read(self, name):
        file = self.dir / f"{name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def append(self, name, to, row):
        self.dir.mkdir(parents=True, exist_ok=True)
        with self.lock, open(self.dir / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        to.append(row)

    def of(self, spec):
        """The results of a study's runs, as `dylora study` writes them."""
        rows = [row for row in self.runs[spec.item] if row["setting"] == spec.name]
        return [{key: row[key] for key in row if key not in ("item", "setting")} for row in rows]

    def is_over(self, spec):
        return any(row["study"] == spec.id and not row["failed"] for row in self.studies)

    def collect(self, spec, dir):
        """Appends the results of runs that have no row yet."""
        known = {row["hash"] for row in self.of(spec)}
        for file in sorted(dir.glob("runs/*/result.json"), key=lambda file: file.stat().st_mtime):
            result = json.loads(file.read_text())
            if result["hash"] not in known:
                row = {"item": spec.item, "setting": spec.name, **result}
                self.append(spec.item, self.runs[spec.item], row)
                print(f"{spec.folder}: {show(result)}", flush=True)

    def conclude(self, spec, dir):
        """Appends what a study found."""
        report = json.loads((dir / "study.json").read_text())
        keys = ["dylora_version", "steps", "comparisons", "recovery", "warnings", "verdict", "failed"]
        arms = [{key: arm[key] for key in arm if key != "config"} for arm in report["arms"]]
        row = {"study": spec.id, **{key: report[key] for key in keys}, "arms": arms}
        self.append("studies", self.studies, row)
        print(f"{spec.folder}: {report['verdict']}", flush=True)
        for warning in report["warnings"]:
            print(f"{spec.folder}: warning: {warning}", flush=True)

    def restore(self, spec, dir, but):
        """Puts the results that have rows into a study's folder, which may be empty.

        - but: the folders of runs that are to be made again
        """
        for result in self.of(spec):
            run = dir / "runs" / run_folder(result)
            if run not in but and not (run / "result.json").exists():
                run.mkdir(parents=True, exist_ok=True)
                (run / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def run_name(id):
    """The name of a run, as in src/study/run.rs."""
    domain = f"-domain{id['domain']}" if "domain" in id else ""
    return f"{id['arm']}{domain}-x{id['factor']:g}-seed{id['seed']}"


def run_folder(result):
    return f"{run_name(result['id'])}-{result['hash'][:8]}"


def show(result):
    measured = result["outcome"].get("trained")
    if measured is None:
        return f"{run_name(result['id'])} diverged: {result['outcome']['diverged']}"
    return f"{run_name(result['id'])} {measured['report']['loss']:.4f} ({measured['train_secs']:.0f} s)"


# --- running ---


def link(args):
    """Lets the links name this call's base and data, and keeps other calls from changing them."""
    LINKS.mkdir(parents=True, exist_ok=True)
    args.lock = open(LINKS / "lock", "w")
    try:
        fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another call uses `{LINKS}`\nhint: wait until it has ended")
    for name, target in [("base", args.base), ("data", args.data)]:
        path = LINKS / name
        path.unlink(missing_ok=True)
        path.symlink_to(pathlib.Path(target).resolve(strict=True), target_is_directory=True)


class Runner:
    """The studies that are running. Two that have the same folder do not run at once."""

    def __init__(self, args, rows, dylora, specs):
        self.args, self.rows, self.dylora, self.todo = args, rows, dylora, list(specs)
        # the folders of runs that are made again although they have rows
        self.again = []
        self.end = time.monotonic() + 60 * args.minutes
        self.lock, self.busy, self.left = threading.Lock(), set(), []
        self.jobs = max(args.jobs // args.studies, 1)

    def dir(self, spec):
        return pathlib.Path(self.args.out).resolve() / spec.folder

    def command(self, spec, *more, device):
        sets = [f'base.source={{path="{LINKS}/base"}}', *spec.sets, *self.args.set]
        line = [self.dylora.binary, "study", "--config", str(CONFIG), "--arms", ",".join(spec.arms)]
        line += ["--rates", ",".join(map(str, spec.rates)), "--seeds", str(spec.seeds)]
        line += ["--out", str(self.dir(spec)), "--device", device, *more]
        return [*line, *(part for item in sets for part in ("--set", item))]

    def env(self, slot):
        """The study in a slot begins with another GPU than those in the slots before."""
        if not self.dylora.num_gpus:
            return self.dylora.env
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.dylora.num_gpus)))
        names = names.split(",")
        first = slot * self.jobs % len(names)
        return {**self.dylora.env, "CUDA_VISIBLE_DEVICES": ",".join(names[first:] + names[:first])}

    def next(self):
        with self.lock:
            for spec in self.todo:
                if spec.folder not in self.busy:
                    self.todo.remove(spec)
                    self.busy.add(spec.folder)
                    return spec
        return None

    def work(self, slot):
        while time.monotonic() < self.end and self.todo:
            spec = self.next()
            if spec is None:
                time.sleep(POLL)
                continue
            try:
                if not self.study(spec, slot):
                    self.left.append(spec)
            finally:
                self.busy.discard(spec.folder)

    def study(self, spec, slot):
        """Runs a study, or goes on with it, and returns whether it came to its end."""
        dir = self.dir(spec)
        dir.mkdir(parents=True, exist_ok=True)
        self.rows.restore(spec, dir, self.again)
        # with `auto`, the runs share the GPUs
        device = "auto" if self.dylora.num_gpus > 1 else self.args.device
        keep = ["--keep"] if spec.keep else []
        line = self.command(spec, "--jobs", str(self.jobs), *keep, device=device)
        with open(dir / "log.txt", "a") as log:
            process = subprocess.Popen(line, stdout=log, stderr=log, cwd=ROOT, env=self.env(slot))
            self.wait(process, spec, dir)
        self.rows.collect(spec, dir)
        if spec.keep:
            prune(dir, kept(self.rows.of(spec), spec))
        if process.returncode:
            last = "\n".join((dir / "log.txt").read_text().splitlines()[-6:])
            print(f"{spec.folder}: exit code {process.returncode}:\n{last}", file=sys.stderr, flush=True)
            return False
        self.rows.conclude(spec, dir)
        return True

    def wait(self, process, spec, dir):
        """Collects the rows while a study runs, and stops it when the time is over."""
        is_stopped = False
        while process.poll() is None:
            now = time.monotonic()
            if now > self.end and not is_stopped:
                is_stopped = True
                process.send_signal(signal.SIGINT)
            if now > self.end + SAVE:
                process.kill()
            self.rows.collect(spec, dir)
            time.sleep(POLL)

    def run(self):
        # the first study's plan: the device and the data are there
        check = self.command(self.todo[0], "--dry-run", device=self.args.device) if self.todo else None
        if check:
            self.dylora.call(check)
        threads = [threading.Thread(target=self.work, args=[slot]) for slot in range(self.args.studies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left = [*self.left, *self.todo]
        print(f"{len(left)} studies left: {', '.join(spec.folder for spec in left)}")


def kept(results, spec):
    """The folders of the best runs with the first seed; none before all trials are over."""
    names = {}
    for arm in KEPT:
        trials = [r for r in results if r["id"]["arm"] == arm and r["id"]["seed"] == 0]
        if not set(spec.rates) <= {trial["id"]["factor"] for trial in trials}:
            return {}
        best = min(trials, key=selection_loss)
        names[arm] = run_folder(best)
    return names


def prune(dir, names):
    """Removes the checkpoints of the runs that are over and are not among `names`."""
    for result in dir.glob("runs/*/result.json") if names else []:
        if result.parent.name not in names.values():
            shutil.rmtree(result.parent / "checkpoints", ignore_errors=True)


def checkpoints(args, rows, dylora):
    """Prints the folders of the kept runs, and makes those again that have no checkpoint."""
    spec = STUDIES[0]
    runner = Runner(args, rows, dylora, [spec])
    names = kept(rows.of(spec), spec)
    if not names:
        sys.exit("error: the trials of `routing` are not all over")
    folders = {arm: runner.dir(spec) / "runs" / name for arm, name in names.items()}
    lost = [folder for folder in folders.values() if not (folder / "checkpoints").exists()]
    if lost:
        link(args)
        for folder in lost:
            (folder / "result.json").unlink(missing_ok=True)
        runner.again = lost
        runner.run()
    for arm, folder in folders.items():
        print(f"{arm} {folder}", "" if (folder / "checkpoints").exists() else "(no checkpoint)")


def plan(args, dylora, specs):
    """Checks each study's config, and counts the runs. The runs of `per_domain` for all domains, which
    together have the steps of one, count as one."""
    runner, runs = Runner(args, None, dylora, specs), {}
    link(args)
    for spec in specs:
        dylora.call(runner.command(spec, "--dry-run", device=args.device))
        before = runs.get(spec.folder, 0)
        runs[spec.folder] = len(spec.arms) * (len(spec.rates) + spec.seeds - 1)
        what = f"{spec.text}; {', '.join(spec.arms)}; {spec.rates}"
        print(f"{spec.folder:27} {runs[spec.folder] - before:3} runs: {what}")
    print(f"{sum(runs.values())} runs")


def table(rows):
    singles = {}
    groups = {}
    for spec in {spec.folder: spec for spec in STUDIES}.values():
        arms = arms_of(rows.of(spec))
        singles[spec.folder] = arms.get("single")
        single = singles.get(f"{spec.item}/{spec.single_of or spec.name}")
        group = f"{spec.item}: {spec.text if not spec.single_of else ''}"
        if spec.item == "sizes":
            group = f"sizes: {spec.single_of or spec.name} mixing"
        label = lambda arm: f"{arm}: {spec.text.split(', ', 1)[1]}" if spec.single_of else arm
        entry = groups.setdefault(group, ([], []))
        entry[0].extend((label(arm), of, single) for arm, of in arms.items())
        entry[1].append(recovery(arms))
    for title, (lines, recoveries) in groups.items():
        if lines:
            print_tables(title, lines, COLUMNS)
            print("\n" + " ".join(text for text in recoveries if text))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["run", "plan", "checkpoints", "table"])
    parser.add_argument("dylora", nargs="?")
    parser.add_argument("--base", help="the folder of the base")
    parser.add_argument("--data", help="the folder of the data")
    parser.add_argument("--out", default="runs/evidence", help="the studies' folders")
    parser.add_argument("--rows", default=ROOT / "benchmarks/evidence", help="the folder of the rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of all studies together")
    parser.add_argument("--studies", type=int, default=2, help="studies at a time")
    parser.add_argument("--minutes", type=float, default=30, help="the studies are stopped after this time")
    parser.add_argument("--only", default="", help="the beginning of the studies to run, as sizes/equal")
    parser.add_argument("--rates", help="the factors to try instead, as 0.5,0.7")
    parser.add_argument("--seeds", type=int, help="the number of seeds instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    rows = Rows(args.rows)
    if args.action == "table":
        return table(rows)
    if not (args.dylora and args.base and args.data):
        parser.error("DYLORA, --base and --data are needed")
    dylora = Dylora(args.dylora, args.device)
    specs = [spec for spec in STUDIES if spec.folder.startswith(args.only)]
    for spec in specs:
        spec.rates = [float(rate) for rate in args.rates.split(",")] if args.rates else spec.rates
        spec.seeds = args.seeds or spec.seeds
    if args.action == "plan":
        return plan(args, dylora, specs)
    if args.action == "checkpoints":
        return checkpoints(args, rows, dylora)
    link(args)
    Runner(args, rows, dylora, [spec for spec in specs if not rows.is_over(spec)]).run()


if __name__ == "__main__":
    main()
