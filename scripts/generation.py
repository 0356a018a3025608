"""Functions that compare `dylora generate` with transformers and PEFT.

A text that dylora continues greedily must have the same tokens, and each token the same probability.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import torch
from clients import compare, dylora, expect, load_base, load_experts, load_tokenizer, no_warnings, routed

NUM_NEW = 24
# uneven prompts, which dylora continues in one batch
PROMPTS = [
    "How much remains?\n[1] 7 hours = 7 * 11 = 77 crowns\n[2] 77 -",
    "SCENE. The battlements at dawn. HELICAN",
    "Name",
    "The three of them, who had never met before that day in the old house by the river, sat",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Is 7 prime?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And 8?"},
    ],
]


def generate(*arguments, prompts=PROMPTS):
    """What `dylora generate` prints for each prompt, a text to continue or a list of messages."""
    records = [{"prompt": p} if isinstance(p, str) else {"messages": p} for p in prompts]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        arguments = [*arguments, "--raw", "--prompts", file, "--max-new-tokens", NUM_NEW, "--temperature", 0]
        printed = dylora("generate", *arguments, "--dtype", "f32", "--json")
    return [json.loads(line) for line in printed.splitlines()]


def compare_texts(name, ours, theirs, tokenizer):
    """Compares texts with the ids and the logits of another program, [t, v], for each."""
    for number, (text, (ids, logits)) in enumerate(zip(ours, theirs, strict=True), 1):
        expect(f"{name}: the same {len(ids)} tokens, text {number}", text["ids"] == ids, (text["ids"], ids))
        log_probs = logits.float().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        compare(f"{name}: their log-probabilities, text {number}", torch.tensor(text["log_probs"]), log_probs)
        both = (text["prompt_ids"], [*text["prompt_ids"], *ids])
        prompt, whole = (tokenizer.decode(t, skip_special_tokens=True) for t in both)
        expect(f"{name}: the same words, text {number}", whole.removeprefix(prompt) == text["text"], (whole, text))


def by_transformers(model, texts):
    """The continuation of each prompt by transformers, with its logits."""
    found = []
    for text in texts:
        ids = torch.tensor([text["prompt_ids"]])
        done = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        found.append((done.sequences[0, ids.shape[1] :].tolist(), torch.cat(done.logits)))
    return found


def by_passes(logits_of, texts, end_tokens):
    """The greedy continuation of each prompt by a whole forward pass for each token."""
    found = []
    for text in texts:
        ids, logits = list(text["prompt_ids"]), []
        while len(logits) < NUM_NEW and (not logits or ids[-1] not in end_tokens):
            logits.append(logits_of(torch.tensor([ids]), len(text["prompt_ids"]))[0, -1])
            ids.append(logits[-1].argmax().item())
        found.append((ids[len(text["prompt_ids"]) :], torch.stack(logits)))
    return found


def end_tokens(base):
    """The tokens that end a text."""
    ids = load_base(base).generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def check_chat(name, base):
    """Checks the answers of a base to conversations."""
    tokenizer, model = load_tokenizer(base), load_base(base)
    ours = generate("--base", base, prompts=CHATS)
    for number, (text, messages) in enumerate(zip(ours, CHATS, strict=True), 1):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        expect(f"{name}: the same prompt of chat {number}", text["prompt_ids"] == ids, (text["prompt_ids"], ids))
    compare_texts(f"{name}: answers in transformers", ours, by_transformers(model, ours), tokenizer)


def check_program(name, base, export, ours, tokenizer):
    """Checks the program that lies in an export: texts with a cache, alone and in one batch."""
    spec = importlib.util.spec_from_file_location("exported_program", export / "dylora_peft.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    with no_warnings(export):
        model = program.load_mixture(export, base, dtype=torch.float32)
    for routing in ["record", "domain", "expert:99", [1.0]]:
        try:
            program.Mixture(model, export, routing)
            expect(f"{name}: the export's program refuses {routing}", False)
        except ValueError as error:
            expect(f"{name}: the export's program refuses {routing}", str(routing) in str(error), error)
    compare_texts(f"{name}: the export's program", ours, by_transformers(model, ours), tokenizer)
    # uneven prompts in one batch, padded on the left
    prompts = [text["prompt_ids"] for text in ours]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}
    done = model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()
    same = all(row[: len(text["ids"])] == text["ids"] for row, text in zip(done, ours, strict=True))
    expect(f"{name}: the export's program, in one batch", same, (done, [text["ids"] for text in ours]))
    if any(config.alora_invocation_tokens for config in model.peft_config.values()):
        return  # PEFT itself refuses beams then
    # a search that goes back to other texts finds the same with a cache as without
    prompt, options = {"input_ids": ids[:1], "attention_mask": mask[:1]}, options | {"num_beams": 3}
    beams = [model.generate(**prompt, **options, use_cache=cached) for cached in (True, False)]
    expect(f"{name}: the export's program, with beams", torch.equal(*beams), beams)


def check_generate(name, base, run=None, export=None, experts=(0,)):
    """Checks the texts of a base and, if there is a mixture, of its experts and of the mixture.

    The mixture is computed from PEFT's layers, without a cache.
    """
    tokenizer, model = load_tokenizer(base), load_base(base)
    ours = generate("--base", base)
    compare_texts(f"{name}: the base in transformers", ours, by_transformers(model, ours), tokenizer)
    if run is None:
        return
    meta = json.loads((export / "dylora.json").read_text())
    adapted, _ = load_experts(base, export)
    for expert in experts:
        adapter = meta["experts"][expert]
        adapted.base_model.set_adapter([adapter, *filter(None, [meta.get("shared")])])
        ours = generate("--checkpoint", run, "--routing", f"expert:{expert}")
        compare_texts(f"{name}: {adapter} in PEFT", ours, by_transformers(adapted, ours), tokenizer)
    if meta["router"] is None or meta["routing"] != "router":
        return
    ours = generate("--checkpoint", run)
    theirs = by_passes(lambda *ids: routed(adapted, export, *ids)[0], ours, end_tokens(base))
    compare_texts(f"{name}: the mixture of PEFT's layers", ours, theirs, tokenizer)
    check_program(name, base, export, ours, tokenizer)
    base_text = generate("--checkpoint", run, "--routing", "none")
    expect(f"{name}: the mixture writes other texts than the base", base_text != ours)
