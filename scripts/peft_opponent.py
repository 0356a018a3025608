"""The opponents of scripts/compare_peft, from PEFT's and transformers' public API: measures rows in this process.

    one_pass      every adapter in one pass: PEFT's layer with its forward replaced by the routed loop over adapters
    single_lora   PEFT as it comes, one adapter (in bf16 under autocast, as transformers' Trainer runs it)
    two_passes    a pass with all adapters unrouted, whose last hidden state the router reads, then the routed pass
    n_passes      one pass for each adapter, the logits blended by the router's weights, then the loss
    eval          the loss of one_pass without gradients

The router reads the token embeddings. A bf16 base has f32 adapters and router, cast where they are used. A step is
forward, loss, backward, clipping to 1 and fused AdamW. Prints a JSON line for each row, with the keys of
`dylora bench --json`.
"""

import ctypes
import gc
import json
import os
import re
import statistics
import sys
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
LENGTH_SIGMA = 0.6  # of the logarithm of documents' lengths, as in dylora
AS_IT_COMES = peft_layer.Linear.forward


class Weights:
    """The routing weights [b, t, e] of the pass that runs; None = 1 for each active adapter."""

    now = None


def routed_forward(layer, x, *_args, **_kwargs):
    result = layer.base_layer(x)
    for i, name in enumerate(layer.active_adapters):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        h = F.linear(F.linear(layer.lora_dropout[name](x), a.to(x.dtype)), b.to(x.dtype)) * layer.scaling[name]
        if Weights.now is not None:
            h = h * Weights.now[..., i : i + 1].to(h.dtype)
        result = result + h
    return result


class Opponent(nn.Module):
    """A row's model; its forward gives the loss."""

    def __init__(self, row, base, setting):
        super().__init__()
        self.row, self.experts = row, 1 if row == "single_lora" else setting["experts"]
        peft_layer.Linear.forward = AS_IT_COMES if row == "single_lora" else routed_forward
        config = lambda: LoraConfig(
            task_type="CAUSAL_LM", fan_in_fan_out=True, r=setting["rank"], lora_alpha=setting["alpha"],
            lora_dropout=setting["dropout"], target_modules=setting["modules"],
        )
        self.names = [f"expert_{e}" for e in range(self.experts)]
        self.peft = get_peft_model(base, config(), adapter_name=self.names[0])
        for name in self.names[1:]:
            self.peft.add_adapter(name, config())
        self.layers = [m for m in self.peft.modules() if isinstance(m, peft_layer.Linear)]
        assert len(self.layers) == base.config.n_layer * len(setting["modules"])
        self.router = nn.Linear(base.config.n_embd, self.experts, device=base.device)
        self.activate(self.names)
        for name, parameter in self.named_parameters():
            trained = "lora_" in name or "router" in name and self.experts > 1
            parameter.requires_grad_(trained)
            if trained:
                parameter.data = parameter.data.float()
        self.gpt2 = self.peft.base_model.model
        self.head_loss = None

    def activate(self, names):
        for layer in self.layers:
            layer._active_adapter = names

    def weights(self, x):
        return F.linear(x, self.router.weight.to(x.dtype), self.router.bias.to(x.dtype)).float().softmax(-1)

    def forward(self, ids, labels, more):
        Weights.now = None
        if self.row == "n_passes":
            return self.n_passes(ids, labels, more)
        if self.row == "two_passes":
            # as PEFT's own X-LoRA takes them: the base alone, without gradients
            self.activate([])
            with torch.no_grad():
                states = self.gpt2.transformer(input_ids=ids, **more).last_hidden_state
            self.activate(self.names)
            Weights.now = self.weights(states)
        elif self.row != "single_lora":
            Weights.now = self.weights(self.gpt2.transformer.wte(ids))
        if self.head_loss:
            loss = self.head_loss(self.gpt2.transformer(input_ids=ids, **more).last_hidden_state, labels)
        else:
            loss = self.peft(input_ids=ids, labels=labels, **more).loss
        Weights.now = None
        return loss

    def compile_blocks(self):
        """Compiles the blocks, which share their code, and the head with the loss: a fraction of the time."""
        for block in self.gpt2.transformer.h:
            block.compile(dynamic=False)

        def head_loss(hidden, labels):
            logits = self.gpt2.lm_head(hidden)
            return self.gpt2.loss_function(logits, labels, vocab_size=self.gpt2.config.vocab_size)

        self.head_loss = torch.compile(head_loss, dynamic=False)

    def n_passes(self, ids, labels, more):
        weights = self.weights(self.gpt2.transformer.wte(ids))
        blended = None
        for e, name in enumerate(self.names):
            self.activate([name])
            logits = self.peft(input_ids=ids, **more).logits
            weighted = logits * weights[..., e : e + 1].to(logits.dtype)
            blended = weighted if blended is None else blended + weighted
        return self.gpt2.loss_function(blended, labels, vocab_size=self.gpt2.config.vocab_size)


