"""Functions that the checks against transformers and PEFT share.

They run dylora, load models without warnings, and compare tensors. Some are whole checks of a base,
an adapter or a mixture, for any family of bases. The first check that fails stops the script with
exit code 1.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub
import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "src/export"))
from dylora_peft import Mixture

TOLERANCE = 1e-4
BASE = "demo/base"
TEXTS = [
    "How much remains?\n[1] 7 hours = 7 * 11 = 77 crowns\n[2] 77 - 7 = 70 crowns\nanswer: 70 crowns",
    "SCENE. The battlements at dawn. HELICAN is discovered, asleep beneath a tree.",
]
# a kind of RoPE for small bases
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
INVOCATION = [199, 59]  # "\n[" in the demo's tokens: twice in the first text, not in the second
# the start of a training's config, whose last section goes on
TRAIN = """
[run]
dir = "{dir}"
[base]
source = {{ path = "{base}" }}
[data]
seq_len = 64
[[data.domains]]
name = "arithmetic"
train = ["{DEMO}/data/arithmetic.validation.jsonl"]
validation = {{ fraction = 0.1 }}
[[data.domains]]
name = "verse"
train = ["{DEMO}/data/verse.validation.jsonl"]
validation = {{ fraction = 0.1 }}
[train]
duration = {{ steps = 12 }}
micro_batch_size = 4
eval_every_steps = 6
[optimizer]
adapters = {{ learning_rate = 1e-2 }}
router = {{ learning_rate = 1e-2 }}
[lora]
rank = 4
alpha = 6
""".replace("{DEMO}", str(Path("demo").resolve()))
DYLORA = os.environ.get("DYLORA", "target/debug/dylora")
DEVICE = os.environ.get("DEVICE", "cpu")
checks = []  # the difference of each check, 0 for checks without numbers
transformers.utils.logging.disable_progress_bar()


def dylora(command, *arguments, code=0):
    """Runs dylora, which must exit with `code`. Returns its stdout, or stderr if that is not 0."""
    line = [DYLORA, "--quiet", command, "--device", DEVICE, *map(str, arguments)]
    # a width at which no table is divided
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"COLUMNS": "1000"})
    if done.returncode != code:
        sys.exit(f"`{' '.join(line)}` exited with {done.returncode}, not {code}:\n{done.stdout}{done.stderr}")
    return done.stderr if code else done.stdout


def trace(*arguments):
    """The tensors of `dylora trace`, in f32."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.safetensors"
        dylora("trace", *arguments, "--dtype", "f32", "--out", file)
        return load_file(file)


def compare(name, ours, theirs, without=None):
    """Stops if two tensors differ, or if `theirs` hardly differs from `without`.

    `without` is the same tensor without adapters or routing. If these hardly changed it, the
    comparison would show nothing.
    """
    if ours.shape != theirs.shape:
        sys.exit(f"{name}: dylora's shape is {list(ours.shape)}, the client's {list(theirs.shape)}")
    found = (ours - theirs).abs().max().item()
    moved = None if without is None else (theirs - without).abs().max().item()
    hold(name, found, TOLERANCE, moved, least=0.1)


def hold(name, difference, bound, moved, least):
    """Stops if a difference exceeds its bound, or if adapters or routers move less than `least`."""
    print(f"{name}: {difference:.1e}" + ("" if moved is None else f" (moved by {moved:.2f})"), flush=True)
    if not difference <= bound:
        sys.exit(f"{name}: the largest difference {difference:.1e} is more than {bound:.0e}")
    if moved is not None and not moved > least:
        sys.exit(f"{name}: the adapters or routers hardly do anything, so this shows nothing")
    checks.append(difference)


def expect(name, condition, text=""):
    """Stops if a condition does not hold."""
    if not condition:
        sys.exit(f"{name}: not so\n{text}")
    print(f"{name}: yes", flush=True)
    checks.append(0.0)


def summary():
    print(f"all {len(checks)} checks hold, the largest difference is {max(checks):.1e}")


