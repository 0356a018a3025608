"""The opponents of scripts/compare_peft, built from the public API of PEFT and transformers.

    python3 scripts/peft_opponent.py SETTING

SETTING is a JSON object such as `run_peft` of scripts/compare_peft.py makes. The bases are GPT-2 and
Llama-like models (see scripts/peft_bases.py). This script measures rows in its own process:

    one_pass      all adapters in one pass: the forward of PEFT's layer is replaced by a routed loop
                  over adapters
    single_lora   PEFT unchanged, with one adapter (in bf16 under autocast, as with transformers'
                  Trainer)
    two_passes    a pass of the base alone, whose last hidden state the router reads, and then the
                  routed pass
    n_passes      one pass for each adapter, whose logits are blended by the routing weights
    eval          the loss of one_pass without gradients

The router reads the token embeddings, except in two_passes. With a bf16 base, adapters and router
are in f32 and cast where they are used. A step consists of forward pass, loss, backward pass,
clipping to 1 and fused AdamW. Its tokens are on the device before the clock starts. The script
prints a JSON line for the setting and one for each row, with the keys of `dylora bench --json`, the
times of all counted steps, and the form.

A form is a list of switches that make a step faster or reduce its memory:

    no_mask       no mask tensor: transformers' `create_causal_mask` returns None, so that SDPA runs
                  with is_causal=True
    cudnn         only cuDNN's attention; no effect on the CPU and in f32, which do not have it
    padded_vocab  the embedding and the head have zero rows up to a multiple of 64; the logits of
                  these rows are set to minus infinity
    padded_loss   with padded_vocab: the logits of these rows are not changed, so the loss is over
                  the padded vocabulary
    liger         the head and the loss by Liger's fused linear cross entropy, which ignores the
                  padding (as padded_loss does)
    no_wait       the host does not wait for a step's loss, and CUDA events time the steps; no
                  effect on the CPU
    repeat_kv     keys and values are repeated for their queries; otherwise, without a mask tensor,
                  SDPA gets them as they are (`enable_gqa`). No effect on GPT-2
    liger_blocks  RMSNorm, RoPE and SwiGLU by Liger's kernels, meant for eager steps; no effect on
                  GPT-2
    checkpointing  each block is computed again in the backward pass, from its input; not in n_passes
    rank_weights  a token's routing weight multiplies the r features between A and B, not the
                  outputs of B
    stacked       as rank_weights, but one product applies A of all adapters, and one B of all; their
                  inputs share one dropout mask

The last two are equal to the plain loop up to rounding, and have no effect on single_lora.

A row under torch.compile or with a form also has `eager_loss` and `eager_grad_norm`, the loss and
the gradient norm of the first step by unchanged eager PEFT over `loss_vocab_size` logits. They are
computed sequence by sequence and with checkpointing, so that they need little memory.

torchrun runs a setting on several GPUs of one machine, with one process for each:

    torchrun --standalone --nproc-per-node 4 scripts/peft_opponent.py SETTING

SETTING is that of one process. Its device is `cuda`, of which each process takes the GPU of its
LOCAL_RANK, or `cpu`. Each process reads `batches` sequences at a time of its own data (the seed plus
RANK), and DistributedDataParallel averages the gradients, by NCCL or, on the CPU, by Gloo. Only the
process of rank 0 prints. Its rows also have `processes`. Their tokens are those of all processes,
their losses are the means over all processes, and their times and memory are those of rank 0. They
have no `eager_loss` and `eager_grad_norm`. An error of a process ends all of them.
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
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from inspect import signature
from itertools import islice, pairwise
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from peft_bases import blocks_of, is_gpt2, load_base, target_modules
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import sdpa_attention

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LENGTH_SIGMA = 0.6  # standard deviation of the logarithm of document lengths, as in dylora
# Liger's chunks of logits may take this many times its default memory, so that they are fewer
LIGER_CHUNK = 8
AS_IT_COMES = peft_layer.Linear.forward


class RoutingWeights:
    """The routing weights of the present pass, [b, t, e]; None means 1 for each active adapter."""

    def __init__(self):
        self.now = None


# an instance, because torch.compile ends a graph wherever an attribute of a class is set
WEIGHTS = RoutingWeights()


def routed_forward(layer, x, *_args, **_kwargs):
    result = layer.base_layer(x)
    for i, name in enumerate(layer.active_adapters):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        h = F.linear(F.linear(layer.lora_dropout[name](x), a.to(x.dtype)), b.to(x.dtype)) * layer.scaling[name]
        if WEIGHTS.now is not None:
            h = h * WEIGHTS.now[..., i : i + 1].to(h.dtype)
        result = result + h
    return result


def rank_weighted_forward(layer, x, *_args, **_kwargs):
    result = layer.base_layer(x)
    for i, name in enumerate(layer.active_adapters):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        h = F.linear(layer.lora_dropout[name](x), a.to(x.dtype)) * layer.scaling[name]
        if WEIGHTS.now is not None:
            h = h * WEIGHTS.now[..., i : i + 1].to(h.dtype)
        result = result + F.linear(h, b.to(x.dtype))
    return result


def stacked_forward(layer, x, *_args, **_kwargs):
    result, names = layer.base_layer(x), layer.active_adapters
    if not names:
        return result
    a = torch.cat([layer.lora_A[name].weight for name in names])
    b = torch.cat([layer.lora_B[name].weight for name in names], dim=1)
    h = F.linear(layer.lora_dropout[names[0]](x), a.to(x.dtype)) * layer.scaling[names[0]]
    if WEIGHTS.now is not None:
        h = h * WEIGHTS.now.repeat_interleave(layer.r[names[0]], -1).to(h.dtype)
    return result + F.linear(h, b.to(x.dtype))


@torch.compiler.disable  # it reads a count from the device, which would end a graph inside of it
def liger_loss(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    chunk = {"chunk_mem_const": LIGER_CHUNK} if "chunk_mem_const" in signature(fused).parameters else {}
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    return fused(hidden.flatten(0, 1).to(weight.dtype), weight, targets, **chunk)


class Opponent(nn.Module):
    """A row's model, whose forward returns the loss."""

    def __init__(self, row, base, setting):
        super().__init__()
        self.row, self.experts = row, 1 if row == "single_lora" else setting["experts"]
        peft_layer.Linear.forward = AS_IT_COMES if row == "single_lora" else routed_forward
        modules = target_modules(base, setting["modules"])
        config = lambda: LoraConfig(
            task_type="CAUSAL_LM", fan_in_fan_out=is_gpt2(base), r=setting["rank"], lora_alpha=setting["alpha"],
            lora_dropout=setting["dropout"], target_modules=modules,
        )
        self.names = [f"expert_{e}" for e in range(self.experts)]
        self.peft = get_peft_model(base, config(), adapter_name=self.names[0])
        for name in self.names[1:]:
            self.peft.add_adapter(name, config())
        self.layers = [m for m in self.peft.modules() if isinstance(m, peft_layer.Linear)]
        assert len(self.layers) == base.config.num_hidden_layers * len(modules)
        self.router = nn.Linear(base.config.hidden_size, self.experts, device=base.device)
        self.activate(self.names)
        for name, parameter in self.named_parameters():
            trained = "lora_" in name or "router" in name and self.experts > 1
            parameter.requires_grad_(trained)
            if trained:
                parameter.data = parameter.data.float()
        self.base, self.body, self.embed = base, base.base_model, base.get_input_embeddings()
        self.keeps_rng = setting["dropout"] > 0
        self.form = setting.get("form", [])
        self.set_checkpointing("checkpointing" in self.form)
        self.own_head = bool(self.form)
        padding_counts = {"padded_loss", "liger"} & set(self.form)
        self.loss_vocab_size = len(base.lm_head.weight) if padding_counts else base.config.vocab_size

    def set_checkpointing(self, on):
        self.checkpointing = on
        if on:
            assert self.row != "n_passes", "the backward pass would not know which adapter was active"
            how = {"use_reentrant": False, "preserve_rng_state": self.keeps_rng}
            self.base.gradient_checkpointing_enable(how)
            self.base.disable_input_require_grads()  # only reentrant checkpointing needs these
        else:
            self.base.gradient_checkpointing_disable()

    def activate(self, names):
        for layer in self.layers:
            layer._active_adapter = names

    def weights(self, x):
        return F.linear(x, self.router.weight.to(x.dtype), self.router.bias.to(x.dtype)).float().softmax(-1)

    def route(self, ids, more):
        """Sets the routing weights of the next pass."""
        WEIGHTS.now = None
        if self.row == "two_passes":
            # like PEFT's own X-LoRA: the hidden states of the base alone, without gradients
            self.activate([])
            with torch.no_grad():
                states = self.body(input_ids=ids, **more).last_hidden_state
            self.activate(self.names)
            WEIGHTS.now = self.weights(states)
        elif self.row != "single_lora":
            WEIGHTS.now = self.weights(self.embed(ids))

    def forward(self, ids, labels, more):
        if self.row == "n_passes":
            return self.n_passes(ids, labels, more)
        self.route(ids, more)
        if self.own_head:
            loss = self.head_loss(self.body(input_ids=ids, **more).last_hidden_state, labels)
        else:
            loss = self.peft(input_ids=ids, labels=labels, **more).loss
        if not self.checkpointing:  # which needs them in the backward pass
            WEIGHTS.now = None
        return loss

    def head_loss(self, hidden, labels):
        if "liger" in self.form:
            return liger_loss(hidden, self.base.lm_head.weight, labels)
        return self.loss_of(self.base.lm_head(hidden), labels)

    def loss_of(self, logits, labels):
        rows = logits.shape[-1]
        if rows > self.loss_vocab_size:
            # not a slice, since an odd number of columns would be read one by one
            padding = torch.arange(rows, device=logits.device) >= self.loss_vocab_size
            logits = logits.masked_fill(padding, float("-inf"))
        return self.base.loss_function(logits, labels, vocab_size=rows)

    def eager_loss(self, ids, labels, more):
        """The loss as PEFT and transformers compute it, whatever the form."""
        self.route(ids, more)
        logits = self.peft(input_ids=ids, **more).logits[..., : self.loss_vocab_size]
        return self.base.loss_function(logits, labels, vocab_size=self.loss_vocab_size)

    def compile_blocks(self):
        """Compiles the blocks, which share their code, and the head with the loss.

        This takes a fraction of the time that compiling the whole model takes. A final RMSNorm is
        compiled as well, because it takes several kernels.
        """
        for part in [*blocks_of(self.base), *([] if is_gpt2(self.base) else [self.body.norm])]:
            part.compile(dynamic=False)
        self.own_head = True
        self.head_loss = torch.compile(self.head_loss, dynamic=False)

    def n_passes(self, ids, labels, more):
        WEIGHTS.now = None
        weights = self.weights(self.embed(ids))
        blended = None
        for e, name in enumerate(self.names):
            self.activate([name])
            logits = self.peft(input_ids=ids, **more).logits
            weighted = logits * weights[..., e : e + 1].to(logits.dtype)
            blended = weighted if blended is None else blended + weighted
        return self.loss_of(blended, labels)


