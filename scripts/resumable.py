"""Named jobs of a study, several at a time. The result of each is a line of JSON in a file, and a job
whose result is there is not run again."""
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent


# the number of a thread among those that run jobs
WORKER = threading.local()


def num_gpus():
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return len(done.stdout.splitlines())


class Failed(Exception):
    """A command of a job that did not end well: its exit code and what it said."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Dylora:
    """The binary, which runs in the repository's root with one thread for each process.

    With the device `cuda`, the jobs of a study share the GPUs of the machine evenly. The binary finds
    libtorch by itself where it was built. Elsewhere, the libtorch of python3's PyTorch is used, unless
    LD_LIBRARY_PATH is set.
    """

    def __init__(self, binary, device):
        self.binary, self.device = str(pathlib.Path(binary).resolve()), device
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run([self.binary, "--version"], capture_output=True, env=self.env).returncode:
            code = "import torch, os; print(os.path.join(os.path.dirname(torch.__file__), 'lib'))"
            found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            self.env.setdefault("LD_LIBRARY_PATH", found.stdout.strip())
        self.num_gpus = num_gpus() if device == "cuda" else 0

    def json(self, command, *arguments, sets=()):
        """What a command prints with --json, as an object."""
        line = [self.binary, "-q", command, *map(str, arguments), "--device", self.device, "--json"]
        for item in sets:
            line += ["--set", item]
        return json.loads(self.call(line))

    def call(self, line):
        """What a command prints."""
        env = self.env
        number = getattr(WORKER, "number", None)
        if self.num_gpus and number is not None:
            env = {**env, "CUDA_VISIBLE_DEVICES": str(number % self.num_gpus)}
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)
        if done.returncode:
            raise Failed(done.returncode, done.stderr.strip())
        return done.stdout


class Study:
    """The results of a study in a file, and the folder for its runs."""

    def __init__(self, file):
        self.file = pathlib.Path(file)
        self.lock = threading.Lock()

    def results(self):
        """The results by the names of their jobs."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {result["name"]: result for result in map(json.loads, lines)}

    def add(self, result):
        """Appends a result."""
        with self.lock, open(self.file, "a") as file:
            file.write(json.dumps(result) + "\n")

    def run(self, jobs, work, at_once, minutes, show):
        """Runs the jobs that have no result, and returns how many are left.

        - jobs: what `work` needs, by name
        - work: makes a result from the name, what it needs and an empty folder, which is removed after
        - minutes: no job begins later than this after the call
        - show: makes a line of text from a result
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        done = self.results()
        todo = [name for name in jobs if name not in done]
        end = time.monotonic() + 60 * minutes

        def one(name):
            if time.monotonic() > end:
                return 0
            dir = (self.file.parent / "runs" / name).resolve()
            shutil.rmtree(dir, ignore_errors=True)
            dir.mkdir(parents=True)
            began = time.monotonic()
            try:
                result = {"name": name, **work(name, jobs[name], dir)}
            except Failed as error:
                print(f"{name}: exit code {error.code}: {error}", file=sys.stderr, flush=True)
                return 0
            finally:
                shutil.rmtree(dir, ignore_errors=True)
            result["secs"] = round(time.monotonic() - began, 1)
            self.add(result)
            print(show(result), flush=True)
            return 1

        numbers = itertools.count()

        def begin():
            WORKER.number = next(numbers)

        with ThreadPoolExecutor(at_once, initializer=begin) as pool:
            made = sum(pool.map(one, todo))
        return len(todo) - made


def domain(name, train, validation, weight=None, expert=None):
    """A domain's entry in the config."""
    keys = {"weight": weight, "expert": expert}
    more = "".join(f", {key}={value}" for key, value in keys.items() if value is not None)
    return f'{{name="{name}"{more}, train=["{train}"], validation={{files=["{validation}"]}}}}'


def domains(entries):
    """The override that sets the domains."""
    return f"data.domains=[{', '.join(entries)}]"


def add_options(parser, out=None, device="cpu", jobs=2):
    """The options of a study on a base. They are DYLORA, OUT, which is needed if `out` is `None`, and more."""
    parser.add_argument("dylora", metavar="DYLORA|table")
    parser.add_argument("out", nargs="?" if out else None, default=out, metavar="OUT", help="the folder of the results")
    parser.add_argument("--base", help="the folder of the base")
    parser.add_argument("--data", help="the folder of the data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes at a time")
    parser.add_argument("--device", default=device)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="sets a key for all runs")
    parser.add_argument("--minutes", type=float, default=30, help="nothing begins after this time")


def markdown(head, rows):
    """A table of markdown, whose columns are to the right except for the first."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(head) - 1), *lines[1:]])
