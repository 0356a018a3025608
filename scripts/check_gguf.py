#!/usr/bin/env python3
"""Runs GGUF files in llama.cpp and compares them with dylora, transformers and PEFT.

    scripts/check_gguf.py LLAMA BASE FOLDER

LLAMA comes from scripts/llama_cpp_env and BASE from scripts/real_base. FOLDER is for the files of
the check. llama.cpp evaluates each file and computes in f32 on the CPU. These must agree:

    tokens of texts in each kind of tokenizer     exactly, with dylora's
    experts of mixtures on the demo base and on   probabilities of the next token to 1e-3, with
    BASE, rsLoRA and a part that is always on     dylora's and PEFT's
    small bases of each family and kind of RoPE,  the same, with dylora's, transformers' and
    and experts and merges on them                PEFT's
    merges in f32, f16 and bf16                   to 1e-3, 5e-3 and 3e-2, with transformers'

What llama.cpp cannot express must be refused by name. Needs scripts/reference_env;
scripts/check_gguf runs this script.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from clients import BASE, LLAMA3, dylora, expect, hold, load_adapters, load_base, summary, trace, train, write_texts
from tokenizers import Tokenizer

LLAMA, REAL, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve()
TEXTS = ["How much remains?\n[1] 7 hours = 7 * 11 = 77", "SCENE. The battlements at dawn."]
TOKENIZER_TEXTS = [
    *TEXTS,
    "  a  b   c    ",
    "\tif x:\n\t\treturn\t1\n\n\n",
    "1234567890 3.14159e-10 and 1,000,000.00",
    "I'm, you're, he'S, they'LL, don't 'tis ''twice''",
    "HELLO Hello snake_case camelCase __init__ antidisestablishmentarianism",
    "café naïve straße Привет, мир! 你好，世界。 नमस्ते 😀👍🏽 “quotes” — dashes… €5",
    "fn main() { println!(\"{:?}\", vec![1, 2]); } ... --- *** === !?!?!?",
    "<|im_start|>user\nHi!<|im_end|> <s> </s>",
]
BOUNDS = {"f32": 1e-3, "f16": 5e-3, "bf16": 3e-2}
# the rest of each config, which continues `[lora]`
MIXTURE = """num_experts = 3
use_rslora = true
rank_pattern = { "mlp.c_fc" = 2, "h.1.attn.c_attn" = 6 }
alpha_pattern = { "attn.c_proj" = 3, "h.0.mlp.c_proj" = 9.5 }
[[lora.experts]]
[[lora.experts]]
init = "pissa"
[[lora.experts]]
use_rslora = false
target_modules = ["mlp.c_fc", "attn.c_proj"]
rank_pattern = {}
alpha_pattern = {}
"""
SHARED = "num_experts = 2\nshared_rank = 3\n"
DORA = "num_experts = 2\nuse_dora = true\n"
ALL_LINEAR = 'num_experts = 2\ntarget_modules = "all-linear"\n'
SIZES = {
    "vocab_size": 2050,  # two rows without a token
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
# the settings of small bases besides SIZES, by the family
FAMILIES = {
    "llama": [
        {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "eos_token_id": [0, 5]},
        {"rope_parameters": LINEAR, "tie_word_embeddings": True, "head_dim": 24},
        {"rope_parameters": YARN},
    ],
    "qwen2": [{"tie_word_embeddings": True}],
    "qwen3": [{"rms_norm_eps": 1e-5, "head_dim": 32}],
    "smollm3": [{}, {"head_dim": 24}],
    "mistral": [{"sliding_window": None, "head_dim": 32}],
}
# settings that are refused, and what the message names
REFUSED = {
    "qwen2": [({"head_dim": 24}, "`head_dim`")],
    "mistral": [({"sliding_window": 8}, "`sliding_window`")],
    "qwen3": [({"attention_bias": True}, "`attention_bias`"), ({"rope_parameters": LLAMA3}, "`llama3`")],
    "smollm3": [({"no_rope_layer_interval": 2}, "`no_rope_layers`")],
    "llama": [({"rope_parameters": YARN | {"attention_factor": 2.0}}, "`attention_factor`")],
}


def in_llama_cpp(*jobs):
    """What llama.cpp finds for each text of each job, a model, its adapters and texts."""
    jobs = [
        {
            "model": str(model),
            "adapters": [{"filePath": str(file), "scale": scale} for file, scale in adapters.items()],
            "texts": texts,
        }
        for model, adapters, texts in jobs
    ]
    program = ["node", f"{LLAMA}/evaluate.mjs"]
    done = subprocess.run(program, input=json.dumps(jobs), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"llama.cpp failed on {jobs}:\n{done.stdout}\n{done.stderr}")
    lines = iter(done.stdout.splitlines())
    return [[json.loads(next(lines)) for _ in job["texts"]] for job in jobs]


def differences(found, logits):
    """The largest difference of llama.cpp's probabilities from those of logits, [1, t, v]."""
    probabilities = logits[0].double().softmax(-1)
    ids = found["ids"]
    of_text = probabilities[torch.arange(len(ids) - 1), ids[1:]]
    next_token = torch.tensor(found["next"], dtype=torch.double)[: logits.shape[-1]]
    each = [of_text - torch.tensor(found["probabilities"], dtype=torch.double), probabilities[-1] - next_token]
    return max(difference.abs().max().item() for difference in each)