@contextmanager
def form_of(opponent, setting):
    """Within this context, the opponent runs as its form says."""
    form, base = opponent.form, opponent.base
    code = sys.modules[type(base).__module__]
    with ExitStack() as stack:
        patch = lambda where, name, new: stack.enter_context(mock.patch.object(where, name, new))
        if "no_mask" in form:
            patch(code, "create_causal_mask", lambda *_, **__: None)
        if "cudnn" in form and has_cudnn_attention(setting):
            stack.enter_context(sdpa_kernel([SDPBackend.CUDNN_ATTENTION]))
        if "repeat_kv" in form:
            patch(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)
        if "liger_blocks" in form and not is_gpt2(base):
            from liger_kernel.transformers import functional as liger

            patch(code, "apply_rotary_pos_emb", liger.liger_rope)
            rms_norm = lambda norm, x: liger.liger_rms_norm(x, norm.weight, norm.variance_epsilon)
            patch(type(opponent.body.norm), "forward", rms_norm)
            swiglu = lambda mlp, x: mlp.down_proj(liger.liger_swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
            patch(type(blocks_of(base)[0].mlp), "forward", swiglu)
        for name, forward in {"rank_weights": rank_weighted_forward, "stacked": stacked_forward}.items():
            if name in form and opponent.row != "single_lora":
                patch(peft_layer.Linear, "forward", forward)
        yield


def has_cudnn_attention(setting):
    return setting["device"] != "cpu" and setting["dtype"] == "bf16"


def batches(setting, batch, vocab_size, device):
    """Yields batches of random tokens without end: ids, labels and more arguments of the model.

    With packed documents, these include their positions and mask.
    """
    generator = torch.Generator().manual_seed(setting["seed"] + dist_rank())
    t = setting["seq_len"]
    while True:
        ids = torch.randint(vocab_size, (batch, t), generator=generator)
        if not setting["documents"]:
            ids = ids.to(device)
            yield ids, ids, {"use_cache": False}
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


def join_world(device):
    """Joins the other processes that torchrun started, each of which uses a GPU of its own."""
    torch._dynamo.config.optimize_ddp = False  # it would split graphs where a bucket of gradients ends
    if device == "cpu":
        dist.init_process_group("gloo")
        return
    assert device == "cuda", f"torchrun chooses the GPU of a process: the device must be `cuda`, got `{device}`"
    gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(gpu)
    dist.init_process_group("nccl", device_id=gpu)


def dist_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def averaging(loss_of, row):
    """The callable that returns the loss, whose backward pass averages gradients over the processes.

    Every trained parameter must get a gradient; otherwise the second step fails.
    """
    if not dist.is_initialized() or row == "eval":
        return loss_of
    return DistributedDataParallel(loss_of, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_averaging(loss_of):
    """A context in which backward passes add to the gradients of this process alone."""
    return loss_of.no_sync() if isinstance(loss_of, DistributedDataParallel) else nullcontext()


def mean_over_processes(values, device):
    if not dist.is_initialized():
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def measure(setting, row, batch, device):
    base = load_base(setting, device)
    accumulate = setting["accumulate"]
    num_batches = (setting["warmup"] + setting["steps"]) * accumulate
    data = batches(setting, batch, base.config.vocab_size, device)
    if not setting["documents"]:  # the masks of documents would fill the memory
        data = list(islice(data, num_batches))
    reset_peak(device)
    before = memory("VmRSS", device)
    torch.manual_seed(setting["seed"])
    opponent = Opponent(row, base, setting)
    opponent.train(row != "eval")
    for name, parameter in opponent.named_parameters():
        if "lora_B" in name:  # the first loss and its gradients then depend on all experts
            parameter.data.normal_(std=0.02)
    precision = autocast(row, setting)
    eager = {}
    checked = setting["compile"] or opponent.form
    checked = checked and not dist.is_initialized()
    if checked and not setting["dropout"] and not setting["documents"] and row != "n_passes":
        eager = eager_figures(opponent, row, data[:accumulate], precision)
        reset_peak(device)
    with form_of(opponent, setting):
        loss_of = averaging(compiled(opponent, setting), row)
        if dist.is_initialized():
            torch.manual_seed(setting["seed"] + dist_rank())  # for dropout
        step, first = step_of(opponent, row, loss_of, iter(data), accumulate, precision)
        figures = run_steps(step, setting, wait=device == "cpu" or "no_wait" not in opponent.form)
    peak = memory("VmHWM", device)
    losses = {key: figures[key] for key in ["first_loss", "last_loss"]}
    figures |= mean_over_processes(losses, device)
    tokens = world_size() * batch * accumulate * setting["seq_len"]
    return {
        "tokens_per_sec": tokens / figures["step_ms"] * 1e3,
        **figures,
        "first_grad_norm": first["grad_norm"] and first["grad_norm"].item(),
        **eager,
        "tokens_per_step": tokens,
        "peak_memory_bytes": peak,
        "extra_memory_bytes": peak - before,
        "loss_vocab_size": opponent.loss_vocab_size,
        "attention": "cudnn" if "cudnn" in opponent.form and has_cudnn_attention(setting) else "default",
        "graph_breaks": graph_breaks() if setting["compile"] else None,
        "liger": version("liger-kernel") if {"liger", "liger_blocks"} & set(opponent.form) else None,
    }


def autocast(row, setting):
    """Autocast for the single LoRA in bf16, as transformers' Trainer runs it."""
    enabled = row == "single_lora" and setting["dtype"] == "bf16"
    return torch.autocast(setting["device"].split(":")[0], torch.bfloat16, enabled)


def compiled(opponent, setting):
    """The callable that returns the loss: the opponent, compiled if the setting says so."""
    if not setting["compile"]:
        return opponent
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if setting["compile"] == "blocks":
        opponent.compile_blocks()
        return opponent
    mode = None if setting["compile"] == "default" else setting["compile"]
    return torch.compile(opponent, mode=mode, dynamic=False)


def graph_breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def trained_by(opponent):
    return [p for p in opponent.parameters() if p.requires_grad]


def step_of(opponent, row, loss_of, data, accumulate, precision):
    """A function that makes a step and returns its mean loss on the device.

    Also returns a dict in which the function stores the gradient norm of the first step.
    """
    trained = trained_by(opponent)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    first = {}

    def step():
        total = 0.0
        for i in range(accumulate):
            ids, labels, more = next(data)
            with without_averaging(loss_of) if i + 1 < accumulate else nullcontext():
                with torch.set_grad_enabled(row != "eval"), precision:
                    loss = loss_of(ids, labels, more)
                if row != "eval":
                    (loss / accumulate).backward()
            total += loss.detach()
        norm = None
        if row != "eval":
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        first.setdefault("grad_norm", norm)
        return total / accumulate

    return step, first


def run_steps(step, setting, wait):
    """Runs the warm-up and the counted steps.

    Without waiting, a step's time is that from the end of the step before it to its own end.
    """
    warmup, steps = setting["warmup"], setting["steps"]
    all_ms, losses, first_end = [], [], None
    for _ in range(warmup + steps if wait else warmup):
        start = time.perf_counter()
        losses.append(step().item())  # waits for the device
        all_ms.append(1e3 * (time.perf_counter() - start))
        first_end = first_end or time.time()
    if not wait:
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(1 + steps)]
        ends[0].record()
        for end in ends[1:]:
            losses.append(step())
            end.record()
        torch.cuda.synchronize()
        all_ms += [start.elapsed_time(end) for start, end in pairwise(ends)]
    counted = all_ms[warmup:]
    return {
        "step_ms": statistics.median(counted),
        "min_step_ms": min(counted),
        "max_step_ms": max(counted),
        "first_step_ms": all_ms[0],
        "first_step_unix_secs": first_end,
        "warmup_ms": all_ms[:warmup],
        "counted_ms": counted,
        "first_loss": losses[0],
        "last_loss": float(losses[-1]),
    }


def eager_figures(opponent, row, micro_batches, precision):
    """The loss and the gradient norm of the first step by eager PEFT, sequence by sequence.

    All sequences have the same number of labels.
    """
    opponent.set_checkpointing(True)
    total, trained = 0.0, trained_by(opponent)
    num_sequences = sum(len(ids) for ids, _, _ in micro_batches)
    for ids, labels, more in micro_batches:
        for one in range(len(ids)):
            with torch.set_grad_enabled(row != "eval"), precision:
                loss = opponent.eager_loss(ids[one : one + 1], labels[one : one + 1], more) / num_sequences
            if row != "eval":
                loss.backward()
            total += loss.item()
    WEIGHTS.now = None
    opponent.set_checkpointing("checkpointing" in opponent.form)
    if row == "eval":
        return {"eager_loss": total, "eager_grad_norm": None}
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained]).item()
    opponent.zero_grad(set_to_none=True)
    return {"eager_loss": total, "eager_grad_norm": norm}


def header(setting):
    on_gpu = setting["device"] != "cpu"
    return {
        "kind": "header",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": version("peft"),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "device_model": torch.cuda.get_device_name() if on_gpu else None,
        "threads": torch.get_num_threads(),
        **setting,
    }


def main():
    setting = json.loads(sys.argv[1])
    device = setting["device"]
    if "RANK" in os.environ:
        join_world(device)
    elif device != "cpu":
        torch.cuda.set_device(device if ":" in device else 0)
    show(header(setting))
    for batch in setting["batches"]:
        for row in setting["rows"]:
            report = {"kind": "row", "row": row, "micro_batch_size": batch, "error": None}
            report |= {"compile": setting["compile"], "form": setting["form"]}
            if dist.is_initialized():
                report["processes"] = world_size()
            try:
                report |= measure(setting, row, batch, device)
            except Exception as error:  # an error, such as the compiler's, costs only this row
                report["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                if dist.is_initialized():  # the other processes may wait for this one
                    show(report)
                    raise
            show(report)
            gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def show(line):
    if dist_rank() == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
