"""What the scripts of the evidence share: how answers of E2E are scored, the interval of a share, and
the runs of a study."""
import json
import math
import pathlib
import statistics
import sys


def read_lines(file):
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_text(text, encoding="utf-8")


def facts(prompt):
    """The slots of an E2E input, as in `name : Alimentum | area : city centre`, with their values."""
    return dict(fact.split(" : ", 1) for fact in prompt.strip().split(" | "))


def first_of_each_input(records):
    """The records in an order in which the first one of each prompt comes first, and the number of
    prompts. The first answers of an evaluation are then those of all prompts."""
    first, others, seen = [], [], set()
    for record in records:
        (others if record["prompt"] in seen else first).append(record)
        seen.add(record["prompt"])
    return first + others, len(first)


def references(records):
    """All completions of each prompt, without white space at their ends."""
    found = {}
    for record in records:
        found.setdefault(record["prompt"].strip(), set()).add(record["completion"].strip())
    return found


def share_of_values(text, values):
    """The share of the values that occur in a text, in capitals or not. The values yes and no do not
    count, since the text puts them into other words."""
    values = [value for value in values.values() if value not in ("yes", "no")]
    text = text.casefold().replace("*", "")
    return sum(value.casefold() in text for value in values) / len(values)


def wilson(count, total):
    """The 95 % interval of a share by Wilson's score."""
    if total == 0:
        return [0.0, 1.0]
    z, share = statistics.NormalDist().inv_cdf(0.975), count / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def sign_test(wins, losses):
    """The two-sided p of a sign test of paired answers, of which only one is right."""
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def study_runs(dir):
    """The finished runs of a study, each as its result with the folder as `dir`. Of several runs of
    the same name, which differ in their configs, the one that ended last counts."""
    files = sorted(pathlib.Path(dir).glob("runs/*/result.json"), key=lambda file: file.stat().st_mtime)
    runs = {}
    for file in files:
        result = json.loads(file.read_text())
        run = result["id"]
        measured = result["outcome"].get("trained")
        if measured and run.get("domain") is None:
            name = f"{run['arm']}-x{run['factor']:g}-seed{run['seed']}"
            runs[name] = {**run, **measured, "rate": result["learning_rate"], "dir": file.parent.resolve()}
    return runs


def kept_runs(dir, seeds=1):
    """The run of each arm and seed at the rate that the study keeps: the one with the lowest loss of
    the first seed on the half to select by, of equal ones the smaller. There is none before all runs of
    the study are over, since another rate may be better."""
    if not (pathlib.Path(dir) / "study.json").exists():
        print(f"the study in {dir} is not complete", file=sys.stderr)
        return {}
    runs = study_runs(dir).values()
    first = min((run["seed"] for run in runs), default=0)
    kept = {}
    for arm in sorted({run["arm"] for run in runs}):
        own = [run for run in runs if run["arm"] == arm]
        trials = [run for run in own if run["seed"] == first]
        if not trials:
            continue
        best = min(trials, key=lambda run: (run["selection"]["loss"], run["factor"]))
        for run in own:
            if run["factor"] == best["factor"] and run["seed"] < first + seeds:
                kept[arm, run["seed"]] = run
    return kept


def has_checkpoint(run):
    """Whether the checkpoints of a run were kept (`dylora study --keep`). If not, it says so."""
    found = any((run / "checkpoints").glob("step-*"))
    if not found:
        print(f"{run} has no checkpoint and is left out", file=sys.stderr)
    return found
