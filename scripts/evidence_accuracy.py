#!/usr/bin/env python3
"""Counts right answers of the runs of a study: of GSM8K (the domain math) and E2E (the domain data2text).

    scripts/evidence_accuracy.py DYLORA OUT --study STUDY --base DIR --data DIR [--device cuda] [--jobs 8]
    scripts/evidence_accuracy.py DYLORA OUT --run single=RUN --run oracle=RUN --base DIR --data DIR
    scripts/evidence_accuracy.py table [OUT]

The study was made with `dylora study --keep`. Of each of the --arms, the runs of the first --seeds seeds
are taken, at the rate with the lowest loss on the half to select by. --run names a run by hand instead.
The base alone is that of the first run with `--routing none`. Every other run is routed as it was
trained, so that the oracle knows the domain.

Answers are greedy, in the dtype of the run. All --answers first documents of math are asked, and each
input of data2text once:

    math       the number behind `####` is that of the reference; the last number of the text is that of
               the reference; the text has a line `#### NUMBER`
    data2text  the text is one of the references of the same input; the share of the input's values that
               occur in the text (those that are yes or no aside)

Each result is a line of OUT/accuracy.jsonl. Finished ones are not made again. `table` prints markdown,
with 95 % intervals by Wilson's score and sign tests of the paired answers against `single`.
"""
import argparse
import pathlib
import re
import statistics
import sys

from evidence_metrics import (
    facts, first_of_each_input, has_checkpoint, kept_runs, read_lines, references, share_of_values, sign_test,
    wilson, write_lines,
)
from resumable import Dylora, Study, markdown

ARMS = ["base", "single", "learned", "supervised", "oracle"]
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
# as in GSM8K's references, whose last line this is
FINAL = re.compile(r"^#### *(-?\$?\d[\d,]*(?:\.\d+)?)\.?\s*$", re.MULTILINE)


def number(text):
    """The value of a number that may have a currency sign and commas."""
    return float(text.replace("$", "").replace(",", ""))


def last(pattern, text):
    found = pattern.findall(text)
    return number(found[-1]) if found else None


def count(right):
    """A count with its interval, and the single answers as a text of 0 and 1."""
    interval = wilson(sum(right), len(right))
    return {
        "count": sum(right), "total": len(right), "interval": interval,
        "answers": "".join(str(int(of)) for of in right),
    }


def math_counts(samples):
    right = [last(FINAL, sample["reference"]) for sample in samples]
    if None in right:
        raise ValueError("a reference of math has no line `#### NUMBER`")
    texts = [sample["text"] for sample in samples]
    return {
        "final": count([last(FINAL, text) == of for text, of in zip(texts, right)]),
        "last_number": count([last(NUMBER, text) == of for text, of in zip(texts, right)]),
        "has_form": count([last(FINAL, text) is not None for text in texts]),
        "ended": count([sample["finish_reason"] == "stop" for sample in samples]),
    }


def data2text_counts(samples, known):
    texts = [(sample["prompt"].strip(), sample["text"].strip()) for sample in samples]
    shares = [share_of_values(text, facts(prompt)) for prompt, text in texts]
    return {
        "exact": count([text in known[prompt] for prompt, text in texts]),
        "all_values": count([share == 1 for share in shares]),
        "values": round(statistics.mean(shares), 4),
        "ended": count([sample["finish_reason"] == "stop" for sample in samples]),
    }


def jobs_of(args):
    """The evaluations: the run's folder, its arm, its seed, and whether the base alone answers."""
    if args.run:
        named = [run.split("=", 1) for run in args.run]
        runs = {(arm, 0): pathlib.Path(dir).resolve() for arm, dir in named}
    else:
        kept = kept_runs(args.study, args.seeds)
        runs = {key: run["dir"] for key, run in kept.items() if key[0] in args.arms}
    runs = {key: dir for key, dir in runs.items() if has_checkpoint(dir)}
    if not runs:
        sys.exit("no run has a checkpoint\nhint: make the study with `dylora study --keep`, or name runs by --run")
    jobs = {}
    if "base" in args.arms:
        jobs["base"] = (next(iter(runs.values())), "base", None)
    for (arm, seed), dir in sorted(runs.items(), key=lambda item: item[0][1]):
        jobs[f"{arm}-{seed}"] = (dir, arm, seed)
    return jobs


