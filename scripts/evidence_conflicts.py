#!/usr/bin/env python3
"""Four customers want the same records in four formats: is routing worth anything there, and when?

    scripts/evidence_conflicts.py DYLORA OUT --base DIR --data DIR [--device cuda] [--jobs 8] [--minutes 30]
    scripts/evidence_conflicts.py table [OUT]      (or benchmarks/evidence/conflicts)

Every record of E2E (the domain data2text) is in all four domains, whose completions differ by rule:

    text   the reference as it is
    bold   the reference with each of the input's values between two pairs of asterisks
    json   the input as a JSON object
    qa     a line with a question and its answer for each slot of the input

There is a study (`dylora study --keep`) for each cue by which the prompt tells the format:

    none         the same prompt in all four domains
    prefix       `format : json | ` in front of the input
    instruction  a sentence in front of the input, by one of three wordings

Then the run of each arm with the first seed, at its best rate, answers the validation inputs greedily,
by its router and, as a tenant is served, with `--routing domain`. The studies lie in OUT/studies, their
runs are lines of OUT/runs.jsonl, and the answers are counted in OUT/answers.jsonl. Whatever is finished
is not made again. Studies stop after --minutes, and save. An answer has a format if it ends by itself, names the restaurant, and is a JSON
object, begins with the first question, has asterisks, or has none of these (the text). The
runs.jsonl and answers.jsonl of the study of 2026-11-26 are in benchmarks/evidence/conflicts. `table`
prints markdown.
"""
import argparse
import pathlib
import signal
import statistics
import subprocess
import time

from evidence_formats import CUES, FORMATS, format_of, made
from evidence_metrics import (
    facts, first_of_each_input, has_checkpoint, kept_runs, read_lines, references, share_of_values, study_runs,
    wilson, write_lines,
)
from evidence_tables import interval
from resumable import ROOT, Dylora, Study, add_options, domain, domains, markdown

CONFIG = ROOT / "benchmarks/recipe/equal-documents.toml"
ARMS = ["single", "learned", "supervised", "oracle"]


class Data:
    """The data of all cues and formats in a folder."""

    def __init__(self, source, dir):
        # by the file: the references of each prompt, and the input of E2E in it
        self.dir, self.known, self.inputs = dir, {}, {}
        splits = {split: read_lines(f"{source}/data2text.{split}.jsonl") for split in ("train", "validation")}
        splits["validation"], self.num_inputs = first_of_each_input(splits["validation"])
        for cue in CUES:
            for format in FORMATS:
                for split, records in splits.items():
                    self.write(self.file(cue, format, split), list(made(records, cue, format)))
        for format in FORMATS:
            records = list(made(splits["validation"], "instruction", format, unseen=True))
            self.write(self.file("instruction", format, "unseen"), records)

    def write(self, file, records):
        self.known[file] = references(records)
        self.inputs[file] = {record["prompt"].strip(): record["input"] for record in records}
        text = [{key: record[key] for key in ("prompt", "completion")} for record in records]
        # a file that is there stays, so that what was made of it need not be made again
        if not file.exists() or read_lines(file) != text:
            write_lines(file, text)

    def file(self, cue, format, split):
        return self.dir / cue / f"{format}.{split}.jsonl"

    def domains(self, cue):
        """The override that sets the four domains, which share the blocks by their tokens."""
        file = lambda format, split: self.file(cue, format, split)
        return domains(domain(format, file(format, "train"), file(format, "validation")) for format in FORMATS)