class Collect(logging.Handler):
    """Keeps the messages that are logged at the level of warnings or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextmanager
def no_warnings(name):
    """Stops the script if Python, transformers or PEFT give a warning."""
    collect = Collect()
    loggers = [logging.getLogger(library) for library in (None, "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(collect)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for logger in loggers:
        logger.removeHandler(collect)
    if problems := [str(w.message) for w in caught] + collect.messages:
        sys.exit(f"{name}: loading it warned: {problems}")


def load_base(folder):
    with no_warnings(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_adapters(base, **folders):
    """A new base with adapters from their folders, the first of which is active."""
    (first, folder), *others = folders.items()
    model = load_base(base)
    with no_warnings(folder):
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for name, folder in others:
        with no_warnings(folder):
            model.load_adapter(str(folder), adapter_name=name)
    return model.eval()


def load_experts(base, export):
    """A new base with the adapters of an export, and the names of its experts."""
    meta = json.loads((export / "dylora.json").read_text())
    experts, shared = meta["experts"], [meta["shared"]] if meta.get("shared") else []
    return load_adapters(base, **{name: export / name for name in [*experts, *shared]}), experts


def load_tokenizer(base):
    """The tokenizer as `tokenizer.json` describes it.

    For a model_type of `qwen2`, AutoTokenizer would use Qwen2's own rules instead.
    """
    return transformers.PreTrainedTokenizerFast.from_pretrained(base)


def token_ids(base, text):
    """The ids of a text in transformers, [1, t]."""
    return torch.tensor([load_tokenizer(base).encode(text)])


def documents(base):
    """The ids of each of TEXTS and the end token, [1, t]."""
    end = load_tokenizer(base).eos_token_id
    return [torch.cat([token_ids(base, text), torch.tensor([[end]])], 1) for text in TEXTS]


def write_texts(file):
    """Writes TEXTS as records, one document each."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def token_losses(logits, ids):
    """The loss of each token of a document but the first, [t - 1]."""
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


def listed(ids):
    """The ids as an argument of `--tokens`."""
    return ",".join(map(str, ids[0].tolist()))


def randomise(model, scale=0.05):
    """Adds random numbers to an adapter's parameters, since a new adapter has no effect."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += (10 if "magnitude" in name else 1) * scale * torch.rand_like(parameter)


def mixed(model, export, ids, routing=None, prompt_len=None):
    """The logits of an export by the program that lies in it, and the routing weights by site."""
    mixture = Mixture(model, export, routing)
    mixture.prompt_len = prompt_len
    logits = model(ids).logits
    mixture.remove()
    model.set_adapter(mixture.experts[0])
    return logits, mixture.weights


def static_logits(model, export, ids, weights):
    """The logits of the mixture with the same weights, [e], for every token."""
    return mixed(model, export, ids, weights)[0]


def active(model, experts, ids):
    """1 where an expert is active in PEFT, 0 before its invocation tokens, [b, t, e]."""
    mask = torch.ones(*ids.shape, len(experts))
    for e, name in enumerate(experts):
        if model.peft_config[name].alora_invocation_tokens:
            for row, offset in enumerate(calculate_alora_offsets(model.peft_config, name, ids)):
                mask[row, : ids.shape[1] - (offset or 0), e] = 0
    return mask


def routed(model, export, ids, prompt_len=None):
    """The logits and the routing weights by site of the mixture that an export describes.

    It is computed from PEFT's layers and router.safetensors. The prompt is the whole text, unless
    its length is given.
    """
    logits, weights = mixed(model, export, ids, prompt_len=prompt_len)
    mask = active(model, json.loads((export / "dylora.json").read_text())["experts"], ids)
    return logits, {site: g * mask for site, g in weights.items()}


def train(folder, name, settings, base=BASE, options=()):
    """Trains and exports a mixture, and returns its checkpoint and its export.

    `settings` continues the config after TRAIN.
    """
    run, export = folder / name, folder / f"{name}.export"
    config = folder / f"{name}.toml"
    config.write_text(TRAIN.format(dir=run, base=Path(base).resolve()) + settings)
    dylora("train", "--config", config, *options)
    dylora("export-adapters", "--checkpoint", run, "--out", export)
    return run, export


def check_base(name, base):
    """Checks dylora's tokens, and the logits of the base alone."""
    model = load_base(base)
    for number, text in enumerate(TEXTS, 1):
        ours = trace("--base", base, "--text", text)
        same = torch.equal(ours["input_ids"], token_ids(base, text))
        expect(f"{name}: transformers has the same tokens, text {number}", same)
        compare(f"{name}: base alone, text {number}", ours["logits"], model(ours["input_ids"]).logits)