def show(result):
    final, exact = result["math"]["final"], result["data2text"]["exact"]
    return (
        f"{result['name']:14} math {final['count']} of {final['total']},"
        f" data2text {exact['count']} of {exact['total']}, values {result['data2text']['values']:.3f}"
    )


def paired(results, arm, task, key):
    """The answers that only the arm has right, and those that only `single` has, over common seeds."""
    by_seed = lambda name: {of["seed"]: of[task][key]["answers"] for of in results if of["arm"] == name}
    own, single = by_seed(arm), by_seed("single")
    pairs = [pair for seed in own.keys() & single.keys() for pair in zip(own[seed], single[seed])]
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def cell(results, arm, task, key):
    own = [of[task][key] for of in results if of["arm"] == arm]
    right, total = sum(of["count"] for of in own), sum(of["total"] for of in own)
    low, high = wilson(right, total)
    return f"{right} of {total}, {100 * right / total:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def table(results):
    results = list(results.values())
    rows = []
    for arm in ARMS:
        own = [of for of in results if of["arm"] == arm]
        if not own:
            continue
        wins, losses = paired(results, arm, "math", "final")
        against = "" if arm in ("single", "base") else f"{wins} : {losses}, p = {sign_test(wins, losses):.2f}"
        rows.append([
            arm, str(len(own)), cell(results, arm, "math", "final"), against,
            cell(results, arm, "math", "last_number"), cell(results, arm, "math", "has_form"),
            cell(results, arm, "data2text", "exact"), cell(results, arm, "data2text", "all_values"),
            f"{statistics.mean(of['data2text']['values'] for of in own):.3f}",
        ])
    head = ["arm", "seeds", "math: right", "right by the arm alone : by single alone", "math: last number right"]
    print(markdown([
        *head, "math: has the form", "data2text: a reference", "data2text: all values", "data2text: share of values",
    ], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dylora", metavar="DYLORA|table")
    parser.add_argument("out", nargs="?", default="runs/evidence/accuracy", metavar="OUT")
    parser.add_argument("--study", help="the folder of a study")
    parser.add_argument("--run", action="append", default=[], metavar="ARM=DIR", help="a run, instead of a study")
    parser.add_argument("--arms", default=",".join(ARMS), type=lambda text: text.split(","))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", help="the folder of the base, if it has moved since the study")
    parser.add_argument("--data", help="the folder of the data")
    parser.add_argument("--answers", type=int, default=500, help="documents of math to answer")
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=64, help="answers at a time")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="the dtype of the base [default: that of the run]")
    parser.add_argument("--minutes", type=float, default=30, help="no evaluation begins after this time")
    args = parser.parse_args()
    results = Study(f"{args.out}/accuracy.jsonl")
    if args.dylora == "table":
        return table(results.results())
    if not args.data or not (args.study or args.run):
        parser.error("--data and --study or --run are needed")
    data = pathlib.Path(args.data).resolve()
    e2e, num_inputs = first_of_each_input(read_lines(data / "data2text.validation.jsonl"))
    file = pathlib.Path(args.out).resolve() / "data2text.inputs.jsonl"
    write_lines(file, e2e[:num_inputs])
    known = references(e2e)
    dylora = Dylora(args.dylora, args.device)

    def work(name, job, dir):
        run, arm, seed = job
        line = ["--checkpoint", run, "--data", f"math={data}/math.validation.jsonl", "--data", f"data2text={file}"]
        line += ["--generate", args.answers, "--max-new-tokens", args.max_new_tokens, "--batch-size", args.batch_size]
        line += ["--base", pathlib.Path(args.base).resolve()] if args.base else []
        line += ["--dtype", args.dtype] if args.dtype else []
        line += ["--routing", "none"] if arm == "base" else []
        report = dylora.json("eval", *line)
        of = lambda domain: [sample for sample in report["samples"] if sample["domain"] == domain]
        write_lines(file.parent / "samples" / f"{name}.jsonl", report["samples"])
        result = {"arm": arm, "seed": seed, "run": run.name, "routing": report["routing_source"]}
        return {**result, "math": math_counts(of("math")), "data2text": data2text_counts(of("data2text"), known)}

    left = results.run(jobs_of(args), work, args.jobs, args.minutes, show)
    print(f"{left} evaluations left")


if __name__ == "__main__":
    main()
