"""
Families of models (GPT-2, Llama, Huginn, ...): their config.json and tensor names beside ours.

A Family is a table that is used in both directions: to read config.json as fields of GPTConfig and
stored tensors as ours, and to write them. "Ours" is a name of model.py, "theirs" the name that the
family has for the same thing. Opening and writing files is in pretrained.py.
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from configurator import freeze, require
from model import GPTConfig


def no_fields(_: object) -> dict:
    """Return the extra fields of a family that has none."""
    return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """The config.json and the tensor names of a family, as pairs of ours and theirs."""

    name: str
    # config.json: fields that must have this value or be missing, since GPTConfig has no option
    # for any other value
    demands: dict
    # {field of GPTConfig: field of config.json}; of several spellings the first is written
    fields: dict
    # fields of GPTConfig that every model of the family shares and config.json does not mention
    fixed: dict = field(default_factory=dict)
    # fields of GPTConfig whose field may be missing in config.json, and what is meant then
    defaults: dict = field(default_factory=dict)
    # {our tensor, or module that holds it: theirs}; {layer} and {section} stand for the block. A
    # tuple: our tensor is the concatenation of these, row after row. Not listed: our name
    tensors: dict = field(default_factory=dict)
    # {our tensor: row}: tensors that are rows of one stored tensor (queries' and keys' biases)
    stacked: dict = field(default_factory=dict)
    # tensors of a block that are stored transposed
    transposed: tuple = ()
    # rotary positions rotate channels 2i and 2i + 1 of a head; ours rotate i and i + D/2
    interleaved_rotary: bool = False
    # the injection's matrix reads the state before the loop's input, [s, e]; ours reads [e, s]
    state_first: bool = False
    # gains of norms are stored without the 1 around which they are
    centered_gains: bool = False
    # programs that open a folder of this format, besides pretrained.load
    opened_by: tuple = ()
    # functions for fields that are not one to one: config.json -> fields of GPTConfig, and
    # GPTConfig -> fields of config.json
    read_extra: Callable[[dict], dict] = no_fields
    write_extra: Callable[[GPTConfig], dict] = no_fields


VALUES = {  # {field of GPTConfig: {their value: ours}}, where values have other names
    "mlp": {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    "input_injection": {"linear": "inject", "add": "add", "diagonal": "diagonal"},
    "state_init": {"like-init": "noise", "zero": "zero"},
    "qk_norm": {True: "rotated", False: "none"},
    "loop_entry": {True: "rmsnorm", False: "none"},
}
DROPPED = {"embedding_norm": False}  # {field that GPTConfig had in earlier versions: its default}


# -----------------------------------------------------------------------------
# fields that are not one to one


def get_object(config_json: dict, name: str) -> dict:
    """Return a field that holds a JSON object; {} where it is missing or null."""
    value = config_json.get(name) or {}
    require(name, value, isinstance(value, dict), "a JSON object")
    return value


def get_list(config_json: dict, name: str) -> list:
    """Return a field that holds a JSON list; [] where it is missing or null."""
    value = config_json.get(name) or []
    require(name, value, isinstance(value, list), "a list")
    return value


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_rope(config_json: dict) -> dict:
    """Return rope_base and rope_scaling; ValueError for a sliding window, which is no option.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.
    """
    layer_types = get_list(config_json, "layer_types")
    full = all(layer_type == "full_attention" for layer_type in layer_types)
    require("layer_types", layer_types, full, "full_attention in every layer")
    window = config_json.get("sliding_window")
    full = not window or not config_json.get("use_sliding_window", True)
    require("sliding_window", window, full, "null, or use_sliding_window false")
    rope = get_object(config_json, "rope_parameters") or get_object(config_json, "rope_scaling")
    base = rope.get("rope_theta") or config_json.get("rope_theta") or config_json.get("rope_base")
    return {"rope_base": base or 10000.0, "rope_scaling": read_rope_scaling(rope)}


def read_rope_scaling(rope: dict) -> tuple:
    """Return GPTConfig's rope_scaling: () or Llama 3's four numbers."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    require("rope_scaling", kind, kind in ("default", "llama3"), "default or llama3")
    if kind == "default":
        return ()
    require("rope_scaling", rope, set(LLAMA3) <= set(rope), f"with {', '.join(LLAMA3)}")
    return tuple(rope[name] for name in LLAMA3)


def write_rope(config: GPTConfig) -> dict:
    scaling = None
    if config.rope_scaling:
        scaling = {"rope_type": "llama3", **dict(zip(LLAMA3, config.rope_scaling))}
    return {"rope_theta": config.rope_base, "rope_scaling": scaling}


def check_core(config_json: dict) -> None:
    """Raise ValueError where a looped family has no looped block."""
    n_block = config_json.get("n_layers_in_recurrent_block")
    require("n_layers_in_recurrent_block", n_block, n_block != 0, "at least 1")


def read_huginn(config_json: dict) -> dict:
    """Return rope_base and embedding_scale, sqrt(n_embd) unless init_values says otherwise."""
    check_core(config_json)
    n_embd = config_json.get("n_embd") or config_json.get("hidden_size") or 1
    require("n_embd", n_embd, type(n_embd) is int and n_embd > 0, "a whole number, at least 1")
    init_values = get_object(config_json, "init_values")
    return {
        "rope_base": config_json.get("rope_base", 50000.0),
        "embedding_scale": init_values.get("embed_scale", math.sqrt(n_embd)),
    }


