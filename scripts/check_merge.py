#!/usr/bin/env python3
"""Merges mixtures, loads the results in transformers and PEFT, and checks the reported cost.

    scripts/check_merge.py FOLDER

FOLDER holds the runs of scripts/check_peft.py. The reference is a mixture with the same weights for
every token, computed from PEFT's layers. A merged base must give the same logits in transformers,
and a merged adapter the same logits in PEFT. Both must load without a warning. Needs
scripts/reference_env.
"""

import json
import sys
from pathlib import Path

import torch
from clients import BASE, TEXTS, check_merge, compare, documents, dylora, expect, load_base, load_experts
from clients import routed, static_logits, summary, token_ids, token_losses, trace, write_texts

# the run, the weights and the form of each merge; no adapter can hold a mixture of DoRA experts
CASES = [
    ("single", None, "base"),
    ("top_k", "mean", "base"),
    ("top_k", "expert:1", "base"),
    ("top_k", "0.5,0.3,0.2", "adapter"),
    ("patterns", "0.7,-0.4,1.1", "base"),
    ("patterns", "0.7,-0.4,1.1", "adapter"),
    ("dora", "uniform", "base"),
    ("pissa", "all", "base"),
    ("pissa", "mean", "adapter"),
    ("alora", "expert:1", "adapter"),
    ("all", None, "adapter"),
]


def check_cost(folder, run):
    """Checks the losses that `merge` measures, computed by transformers and PEFT.

    Each text with its end token is a document of its own.
    """
    texts = write_texts(folder / "texts.jsonl")
    out = folder / "measured"
    merge = ["--checkpoint", folder / run, "--weights", "mean", "--data", texts, "--seq-len", 256, "--out", out]
    printed = dylora("merge", *merge)
    expect("merge prints the cost of fixing the weights", "cost of fixing the weights" in printed, printed)
    report = json.loads(dylora("merge", *merge, "--overwrite", "--json"))
    merged = load_base(out)
    model, _ = load_experts(BASE, folder / f"{run}.export")
    losses, weights = {"routed": [], "static": []}, []
    for ids in documents(BASE):
        logits, at_sites = routed(model, folder / f"{run}.export", ids)
        weights.append(torch.stack(list(at_sites.values())).mean(0)[0, :-1])
        for name, logits in (("routed", logits), ("static", merged(ids).logits)):
            losses[name].append(token_losses(logits, ids))
    losses = {name: torch.cat(parts).mean() for name, parts in losses.items()}
    for name, loss in losses.items():
        compare(f"{run}: measured {name} loss", torch.tensor(report["measured"][name]["token_loss"]), loss)
    cost = torch.tensor(report["measured"]["token_cost"])
    compare(f"{run}: measured cost", cost, losses["static"] - losses["routed"])
    compare(f"{run}: mean weights of the router", torch.tensor(report["weights"]), torch.cat(weights).mean(0))


def check_concatenation(folder, run):
    """Checks PEFT's own concatenation of a mixture's experts, in dylora."""
    ids = token_ids(BASE, TEXTS[0])
    model, experts = load_experts(BASE, folder / f"{run}.export")
    weights = [0.5, 0.3, 0.2]
    theirs = static_logits(model, folder / f"{run}.export", ids, weights)
    model.add_weighted_adapter(experts, weights, "joined", combination_type="cat")
    model.save_pretrained(folder, selected_adapters=["joined"], save_embedding_layers=False)
    ours = trace("--adapters", folder / "joined", "--base", BASE, "--text", TEXTS[0])["logits"]
    compare(f"{run} concatenated by PEFT, in dylora", ours, theirs, load_base(BASE)(ids).logits)


def check_refusals(folder):
    out = ["--out", folder / "refused"]
    says = lambda name, words, message: expect(name, words in message and not out[1].exists(), message)
    message = dylora("merge", "--checkpoint", folder / "top_k", *out, code=2)
    says("a routed mixture needs --weights", "`--weights mean`", message)
    export = ["--adapters", folder / "top_k.export", "--base", BASE]
    message = dylora("merge", *export, "--weights", "mean", *out, code=2)
    says("a routed mixture needs data to measure the cost", "`--data [DOMAIN=]FILE`", message)
    message = dylora("merge", "--checkpoint", folder / "dora", "--weights", "all", "--as", "adapter", *out, code=1)
    says("DoRA fits into no adapter", "merge into the base instead", message)
    message = dylora("merge", "--checkpoint", folder / "alora", "--weights", "uniform", *out, code=1)
    says("invocation tokens fit into no merge", "invocation tokens", message)


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]).resolve()
    check_refusals(folder)
    check_cost(folder, "top_k")
    for run, weights, form in CASES:
        check_merge(run, folder / "merged", folder / run, folder / f"{run}.export", weights, form, BASE)
    check_concatenation(folder, "top_k")
    summary()


main()
