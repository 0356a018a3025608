#!/usr/bin/env python3
"""Checks the pages of `dylora report`.

    scripts/check_report.py FOLDER

Runs of some steps, a growth and a study are made on the demo base in FOLDER, and a run whose names
are hostile is written by hand. Each number of a report must be that of the run's files. Chromium,
if there is one, takes pictures of the pages on a desktop and a phone, light and dark, and printed;
nothing may be wider than the phone, cut off, empty, loaded or logged as an error. Needs no packages;
scripts/check_report runs this script.
"""

import json
import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import browser

DYLORA = os.environ.get("DYLORA", "target/debug/dylora")
HOSTILE = ["</script><img src=x onerror=alert(1)>", "\u202egnp.\u2066 \u05d0 a\"b'c & <b>\x1b[2J"]
# as they are shown
VISIBLE = [HOSTILE[0], "[U+202E]gnp.[U+2066] \u05d0 a\"b'c & <b>\u241b[2J"]
# elements that a report may have
ELEMENTS = set(
    "html head meta title style body a header h1 h2 h3 h4 ul li span main section p table caption "
    "thead tbody tr th td div figure figcaption svg desc path text circle rect g details summary "
    "article dl dt dd sub br pre code footer strong".split()
)
VOID = {"meta", "br"}
count = 0


def expect(name, condition, found=""):
    """Stops if a condition does not hold."""
    global count
    if not condition:
        sys.exit(f"{name}: not so\n{found}")
    count += 1