def check_qk_bias(config: GPTConfig) -> None:
    """Raise ValueError where Huginn's one tensor of biases does not fit both queries and keys."""
    n_head, n_kv_head = config.n_head, config.n_kv_head or config.n_head
    fits = n_kv_head == n_head or not config.qk_bias
    require("n_kv_head", n_kv_head, fits, f"n_head={n_head} with qk_bias")


def write_huginn(config: GPTConfig) -> dict:
    check_qk_bias(config)
    return {
        "n_layers": config.n_physical,
        "rope_base": config.rope_base,
        "init_values": {"embed_scale": config.embedding_scale},
    }


def read_retrofitted(config_json: dict) -> dict:
    """Return Huginn's and Llama's extra fields; without n_embd the embedding is not scaled."""
    return read_huginn({"n_embd": 1, **config_json}) | read_rope(config_json)


def write_retrofitted(file: str, config: GPTConfig) -> dict:
    """Return Huginn's and Llama's extra fields, and the file of the class in the folder."""
    auto_map = {"AutoModelForCausalLM": f"{file}.RavenForCausalLM"}
    return {**write_huginn(config), **write_rope(config), "auto_map": auto_map}


def read_parcae(config_json: dict) -> dict:
    check_core(config_json)
    rope = get_object(config_json, "rope_settings")
    plain = rope.get("use_rope", True) and rope.get("rope_condense_ratio", 1) == 1
    require("rope_settings", rope, plain, "with use_rope true and rope_condense_ratio 1")
    name = "recurrent_embedding_dimension"
    width, n_embd = config_json.get(name), config_json.get("n_embd")
    require(name, width, width in (None, n_embd), f"n_embd={n_embd}")
    qk_bias = config_json.get("qk_bias")
    require("qk_bias", qk_bias, not qk_bias, "false")
    return {
        "rope_base": rope.get("rope_base", 50000.0),
        "logit_softcap": config_json.get("logit_softcap") or 0.0,
    }


def write_parcae(config: GPTConfig) -> dict:
    """Return rope_settings and logit_softcap; ValueError where gates may be of other blocks."""
    legal = gates_have_tables(config) or not config.value_embedding
    require("value_embedding", config.value_embedding, legal, "False with odd numbers of blocks")
    rope = {"use_rope": True, "rope_condense_ratio": 1, "rope_base": config.rope_base}
    return {"rope_settings": rope, "logit_softcap": config.logit_softcap or None}


def read_nanbeige(config_json: dict) -> dict:
    """Return Llama's extra fields, and which norm the last one is: the loop's or the model's."""
    width, head_dim = config_json.get("kv_channels"), config_json.get("head_dim")
    require("kv_channels", width, width in (None, head_dim), f"head_dim={head_dim}")
    once = bool(config_json.get("skip_loop_final_norm"))
    return read_rope(config_json) | {
        "final_norm": once,
        "loop_norm": "none" if once else "rmsnorm",
    }


def write_nanbeige(config: GPTConfig) -> dict:
    scaling = config.rope_scaling
    require("rope_scaling", scaling, not scaling, "()")
    return write_rope(config) | {"skip_loop_final_norm": config.final_norm}


def read_xllm(config_json: dict) -> dict:
    """Return what is looped in a model of xLLM, and how (2610.06833 and the part before it)."""
    for name in ("swiglu", "apply_rmsnorm"):  # their default is false
        value = config_json.get(name)
        require(name, value, value is True, "true")
    width, head_dim = config_json.get("rope_head_dim"), config_json.get("head_dim")
    require("rope_head_dim", width, width in (None, head_dim), f"head_dim={head_dim}")
    if config_json["model_type"] == "xllm_huginn":
        return read_xllm_core(config_json)
    n_layer, n_loop = read_int(config_json, "num_layers"), read_int(config_json, "loop_times", 1)
    first = read_int(config_json, "loop_start_layer", 0)
    last = read_int(config_json, "loop_end_layers", n_layer)
    injection = read_choice(config_json, "loop_input_injection")
    if n_loop == 1 and injection == "passthrough":
        return {}
    legal = first == 0 or injection == "passthrough"  # theirs is of the embedding, in all layers
    require("loop_start_layer", first, legal, "0 with loop_input_injection")
    shape = {"n_prelude": first, "n_block": last - first, "n_coda": n_layer - last}
    return {"n_loop": n_loop, "input_injection": injection, **shape}


def read_xllm_core(config_json: dict) -> dict:
    """Return the extra fields of a model with prelude, recurrent block and coda."""
    n_prelude = read_int(config_json, "huginn_prelude_layers", 1)
    n_coda = read_int(config_json, "huginn_coda_layers", 1)
    others = read_int(config_json, "num_layers") - n_prelude - n_coda
    n_block = read_int(config_json, "huginn_recurrent_layers", others)
    fields = {"n_prelude": n_prelude, "n_block": n_block, "n_coda": n_coda}
    fields["n_loop"] = read_int(config_json, "loop_times", 1)
    for name, theirs in XLLM_CHOICES.items():
        fields[name] = read_choice(config_json, theirs)
    fields["input_injection"] = read_xllm_injection(config_json)
    if fields["input_injection"] != "passthrough":
        fields["bptt_k"] = read_int(config_json, "huginn_backprop_depth", 0)
    return fields


def read_xllm_injection(config_json: dict) -> str:
    """Return GPTConfig's input_injection, which three fields of xLLM's tell (2610.06833)."""
    injection = read_choice(config_json, "huginn_input_injection")
    orthogonal = config_json.get("huginn_prelude_orthogonal")
    if orthogonal:
        legal = injection == "diagonal"
        require("huginn_prelude_orthogonal", orthogonal, legal, "false without diagonal injection")
        return "orthogonal"
    if injection == "inject" and config_json.get("apply_bias_term"):
        return "inject_bias"  # the blocks have no bias, whatever apply_bias_term is
    return injection