def check_experts(name, run, folders, shared, base_dir):
    base = load_base(base_dir)
    for expert, (adapter, folder) in enumerate(folders.items()):
        model = load_adapters(base_dir, **{adapter: folder}, **shared)
        model.base_model.set_adapter([adapter, *shared])
        ours = trace("--checkpoint", run, "--text", TEXTS[0], "--routing", f"expert:{expert}")
        ids = ours["input_ids"]
        compare(f"{name}: {adapter} in PEFT", ours["logits"], model(ids).logits, base(ids).logits)


def check_mixture(name, run, export, model, base):
    """Checks the mixture that the export describes, computed from PEFT's layers."""
    for number, text in enumerate(TEXTS, 1):
        ours = trace("--checkpoint", run, "--text", text)
        ids = ours["input_ids"]
        theirs, weights = routed(model, export, ids)
        compare(f"{name}: mixture of PEFT's layers, text {number}", ours["logits"], theirs, base(ids).logits)
        found = torch.stack([ours["routing_weights" + site] for site in weights])
        weights = torch.stack(list(weights.values()))
        even = torch.full_like(found, 1 / found.shape[-1])
        compare(f"{name}: weights at {len(found)} site(s), text {number}", found, weights, even)


def check_all_active(name, run, model, base):
    """Checks PEFT's sum of several active adapters, which is correct if they are plain LoRA."""
    ours = trace("--checkpoint", run, "--text", TEXTS[0], "--routing", "all")
    ids = ours["input_ids"]
    model.base_model.set_adapter(list(model.peft_config))
    compare(f"{name}: all adapters active in PEFT", ours["logits"], model(ids).logits, base(ids).logits)


def check_card(name, export, base_dir):
    """Checks a model card with the Hub's own library."""
    card = huggingface_hub.ModelCard.load(export / "README.md")
    fields = card.data.to_dict()
    expect(f"{name}: the Hub reads the model card", fields["library_name"] == "peft" and "dylora" in fields["tags"], fields)
    paths = [str(Path(folder).resolve()) for folder in (base_dir, export)]
    expect(f"{name}: the model card names no folder", not any(path in card.content for path in paths), card.content)


def check_export(name, run, export, base_dir):
    """Checks an export of a checkpoint in PEFT, and again in dylora."""
    check_card(name, export, base_dir)
    meta = json.loads((export / "dylora.json").read_text())
    folders = {adapter: export / adapter for adapter in meta["experts"]}
    shared = {meta["shared"]: export / meta["shared"]} if meta.get("shared") else {}
    check_experts(name, run, folders, shared, base_dir)
    if meta["router"] is not None:
        model, base = load_adapters(base_dir, **folders, **shared), load_base(base_dir)
        if meta["routing"] == "router":
            check_mixture(name, run, export, model, base)
        if not any(config.use_dora or config.alora_invocation_tokens for config in model.peft_config.values()):
            check_all_active(name, run, model, base)
    # an export holds its routing, but `dylora trace` needs it for a checkpoint
    routing = ["--routing", "all"] if meta["routing"] == "all" else []
    ours = trace("--adapters", export, "--base", base_dir, "--text", TEXTS[0])
    again = trace("--checkpoint", run, "--text", TEXTS[0], *routing)
    compare(f"{name}: the export in dylora", ours["logits"], again["logits"])