def compare(name, found, logits, bound=1e-3, without=None):
    """Stops if probabilities differ, or hardly differ from those `without` adapters."""
    difference = differences(found, logits)
    moved = None if without is None else differences(found, without)
    hold(name, difference, bound, moved, least=0.02)


def set_threads(count):
    """The number of threads of PyTorch, dylora and llama.cpp. Small models are faster with one."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def timed(check):
    """Prints how long a check takes."""

    def run(*arguments):
        started = time.monotonic()
        check(*arguments)
        print(f"-- {check.__name__}: {time.monotonic() - started:.0f} s", file=sys.stderr)

    return run


def export(run, out):
    dylora("export-adapters", "--checkpoint", run, "--format", "gguf", "--out", out)
    return out


def base_file(base, out):
    dylora("merge", "--base", base, "--format", "gguf", "--out", out)
    return out / "model.gguf"


def check_experts(name, base, file, run, folders, texts=TEXTS[:1]):
    """Checks each expert of a run, with the part that is always on if there is one.

    `folders` has PEFT's folders of the experts.
    """
    out = export(run, FOLDER / f"{name}.gguf")
    shared = [out / "shared.gguf"] if (out / "shared.gguf").exists() else []
    experts = sorted(out.glob("expert_*.gguf"))
    found = in_llama_cpp(*((file, {path: 1 for path in [expert, *shared]}, texts) for expert in experts))
    model = load_base(base)
    for number, results in enumerate(found):
        adapted = None if shared else load_adapters(base, adapter=folders / f"expert_{number}")
        for text, result in zip(texts, results, strict=True):
            ours = trace("--checkpoint", run, "--text", text, "--routing", f"expert:{number}")
            ids = ours["input_ids"]
            same = ids[0].tolist() == result["ids"]
            expect(f"{name}: llama.cpp has the same {len(result['ids'])} tokens", same, (ids, result["ids"]))
            compare(f"{name}: expert {number} by dylora", result, ours["logits"], without=model(ids).logits)
            if adapted is not None:
                compare(f"{name}: expert {number} in PEFT", result, adapted(ids).logits)


def check_merges(name, base, run, weights, dtypes):
    """Checks a merged mixture in each dtype against the merged base in transformers."""
    # what fixing the weights costs is measured on data, as little as possible
    data = ["--data", write_texts(FOLDER / "texts.jsonl"), "--seq-len", 64]
    merge = ["--checkpoint", run, "--weights", weights, *data, "--overwrite"]
    merged = FOLDER / f"{name}.merged"
    dylora("merge", *merge, "--out", merged)
    model, plain = load_base(merged), load_base(base)
    out = FOLDER / f"{name}.merged-gguf"
    for dtype in dtypes:
        dylora("merge", *merge, "--format", "gguf", "--save-dtype", dtype, "--out", out)
        [texts] = in_llama_cpp((out / "model.gguf", {}, TEXTS))
        for result in texts:
            ids = torch.tensor([result["ids"]])
            compare(f"{name}: merged in {dtype}", result, model(ids).logits, BOUNDS[dtype], plain(ids).logits)


def check_refused(name, words, command, *arguments):
    out = FOLDER / "refused"
    message = dylora(command, *arguments, "--format", "gguf", "--out", out, code=1)
    expect(f"{name} is refused", all(word in message for word in words) and not out.exists(), message)


def joined_everywhere(tokenizer):
    """A tokenizer of SentencePiece's kind with all merges that SentencePiece would have.

    Such a tokenizer joins any two tokens whose joined text is one, the most frequent first. The
    tokenizers of tests/golden/tokenizers have each token's one merge alone.
    """
    model = tokenizer["model"]
    known = model["vocab"].keys() - {token["content"] for token in tokenizer["added_tokens"]}
    made = dict.fromkeys("".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"])
    splits = [(token[:at], token[at:]) for token in made for at in range(1, len(token))]
    model["merges"] = [[a, b] for a, b in splits if a in known and b in known]
    return tokenizer


@timed
def check_tokenizers():
    """Checks the tokens of many texts in each kind of tokenizer."""
    names = ["demo", "llama2", "llama3", "mistral", "qwen", "smollm"]
    tokenizers, jobs = [], []
    for name in names:
        file = Path(BASE) / "tokenizer.json" if name == "demo" else Path(f"tests/golden/tokenizers/{name}.tokenizer.json")
        tokenizer = json.loads(file.read_text())
        if tokenizer["model"]["byte_fallback"]:
            tokenizer = joined_everywhere(tokenizer)
        base = FOLDER / f"tokenizer-{name}"
        make_base(base, "llama", {"tie_word_embeddings": True})
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
        jobs.append((base_file(base, FOLDER / f"tokenizer-{name}.base"), {}, TOKENIZER_TEXTS))
        tokenizers.append(Tokenizer.from_file(str(base / "tokenizer.json")))
    for name, plain, texts in zip(names, tokenizers, in_llama_cpp(*jobs), strict=True):
        for text, result in zip(TOKENIZER_TEXTS, texts, strict=True):
            ids = plain.encode(text).ids
            # Metaspace puts a space in front of fewer texts than llama.cpp, of which dylora warns
            if name == "mistral" and (text.startswith(" ") or "<s>" in text):
                expect(f"{name}: llama.cpp has other tokens of {text!r}", ids != result["ids"])
                continue
            expect(f"{name}: llama.cpp has the same {len(ids)} tokens", ids == result["ids"], (text, ids, result["ids"]))


@timed
def check_demo():
    """Checks mixtures on the demo base, a GPT-2."""
    file = base_file(BASE, FOLDER / "demo.base")
    run, folders = train(FOLDER, "demo", MIXTURE)
    check_experts("demo", BASE, file, run, folders, TEXTS)
    check_merges("demo", BASE, run, "0.7,-0.4,1.1", ["f32", "f16", "bf16"])
    run, folders = train(FOLDER, "shared", SHARED)
    check_experts("shared", BASE, file, run, folders)
    check_merges("shared", BASE, run, "0.5,0.5", ["f32"])
    run, _ = train(FOLDER, "dora", DORA)
    check_refused("a DoRA expert", ["DoRA", "`expert_0`", "dylora merge"], "export-adapters", "--checkpoint", run)
    check_merges("dora", BASE, run, "expert:1", ["f32"])


def make_base(folder, family, settings):
    """Writes a base of random weights with the demo's tokenizer."""
    config = transformers.AutoConfig.for_model(family, **SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += (0.2 if parameter.dim() == 1 else 0.15) * torch.randn_like(parameter)
    model.get_output_embeddings().weight.data *= 4  # so that some tokens are likely
    model.save_pretrained(folder)
    for file in ["tokenizer.json", "tokenizer_config.json"]:
        (folder / file).write_text((Path(BASE) / file).read_text())


@timed
def check_families():
    """Checks small bases, and experts and merges on some of them."""
    for family, variants in FAMILIES.items():
        for number, settings in enumerate(variants):
            name = f"{family}-{number}"
            base = FOLDER / name
            make_base(base, family, settings)
            file = base_file(base, FOLDER / f"{name}.base")
            [texts] = in_llama_cpp((file, {}, TEXTS))
            for result in texts:
                ids = torch.tensor([result["ids"]])
                compare(f"{name}: the base in transformers", result, load_base(base)(ids).logits)
            # Mistral is llama.cpp's `llama`, whose experts are checked
            if number == 0 and family != "mistral":
                run, folders = train(FOLDER, f"{name}.run", ALL_LINEAR, base)
                check_experts(name, base, file, run, folders)
                if family in ("llama", "qwen3"):
                    check_merges(name, base, run, "0.5,0.5", ["f32"])
    for family, variants in REFUSED.items():
        for number, (settings, word) in enumerate(variants):
            base = FOLDER / f"{family}-refused-{number}"
            make_base(base, family, settings)
            check_refused(f"{family} with {settings}", [word, "llama.cpp"], "merge", "--base", base)


@timed
def check_real_base():
    """Checks a mixture on SmolLM2-135M-Instruct."""
    set_threads(2)
    file = base_file(REAL, FOLDER / "real.base")
    options = ["--set", "train.duration={ steps = 3 }", "--set", "data.seq_len=32", "--set", "train.eval_every_steps=3"]
    run, folders = train(FOLDER, "real", ALL_LINEAR, REAL, options)
    check_experts("real base", REAL, file, run, folders)
    check_merges("real base", REAL, run, "0.6,0.4", ["f32", "bf16"])


@torch.no_grad()
def main():
    torch.manual_seed(0)
    set_threads(1)
    check_tokenizers()
    check_demo()
    check_families()
    check_real_base()
    summary()


main()