def dylora(*arguments):
    """The standard output of a command."""
    line = [DYLORA, "--quiet", *map(str, arguments)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


class Document(HTMLParser):
    """A page: its elements with their attributes and texts, as a flat list in their order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        parent = self.open[-1] if self.open else None
        element = {"tag": tag, "parent": parent, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1]["tag"] != tag:
            sys.exit(f"`</{tag}>` closes {self.open[-1:]}")
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        """All elements with a tag."""
        return [element for element in self.elements if element["tag"] == tag]

    def inside(self, element, tag):
        """The elements with a tag whose parent is `element`."""
        return [x for x in self.elements if x["parent"] is element and x["tag"] == tag]


def metrics(run):
    """The lines of a run's metrics by kind and step."""
    text = (run / "metrics.jsonl").read_text()
    for name, shown in zip(HOSTILE, VISIBLE):
        text = text.replace(json.dumps(name), json.dumps(shown))
    lines = map(json.loads, text.splitlines())
    return {(line["kind"], line["step"]): line for line in lines}


def same(shown, value):
    """Whether a shown number is a number of a JSON file."""
    return shown == "not finite" if value is None else float(shown) == value


def figures(document, runs):
    """Compares all numbers that name their source. Returns the sources with their runs and steps."""
    lines = [metrics(run) if run else {} for run in runs]
    found = set()

    def compare(run, step, source, shown):
        kind, *keys = source
        value = lines[run][kind, step]
        for key in keys:
            # JSON writes this control character by its number, which stays as it is
            value = value[key.replace("\x1b", "\u241b") if isinstance(key, str) else key]
        cells = value if isinstance(value, list) else [value]
        good = len(cells) == len(shown) and all(map(same, shown, cells))
        expect("a figure is that of the metrics", good, f"{run} {step} {source}: {shown}, {cells}")
        found.add((run, step, json.dumps(source).replace("\\u001b", "\\u241b")))

    for table in document.all("table"):
        rows = [row for part in document.inside(table, "tbody") for row in document.inside(part, "tr")]
        if table.get("class") == "series":
            (head,) = document.inside(document.inside(table, "thead")[0], "tr")
            heads = document.inside(head, "th")[1:]
            for row in rows:
                step = int(document.inside(row, "th")[0]["text"])
                for column, cell in zip(heads, document.inside(row, "td"), strict=True):
                    if cell["text"]:
                        source = json.loads(column["data-source"])
                        compare(int(column["data-run"]), step, source, [cell["text"]])
            continue
        for row in rows:
            cells = document.inside(row, "td")
            if "data-source" in row:
                shown = [x["data-value"] for x in cells if "data-value" in x and "data-source" not in x]
                source = json.loads(row["data-source"])
                compare(int(table["data-run"]), int(table["data-step"]), source, shown)
            for cell in cells:
                if "data-source" in cell and "data-value" in cell:
                    source = json.loads(cell["data-source"])
                    compare(int(cell["data-run"]), int(cell["data-step"]), source, [cell["data-value"]])
    return found


def whole(found, runs):
    """Checks that a report shows all losses, rates, norms, speeds and loads of its runs."""
    for run, folder in enumerate(runs):
        for (kind, step), line in metrics(folder).items() if folder else []:
            sources = [[kind, key, name] for key in ("domain_losses",) for name in line.get(key, {})]
            if kind == "train":
                sources += [[kind, "loss"], [kind, "grad_norm"], [kind, "tokens_per_sec"]]
                sources += [[kind, "learning_rates", name] for name in line["learning_rates"]]
            elif kind == "validation":
                sources += [[kind, key] for key in ("loss", "mutual_information") if key in line]
            elif "routing" in line:
                load = line["routing"]["expert_load"]
                sources += [[kind, "routing", "expert_load", expert] for expert in range(len(load))]
            for source in sources:
                expect("all is shown", (run, step, json.dumps(source)) in found, (folder, step, source))


def accessible(document, text):
    """Checks what a reader needs who does not see the page."""
    ids = [element["id"] for element in document.elements if "id" in element]
    expect("ids are unique", len(ids) == len(set(ids)), ids)
    named = {element["id"]: element["text"].strip() for element in document.elements if "id" in element}
    for drawing in document.all("svg"):
        names = [named.get(name) for name in drawing["aria-labelledby"].split()]
        expect("a chart has a title and a description", drawing["role"] == "img" and all(names), names)
    for table in document.all("table"):
        heads = [x for x in document.all("th") if within(x, table)]
        expect("a table's heads have a scope", heads and all("scope" in head for head in heads))
    tags = {element["tag"] for element in document.elements}
    expect("there are no foreign elements", tags <= ELEMENTS, tags - ELEMENTS)
    handlers = [x for x in document.elements for key in x if key.startswith("on") or key in ("src", "href")]
    expect("nothing runs and nothing is loaded", all(x["href"] == "#main" for x in handlers), handlers)
    bad = [c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x202A <= ord(c) <= 0x2069]
    expect("control characters are visible", not [c for c in bad if ord(c) < 32 or c in "\u202e\u2066"], bad)


def within(element, ancestor):
    """Whether an element is inside another."""
    while element is not None and element is not ancestor:
        element = element["parent"]
    return element is ancestor


def cells(document, attribute):
    """The tables' cells with a value, by an attribute of their rows and their domain."""
    return {
        (cell["parent"].get(attribute), cell.get("data-domain")): cell["data-value"]
        for cell in document.all("td")
        if "data-value" in cell and ("data-domain" in cell or attribute in cell["parent"])
    }


def check_growth(document, run):
    """Compares the forgetting matrix and the experts' norms with `dylora eval`."""
    evaluated = json.loads(dylora("eval", "--checkpoint", run, "--json", "--device", "cpu"))
    shown = cells(document, "data-stage")
    for index, stage in enumerate(evaluated["stages"]):
        for domain, loss in stage["losses"].items():
            expect("the matrix is that of eval", same(shown[str(index), domain], loss), (index, domain))
    for domain, rise in evaluated["forgetting"].items():
        expect("forgetting is that of eval", same(shown[None, domain], rise), domain)
    norms = cells(document, "data-expert")
    for expert in evaluated["experts"]:
        found = norms[expert["name"], None]
        expect("the norm is that of eval", same(found, expert["update_norm"]), (expert, found))


def check_study(document, folder):
    """Compares the verdict and the gains with study.json."""
    study = json.loads((folder / "study.json").read_text())
    verdicts = [x["text"] for x in document.all("p") if x.get("class") == "verdict"]
    expect("the verdict is the study's", verdicts == [study["verdict"]], verdicts)
    shown = cells(document, "data-comparison")
    for row in study["comparisons"]:
        expect("the gain is the study's", same(shown[row["name"], None], row["interval"]["mean"]), row)


def hostile(folder, whole_run):
    """A run in progress whose domains have hostile names: the metrics of another with other names,
    without its checkpoints, and with a line that is half written."""
    folder.mkdir(exist_ok=True)
    text = (whole_run / "metrics.jsonl").read_text()
    for name, other in zip(["arithmetic", "code"], HOSTILE):
        text = text.replace(json.dumps(name), json.dumps(other))
    (folder / "metrics.jsonl").write_text(text + '{"kind":"train","st')
    return folder


def small(folder):
    """Small files of the demo's data in the folder, and the config of a mixture on two of them."""
    domains = []
    for name in ["arithmetic", "code", "data2text"]:
        for split, lines in [("train", 80), ("validation", 12)]:
            text = Path(f"demo/data/{name}.{split}.jsonl").read_text().splitlines()[:lines]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(text) + "\n")
        files = {split: str(folder / f"{name}.{split}.jsonl") for split in ("train", "validation")}
        domains.append(
            f"[[data.domains]]\nname = '{name}'\ntrain = ['{files['train']}']\n"
            f"validation = {{ files = ['{files['validation']}'] }}\n"
        )
    config = folder / "small.toml"
    config.write_text(f"""
[base]
source = {{ path = "{Path("demo/base").resolve()}" }}
[run]
device = "cpu"
[data]
seq_len = 256
{"".join(domains[:2])}
[lora]
num_experts = 2
[router]
window_steps = 3
[train]
duration = {{ steps = 9 }}
micro_batch_size = 4
eval_every_steps = 3
[optimizer]
adapters = {{ learning_rate = 5e-3 }}
[schedule]
warmup_steps = 1
""")
    return config