def study(dylora, args, data, cue, end):
    """Makes the study of a cue as far as the time allows."""
    dir = pathlib.Path(args.out).resolve() / "studies" / cue
    sets = [
        f'base.source={{path="{pathlib.Path(args.base).resolve()}"}}',
        f'run.dir="{dir}"',
        data.domains(cue),
        "data.mixing=proportional",
        f"train.duration={{steps={args.steps}}}",
        *args.set,
    ]
    device = "auto" if args.device == "cuda" else args.device
    line = [dylora.binary, "-q", "study", "--config", str(CONFIG), "--arms", ",".join(ARMS), "--out", str(dir)]
    line += ["--seeds", str(args.seeds), "--rates", args.rates, "--jobs", str(args.jobs), "--keep", "--device", device]
    for item in sets:
        line += ["--set", item]
    if args.dry_run:
        return subprocess.run([*line, "--dry-run"], cwd=ROOT, env=dylora.env, check=True)
    if time.monotonic() > end:
        return
    process = subprocess.Popen(line, cwd=ROOT, env=dylora.env)
    try:
        process.wait(end - time.monotonic())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
    if process.returncode:
        print(f"the study of the cue {cue} is not complete; the same command goes on", flush=True)


def note_runs(args, cue, results):
    """Appends the runs of a cue's study that have no line yet."""
    there = results.results()
    keys = ["arm", "factor", "rate", "seed", "selection", "report", "steps", "train_secs", "parameters"]
    results.file.parent.mkdir(parents=True, exist_ok=True)
    for name, run in study_runs(f"{args.out}/studies/{cue}").items():
        name = f"{cue}-{name}"
        if name not in there:
            results.add({"name": name, "cue": cue, **{key: run[key] for key in keys}})


def answer_jobs(args, cue):
    """The evaluations of a cue: the cue, the arm, the routing, the split and the run's folder."""
    jobs = {}
    for (arm, _), run in kept_runs(f"{args.out}/studies/{cue}").items():
        dir = run["dir"]
        if not has_checkpoint(dir):
            continue
        for routing in {"oracle": ["domain"], "supervised": ["router", "domain"]}.get(arm, ["router"]):
            jobs[f"{cue}-{arm}-{routing}"] = (cue, arm, routing, "validation", dir)
            if cue == "instruction" and arm != "learned":
                jobs[f"unseen-{arm}-{routing}"] = (cue, arm, routing, "unseen", dir)
        if arm == "single":
            jobs[f"{cue}-base"] = (cue, "base", "none", "validation", dir)
    return jobs


def scores(data, file, format, samples):
    """What the answers of a domain have right."""
    counts = dict.fromkeys(("followed", "exact"), 0)
    formats = dict.fromkeys([*FORMATS, "none"], 0)
    shares = []
    for sample in samples:
        prompt, text = sample["prompt"].strip(), sample["text"].strip()
        slots = facts(data.inputs[file][prompt])
        found = format_of(text, slots["name"]) if sample["finish_reason"] == "stop" else None
        formats[found or "none"] += 1
        counts["followed"] += found == format
        counts["exact"] += text in data.known[file][prompt]
        shares.append(share_of_values(text, slots))
    return {"total": len(samples), **counts, "formats": formats, "values": round(statistics.mean(shares), 4)}


def answers(dylora, args, data, name, job):
    """The losses of a run on all validation records, and the counts of its answers to the inputs."""
    cue, arm, routing, split, run = job
    line = ["--checkpoint", run, "--base", pathlib.Path(args.base).resolve(), "--routing", routing]
    for format in FORMATS:
        line += ["--data", f"{format}={data.file(cue, format, split)}"]
    line += ["--generate", min(args.answers, data.num_inputs), "--max-new-tokens", 192, "--batch-size", 32]
    report = dylora.json("eval", *line)
    write_lines(pathlib.Path(args.out) / "samples" / f"{name}.jsonl", report["samples"])
    counts = {}
    for format in FORMATS:
        samples = [sample for sample in report["samples"] if sample["domain"] == format]
        counts[format] = scores(data, data.file(cue, format, split), format, samples)
    losses = {domain["name"]: domain["loss"] for domain in report["domains"]}
    asked = "unseen" if split == "unseen" else cue
    result = {"cue": asked, "arm": arm, "routing": routing, "run": run.name}
    return {**result, "loss": report["loss"], "losses": losses, "answers": counts}


def totals(result):
    """The answers of all formats together: how many, how many in the right format, and how many exact."""
    return [sum(of[key] for of in result["answers"].values()) for key in ("total", "followed", "exact")]


