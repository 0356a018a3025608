#!/usr/bin/env python3
"""Compares dylora with transformers and PEFT on a real base of the Llama family.

    scripts/check_real_base.py BASE FOLDER

BASE comes from scripts/real_base, and FOLDER is for the files of the check. All is computed in f32
on the CPU. These must agree:

    the token ids of many texts          exactly
    the logits of the base alone         to 1e-3
    texts, and answers to conversations  exactly, and their log-probabilities to 1e-3
    the losses of two domains            to 1e-5 of their value
    and of the turns of some chats
    the logits with an rsLoRA adapter    to 1e-3
    the losses and the gradient norms    to 1e-4 of their value
    of 20 steps that train an adapter

Needs scripts/reference_env; scripts/check_real_base runs this script.
"""

import json
import sys
from pathlib import Path

import clients
import torch
import torch.nn.functional as F
from clients import checks, compare, dylora, expect, load_base, randomise, summary, trace
from generation import check_chat, check_generate
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

clients.TOLERANCE = 1e-3  # the largest logit is about 30, and rounding adds up over 30 layers
END = "<|endoftext|>"
NUM_RECORDS = 50  # of each domain whose loss is compared
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS}
NUM_STEPS = 20
LEARNING_RATE, BETAS, EPS, MAX_GRAD_NORM = 3e-4, [0.9, 0.999], 1e-8, 0.5
# each domain fills one block and a step takes two, so every step sees all records in any order
CONFIG = """
[run]
dir = "{folder}/run"
[base]
source = {{ path = "{base}" }}
[data]
seq_len = 192
[[data.domains]]
name = "code"
train = ["{folder}/code.jsonl"]
[[data.domains]]
name = "verse"
train = ["{folder}/verse.jsonl"]
[train]
duration = {{ steps = {num_steps} }}
micro_batch_size = 1
grad_accum_steps = 2
[optimizer]
adapters = {{ learning_rate = {learning_rate} }}
betas = {betas}
eps = {eps}
max_grad_norm = {max_grad_norm}
[schedule]
kind = "constant"
warmup_steps = 0
[lora]
num_experts = 1
target_modules = {modules}
[[lora.experts]]
source = {{ path = "{folder}/start" }}
"""
# the texts whose tokens are compared: first those that are hard to see, then one on each line
TOKENIZER_TEXTS = [
    "", " ", "   ", "\t", "\n", "\r\n", "\n\n\n", " \n \n", "\tif x:\n\t\treturn\t1\n", "  a  b   c    ",
    "no-break\u00a0space, thin\u2009space, wide\u3000space", "line\u2028separator, form\ffeed, \x85",
    "zero\u200bwidth, joiner\u200d, soft\u00adhyphen, \ufeffbyte order mark", "\x01\x02\x1b[0m\x7f\ufffd",
    "decomposed: cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "a" * 200, "ab " * 60, "=" * 70,
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n",
    *r"""7
1234567890
3.14159e-10 and 1,000,000.00
2024-02-29T23:59:60Z, v1.2.3-rc4, 0x1F4A9, 50%
a1b22c333 5 6  7   8
x² + ½ y₃, ٣٤٥, １２３, Ⅷ, ①
I'm, you're, he'S, they'LL, don't, o'clock, 'tis, ''twice''
HELLO Hello hello hElLo snake_case camelCase __init__
antidisestablishmentarianism qzxjkvw
café naïve Ångström straße STRASSE ẞ ﬁne
Привет, мир! Γειά σου Κόσμε
你好，世界。 こんにちは世界 안녕하세요
مرحبا بك שָׁלוֹם नमस्ते สวัสดี
😀👍🏽 👨‍👩‍👧‍👦 🇫🇷 ❤️ 𠀀𝓐
“quotes” ‘and’ — dashes… €5 £6 ¥7 ©®™
... --- *** === ~~~ ??? !?!?!? (((([[[{{{<<<
def f(x: int) -> int: return x**2  # squared
fn main() { println!("{:?}", vec![1, 2]); }
int main(void) { return a[i]++ == 0 ? -1 : ~b; }
SELECT * FROM t WHERE a <> 'b' AND c >= 10;
<div class="x">&nbsp;</div><!-- -->
{"a": [1, null, true], "b": "\u00e9\n"}
$\frac{a}{b} \leq \sum_{i=1}^{n} x_i$
https://example.org/a?b=c&d=%20#e user@example.org C:\Users\x\file.txt
--flag=value -x | grep -v '^#' > out 2>&1
a<|im_end|>b <|im_end|> <|im_start|><|im_start|>
<|im_end <|im_start |> <|IM_END|>
<repo_name>dylora<file_sep>src/lib.rs <filename>1.py<gh_stars>10""".splitlines(),
]