def load_base(setting, device):
    dtype = torch.bfloat16 if setting["dtype"] == "bf16" else torch.float32
    if setting["base"]:
        model = GPT2LMHeadModel.from_pretrained(setting["base"], dtype=dtype, attn_implementation="sdpa")
    else:
        torch.manual_seed(setting["seed"])
        with torch.device(device):
            model = GPT2LMHeadModel._from_config(shape(setting), attn_implementation="sdpa")
    for dropout in [m for m in model.modules() if isinstance(m, nn.Dropout)]:
        dropout.p = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.0
    model.loss_type = "ForCausalLM"
    return model.to(device=device, dtype=dtype)


def shape(setting):
    n_layer, n_head, n_embd = SHAPES[setting["size"]]
    vocab_size = 50304 if setting.get("padded_vocab") else 50257
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size, use_cache=False, **dropout
    )


def batches(setting, batch, vocab_size, device):
    """Endless batches of random tokens: ids, labels, and with short documents their positions and mask."""
    generator = torch.Generator().manual_seed(setting["seed"])
    t = setting["seq_len"]
    while True:
        ids = torch.randint(vocab_size, (batch, t), generator=generator)
        if not setting["documents"]:
            yield ids.to(device), ids.to(device), {"use_cache": False}
            continue
        documents, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for row in range(batch):
            at, number = 0, 0
            while at < t:
                z = torch.randn((), generator=generator).item()
                length = max(1, min(t - at, round(setting["documents"] * 2.718281828459045 ** (LENGTH_SIGMA * z))))
                documents[row, at : at + length] = number
                positions[row, at : at + length] = torch.arange(length)
                at, number = at + length, number + 1
        labels = ids.masked_fill(positions == 0, -100)  # transformers shifts them
        documents = documents.to(device)
        mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        more = {"use_cache": False, "position_ids": positions.to(device), "attention_mask": mask}
        yield ids.to(device), labels.to(device), more


def memory(key, device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated() if key == "VmHWM" else torch.cuda.memory_allocated()
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(key + r":\s+(\d+)", status.read()).group(1))


def reset_peak(device):
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(setting, row, batch, device):
    base = load_base(setting, device)
    reset_peak(device)
    before = memory("VmRSS", device)
    torch.manual_seed(setting["seed"])
    opponent = Opponent(row, base, setting)
    opponent.train(row != "eval")
    trained = [p for p in opponent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    loss_of = opponent
    if setting["compile"]:
        torch._dynamo.reset()
        if setting["compile"] == "blocks":
            opponent.compile_blocks()
        else:
            mode = None if setting["compile"] == "default" else setting["compile"]
            loss_of = torch.compile(opponent, mode=mode, dynamic=False)
    data = batches(setting, batch, base.config.vocab_size, device)
    accumulate = setting["accumulate"]
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, row == "single_lora" and setting["dtype"] == "bf16")

    def step():
        total = 0.0
        for _ in range(accumulate):
            ids, labels, more = next(data)
            with torch.set_grad_enabled(row != "eval"), autocast:
                loss = loss_of(ids, labels, more)
            if row != "eval":
                (loss / accumulate).backward()
            total += loss.detach()
        if row != "eval":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total.item() / accumulate  # waits for the device

    all_ms, losses, first_end = [], [], None
    for _ in range(setting["warmup"] + setting["steps"]):
        start = time.perf_counter()
        losses.append(step())
        all_ms.append(1e3 * (time.perf_counter() - start))
        first_end = first_end or time.time()
    counted = all_ms[setting["warmup"] :]
    tokens = batch * accumulate * setting["seq_len"]
    peak = memory("VmHWM", device)
    return {
        "tokens_per_sec": tokens / statistics.median(counted) * 1e3,
        "step_ms": statistics.median(counted),
        "min_step_ms": min(counted),
        "max_step_ms": max(counted),
        "tokens_per_step": tokens,
        "peak_memory_bytes": peak,
        "extra_memory_bytes": peak - before,
        "first_step_ms": all_ms[0],
        "first_step_unix_secs": first_end,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main():
    setting = json.loads(sys.argv[1])
    device = setting["device"]
    if device != "cpu":
        torch.cuda.set_device(device if ":" in device else 0)
    for batch in setting["batches"]:
        for row in setting["rows"]:
            report = {"kind": "row", "row": row, "micro_batch_size": batch, "error": None}
            try:
                report |= measure(setting, row, batch, device)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                report["error"] = str(error).splitlines()[0]
            print(json.dumps(report), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