def make(folder):
    """The reports to check: their names, pages and runs."""
    config, runs = small(folder), folder / "runs"
    dylora("train", "--config", config, "--set", f"run.dir={runs / 'mixture'}")
    one = ["--set", "lora.num_experts=1", "--set", f"run.dir={runs / 'single'}"]
    dylora("train", "--config", config, *one)
    grow = ["--out", runs / "three", "--steps", "24", "--device", "cpu"]
    grow += ["--data", folder / "data2text.train.jsonl"]
    grow += ["--validation", folder / "data2text.validation.jsonl", "--domain", "data2text"]
    dylora("add-expert", "--checkpoint", runs / "mixture", *grow)
    study = ["--arms", "single,supervised", "--rates", "1", "--seeds", "2", "--jobs", "2"]
    study += ["--set", "train.duration={steps=2}", "--out", folder / "study"]
    dylora("study", "--config", config, *study)
    pages = {
        "mixture": [runs / "mixture"],
        "overlaid": [runs / "mixture", runs / "single"],
        "growth": [runs / "three"],
        "study": [folder / "study"],
        "hostile": [hostile(folder / "hostile", runs / "mixture")],
    }
    for name, folders in pages.items():
        options = ["--overwrite", "--samples", "0" if name == "hostile" else "2"]
        dylora("report", *folders, "--out", folder / f"{name}.html", "--device", "cpu", *options)
    return pages


# elements that are wider than the page, and texts of drawings that lie outside of these
OVERFLOW = """[...document.querySelectorAll('body *')].filter(x =>
    !x.closest('.scroll, pre, details, .skip') && 
    x.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map(x => x.outerHTML.slice(0, 200))"""
CUT = """[...document.querySelectorAll('svg text')].filter(x => {
    const box = x.getBBox(), view = x.ownerSVGElement.viewBox.baseVal;
    return box.x < -1 || box.y < -1 || box.x + box.width > view.width + 1
        || box.y + box.height > view.height + 1;
}).map(x => x.textContent)"""


def look(chromium, folder, names):
    """Takes pictures of the pages, and checks what can be seen of them."""
    looks = {"desktop": (1280, False), "phone": (390, False), "dark": (1280, True), "phone-dark": (390, True)}
    with browser.Browser(chromium) as window:
        for name in names:
            url = (folder / f"{name}.html").resolve().as_uri()
            grounds = set()
            for what, (width, dark) in [*looks.items(), ("print", (800, True))]:
                media = "print" if what == "print" else "screen"
                page = window.page(url, width, dark, media)
                detail = page.screenshot(folder / f"{name}-{what}.png")
                expect("the picture is not empty", detail > 0.005, (name, what, detail))
                wide = page.value("document.documentElement.scrollWidth")
                expect("the page fits", wide <= width, (name, what, wide, page.value(OVERFLOW)))
                expect("nothing overflows", not page.value(OVERFLOW), (name, what, page.value(OVERFLOW)))
                expect("no text is cut", not page.value(CUT), (name, what, page.value(CUT)))
                expect("nothing is logged", not page.problems(), (name, what, page.problems()))
                ground = page.value("getComputedStyle(document.body).backgroundColor")
                grounds.add((dark and media == "screen", ground))
                if media == "print":
                    expect("paper is white", ground == "rgb(255, 255, 255)", ground)
                    page.pdf(folder / f"{name}.pdf")
                page.close()
            dark_grounds = {ground for dark, ground in grounds if dark}
            light_grounds = {ground for dark, ground in grounds if not dark}
            expect("dark is another page", not dark_grounds & light_grounds, grounds)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pages = make(folder)
    print(f"made {len(pages)} reports in {time.monotonic() - started:.0f} s", flush=True)
    total = 0
    for name, runs in pages.items():
        text = (folder / f"{name}.html").read_text()
        document = Document(text)
        accessible(document, text)
        if name == "study":
            check_study(document, runs[0])
            continue
        if name == "hostile":
            # the parser of JSON must not see the half line
            lines = (runs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
            (runs[0] / "metrics.jsonl").write_text("".join(lines[:-1]))
            heads = [x["text"] for x in document.all("figcaption")]
            good = all(any(shown in head for head in heads) for shown in VISIBLE)
            expect("names are shown as they are", good, heads)
        found = figures(document, runs)
        whole(found, runs)
        total += len(found)
        if name == "growth":
            check_growth(document, runs[0])
    expect("many figures were compared", total > 500, total)
    print(f"{total} figures are those of the runs' files", flush=True)
    chromium = browser.find()
    if chromium is None:
        print("there is no Chromium, so no pictures were taken")
    else:
        started = time.monotonic()
        look(chromium, folder, pages)
        print(f"Chromium took {5 * len(pages)} pictures in {time.monotonic() - started:.0f} s")
    print(f"{count} checks")


if __name__ == "__main__":
    main()
