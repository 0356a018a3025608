"""What the scripts of the evidence study share: the data of a real base, and runs of `dylora train` on
them."""
import json
import pathlib
import time

from resumable import Dylora, domain, domains

# the files of each domain, DATA/FILE.{train,validation}.jsonl, and its share of the blocks in the recipe
FILES = {"math": "math", "code": "code_alpaca", "data2text": "data2text", "shakespeare": "shakespeare", "wiki": "wiki"}
WEIGHTS = {"math": 6.0, "code": 3.0, "data2text": 2.0, "shakespeare": 7.0}


class Runs:
    """Runs of one config on a base and its data, with keys that are set for all of them."""

    def __init__(self, dylora, config, args):
        self.dylora, self.config = dylora, config
        self.data, base = (pathlib.Path(path).resolve() for path in [args.data, args.base])
        self.sets = [f'base.source={{path="{base}"}}', "run.tensorboard=false", *args.set]

    def file(self, domain, split):
        return f"{self.data}/{FILES[domain]}.{split}.jsonl"

    def domains(self, weights, train=None):
        """The override that sets the domains and their weights. `train` names other training files."""
        train = train or {name: self.file(name, "train") for name in weights}
        return domains(
            domain(name, train[name], self.file(name, "validation"), weight) for name, weight in weights.items()
        )

    def train(self, dir, seed, steps, sets):
        """Trains a run in a folder. Returns its last validation, and how long the command took."""
        began = time.monotonic()
        own = [f"run.dir={dir}", f"run.seed={seed}", f"train.duration={{steps={steps}}}"]
        self.dylora.json("train", "--config", self.config, sets=[*self.sets, *own, *sets])
        return validation(dir), round(time.monotonic() - began, 1)

    def export(self, dir, out):
        """Exports a run's adapters, and returns the folder of the first."""
        line = [self.dylora.binary, "-q", "export-adapters", "--checkpoint", str(dir), "--out", str(out)]
        self.dylora.call([*line, "--device", self.dylora.device])
        return out / "expert_0"


def validation(dir):
    """The last line of a run's metrics that is of an evaluation."""
    lines = [json.loads(line) for line in (dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"][-1]


def experts(adapters, trainable):
    """The overrides by which a mixture's experts start from these adapters."""
    value = str(trainable).lower()
    entries = [f'{{source={{path="{path}"}}, trainable={value}}}' for path in adapters]
    return [f"lora.num_experts={len(entries)}", f"lora.experts=[{', '.join(entries)}]"]


def parse(parser):
    """The arguments, and the binary, which is `None` for a table."""
    args = parser.parse_args()
    if args.dylora == "table":
        return args, None
    if args.base is None or args.data is None:
        parser.error("--base and --data are needed")
    return args, Dylora(args.dylora, args.device)


class Clock:
    """How many minutes are left of --minutes."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes

    def left(self):
        return (self.end - time.monotonic()) / 60
