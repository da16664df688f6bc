"""
Other people's weights in, ours out:

    model = load("hf:HuggingFaceTB/SmolLM2-360M", n_prelude=2, n_block=4, n_coda=2, n_loop=7)  # folded into a loop
    python pretrained.py export --out_dir=out-quickstart --to=my-model

Sources are checkpoints of ours, nanoGPT's and nanoLOOP's, and Hugging Face folders of GPT-2, Llama, Qwen3, OLMo-2,
Huginn, Ouro, Parcae. A family is a table: which fields of its config.json are ours, which have to be as we compute
them, which of its tensors are which of ours. Reading and writing use the same tables.
"""

import json
import math
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from configurator import clear_errors, configure, freeze
from model import GPT, Diagonal, GPTConfig, Inject
from nanorecur import checkpoint

# -----------------------------------------------------------------------------
out_dir = "out"  # what to export: folder of a run, or a checkpoint file
to = ""  # the folder to write


def main():
    command, *argv = sys.argv[1:] or ["-h"]
    with clear_errors():
        if command not in ("export", "-h", "--help"):
            raise ValueError(f"{command!r}: the only command is export")
        configure(globals(), argv=argv if command == "export" else ["-h"])
        if not to:
            raise ValueError("--to needs a value: the folder to write")
        ckpt = checkpoint.load(out_dir)
        export(build(ckpt), to, ckpt.get("tokenizer"))


# -----------------------------------------------------------------------------
# families


class Family(NamedTuple):
    demands: dict  # fields of config.json that have to be so, or silent
    fields: dict  # our field: theirs, or several spellings of it
    fixed: dict = {}  # our fields that follow from the family
    defaults: dict = {}  # our fields where config.json is silent
    names: dict = {}  # our tensor: theirs, or several whose rows are one below the other in ours; else the same name
    turned: tuple = ()  # tensors that are stored transposed
    paired: bool = (
        False  # rotary positions turn channels 2i and 2i + 1 together, ours i and i + D/2
    )
    state_first: bool = False  # the adapter reads [s, e], ours [e, s]
    more: tuple = (
        lambda given: {},
        lambda config: {},
    )  # fields that need arithmetic: theirs to ours, ours to theirs