CHATS = [
    [("user", "Is 7 prime?"), ("assistant", "Yes, 7 is prime.")],
    [
        ("system", "You are brief."),
        ("user", "  What is 12 * 12?\n"),
        ("assistant", "144"),
        ("user", "And 13 * 13? Éa 你好 😀"),
        ("assistant", "It is 169.\n\n```\n13 * 13 = 169\n```"),
        ("user", "Thanks!"),
    ],
    [("user", "A haiku, please."), ("tool", "five, seven, five"), ("assistant", " An old silent pond"), ("user", "More")],
]


def compare_numbers(name, ours, theirs, tolerance):
    """Stops if two lists of numbers differ by more than `tolerance` of a number's value."""
    if len(ours) != len(theirs):
        sys.exit(f"{name}: dylora has {len(ours)} numbers, the client {len(theirs)}")
    found = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: {found:.1e} of the value ({theirs[0]:.4f} to {theirs[-1]:.4f})", flush=True)
    if not found <= tolerance:
        sys.exit(f"{name}: {found:.1e} is more than {tolerance:.0e}\ndylora: {ours}\nthe client: {theirs}")
    checks.append(found)


def records(domain):
    return Path(f"demo/data/{domain}.validation.jsonl").read_text().splitlines(keepends=True)


def check_tokenizer(base, tokenizer):
    """Checks the ids of all texts in one call of dylora, which gets them joined by an added token.

    A tokenizer first splits its input at added tokens, so each text has the ids that it has alone.
    """
    ours = json.loads(dylora("trace", "--base", base, "--text", END.join(TOKENIZER_TEXTS), "--json"))["input_ids"]
    plain, end = Tokenizer.from_file(f"{base}/tokenizer.json"), tokenizer.convert_tokens_to_ids(END)
    found = [[]]
    for i in ours:
        found.append([]) if i == end else found[-1].append(i)
    for name, encode in [("tokenizers", lambda text: plain.encode(text).ids), ("transformers", tokenizer.encode)]:
        theirs = [encode(text) for text in TOKENIZER_TEXTS]
        wrong = [text for text, a, b in zip(TOKENIZER_TEXTS, found, theirs) if a != b]
        expect(f"{name} has the same tokens of {len(theirs)} texts", found == theirs, wrong)


def check_base(base, model, tokenizer):
    """Checks the logits of the base alone."""
    texts = {
        "a few words": "The capital of France is",
        "a chat": "<|im_start|>user\nIs 7 prime?<|im_end|>\n<|im_start|>assistant\nYes, 7",
        "a long text": "\n".join(json.loads(line)["text"] for line in records("verse")[:3]),
    }
    for name, text in texts.items():
        ours = trace("--base", base, "--text", text)
        ids = torch.tensor([tokenizer.encode(text)])
        expect(f"transformers has the same {ids.shape[1]} tokens of {name}", torch.equal(ours["input_ids"], ids))
        compare(f"base alone, {name}", ours["logits"], model(ids).logits)
        if name == "a few words":
            answer = tokenizer.decode(ours["logits"][0, -1].argmax())
            expect(f"dylora continues `{text}` with ` Paris`", answer == " Paris", answer)


def documents(lines, tokenizer):
    """The ids of each record, and the index of the first id that the loss counts.

    These are the ids of the prompt, if there is one, the completion and the end token. Prompt
    and completion are encoded separately.
    """
    encoded = []
    for record in map(json.loads, lines):
        prompt = tokenizer.encode(record.get("prompt", ""))
        completion = tokenizer.encode(record["completion"] if prompt else record["text"])
        encoded.append(([*prompt, *completion, tokenizer.eos_token_id], max(len(prompt), 1)))
    return encoded


def loss_of(model, lines, tokenizer):
    """The mean loss over the label tokens of some records, and the number of these tokens.

    Each document is computed alone. If the model has trainable parameters, this computes their
    gradients too.
    """
    encoded = documents(lines, tokenizer)
    num_labels = sum(len(ids) - first for ids, first in encoded)
    total = 0.0
    for ids, first in encoded:
        # in f32, PyTorch's cross entropy over this vocabulary is off by 4e-6 of its value
        logits = model(torch.tensor([ids])).logits[0, first - 1 : -1].double()
        loss = F.cross_entropy(logits, torch.tensor(ids[first:]), reduction="sum") / num_labels
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    return total, num_labels


def check_losses(base, folder, model, tokenizer):
    """Checks the losses of two domains by `dylora eval`."""
    arguments, theirs = [], []
    for domain in ["code", "verse"]:
        lines = records(domain)[:NUM_RECORDS]
        file = folder / f"eval-{domain}.jsonl"
        file.write_text("".join(lines))
        arguments += ["--data", f"{domain}={file}"]
        theirs.append(loss_of(model, lines, tokenizer))
    report = json.loads(dylora("eval", "--base", base, *arguments, "--seq-len", 512, "--json"))
    counted = [domain["label_tokens"] for domain in report["domains"]]
    expect(f"transformers has the same label tokens, {counted}", counted == [n for _, n in theirs], theirs)
    ours = [domain["loss"] for domain in report["domains"]]
    compare_numbers("losses of code and verse", ours, [loss for loss, _ in theirs], 1e-5)