def read_int(config_json: dict, name: str, default: int | None = None) -> int:
    """Return a field that is a whole number; default: what is meant where it is missing or null."""
    value = config_json.get(name)
    value = default if value is None else value
    require(name, value, type(value) is int, "a whole number")
    return value


def read_choice(config_json: dict, theirs: str) -> str:
    """Return our value of one of XLLM_VALUES' fields; a missing one has the first there."""
    values = XLLM_VALUES[theirs]
    value = config_json.get(theirs, next(iter(values)))
    require(theirs, value, value in list(values), f"one of {', '.join(values)}")
    return values[value]


XLLM_CHOICES = {  # {field of GPTConfig: xLLM's}
    "state_init": "huginn_state_init",
    "loop_entry": "huginn_prelude_norm",
    "loop_norm": "huginn_recurrent_exit_norm",
    "loop_sampling": "huginn_sampling_scheme",
}
XLLM_VALUES = {  # {xLLM's field: {their value: ours}}, their default first
    "loop_input_injection": {"none": "passthrough", "diagonal": "diagonal"},
    "huginn_input_injection": {"diagonal": "diagonal", "none": "passthrough", "linear": "inject"},
    "huginn_state_init": {"zero": "zero", "input": "input", "normal": "hash"},
    "huginn_prelude_norm": {"none": "none", "rms": "rmsnorm"},
    "huginn_recurrent_exit_norm": {"none": "none", "parameterless_rms": "weightless"},
    "huginn_sampling_scheme": {"fixed": "fixed", "poisson-lognormal-capped": "poisson"},
}


# -----------------------------------------------------------------------------
# plain families

LAYER = "model.layers.{layer}"