VALUES = {  # our field: {their value: ours}, where they differ
    "mlp": {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    "input_injection": {"linear": "inject", "add": "add", "diagonal": "diagonal"},
    "state_init": {"like-init": "noise", "zero": "zero"},
    "qk_norm": {True: "rotated", False: "none"},
    "loop_entry": {True: "rmsnorm", False: "none"},
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_rope(given):
    """rope_theta and rope_scaling as transformers 4 writes them, or rope_parameters as 5 does; no sliding windows."""
    window = given.get("use_sliding_window", True) and given.get("sliding_window")
    if window or set(given.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"sliding_window={window}, layer_types={given.get('layer_types')}: only full attention"
        )
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_scaling={kind!r}: must be default or llama3")
    if kind == "llama3" and not set(LLAMA3) <= set(rope):
        raise ValueError(f"rope_scaling={rope}: needs {', '.join(LLAMA3)}")
    base = rope.get("rope_theta") or given.get("rope_theta") or given.get("rope_base") or 10000.0
    return {
        "rope_base": base,
        "rope_scaling": tuple(rope[name] for name in LLAMA3) if kind == "llama3" else (),
    }


def write_rope(config):
    scaling = (
        {"rope_type": "llama3", **dict(zip(LLAMA3, config.rope_scaling))}
        if config.rope_scaling
        else None
    )
    return {"rope_theta": config.rope_base, "rope_scaling": scaling}


def read_huginn(given):
    """The embedding is scaled by sqrt(n_embd) unless init_values says otherwise."""
    width = given.get("n_embd") or given.get("hidden_size") or 1
    scale = (given.get("init_values") or {}).get("embed_scale", math.sqrt(width))
    return {"rope_base": given.get("rope_base", 50000.0), "embedding_scale": scale}


def write_huginn(config):
    scale = {"embed_scale": config.embedding_scale}
    return {"n_layers": config.n_physical, "rope_base": config.rope_base, "init_values": scale}


def read_parcae(given):
    rope, width = given.get("rope_settings") or {}, given.get("recurrent_embedding_dimension")
    if not rope.get("use_rope", True) or rope.get("rope_condense_ratio", 1) != 1:
        raise ValueError(f"rope_settings={rope}: only rope that is not condensed is known")
    if width not in (None, given.get("n_embd")):
        raise ValueError(f"recurrent_embedding_dimension={width}: must be n_embd")
    return {
        "rope_base": rope.get("rope_base", 50000.0),
        "logit_softcap": given.get("logit_softcap") or 0.0,
    }


def write_parcae(config):
    rope = {"use_rope": True, "rope_condense_ratio": 1, "rope_base": config.rope_base}
    return {
        "_class_name": "ParcaeConfig",
        "rope_settings": rope,
        "logit_softcap": config.logit_softcap or None,
    }


GPT2 = Family(
    {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    {
        "vocab_size": "vocab_size",
        "block_size": ("n_positions", "n_ctx"),
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_hidden": "n_inner",
        "mlp": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
        "tie_weights": "tie_word_embeddings",
    },
    defaults=dict(n_hidden=0, norm_eps=1e-5, dropout=0.0, tie_weights=True, mlp="gelu_tanh"),
    turned=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
)
LAYER = "model.layers.{number}"
LLAMA = Family(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
    },
    {
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_size": "head_dim",
        "n_hidden": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "tie_weights": "tie_word_embeddings",
    },
    dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False),
    dict(n_kv_head=0, head_size=0, norm_eps=1e-6, tie_weights=False),
    {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "ln_1": f"{LAYER}.input_layernorm",
        "ln_2": f"{LAYER}.post_attention_layernorm",
        "attn.c_attn": tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qkv"),
        "attn.c_proj": f"{LAYER}.self_attn.o_proj",
        "attn.q_norm": f"{LAYER}.self_attn.q_norm",
        "attn.k_norm": f"{LAYER}.self_attn.k_norm",
        "mlp.c_fc": (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"),
        "mlp.c_proj": f"{LAYER}.mlp.down_proj",
    },
    more=(read_rope, write_rope),
)
QWEN3 = LLAMA._replace(
    demands={**LLAMA.demands, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    fixed={**LLAMA.fixed, "qk_norm": "head"},
    defaults={**LLAMA.defaults, "head_size": 128},
)
OLMO2 = LLAMA._replace(
    demands={**LLAMA.demands, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
    fixed={**LLAMA.fixed, "norm_place": "post", "qk_norm": "width"},
    defaults={**LLAMA.defaults, "norm_eps": 1e-5},
    names={
        **LLAMA.names,
        "ln_1_out": f"{LAYER}.post_attention_layernorm",
        "ln_2_out": f"{LAYER}.post_feedforward_layernorm",
    },
)
OURO = LLAMA._replace(
    demands={**LLAMA.demands, "model_type": "ouro", "architectures": ["OuroForCausalLM"]},
    fields={**LLAMA.fields, "n_block": "num_hidden_layers", "n_loop": "total_ut_steps"},
    fixed={
        **LLAMA.fixed,
        "norm_place": "branch",
        "input_injection": "passthrough",
        "state_init": "input",
        "loop_norm": "rmsnorm",
        "final_norm": False,
        "exit_gate": "state",
    },
    names={
        **LLAMA.names,
        "ln_1_out": f"{LAYER}.input_layernorm_2",
        "ln_2_out": f"{LAYER}.post_attention_layernorm_2",
        "transformer.loops.0.norm": "model.norm",
        "exit_gate": "model.early_exit_gate",
    },
)
BLOCK = "transformer.{section}"
HUGINN = Family(
    {
        "model_type": "huginn_raven",
        "architectures": ["RavenForCausalLM"],
        "bias": False,
        "block_class_name": "SandwichBlock",
        "norm_class_name": "RMSNorm_llama",
        "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU",
        "test_time_noise": 0,
    },
    {
        "vocab_size": ("padded_vocab_size", "vocab_size"),
        "block_size": "block_size",
        "n_embd": ("n_embd", "hidden_size"),
        "n_head": ("n_heads", "num_attention_heads"),
        "n_kv_head": "num_key_value_heads",
        "n_hidden": "intermediate_size",
        "n_prelude": "n_layers_in_prelude",
        "n_block": "n_layers_in_recurrent_block",
        "n_coda": "n_layers_in_coda",
        "n_loop": "mean_recurrence",
        "bptt_k": "mean_backprop_depth",
        "norm_eps": "norm_eps",
        "qk_bias": "qk_bias",
        "input_injection": "injection_type",
        "state_init": "state_init",
        "tie_weights": "tie_embeddings",
    },
    dict(
        norm="rmsnorm",
        norm_place="sum",
        position="rope",
        mlp="swiglu",
        bias=False,
        loop_norm="none",
        loop_exit="final_norm",
        init="small",
        loop_sampling="poisson",
    ),
    dict(
        n_kv_head=0,
        bptt_k=8,
        norm_eps=1e-6,
        qk_bias=True,
        input_injection="inject",
        state_init="noise",
        tie_weights=True,
    ),
    {
        "transformer.loops.0.inject": "transformer.adapter",
        "ln_1": f"{BLOCK}.norm_1",
        "ln_1_sum": f"{BLOCK}.norm_2",
        "ln_2": f"{BLOCK}.norm_3",
        "ln_2_sum": f"{BLOCK}.norm_4",
        "attn.c_attn": f"{BLOCK}.attn.Wqkv",
        "attn.c_proj": f"{BLOCK}.attn.proj",
        "attn.q_norm": f"{BLOCK}.attn.q_norm",
        "attn.k_norm": f"{BLOCK}.attn.k_norm",
        "attn.q_bias.bias": f"{BLOCK}.attn.qk_bias",
        "attn.k_bias.bias": f"{BLOCK}.attn.qk_bias",
        "mlp.c_fc": f"{BLOCK}.mlp.fc",
        "mlp.c_proj": f"{BLOCK}.mlp.proj",
    },
    paired=True,
    state_first=True,
    more=(read_huginn, write_huginn),
)


def retrofitted(module, names, **fixed):
    """Huginn's frame around another model's blocks (arXiv 2511.07384): the file that auto_map names says whose."""
    automap = {"auto_map": {"AutoModelForCausalLM": f"{module}.RavenForCausalLM"}}
    return HUGINN._replace(
        fixed={**HUGINN.fixed, "loop_exit": "none", **fixed},
        defaults={**HUGINN.defaults, "qk_bias": False, "tie_weights": False},
        names={**HUGINN.names, **{ours: f"{BLOCK}.{theirs}" for ours, theirs in names.items()}},
        paired=False,
        more=(
            lambda given: {**read_huginn({"n_embd": 1, **given}), **read_rope(given)},
            lambda config: {**write_huginn(config), **write_rope(config), **automap},
        ),
    )


RETROFITTED_LLAMA = retrofitted(
    "raven_modeling_minimal_llama", {"ln_1": "norm_1", "ln_2": "norm_2"}, norm_place="pre"
)
RETROFITTED_OLMO = retrofitted(
    "raven_modeling_minimal_olmo",
    {"ln_1_out": "norm_1", "ln_2_out": "norm_2"},
    norm_place="post",
    qk_norm="width",
)
PARCAE = Family(
    {
        "model_type": "parcae",
        "_class_name": "ParcaeConfig",
        "bias": False,
        "norm_class_name": "RMSNorm",
        "block_class_name": "TransformerPreNormBlock",
        "mlp_class_name": "BaseMLP",
        "nonlin_name": "ReLU2",
    },
    {
        **HUGINN.fields,
        "n_head": "num_attention_heads",
        "qk_norm": "qk_norm",
        "loop_entry": "prelude_norm",
    },
    {
        **HUGINN.fixed,
        "norm_place": "pre",
        "mlp": "relu2",
        "mlp_scale": 0.5,
        "value_embedding": True,
        "loop_exit": "linear",
        "init": "orthogonal",
    },
    dict(
        n_kv_head=0,
        bptt_k=4,
        norm_eps=1e-5,
        qk_bias=False,
        input_injection="diagonal",
        state_init="noise",
        tie_weights=True,
        qk_norm="rotated",
        loop_entry="rmsnorm",
    ),
    {
        "transformer.loops.0.entry": "transformer.ln_prelude",
        "transformer.loops.0.exit": "transformer.C",
        "transformer.loops.0.inject": "transformer.adapter",
        "transformer.loops.0.inject.weight": "transformer.adapter.B",
        "ln_1": f"{BLOCK}.norm_1",
        "ln_2": f"{BLOCK}.norm_2",
        "attn.c_attn": tuple(f"{BLOCK}.attn.c_{part}" for part in "qkv"),
        "attn.c_proj": f"{BLOCK}.attn.c_proj",
        "attn.value.gate": f"{BLOCK}.attn.ve_gate",
        "attn.value.table": "value_embeds.{number}",
        "mlp.c_fc": f"{BLOCK}.mlp.fc",
        "mlp.c_proj": f"{BLOCK}.mlp.proj",
    },
    paired=True,
    state_first=True,
    more=(read_parcae, write_parcae),
)
OURS = Family({"model_type": "nanorecur"}, {})
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "huginn_raven": HUGINN,
    "ouro": OURO,
    "parcae": PARCAE,
    "nanorecur": OURS,
}
BY_CLASS = {
    "ParcaeConfig": "parcae",
    **{
        f.demands["architectures"][0]: kind
        for kind, f in FAMILIES.items()
        if "architectures" in f.demands
    },
}
EXPORTED = (GPT2, LLAMA, QWEN3, OLMO2, HUGINN, RETROFITTED_LLAMA, RETROFITTED_OLMO, OURO, PARCAE)


def family_of(given):
    """The family of a config.json."""
    kind = given.get("model_type") or BY_CLASS.get(
        given.get("_class_name") or (given.get("architectures") or [""])[0]
    )
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r}: must be one of {', '.join(FAMILIES)}")
    file = (given.get("auto_map") or {}).get("AutoModelForCausalLM", "").split(".")[0]
    retrofits = (
        {"llama": RETROFITTED_LLAMA, "olmo": RETROFITTED_OLMO} if kind == "huginn_raven" else {}
    )
    return next(
        (family for name, family in retrofits.items() if file.endswith(name)), FAMILIES[kind]
    )


def read_config(family, given):
    """The GPTConfig fields of a config.json. ValueError where it asks for what we cannot compute."""
    for name, value in family.demands.items():
        if given.get(name) not in (value, None):
            raise ValueError(
                f"{name}={given[name]!r}: must be {value!r}, nothing else can be expressed"
            )
    args = {**family.fixed, **family.more[0](given)}
    for ours, names in family.fields.items():
        names = (names,) if isinstance(names, str) else names
        value = next((given[name] for name in names if given.get(name) is not None), None)
        if value is None and ours not in family.defaults:
            raise ValueError(f"{names[0]} is missing")
        if value is not None and ours in VALUES and value not in VALUES[ours]:
            raise ValueError(
                f"{names[0]}={value!r}: must be one of {', '.join(map(str, VALUES[ours]))}"
            )
        args[ours] = (
            family.defaults[ours]
            if value is None
            else VALUES[ours][value]
            if ours in VALUES
            else value
        )
    return {**args, "max_loops": max(64, args.get("n_loop", 1))}


def read_ours(given):
    unknown = sorted(set(given) - set(GPTConfig.__dataclass_fields__) - {"model_type", "tokenizer"})
    if unknown:
        raise ValueError(f"holds {', '.join(unknown)}, which GPTConfig does not know")
    return {
        name: freeze(value)
        for name, value in given.items()
        if name in GPTConfig.__dataclass_fields__
    }


def write_config(family, config):
    """The config.json of a model in the words of a family. ValueError where it has none for a value."""
    if family is OURS:
        return {**family.demands, **asdict(config)}
    config, given = spelt_out(config), {**family.demands, **family.more[1](config)}
    for ours, names in family.fields.items():
        value = getattr(config, ours)
        if ours in VALUES:
            words = [theirs for theirs, meaning in VALUES[ours].items() if meaning == value]
            if not words:
                raise ValueError(f"{ours}={value!r}")
            value = words[0]
        given.setdefault(names if isinstance(names, str) else names[0], value)
    return given


# -----------------------------------------------------------------------------
# tensors


class Stored(NamedTuple):
    shape: tuple
    read: object  # rows, a slice -> those of the tensor


class Piece(NamedTuple):
    ours: str
    theirs: str
    view: torch.Tensor  # of our tensor, as it is in theirs
    shape: tuple  # of theirs
    first: int = 0  # the row of theirs where it begins


def pieces(family, config, tensors, layers):
    """What of theirs is what of ours. layers: the number, there, of each of our blocks."""
    sections = (
        (config.n_prelude, "prelude"),
        (config.n_block, "core_block"),
        (config.n_coda, "coda"),
    )
    sections = dict(enumerate(f"{name}.{i}" for count, name in sections for i in range(count)))
    H, K, D = config.n_head, config.n_kv_head or config.n_head, config.size
    for ours, tensor in tensors.items():
        block = ours.startswith("transformer.h.")
        j, part = ours.split(".", 3)[2:] if block else (0, ours)
        where = dict(number=layers[int(j)], section=sections.get(int(j))) if block else {}
        stem, leaf = part.rsplit(".", 1)
        same = "transformer.h.{number}." + part if block else part
        names = family.names.get(part) or family.names.get(stem) or same
        whole = part in family.names or names == same
        if isinstance(names, tuple):
            rows = (H * D, K * D, K * D) if len(names) == 3 else len(tensor) // 2
            views = tensor.split(rows)
        elif part in ("attn.q_bias.bias", "attn.k_bias.bias") and family.names:  # stacked in theirs
            yield Piece(
                ours,
                names.format(**where),
                tensor.view(1, 1, H, D),
                (2, 1, H, D),
                int("k_bias" in part),
            )
            continue
        else:
            names, views = (names,), (tensor.T if part in family.turned else tensor,)
        for name, view in zip(names, views):
            yield Piece(
                ours, name.format(**where) + ("" if whole else f".{leaf}"), view, tuple(view.shape)
            )


IGNORED = (
    ".attn.bias",
    ".attn.masked_bias",
    "rotary_emb.inv_freq",
    "freqs_cis",
)  # masks and tables, not weights
ADDED = (
    "exit_gate.",
    "ahead.",
    "prefix.",
)  # what may be laid over a finished model: at first 0, which changes nothing
CHUNK = 2**22  # values read at a time


class Undrawn(TorchFunctionMode):
    """Draws no random numbers: on the meta device they are nothing, but import much of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def hollow(config):
    """The model without weights: parameters are on the meta device, tables of angles and noise are real."""
    hook = register_module_parameter_registration_hook(
        lambda module, name, p: None if p is None or p.is_meta else nn.Parameter(p.to("meta"))
    )
    try:
        with Undrawn():
            return GPT(config)
    finally:
        hook.remove()


def untied(config, tensors):
    """The tensors without the head's, where that is the embedding's."""
    return {
        name: t for name, t in tensors.items() if name != "lm_head.weight" or not config.tie_weights
    }


def shapes(config):
    """Our tensors, without values."""
    return untied(config, hollow(config).state_dict())


def assemble(args, family, stored, layers=(), **overrides):
    """The model of GPTConfig fields (args, then overrides) and of stored tensors, read a few rows at a time."""
    check_size(args, stored)
    source = GPTConfig(**args)
    config, layers, folded = fold(source, layers, overrides)
    model = hollow(config)
    tensors = untied(config, {name: torch.empty(t.shape) for name, t in model.state_dict().items()})
    new = {name for name in tensors if folded and name.startswith("transformer.loops.")}
    added = [name for name in tensors if name.startswith(ADDED)]
    new |= {*added} - (shapes(source).keys() if added else set())
    for name in new:
        tensors[name].zero_()
    parts = list(
        pieces(family, config, {name: t for name, t in tensors.items() if name not in new}, layers)
    )
    known = {part.theirs for part in parts} | ({"lm_head.weight"} if config.tie_weights else set())
    if folded:  # the layers that are left out are no strangers
        known |= {
            part.theirs for part in pieces(family, source, shapes(source), range(source.n_physical))
        }
    changed = [
        f"{k}={v} where the checkpoint has {args.get(k)}"
        for k, v in overrides.items()
        if v != args.get(k)
    ]
    check_fit(parts, stored, known, changed)
    for part in parts:
        copy(part, stored[part.theirs])
    for name, tensor in tensors.items():
        tensors[name] = rearranged(family, config, name, tensor)
    if config.tie_weights:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    model.load_state_dict(tensors, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    if folded:
        pass_through(model)
    return model


def rearranged(family, config, name, tensor, out=False):
    """A tensor with its channels in our order, from a family's, or out again to that."""
    stem = name.split(".", 3)[-1].rsplit(".", 1)[0]
    if (
        family.state_first
        and stem == "inject"
        and config.input_injection == "inject"
        and tensor.dim() > 1
    ):
        return tensor.roll(config.n_embd, -1)
    if family.paired and stem in ("attn.c_attn", "attn.q_bias", "attn.k_bias"):
        count = (config.n_head + (config.n_kv_head or config.n_head)) * config.size
        turning, values = tensor[:count], tensor[count:]
        shape = (-1, 2, config.size // 2) if out else (-1, config.size // 2, 2)
        turned = turning.view(*shape, *tensor.shape[1:]).transpose(1, 2).reshape(turning.shape)
        return torch.cat((turned, values))
    return tensor


def check_size(args, stored):
    """ValueError where a file's own sizes are beyond the tensors beside them: such a model could fill the memory."""
    size = {
        name: value for name, value in args.items() if type(value) is int
    }  # other types are GPTConfig's to refuse
    values = 2**20 + sum(math.prod(tensor.shape) for tensor in stored.values())
    width = size.get("n_embd", 768)
    rows = {name: size.get(name, 0) for name in ("vocab_size", "n_head", "head_size", "n_latent")}
    rows |= {"n_embd": size.get("n_hidden") or 4 * width, "n_hidden": size.get("n_hidden", 0)}
    rows |= {"max_loops": size.get("max_loops", 0) * (args.get("loop_embedding") == "learned")}
    rows |= {
        "block_size": size.get("block_size", 0) * (args.get("position", "learned") == "learned")
    }
    limits = dict.fromkeys(
        ("n_layer", "n_prelude", "n_block", "n_coda", "n_ahead"), 1000 + len(stored)
    )
    limits["block_size"] = 2**22  # of rotary positions no tensor tells
    wrong = [name for name in rows if rows[name] * width > values]
    wrong += [name for name in limits if size.get(name, 0) > limits[name]]
    if wrong:
        shown = str(size.get(wrong[0]))[:20] if size.get(wrong[0], 0) < 10**20 else "enormous"
        raise ValueError(
            f"{wrong[0]}={shown}: more than the {len(stored)} tensors beside it can be of"
        )


def copy(part, stored):
    step = max(1, CHUNK // part.view[0].numel())
    for start in range(0, len(part.view), step):
        rows = part.view[start : start + step]
        rows.copy_(stored.read(slice(part.first + start, part.first + start + len(rows))))


def check_fit(parts, stored, known, changed):
    """ValueError that names the first tensor which is missing, of another shape, or unknown."""
    wanted = {part.theirs: part.shape for part in parts}
    given = {
        name: s.shape for name, s in stored.items() if name in wanted or not name.endswith(IGNORED)
    }
    for part in parts:
        if (
            part.ours == "transformer.wpe.weight" and part.theirs in given
        ):  # a shorter context: the first positions
            given[part.theirs] = (
                min(given[part.theirs][0], part.shape[0]),
                *given[part.theirs][1:],
            )
    wrong = sorted(name for name in wanted if given.get(name) != wanted[name]) + sorted(
        given.keys() - known
    )
    if wrong:
        first = f"{wrong[0]} is {given.get(wrong[0], 'missing')}, expected {wanted.get(wrong[0], 'none')}"
        reasons = ", ".join([first, *changed])
        raise ValueError(
            f"the weights do not fit this model: {reasons} ({len(wrong)} tensors differ)"
        )


def fold(source, layers, overrides):
    """(config, which layer of the source each block is, whether a loop is laid over a plain model)."""
    plain = not source.groups and not source.n_block
    n_block = overrides.get("n_block", 0)
    if not (plain and (layers or n_block or overrides.get("loop_groups"))):
        if layers:
            raise ValueError(
                "layers: only those of a model in which nothing is looped can be chosen"
            )
        config = GPTConfig(**{**asdict(source), **overrides})
        return config, range(config.n_physical), False
    start = {
        "input_injection": "inject",
        "state_init": "input",
        "loop_norm": "none",
    }  # see pass_through
    cut = {"n_layer": len(layers)} if layers and not n_block else {}
    config = GPTConfig(**{**asdict(source), **start, **cut, **overrides})
    layers = tuple(layers) or (spread(source.n_layer, config) if n_block else range(source.n_layer))
    if len(layers) != config.n_physical or not set(layers) <= set(range(source.n_layer)):
        raise ValueError(
            f"layers={layers}: must be {config.n_physical} numbers below {source.n_layer}"
        )
    return config, layers, True


def spread(n_layer, config):
    """The first n_prelude layers, the last n_coda, and of those between n_block, evenly spaced."""
    middle = n_layer - config.n_prelude - config.n_coda
    if middle < config.n_block:
        raise ValueError(f"n_block={config.n_block}: only {max(0, middle)} layers are left for it")
    core = [
        config.n_prelude + int((i + 0.5) * middle / config.n_block) for i in range(config.n_block)
    ]
    return (*range(config.n_prelude), *core, *range(n_layer - config.n_coda, n_layer))


@torch.no_grad()
def pass_through(model):
    """What a loop adds to a pretrained model begins as if it were not there, so that one loop is that model."""
    for module in [part for loop in model.transformer.loops for part in loop.modules()]:
        for p in module.parameters(recurse=False):
            p.fill_(1 if isinstance(module, nn.RMSNorm) else 0)
        if isinstance(module, (Inject, Diagonal)):
            module.init()
        elif isinstance(module, nn.Linear):  # the exit
            nn.init.eye_(module.weight)


# -----------------------------------------------------------------------------
# sources

SHORT = {
    name: f"hf:openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}


def load(source, layers=(), **overrides):
    """The model of a source, in eval mode, with float32 parameters.

    source: a checkpoint file; a run's folder (ours, nanoGPT's, nanoLOOP's); a Hugging Face folder (config.json and
    *.safetensors); hf:<name> for one of the hub, or gpt2, gpt2-medium, gpt2-large, gpt2-xl.
    overrides: GPTConfig fields that replace the source's. With n_prelude, n_block, n_coda a plain model is folded into
    a loop: its first layers, n_block evenly spaced, its last; or those that layers lists by number. At one loop it is
    the source cut to these layers. Raises ValueError that names what is wrong with the source.
    """
    name = str(source) if Path(source).exists() else SHORT.get(str(source), str(source))
    folder = Path(name.removeprefix("hf:"))
    if name.startswith("hf:") and not folder.is_dir():
        folder = download(name.removeprefix("hf:"))
    if checkpoint.exists(folder) or not (folder / "config.json").exists():
        return build(checkpoint.load(folder), layers, **overrides).eval()
    try:
        given = json.loads((folder / "config.json").read_text("utf-8"))
        family = family_of(given)
        args = read_ours(given) if family is OURS else read_config(family, given)
        stored = open_folder(folder)
        if (
            family is GPT2 and "wte.weight" in stored
        ):  # saved without the head, as the released ones are
            stored = {f"transformer.{name}": tensor for name, tensor in stored.items()}
        return assemble(args, family, stored, layers, **overrides).eval()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def build(ckpt, layers=(), **overrides):
    """The model of a loaded checkpoint dict."""
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in ckpt["model"].items()}
    args = dict(ckpt["model_args"])
    if "norm_recur.weight" in weights:
        args, weights = from_nanoloop(args, weights)
    unknown = sorted(set(args) - set(GPTConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"the checkpoint's model_args hold {', '.join(unknown)}, which GPTConfig does not know"
        )
    stored = {
        name: Stored(tuple(tensor.shape), tensor.__getitem__) for name, tensor in weights.items()
    }
    return assemble(args, OURS, stored, layers, **overrides)


def from_nanoloop(args, weights):
    """nanoLOOP's options and names as ours. Its inject_random starts from noise of std sqrt(1 / n_embd), ours from
    sqrt(2 / (5 n_embd)): the loops forget it alike."""
    first = {"prelude": 0, "recur": args["n_prelude"], "coda": args["n_prelude"] + args["n_block"]}
    renamed = {}
    for name, tensor in weights.items():
        part, _, rest = name.removeprefix("transformer.").partition(".")
        if part in first:
            number, rest = rest.split(".", 1)
            name = f"transformer.h.{first[part] + int(number)}.{rest}"
        elif part in ("norm_recur", "inject"):
            name = f"transformer.loops.0.{part.removesuffix('_recur')}.{rest}"
        renamed[name] = tensor
    noise = args.get("input_injection") == "inject_random"
    ours = {
        "norm": "rmsnorm",
        "bptt_k": args.get("bptt_k") or 0,
        "max_loops": max(64, args.get("n_loop", 1)),
    }
    return {
        **args,
        **ours,
        **({"input_injection": "inject", "state_init": "noise"} if noise else {}),
    }, renamed


def tokenizer_of(source):
    """The tokenizer that a source for load names, as make_tokenizer takes it, or None."""
    folder = Path(str(source).removeprefix("hf:"))
    if checkpoint.exists(folder) or folder.is_file():
        return checkpoint.load(folder).get("tokenizer")
    path = folder / "config.json"
    return json.loads(path.read_text("utf-8")).get("tokenizer") if path.exists() else None


def download(name):
    """The local folder of a model of the hub: its json and safetensors files, nothing that could be executed."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (
        Exception
    ) as error:  # the hub's and the network's errors are many; all mean the same here
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"hf:{name}: cannot be downloaded ({type(error).__name__}: {reason[0][:120]})"
        ) from None


def open_folder(folder):
    """{name: Stored} of a folder's safetensors files."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    files = (
        sorted(folder / Path(name).name for name in listed)
        if listed
        else sorted(folder.glob("*.safetensors"))
    )
    if not files:
        raise ValueError(
            "holds no *.safetensors; pickled weights (.bin, .pt) can execute code and are not read"
        )
    stored = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    shape = tuple(file.get_slice(name).get_shape())
                    stored[name] = Stored(shape, partial(read_rows, path, name))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from None
    return stored


def read_rows(path, name, rows):
    """Opened anew each time: an open file keeps in memory all that was read of it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_slice(name)[rows]


# -----------------------------------------------------------------------------
# ours out


def spelt_out(config):
    """The same model with the usual in place of 0, and one looped group as prelude, core and coda."""
    eps = (
        1e-5 if config.norm == "layernorm" else torch.finfo(torch.float32).eps
    )  # torch's, where it is given none
    usual = dict(
        n_kv_head=config.n_head, head_size=config.size, n_hidden=4 * config.n_embd, norm_eps=eps
    )
    fields = {
        **asdict(config),
        **{name: value for name, value in usual.items() if not getattr(config, name)},
    }
    if len(config.groups) < 2:
        core = config.groups[0] if config.groups else ()
        first, last = (core[0], core[-1] + 1) if core else (0, config.n_physical)
        fields.update(
            n_layer=config.n_physical,
            n_prelude=first,
            n_block=len(core),
            n_coda=config.n_physical - last,
            n_loop=(*config.counts(), 1)[0],
            loop_groups=(),
            loop_counts=(),
            use_model_baseline=False,
        )
    return GPTConfig(**fields)


TRAINING = ("dropout", "init", "loop_sampling", "bptt_k", "loop_noise_scale", "max_loops")
LOOP = ("input_injection", "state_init", "loop_norm", "loop_embedding", "loop_entry", "loop_exit")
ROPE = ("rope_base", "rope_scaling")
NEVER = (
    "residual_share",
    "n_latent",
    "max_shift",
    "label_shift_prob",
)  # of options that no family but ours has


def expresses(family, config):
    """Whether a family's config.json says the same as a config: it is written, read back and compared."""
    unread = (
        TRAINING
        + NEVER
        + (() if config.groups else LOOP)
        + (() if config.position == "rope" else ROPE)
    )
    try:
        given = write_config(family, config)
        again = spelt_out(GPTConfig(**read_config(family, given)))
    except ValueError:
        return False
    old, new = (
        {k: freeze(v) for k, v in vars(c).items() if k not in unread}
        for c in (spelt_out(config), again)
    )
    return family_of(given) is family and old == new


def export(model, folder, tokenizer=None):
    """Write config.json and model.safetensors in the format of the first family that computes the same, else in ours.

    GPT-2, Llama, Qwen3 and OLMo-2 then open in transformers. load(folder) gives the same model, bit for bit; options
    of training are kept in our format alone. tokenizer: a run's description of its own (a dict), kept in config.json.
    """
    from safetensors.torch import save_file

    family = next((family for family in EXPORTED if expresses(family, model.config)), OURS)
    config = model.config if family is OURS else spelt_out(model.config)
    given = {**write_config(family, config), **({"tokenizer": tokenizer} if tokenizer else {})}
    own = untied(
        config, {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    )
    own = {name: rearranged(family, config, name, tensor, out=True) for name, tensor in own.items()}
    stored = {}
    for piece in pieces(family, config, own, range(config.n_physical)):
        if piece.shape == tuple(piece.view.shape):
            stored[piece.theirs] = piece.view.contiguous().clone()
        else:
            stored.setdefault(piece.theirs, torch.empty(piece.shape))[
                piece.first : piece.first + 1
            ] = piece.view
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write = {
        "model.safetensors": lambda file: save_file(stored, file.name, {"format": "pt"}),
        "config.json": lambda file: file.write(json.dumps(given, indent=2).encode()),
    }
    for name, fill in write.items():
        os.replace(checkpoint.write_part(folder / name, fill), folder / name)


if __name__ == "__main__":
    main()