def marked(template):
    """The stock template of SmolLM2 with `{% generation %}` around what the assistant says."""
    said = "message['content'] + '<|im_end|>' + '\n'"
    header = "'<|im_start|>' + message['role'] + '\n'"
    expect("the template is SmolLM2's", template.count(f"{{{{{header} + {said}}}}}") == 1, template)
    of_assistant = f"{{% generation %}}{{{{ {said} }}}}{{% endgeneration %}}"
    branches = f"{{% if message['role'] == 'assistant' %}}{of_assistant}{{% else %}}{{{{ {said} }}}}{{% endif %}}"
    return template.replace(f"{{{{{header} + {said}}}}}", f"{{{{ {header} }}}}{branches}")


def check_chats(base, folder, model, tokenizer):
    """Checks the losses of the assistant's turns in chats by `dylora eval`."""
    chats = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    template = marked(tokenizer.chat_template)
    losses = {"all": [], "last": []}
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat)["input_ids"]
        masked = tokenizer.apply_chat_template(chat, chat_template=template, return_assistant_tokens_mask=True)
        expect("the marked template has the same tokens", masked["input_ids"] == ids, masked)
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        each = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
        learned = [at for at, is_learned in enumerate(masked["assistant_masks"]) if is_learned]
        last = max(at for at in learned if at - 1 not in learned)
        losses["all"] += [each[at - 1] for at in learned]
        losses["last"] += [each[at - 1] for at in learned if at >= last]
    for turns, theirs in losses.items():
        arguments = ["--base", base, "--data", f"chat={file}", "--seq-len", 512, "--loss-on-turns", turns, "--json"]
        [domain] = json.loads(dylora("eval", *arguments))["domains"]
        counted = domain["label_tokens"]
        expect(f"transformers has the same {counted} label tokens of turns `{turns}`", counted == len(theirs), theirs)
        compare_numbers(f"loss of turns `{turns}`", [domain["loss"]], [sum(theirs) / len(theirs)], 1e-5)


def check_adapter(base, folder, model, tokenizer):
    """Checks a random adapter on all linear layers."""
    ids = torch.tensor([tokenizer.encode(json.loads(records("verse")[0])["text"])])
    alone = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(**LORA, use_rslora=True)).eval()
    randomise(adapted, 0.01)
    theirs = adapted(ids).logits
    adapted.save_pretrained(folder / "random", save_embedding_layers=False)
    adapted.unload()
    arguments = ["--adapters", folder / "random", "--base", base, "--tokens", ",".join(map(str, ids[0].tolist()))]
    compare("rsLoRA on all linear layers", trace(*arguments)["logits"], theirs, alone)
    compare("the same, routing `none`", trace(*arguments, "--routing", "none")["logits"], alone)


@torch.enable_grad()
def train_in_peft(model, lines, tokenizer):
    """The loss and the gradient norm of each step. A step takes all records."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    steps = []
    for _ in range(NUM_STEPS):
        loss, num_labels = loss_of(model, lines, tokenizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss, "grad_norm": norm.item(), "label_tokens": num_labels})
    return steps


def check_training(base, folder, model, tokenizer):
    """Checks the training of an adapter that starts from the same numbers in both programs."""
    lines = {"code": records("code")[:2], "verse": records("verse")[:1]}
    for domain, of_domain in lines.items():
        (folder / f"{domain}.jsonl").write_text("".join(of_domain))
    adapted = get_peft_model(model, LoraConfig(**LORA))
    adapted.save_pretrained(folder / "start", save_embedding_layers=False)
    settings = {
        "num_steps": NUM_STEPS, "learning_rate": LEARNING_RATE, "betas": BETAS, "eps": EPS,
        "max_grad_norm": MAX_GRAD_NORM, "modules": PROJECTIONS,
    }
    (folder / "train.toml").write_text(CONFIG.format(base=base, folder=folder, **settings))
    dylora("train", "--config", folder / "train.toml")
    metrics = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    ours = [line for line in metrics if line["kind"] == "train"]
    theirs = train_in_peft(adapted, sum(lines.values(), []), tokenizer)
    counted = [[step["label_tokens"] for step in steps] for steps in (ours, theirs)]
    expect(f"each of {NUM_STEPS} steps takes all records", counted[0] == counted[1], counted)
    expect("some gradients are clipped", any(step["grad_norm"] > MAX_GRAD_NORM for step in theirs))
    for key in ["loss", "grad_norm"]:
        compare_numbers(f"{key} of each step", *([step[key] for step in steps] for steps in (ours, theirs)), 1e-4)


@torch.no_grad()
def main():
    base, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    check_tokenizer(base, tokenizer)
    model = load_base(base)
    check_base(base, model, tokenizer)
    check_generate("real base", base)
    check_chat("real base", base)
    check_losses(base, folder, model, tokenizer)
    check_chats(base, folder, model, tokenizer)
    check_adapter(base, folder, model, tokenizer)
    check_training(base, folder, model, tokenizer)
    summary()


main()