def show(result):
    total, followed, exact = totals(result)
    return f"{result['name']:28} loss {result['loss']:.4f}, {followed} in the format, {exact} exact of {total}"


def best(runs, cue, arm):
    """The runs of an arm at the rate with the lowest loss of the first seed on the half to select by."""
    own = [run for run in runs if run["cue"] == cue and run["arm"] == arm]
    if not own:
        return []
    first = min(run["seed"] for run in own)
    trials = [run for run in own if run["seed"] == first]
    factor = min(trials, key=lambda run: (run["selection"]["loss"], run["factor"]))["factor"]
    return sorted((run for run in own if run["factor"] == factor), key=lambda run: run["seed"])


def below_single(runs, single):
    """How much lower the loss is than that of `single`, as the mean over the seeds and its interval."""
    losses = {run["seed"]: run["report"]["loss"] for run in single}
    pairs = [losses[run["seed"]] - run["report"]["loss"] for run in runs if run["seed"] in losses]
    return interval(pairs) if pairs else ""


def table_of_losses(runs):
    rows = []
    for cue in CUES:
        single = best(runs, cue, "single")
        for arm in ARMS:
            own = best(runs, cue, arm)
            if not own:
                continue
            mean = lambda get: f"{statistics.mean(map(get, own)):.4f}"
            rows.append([
                f"{cue}, {arm}", f"{own[0]['rate']:.1e}", str(len(own)),
                *[mean(lambda run: run["report"]["domains"][format]) for format in FORMATS],
                mean(lambda run: run["report"]["loss"]), "" if arm == "single" else below_single(own, single),
            ])
    print(markdown(["cue and arm", "rate", "seeds", *FORMATS, "mean", "below single"], rows))


def table_of_answers(results):
    rows, cues, arms = [], [*CUES, "unseen"], ["base", *ARMS]
    order = lambda result: (cues.index(result["cue"]), arms.index(result["arm"]), result["routing"] != "router")
    for result in sorted(results, key=order):
        total, followed, exact = totals(result)
        low, high = wilson(followed, total)
        counts = result["answers"].values()
        rows.append([
            f"{result['cue']}, {result['arm']}, {result['routing']}", f"{result['loss']:.4f}",
            f"{100 * followed / total:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            " / ".join(str(of["followed"]) for of in counts),
            f"{exact} of {total}", " / ".join(str(of["exact"]) for of in counts),
            " / ".join(f"{of['values']:.2f}" for of in counts),
        ])
    by = " / ".join(FORMATS)
    head = ["cue, arm, routing", "loss", "in the right format", by, "exact", by, f"share of values: {by}"]
    print(markdown(head, rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "runs/evidence/conflicts")
    parser.add_argument("--cues", default=",".join(CUES), type=lambda text: text.split(","))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rates", default="0.5,0.7", help="factors of the config's learning rate")
    parser.add_argument("--answers", type=int, default=1000, help="most inputs that are answered in each format")
    parser.add_argument("--dry-run", action="store_true", help="write the data and print the plans of the studies")
    args = parser.parse_args()
    runs, results = Study(f"{args.out}/runs.jsonl"), Study(f"{args.out}/answers.jsonl")
    if args.dylora == "table":
        table_of_losses(list(runs.results().values()))
        print()
        return table_of_answers(results.results().values())
    if not (args.base and args.data):
        parser.error("--base and --data are needed")
    end = time.monotonic() + 60 * args.minutes
    dylora = Dylora(args.dylora, args.device)
    data = Data(args.data, pathlib.Path(args.out).resolve() / "data")
    work = lambda name, job, dir: answers(dylora, args, data, name, job)
    left = 0
    for cue in args.cues:
        study(dylora, args, data, cue, end)
        note_runs(args, cue, runs)
        if not args.dry_run:
            left += results.run(answer_jobs(args, cue), work, args.jobs, (end - time.monotonic()) / 60, show)
    print(f"{left} evaluations left")


if __name__ == "__main__":
    main()
