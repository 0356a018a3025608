"""Loads a mixture of LoRA experts that dylora exported in transformers and PEFT, with its routing.

    from dylora_peft import load_mixture
    model = load_mixture("FOLDER", "BASE")  # the export's folder; the base's folder or Hub id
    model.generate(**tokenizer("Hello", return_tensors="pt"))

Each target module computes W x + b + sum_e g_e (E_e(x) - W x - b), where E_e is PEFT's layer with
adapter e alone and g the routing weights that dylora.json and router.safetensors describe. Text is
generated with a key-value cache. Batches of uneven prompts are padded on the left, as in
transformers. This is for inference: dropout is off.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache


def load_mixture(folder, base, routing=None, **settings):
    """The base with the experts of an export, which a router or fixed weights mix.

    `base` is a loaded model, or what `from_pretrained` finds one by, with `settings` such as dtype.
    `routing` replaces the export's own: "router", "uniform", "all", "none", "expert:N", or a list
    with a weight for each expert.
    """
    if isinstance(base, (str, Path)):
        base = AutoModelForCausalLM.from_pretrained(base, **settings)
    manifest = json.loads((Path(folder) / "dylora.json").read_text())
    names = [*manifest["experts"], *filter(None, [manifest.get("shared")])]
    model = PeftModel.from_pretrained(base, str(Path(folder, names[0])), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(Path(folder, name)), adapter_name=name)
    model.mixture = Mixture(model, folder, routing)
    return model.eval()


class Mixture:
    """Mixes the adapters of a PeftModel until `remove` is called.

    `weights` has the routing weights of the last forward pass by site, [b, t, e].
    """

    def __init__(self, model, folder, routing=None):
        manifest = json.loads((Path(folder) / "dylora.json").read_text())
        if manifest["format"] != 3:
            raise ValueError(f"`dylora.json` has format {manifest['format']}, this file reads 3")
        self.experts, self.shared = manifest["experts"], manifest.get("shared")
        self.fixed = self.fixed_weights(manifest["routing"] if routing is None else routing)
        router = manifest["router"]
        if self.fixed is None and router is None:
            self.fixed = torch.ones(1)  # a single expert has no router
        self.spec = None if self.fixed is not None else router["spec"]
        self.tensors = {} if self.fixed is not None else load_file(Path(folder, router["file"]))
        self.configs, self.lm = model.peft_config, model.base_model.model
        self.is_off, self.prompt_len, self.length, self.weights = routing == "none", None, 0, {}
        self.list_name = "h" if self.lm.config.model_type == "gpt2" else "layers"
        self.blocks = getattr(self.lm.base_model, self.list_name)
        self.hooks = [self.lm.register_forward_pre_hook(self.begin, with_kwargs=True)]
        first = self.blocks[0].register_forward_pre_hook(self.read_embeddings, with_kwargs=True)
        self.hooks.append(first)
        self.layers = []
        for number, block in enumerate(self.blocks):
            norm = block.ln_1 if self.list_name == "h" else block.input_layernorm
            keep = lambda _m, _x, y, n=number: self.read.update({n: y})
            self.hooks.append(norm.register_forward_hook(keep))
            for module, layer in block.named_modules():
                if isinstance(layer, LoraLayer):
                    at = (number, module, layer)
                    layer.forward = lambda x, *_, at=at, **__: self.blend(*at, x)
                    self.layers.append(layer)

    def fixed_weights(self, routing):
        """The weight of each expert, [e], if no router decides them."""
        count = len(self.experts)
        if routing == "router":
            return None
        if routing in ("record", "domain"):
            raise ValueError(f"trained by `{routing}`: name another `routing`, such as `expert:0`")
        by_name = {"none": [0.0] * count, "uniform": [1 / count] * count, "all": [1.0] * count}
        for n in range(count):
            by_name[f"expert:{n}"] = [float(n == e) for e in range(count)]
        weights = by_name.get(routing) if isinstance(routing, str) else routing
        if weights is None or len(weights) != count:
            raise ValueError(f"`routing` {routing!r} is unknown to a mixture of {count} experts")
        return torch.tensor(weights)

    def remove(self):
        """Gives the model its own layers back."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            del layer.forward

    def begin(self, _module, args, kwargs):
        """Prepares a forward pass: of a new text if nothing is cached, or of its next tokens."""
        ids = args[0] if args else kwargs.get("input_ids")
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if ids is None or (mask is not None and mask.dim() != 2):
            raise ValueError("a mixture needs `input_ids`, and an `attention_mask` of [b, t]")
        cached = 0 if past is None else past.get_seq_length()
        if cached and cached != self.length:
            raise ValueError(f"{cached} positions are cached, but the last text has {self.length}")
        self.length, self.weights, self.read = cached + ids.shape[1], {}, {}
        self.mask = ids.new_ones(ids.shape) if mask is None else mask[:, -ids.shape[1] :]
        if not cached:
            self.means, self.base_cache = {}, DynamicCache(config=self.lm.config)
            found = (calculate_alora_offsets(self.configs, name, ids) for name in self.experts)
            offsets = dict(zip(self.experts, found))
        else:  # an expert that was invoked is active from then on
            offsets = {n: [o and ids.shape[1] for o in all] for n, all in self.offsets.items()}
        self.offsets = offsets
        if self.spec and self.spec["input"] == "base_hidden" and not self.is_off:
            if past is not None and not cached:
                both = (past.reorder_cache, self.base_cache.reorder_cache)
                past.reorder_cache = lambda beams: [reorder(beams) for reorder in both]
            self.is_off, kept = True, ("attention_mask", "position_ids", "cache_position")
            kept = {key: kwargs[key] for key in kept if key in kwargs}
            base = self.lm.base_model(ids, past_key_values=self.base_cache, use_cache=True, **kept)
            self.features, self.is_off, self.read = base.last_hidden_state, False, {}

    def read_embeddings(self, _module, args, kwargs):
        if self.spec and self.spec["input"] == "embeddings":
            self.features = args[0] if args else kwargs["hidden_states"]

    def blend(self, number, module, layer, x):
        """The output of a target module, [b, t, o]."""
        base = y = layer.base_layer(x)
        if self.is_off:
            return base
        g = self.fixed.to(x) if self.fixed is not None else self.routed(number, module, x).to(x)
        for e, name in enumerate(self.experts):
            if name in layer.lora_A:
                y = y + g[..., e : e + 1] * self.update(layer, name, x, base)
        return y + self.update(layer, self.shared, x, base) if self.shared in layer.lora_A else y

    def update(self, layer, name, x, base):
        """What an adapter alone adds to the base."""
        if name not in layer.lora_variant:  # plain LoRA
            a, b = layer.lora_A[name], layer.lora_B[name]
            return (b(a(x.to(a.weight.dtype))) * layer.scaling[name]).to(x.dtype)
        layer._active_adapter = [name]
        return type(layer).forward(layer, x, alora_offsets=self.offsets.get(name)) - base

    def routed(self, number, module, x):
        """The routing weights of the site that decides for a target module, [b, t, e]."""
        spec, block = self.spec, f"{self.list_name}.{number}"
        scope = {"shared": "", "layer": f"{block}.", "module": f"{block}.{module}."}[spec["scope"]]
        is_alike = spec["input"] != "layer_input" and not spec["own_experts"]
        site = f".{block}.{module}" if spec["scope"] == "module" else f".{block}"
        site = "" if spec["scope"] == "shared" and is_alike else site
        if site not in self.weights:
            present = list(range(len(self.experts)))
            if spec["own_experts"]:
                own = [m for m in self.blocks[number].modules() if isinstance(m, LoraLayer)]
                present = [e for e in present if any(self.experts[e] in m.lora_A for m in own)]
            inputs = {"layer_input": self.read.get(number), "module_input": x}
            features = inputs[spec["input"]] if spec["input"] in inputs else self.features
            features = self.averaged(site, features.float())
            self.weights[site] = self.decide(features, f"{scope}router.", present)
        return self.weights[site]

    def averaged(self, site, x):
        """The mean of a router's inputs over the prompt so far, or the inputs, [b, t, d]."""
        if self.spec["level"] == "token":
            return x
        if site not in self.means:  # without a known prompt, the first pass has all of it
            prompt_len = self.prompt_len or x.shape[1]
            is_read = self.mask.to(x) * (torch.arange(x.shape[1], device=x.device) < prompt_len)
            count = is_read.cumsum(1).clamp_min(1)
            means = (x * is_read[..., None]).cumsum(1) / count[..., None]
            self.means[site] = means[:, -1:]
            return means
        return self.means[site].expand(-1, x.shape[1], -1)

    def decide(self, x, prefix, present):
        """The weights by a router that reads `x`, [b, t, d], over the experts `present`."""
        spec, tensors = self.spec, self.tensors.items()
        own = {key[len(prefix) :]: t.to(x) for key, t in tensors if key.startswith(prefix)}
        if spec["normalize_input"]:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        for i in range(spec["hidden_layers"]):
            x = torch.relu(x @ own[f"hidden.{i}.weight"].T + own[f"hidden.{i}.bias"])
        scores = x @ own["weight"].T + own["bias"]
        probs = (scores[..., present] / spec["temperature"]).softmax(-1)
        rule = spec["eval"] or {"top_k": spec["top_k"]}
        top_k = None if rule == "dense" else rule["top_k"]
        if top_k is not None and top_k < len(present):
            by = probs + own["selection_bias"][present] if spec["selection_bias"] else probs
            chosen = by.topk(top_k, -1).indices
            top = probs.gather(-1, chosen)
            top = top / top.sum(-1, keepdim=True) if spec["renormalize"] else top
            probs = torch.zeros_like(probs).scatter(-1, chosen, top)
        present = torch.tensor(present, device=x.device)
        return torch.zeros_like(scores).index_copy(-1, present, probs)