def check_adapter(name, folder, base, ids, scale=0.05, **settings):
    """Checks an adapter with random weights, which PEFT saves in `folder`, in dylora.

    Returns PEFT's logits.
    """
    model = load_base(base)
    alone = model(ids).logits
    settings = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": model.config.model_type == "gpt2", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    initial = {}
    if "init_lora_weights" in settings:
        initial = {"path_initial_model_for_weight_conversion": str(folder.with_name("initial"))}
        model.save_pretrained(folder.with_name("initial"), save_embedding_layers=False)
    randomise(model, scale)
    theirs = model(ids).logits
    # PEFT warns that PiSSA has changed the base
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        model.save_pretrained(folder, save_embedding_layers=False, **initial)
    ours = trace("--adapters", folder, "--base", base, "--tokens", listed(ids))
    compare(f"PEFT's adapter in dylora ({name})", ours["logits"], theirs, alone)
    return theirs


def load_xlora_expert(model, weights, **kwargs):
    """Loads an expert into X-LoRA, which expects the base's blocks in a module called `model`.

    This holds for Llama but not for GPT-2, so the names are corrected here.
    """
    if model.config.model_type == "gpt2":
        weights = {key.replace("model.model.", "model."): tensor for key, tensor in weights.items()}
    return peft.set_peft_model_state_dict(model, weights, **kwargs)


def check_xlora(name, export, run, base_dir):
    """Checks a mixture, exported as X-LoRA, in PEFT's XLoraModel and again in dylora."""
    dylora("export-adapters", "--checkpoint", run, "--format", "xlora", "--out", export)
    fields = json.loads((export / "xlora_config.json").read_text())
    # PEFT names the adapters by their numbers, but then activates them by their keys, so the keys
    # must be the numbers; others cause a KeyError
    fields["adapters"] = {str(i): str(export / path) for i, path in enumerate(fields["adapters"].values())}
    known = {key: value for key, value in fields.items() if key in peft.XLoraConfig.__dataclass_fields__}
    base = load_base(base_dir)
    base.config.use_cache = False
    with mock.patch("peft.tuners.xlora.model.set_peft_model_state_dict", load_xlora_expert):
        model = peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", **known)).eval()
    classifier = model.base_model.internal_xlora_classifier.layers[-1]
    weights = load_file(export / "xlora_classifier.safetensors")
    classifier.load_state_dict({key.removeprefix("last."): tensor for key, tensor in weights.items()})
    for number, text in enumerate(TEXTS, 1):
        ours = trace("--checkpoint", run, "--text", text)
        ids = ours["input_ids"]
        logits = model(ids).logits
        scalings = model.base_model.internal_xlora_scalings
        compare(f"{name}: X-LoRA in PEFT, text {number}", ours["logits"], logits, load_base(base_dir)(ids).logits)
        every = ours["routing_weights"].unsqueeze(2).expand_as(scalings)
        compare(f"{name}: X-LoRA's scalings of {scalings.shape[2]} layers, text {number}", every, scalings)
    again = trace("--adapters", export, "--base", base_dir, "--text", text)
    compare(f"{name}: the X-LoRA folder in dylora", again["logits"], logits)


def check_merge(name, out, run, export, weights, form, base):
    """Merges a run into the folder `out`, and checks the result in transformers or PEFT."""
    choice = [] if weights is None else ["--weights", weights]
    merge = ["--checkpoint", run, *choice, "--as", form, "--out", out, "--overwrite", "--json"]
    report = json.loads(dylora("merge", *merge))
    ids = token_ids(base, TEXTS[0])
    theirs = static_logits(load_experts(base, export)[0], export, ids, report["weights"])
    model = load_base(out) if form == "base" else load_adapters(base, merged=out)
    name = f"{name} with weights {weights} as {form}"
    compare(name, model(ids).logits, theirs, load_base(base)(ids).logits)
    if form == "base":
        read = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, base)]
        found, expected = [
            (len(t), t.eos_token_id, t.bos_token_id, t.chat_template, t.encode(TEXTS[0])) for t in read
        ]
        expect(f"{name}: the tokenizer came along", found == expected, f"{found}\n{expected}")