GPT2 = Family(
    name="GPT-2",
    demands={
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    fields={
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
    defaults={
        "n_hidden": 0,
        "norm_eps": 1e-5,
        "dropout": 0.0,
        "tie_weights": True,
        "mlp": "gelu_tanh",
    },
    transposed=(
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ),
    opened_by=("transformers",),
)
LLAMA = Family(
    name="Llama",
    demands={
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
    },
    fields={
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
    fixed={"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False},
    defaults={"n_kv_head": 0, "head_size": 0, "norm_eps": 1e-6, "tie_weights": False},
    tensors={
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
    read_extra=read_rope,
    write_extra=write_rope,
    opened_by=("transformers",),
)
QWEN3 = replace(
    LLAMA,
    name="Qwen3",
    demands=LLAMA.demands | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    fixed=LLAMA.fixed | {"qk_norm": "head"},
    defaults=LLAMA.defaults | {"head_size": 128},
)
OLMO2 = replace(
    LLAMA,
    name="OLMo-2",
    demands=LLAMA.demands | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
    fixed=LLAMA.fixed | {"norm_place": "post", "qk_norm": "width"},
    defaults=LLAMA.defaults | {"norm_eps": 1e-5},
    tensors={
        **LLAMA.tensors,
        "ln_1_out": f"{LAYER}.post_attention_layernorm",
        "ln_2_out": f"{LAYER}.post_feedforward_layernorm",
    },
)

# -----------------------------------------------------------------------------
# looped families

SECTION = "transformer.{section}"  # of a block: prelude.0, core_block.0, coda.0, see section_of

OURO = replace(
    LLAMA,
    name="Ouro",
    demands=LLAMA.demands | {"model_type": "ouro", "architectures": ["OuroForCausalLM"]},
    fields=LLAMA.fields | {"n_block": "num_hidden_layers", "n_loop": "total_ut_steps"},
    fixed={
        **LLAMA.fixed,
        "norm_place": "branch",
        "input_injection": "passthrough",
        "state_init": "input",
        "loop_norm": "rmsnorm",
        "final_norm": False,
        "exit_gate": "state",
    },
    tensors={
        **LLAMA.tensors,
        "ln_1_out": f"{LAYER}.input_layernorm_2",
        "ln_2_out": f"{LAYER}.post_attention_layernorm_2",
        "transformer.loops.0.norm": "model.norm",
        "exit_gate": "model.early_exit_gate",
    },
    opened_by=("vLLM",),
)
NANBEIGE = replace(  # arXiv 2607.22083
    LLAMA,
    name="Nanbeige",
    demands=LLAMA.demands
    | {
        "model_type": "nanbeige",
        "architectures": ["NanbeigeForCausalLM"],
        "qk_layernorm": False,
        "loop_loss_weights": [],
        "loop_share_kv": False,
        "enable_double_loop_split": False,
        "enable_hyper_connection": False,
        "enable_mhc": False,
        "enable_depth_attention": False,
        "emb_neighbor_num": None,
        "insert_ngram_layer_idx": [],
        "ngram_insert_all_layers": False,
        "pretraining_tp": 1,
    },
    fields=LLAMA.fields | {"n_block": "num_hidden_layers", "n_loop": "num_loops"},
    fixed=LLAMA.fixed | {"input_injection": "passthrough", "state_init": "input"},
    defaults=LLAMA.defaults | {"n_loop": 1},
    tensors=LLAMA.tensors | {"transformer.loops.0.norm": "model.norm"},
    read_extra=read_nanbeige,
    write_extra=write_nanbeige,
    opened_by=("vLLM", "SGLang", "llama.cpp", "MLX"),
)
HUGINN = Family(
    name="Huginn",
    demands={
        "model_type": "huginn_raven",
        "architectures": ["RavenForCausalLM"],
        "bias": False,
        "block_class_name": "SandwichBlock",
        "norm_class_name": "RMSNorm_llama",
        "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU",
        "test_time_noise": 0,
    },
    fields={
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
    fixed={
        "norm": "rmsnorm",
        "norm_place": "sum",
        "position": "rope",
        "mlp": "swiglu",
        "bias": False,
        "loop_norm": "none",
        "loop_exit": "final_norm",
        "init": "small",
        "loop_sampling": "poisson",
    },
    defaults={
        "n_kv_head": 0,
        "bptt_k": 8,
        "norm_eps": 1e-6,
        "qk_bias": True,
        "input_injection": "inject",
        "state_init": "noise",
        "tie_weights": True,
    },
    tensors={
        "transformer.loops.0.inject": "transformer.adapter",
        "ln_1": f"{SECTION}.norm_1",
        "ln_1_sum": f"{SECTION}.norm_2",
        "ln_2": f"{SECTION}.norm_3",
        "ln_2_sum": f"{SECTION}.norm_4",
        "attn.c_attn": f"{SECTION}.attn.Wqkv",
        "attn.c_proj": f"{SECTION}.attn.proj",
        "attn.q_norm": f"{SECTION}.attn.q_norm",
        "attn.k_norm": f"{SECTION}.attn.k_norm",
        "attn.q_bias.bias": f"{SECTION}.attn.qk_bias",
        "attn.k_bias.bias": f"{SECTION}.attn.qk_bias",
        "mlp.c_fc": f"{SECTION}.mlp.fc",
        "mlp.c_proj": f"{SECTION}.mlp.proj",
    },
    stacked={"attn.q_bias.bias": 0, "attn.k_bias.bias": 1},
    interleaved_rotary=True,
    state_first=True,
    read_extra=read_huginn,
    write_extra=write_huginn,
)


def retrofitted(file: str, fixed: dict, tensors: dict) -> Family:
    """Return the family of Huginn's frame around blocks of another model (arXiv 2511.07384).

    file: the Python file in the folder that auto_map names, from which its blocks are known.
    """
    return replace(
        HUGINN,
        fixed={**HUGINN.fixed, "loop_exit": "none", **fixed},
        defaults={**HUGINN.defaults, "qk_bias": False, "tie_weights": False},
        tensors={**HUGINN.tensors, **tensors},
        interleaved_rotary=False,
        read_extra=read_retrofitted,
        write_extra=partial(write_retrofitted, file),
    )


RETROFITTED_LLAMA = retrofitted(
    file="raven_modeling_minimal_llama",
    fixed={"norm_place": "pre"},
    tensors={"ln_1": f"{SECTION}.norm_1", "ln_2": f"{SECTION}.norm_2"},
)
RETROFITTED_OLMO = retrofitted(
    file="raven_modeling_minimal_olmo",
    fixed={"norm_place": "post", "qk_norm": "width"},
    tensors={"ln_1_out": f"{SECTION}.norm_1", "ln_2_out": f"{SECTION}.norm_2"},
)
PARCAE = Family(
    name="Parcae",
    demands={
        "model_type": "parcae",
        "_class_name": "ParcaeConfig",
        "bias": False,
        "norm_class_name": "RMSNorm",
        "block_class_name": "TransformerPreNormBlock",
        "mlp_class_name": "BaseMLP",
        "nonlin_name": "ReLU2",
    },
    fields={
        **HUGINN.fields,
        "n_head": "num_attention_heads",
        "qk_norm": "qk_norm",
        "loop_entry": "prelude_norm",
    },
    fixed={
        **HUGINN.fixed,
        "norm_place": "pre",
        "mlp": "relu2",
        "mlp_scale": 0.5,
        "value_embedding": True,
        "loop_exit": "linear",
        "init": "orthogonal",
    },
    defaults={
        "n_kv_head": 0,
        "bptt_k": 4,
        "norm_eps": 1e-5,
        "qk_bias": False,
        "input_injection": "diagonal",
        "state_init": "noise",
        "tie_weights": True,
        "qk_norm": "rotated",
        "loop_entry": "rmsnorm",
    },
    tensors={
        "transformer.loops.0.entry": "transformer.ln_prelude",
        "transformer.loops.0.exit": "transformer.C",
        "transformer.loops.0.inject": "transformer.adapter",
        "transformer.loops.0.inject.weight": "transformer.adapter.B",
        "ln_1": f"{SECTION}.norm_1",
        "ln_2": f"{SECTION}.norm_2",
        "attn.c_attn": tuple(f"{SECTION}.attn.c_{part}" for part in "qkv"),
        "attn.c_proj": f"{SECTION}.attn.c_proj",
        "attn.value.gate": f"{SECTION}.attn.ve_gate",
        "attn.value.table": "value_embeds.{layer}",
        "mlp.c_fc": f"{SECTION}.mlp.fc",
        "mlp.c_proj": f"{SECTION}.mlp.proj",
    },
    interleaved_rotary=True,
    state_first=True,
    read_extra=read_parcae,
    write_extra=write_parcae,
)

# IFM/LoopedLM-P1-.. and -P2-.. on the hub; loaded, not exported. In evaluation their first state
# "normal" is a hash of channel, position and the number of the row in the batch; ours takes row 0
# for every row, since the next token of a row must not depend on where it stands in a batch
XLLM = Family(
    name="xLLM",
    demands={
        "model_type": "xllm_transformer",
        "attn_act_func": "softmax",
        "apply_attn_gate": False,
        "qknorm": False,
        "num_experts": 0,
        "num_values": 0,
        "layernorm_num_groups": 1,
        "norm_affine": True,
        "residual_func": "base",
        "scale_emb": False,
        "output_size": -1,
        "dense_prelude_input_injection": "none",
        "huginn_hierarchical_state": "none",
        "huginn_ortho_projection_eps": 1e-6,
    },
    fields={
        "vocab_size": "vocab_size",
        "n_embd": "model_dim",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_kv_head": "num_kv_heads",
        "head_size": "head_dim",
        "n_hidden": "ffn_hidden_dim",
        "norm_eps": "rmsnorm_eps",
        "rope_base": "rope_base",
    },
    fixed={
        **LLAMA.fixed,
        "block_size": 8192,  # tokens of their training rows
        "tie_weights": False,
        "state_init": "input",
        "loop_norm": "none",
    },
    defaults={"n_kv_head": 0, "head_size": 0, "norm_eps": 1e-6, "rope_base": 100000.0},
    tensors={
        "transformer.wte": "embed",
        "transformer.ln_f": "output.final_norm",
        "lm_head": "output.output",
        "transformer.loops.0.inject": "loop_input_injection_module",
        "transformer.loops.0.inject.weight": "loop_input_injection_module.input_adapter.weight",
        "ln_1": "layers.{layer}.attention.norm",
        "ln_2": "layers.{layer}.nffn.norm",
        "attn.c_attn": tuple(f"layers.{{layer}}.attention.w{part}" for part in "qkv"),
        "attn.c_proj": "layers.{layer}.attention.wo",
        "mlp.c_fc": ("layers.{layer}.nffn.fc1", "layers.{layer}.nffn.fc3"),
        "mlp.c_proj": "layers.{layer}.nffn.fc2",
    },
    interleaved_rotary=True,
    centered_gains=True,
    read_extra=read_xllm,
)
XLLM_HUGINN = replace(
    XLLM,
    demands=XLLM.demands | {"model_type": "xllm_huginn"},
    tensors=XLLM.tensors
    | {
        "transformer.loops.0.entry": "huginn_prelude_norm_module",
        "transformer.loops.0.inject": "input_injection",
        "transformer.loops.0.inject.weight": "input_injection.input_adapter.weight",
    },
)
XLLM_LINEAR = replace(  # huginn_input_injection is linear
    XLLM_HUGINN,
    tensors=XLLM_HUGINN.tensors
    | {
        "transformer.loops.0.inject.weight": "input_injection.adapter.weight",
        "transformer.loops.0.inject.bias": "input_injection.adapter.bias",
    },
    state_first=True,
)

# -----------------------------------------------------------------------------
# finding the family of a config.json, or of a GPTConfig

# fields of GPTConfig are in config.json under "gpt", as modeling_nanorecur.py reads them
OURS = Family(
    name="nanoRecur",
    demands={
        "model_type": "nanorecur",
        "architectures": ["NanoRecurForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_nanorecur.NanoRecurConfig",
            "AutoModelForCausalLM": "modeling_nanorecur.NanoRecurForCausalLM",
        },
    },
    fields={},
    opened_by=("transformers with trust_remote_code=True",),
)
PLAIN = (GPT2, LLAMA, QWEN3, OLMO2)  # what is looped goes out in these unrolled
EXPORTED = (*PLAIN, NANBEIGE, HUGINN, RETROFITTED_LLAMA, RETROFITTED_OLMO, OURO, PARCAE)
RETROFITTED = {"llama": RETROFITTED_LLAMA, "olmo": RETROFITTED_OLMO}  # model_type is Huginn's
FAMILIES = {
    family.demands["model_type"]: family
    for family in (*PLAIN, NANBEIGE, HUGINN, OURO, PARCAE, XLLM, XLLM_HUGINN, OURS)
}
MODEL_TYPES = {  # of a class that architectures or _class_name names
    family.demands["architectures"][0]: model_type
    for model_type, family in FAMILIES.items()
    if "architectures" in family.demands
}
MODEL_TYPES["ParcaeConfig"] = "parcae"
FORMATS = {  # names of --as, and the families of which one is written
    "gpt2": (GPT2,),
    "llama": (LLAMA,),
    "qwen3": (QWEN3,),
    "olmo2": (OLMO2,),
    "nanbeige": (NANBEIGE,),
    "huginn": (HUGINN, RETROFITTED_LLAMA, RETROFITTED_OLMO),
    "ouro": (OURO,),
    "parcae": (PARCAE,),
    "nanorecur": (OURS,),
}


def flatten_config(config_json: dict) -> dict:
    """Return a config.json with the fields of the model at its top; in xLLM's they are below."""
    fields = config_json.get("model")
    if not (isinstance(fields, dict) and "arch" in fields):
        return config_json
    return {**fields, "model_type": f"xllm_{fields['arch']}"}


def family_of(config_json: dict) -> Family:
    """Return the family of a config.json. ValueError where it is none of FAMILIES."""
    classes = [config_json.get("_class_name"), *get_list(config_json, "architectures")]
    class_name = next((name for name in classes if name), None)
    model_type = config_json.get("model_type") or MODEL_TYPES.get(str(class_name))
    known = model_type in list(FAMILIES)
    require("model_type", model_type, known, f"one of {', '.join(FAMILIES)}")
    if model_type == "huginn_raven":
        auto_map = get_object(config_json, "auto_map")
        file = str(auto_map.get("AutoModelForCausalLM")).split(".")[0]
        for ending, family in RETROFITTED.items():
            if file.endswith(ending):
                return family
    if model_type == "xllm_huginn" and config_json.get("huginn_input_injection") == "linear":
        return XLLM_LINEAR
    return FAMILIES[model_type]


def family_to_export(config: GPTConfig) -> Family:
    """Return the first family whose config.json can express a config; ours where no other can."""
    for family in EXPORTED:
        if expresses(family, config):
            return family
    return OURS


# fields that another family's config.json need not repeat: options of training, details of options
# that only ours has; and without a loop, or without rotary positions, what only these read
TRAINING = ("dropout", "init", "loop_sampling", "bptt_k", "loop_noise_scale", "max_loops")
DETAILS = ("residual_share", "n_latent", "max_shift", "label_shift_prob")
LOOP = ("input_injection", "state_init", "loop_norm", "loop_embedding", "loop_entry", "loop_exit")
ROPE = ("rope_base", "rope_scaling")


def expresses(family: Family, config: GPTConfig) -> bool:
    """Return True if the family's config.json, written and read again, is the same model."""
    return not find_misfit(family, config)


def find_misfit(family: Family, config: GPTConfig) -> str:
    """Return what a family's config.json cannot express, as a line on one field, or ""."""
    if family is OURS:
        return ""
    try:
        config_json = write_config(family, config)
        read_again = GPTConfig(**read_config(family, config_json))
    except ValueError as error:
        return str(error)
    ignored = TRAINING + DETAILS
    if not config.groups:
        ignored += LOOP
    if config.position != "rope":
        ignored += ROPE
    if family_of(config_json) is not family:
        return f"{family.name}: config.json is another family's"
    written = explicit_fields(read_again, ignored)
    for name, value in explicit_fields(config, ignored).items():
        if value != written[name]:
            return f"{name}={value!r}: must be {written[name]!r}"
    return ""


def explicit_fields(config: GPTConfig, ignored: tuple) -> dict:
    """Return the fields of a config that may be compared with those of another."""
    fields = asdict(spell_out(config))
    return {name: freeze(value) for name, value in fields.items() if name not in ignored}


# -----------------------------------------------------------------------------
# reading and writing config.json


def read_config(family: Family, config_json: dict) -> dict:
    """Return the fields of GPTConfig in a config.json.

    Raises ValueError that names the first field which GPTConfig cannot express.
    """
    if family is OURS:
        return known_fields(read_ours(config_json), "config.json", also=("model_type", "tokenizer"))
    for name, demanded in family.demands.items():
        value = config_json.get(name)
        require(name, value, value in (demanded, None), repr(demanded))
    args = family.fixed | family.read_extra(config_json)
    for name in family.fields:
        args[name] = read_field(family, name, config_json)
    return args | {"max_loops": max_loops_for(args.get("n_loop", 1))}


def read_ours(config_json: dict) -> dict:
    """Return the fields in a config.json of ours; before "gpt" there was, they stood at its top."""
    if "gpt" not in config_json:
        return {name: freeze(value) for name, value in config_json.items()}
    fields = {name: freeze(value) for name, value in get_object(config_json, "gpt").items()}
    n_loop = freeze(config_json.get("n_loop", 1))
    return fields | {"loop_counts" if isinstance(n_loop, tuple) else "n_loop": n_loop}


def write_ours(config: GPTConfig) -> dict:
    """Return config.json of ours; n_loop is the loops of every group, or a list of theirs."""
    fields = asdict(config)
    n_loop, counts = fields.pop("n_loop"), fields.pop("loop_counts")
    return OURS.demands | {
        "n_loop": counts or n_loop,
        "gpt": fields,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": config.tie_weights,
    }


def known_fields(args: dict, holder: str, also: Sequence[str] = ()) -> dict:
    """Return the fields of GPTConfig among args, which an earlier version may have written.

    holder: what args are from, for the message. also: names that are no fields, and left out.
    Raises ValueError for unknown names, and for a dropped field that has not its old default.
    """
    for name, default in DROPPED.items():
        value = args.get(name, default)
        allowed = f"{default}, GPTConfig no longer has this option"
        require(name, value, value == default, allowed)
    unknown = sorted(set(args) - set(GPTConfig.__dataclass_fields__) - set(DROPPED) - set(also))
    if unknown:
        raise ValueError(f"{holder} has {', '.join(unknown)}, which GPTConfig does not know")
    return {name: args[name] for name in args if name in GPTConfig.__dataclass_fields__}


def read_field(family: Family, name: str, config_json: dict) -> object:
    """Return the value of a field of GPTConfig, under any spelling, or the family's default."""
    names = spellings(family, name)
    for theirs in names:
        if config_json.get(theirs) is not None:
            return our_value(name, theirs, config_json[theirs])
    if name not in family.defaults:
        raise ValueError(f"{names[0]} is missing")
    return family.defaults[name]


def spellings(family: Family, name: str) -> tuple[str, ...]:
    """Return the fields of config.json that may hold a field of GPTConfig."""
    theirs = family.fields[name]
    return (theirs,) if isinstance(theirs, str) else theirs


def our_value(name: str, theirs: str, value: object) -> object:
    """Return the value of a field of GPTConfig that has this value in config.json."""
    if name not in VALUES:
        return value
    known = list(VALUES[name])
    require(theirs, value, value in known, f"one of {', '.join(map(str, known))}")
    return VALUES[name][value]


def their_value(name: str, value: object) -> object:
    """Return the value in config.json of a field of GPTConfig that has this value."""
    if name not in VALUES:
        return value
    for theirs, ours in VALUES[name].items():
        if ours == value:
            return theirs
    allowed = ", ".join(dict.fromkeys(VALUES[name].values()))
    raise ValueError(f"{name}={value!r}: must be one of {allowed}")


def max_loops_for(n_loop: int) -> int:
    """Return a max_loops that allows n_loop; one of another type is left to GPTConfig to refuse."""
    least = GPTConfig.max_loops
    return max(least, n_loop) if isinstance(n_loop, int) else least


def write_config(family: Family, config: GPTConfig) -> dict:
    """Return config.json in the words of a family. ValueError where it has none for a value."""
    if family is OURS:
        return write_ours(config)
    config = spell_out(config)
    config_json = family.demands | family.write_extra(config)
    for name in family.fields:
        theirs = spellings(family, name)[0]
        config_json.setdefault(theirs, their_value(name, getattr(config, name)))
    return config_json


def spell_out(config: GPTConfig) -> GPTConfig:
    """Return a config of the same model in which no 0 stands for a usual value.

    One looped group, or none, is spelled as prelude, core and coda.
    """
    rmsnorm_eps = torch.finfo(torch.float32).eps  # of nn.RMSNorm(eps=None)
    changes = {
        "n_kv_head": config.n_kv_head or config.n_head,
        "head_size": config.head_dim,
        "n_hidden": config.n_hidden or 4 * config.n_embd,
        "norm_eps": config.norm_eps or (1e-5 if config.norm == "layernorm" else rmsnorm_eps),
    }
    if len(config.groups) < 2:
        changes |= prelude_core_coda(config)
    return replace(config, **changes)


def prelude_core_coda(config: GPTConfig) -> dict:
    """Return the fields that say what is looped, of a config with at most one looped group."""
    fields = {
        "n_layer": config.n_physical,
        "n_prelude": 0,
        "n_block": 0,
        "n_coda": 0,
        "n_loop": 1,
        "loop_groups": (),
        "loop_counts": (),
        "use_model_baseline": False,
    }
    if config.groups:
        core = config.groups[0]
        fields["n_prelude"] = core[0]
        fields["n_block"] = len(core)
        fields["n_coda"] = config.n_physical - len(core) - core[0]
        fields["n_loop"] = config.counts()[0]
    return fields


# -----------------------------------------------------------------------------
# tensors

# no weights
IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "rope.freqs", "freqs_cis")


class Piece(NamedTuple):
    """Rows of one of our tensors, and the stored tensor that has them."""

    ours: str  # name of our tensor
    theirs: str  # name of the stored tensor
    view: Tensor  # of our tensor, in the shape of the stored rows
    shape: tuple  # of the stored tensor
    first_row: int = 0  # the stored row at which the view begins


def pieces(
    family: Family, config: GPTConfig, tensors: dict[str, Tensor], layers: Sequence[int]
) -> Iterator[Piece]:
    """Yield our tensors in pieces, each with the stored tensor that it is read from or written to.

    layers[i]: the number of the stored layer that is block i.
    """
    H, D = config.n_head, config.head_dim
    for name, tensor in tensors.items():
        _, part = split_name(name)
        stored = stored_names(family, config, name, layers)
        if part in family.stacked:  # (2, 1, H, D) of queries and keys
            check_qk_bias(config)
            view = tensor.view(1, 1, H, D)
            yield Piece(name, stored[0], view, (2, 1, H, D), family.stacked[part])
            continue
        if part in family.transposed:
            tensor = tensor.T
        for theirs, view in zip(stored, split_rows(config, tensor, len(stored))):
            yield Piece(name, theirs, view, tuple(view.shape))


def without_tied_head(config: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without the head's, where that is the embedding's."""
    tied = ("lm_head.weight",) if config.tie_weights else ()
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def split_name(name: str) -> tuple[int | None, str]:
    """Split transformer.h.3.ln_1.weight into 3 and ln_1.weight; outside blocks, None and name."""
    if not name.startswith("transformer.h."):
        return None, name
    block, part = name.removeprefix("transformer.h.").split(".", 1)
    return int(block), part


def stored_names(
    family: Family, config: GPTConfig, name: str, layers: Sequence[int]
) -> tuple[str, ...]:
    """Return the stored tensors that one of our tensors is made of, in the order of its rows."""
    block, part = split_name(name)
    module, leaf = part.rsplit(".", 1)  # such as attn.c_attn and weight
    suffix = ""
    if part in family.tensors:
        theirs = family.tensors[part]
    elif module in family.tensors:
        theirs, suffix = family.tensors[module], f".{leaf}"
    elif block is None:
        theirs = name
    else:
        theirs = "transformer.h.{layer}." + part
    names = (theirs,) if isinstance(theirs, str) else theirs
    if block is not None:
        place = {"layer": layers[block], "section": section_of(config, block)}
        names = tuple(name.format(**place) for name in names)
    return tuple(name + suffix for name in names)


def section_of(config: GPTConfig, block: int) -> str:
    """Return Huginn's name of a block: its part of the model, and its number in that part."""
    if block < config.n_prelude:
        return f"prelude.{block}"
    block -= config.n_prelude
    if block < config.n_block:
        return f"core_block.{block}"
    return f"coda.{block - config.n_block}"


def split_rows(config: GPTConfig, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split the rows of c_attn in queries, keys, values (count 3), of c_fc in gate and up (2)."""
    if count == 3:
        D, K = config.head_dim, config.n_kv_head or config.n_head
        return tensor.split((config.n_head * D, K * D, K * D))
    return tensor.chunk(count)


def to_ours(family: Family, config: GPTConfig, name: str, tensor: Tensor) -> Tensor:
    """Return one of our tensors, read in the family's order of channels, in our order."""
    if is_state_first(family, config, name):
        return tensor.roll(config.n_embd, -1)  # [s, e] -> [e, s]
    if is_interleaved(family, name):
        return reorder_heads(config, tensor, (config.head_dim // 2, 2))
    if family.centered_gains and tensor.dim() == 1 and name.endswith(".weight"):
        return tensor + 1
    return tensor


def to_theirs(family: Family, config: GPTConfig, name: str, tensor: Tensor) -> Tensor:
    """Return one of our tensors in the family's order of channels; undoes to_ours."""
    if is_state_first(family, config, name):
        return tensor.roll(config.n_embd, -1)  # [e, s] -> [s, e]
    if is_interleaved(family, name):
        return reorder_heads(config, tensor, (2, config.head_dim // 2))
    return tensor


def is_state_first(family: Family, config: GPTConfig, name: str) -> bool:
    """Return True for the matrix (C, 2C) of the injection where the family's reads [s, e]."""
    is_matrix = name.endswith(".inject.weight")
    return family.state_first and is_matrix and config.input_injection in ("inject", "inject_bias")


def is_interleaved(family: Family, name: str) -> bool:
    """Return True for a tensor with queries or keys whose rotated channels are side by side."""
    _, part = split_name(name)
    rotated = part.startswith(("attn.c_attn.", "attn.q_bias.", "attn.k_bias."))
    return family.interleaved_rotary and rotated


def reorder_heads(config: GPTConfig, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """Transpose the D channels of each head of queries and keys, seen as a matrix of this shape.

    tensor: (rows, ..) with the rows of queries, keys and values in this order, values as they are.
    """
    n_kv_head = config.n_kv_head or config.n_head
    n_rotated = (config.n_head + n_kv_head) * config.head_dim
    rotated, values = tensor[:n_rotated], tensor[n_rotated:]
    heads = rotated.view(-1, *shape, *tensor.shape[1:]).transpose(1, 2)
    return torch.cat((heads.reshape(rotated.shape), values))


# -----------------------------------------------------------------------------
# Parcae's value embeddings


def gates_have_tables(config: GPTConfig) -> bool:
    """Return True where the released code gives gate and table to the same blocks for certain.

    Every other block has a table, counted from the last one, and every other layer a gate, where
    the looped blocks count once for each loop. Both are the odd ones if these numbers are even.
    """
    return config.n_block % 2 == 0 and config.n_physical % 2 == 0


class ValueEmbeddings(NamedTuple):
    """Stored tensors of value embeddings; one acts where its block has both a table and a gate."""

    acting: list[str]
    idle: list[str]
    without_gate: dict[str, tuple]  # {table, and gate that is missing: shape}


def find_value_embeddings(config: GPTConfig, names: Container[str]) -> ValueEmbeddings:
    """Sort the value embeddings among the names of a Parcae model's stored tensors."""
    n_kv_head = config.n_kv_head or config.n_head
    table_shape = (config.vocab_size, n_kv_head * config.head_dim)
    gate_shape = (n_kv_head, min(32, config.n_embd))
    found = ValueEmbeddings([], [], {})
    blocks = range(config.n_physical)
    for block in blocks:
        value = f"transformer.h.{block}.attn.value"
        (table,) = stored_names(PARCAE, config, f"{value}.table.weight", blocks)
        (gate,) = stored_names(PARCAE, config, f"{value}.gate.weight", blocks)
        if table in names and gate in names:
            found.acting.extend((table, gate))
        elif table in names:
            found.idle.append(table)
            found.without_gate.update({table: table_shape, gate: gate_shape})
        elif gate in names:
            found.idle.append(gate)
    return found


# -----------------------------------------------------------------------------
# nanoLOOP's checkpoints


def is_nanoloop(weights: dict[str, Tensor]) -> bool:
    return "norm_recur.weight" in weights


def from_nanoloop(args: dict, weights: dict[str, Tensor]) -> tuple[dict, dict]:
    """Return nanoLOOP's model_args as fields of GPTConfig, and its tensors under our names.

    Its inject_random starts from noise of std sqrt(1 / n_embd), ours from sqrt(2 / (5 n_embd)): the
    loops forget it alike.
    """
    for name in ("n_prelude", "n_block"):
        require(name, args.get(name), isinstance(args.get(name), int), "a whole number")
    fields = args | {
        "norm": "rmsnorm",
        "bptt_k": args.get("bptt_k") or 0,
        "max_loops": max_loops_for(args.get("n_loop", 1)),
    }
    if args.get("input_injection") == "inject_random":
        fields |= {"input_injection": "inject", "state_init": "noise"}
    renamed = {nanoloop_name(args, name): tensor for name, tensor in weights.items()}
    return fields, renamed


def nanoloop_name(args: dict, name: str) -> str:
    """Return our name of one of nanoLOOP's tensors, such as transformer.recur.0.ln_1.weight."""
    first_block = {
        "prelude": 0,
        "recur": args["n_prelude"],
        "coda": args["n_prelude"] + args["n_block"],
    }
    section, _, part = name.removeprefix("transformer.").partition(".")
    if section in first_block:
        number, _, part = part.partition(".")
        return f"transformer.h.{first_block[section] + int(number)}.{part}"
    module = {"norm_recur": "norm", "inject": "inject"}.get(section)
    return f"transformer.loops.0.{module}.{part}" if module else name
