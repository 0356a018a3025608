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

    With the device `cuda`, the jobs of a study share the GPUs of the machine evenly. The binary finds libtorch by itself where it was built. Elsewhere, the libtorch of python3's
    PyTorch is used, unless LD_LIBRARY_PATH is set.
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
        if self.num_gpus:
            gpu = getattr(WORKER, "number", 0) % self.num_gpus
            env = {**env, "CUDA_VISIBLE_DEVICES": str(gpu)}
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


def markdown(head, rows):
    """A table of markdown, whose columns are to the right except for the first."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(head) - 1), *lines[1:]])
