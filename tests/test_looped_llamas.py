"""
Looped Llamas of others, Nanbeige4.2 and xLLM (IFM): the logits of a folder are those of a reference
in float64, written out from what is public of their code, with tiny random weights.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import build, tokens
from safetensors.torch import load_file, save_file
from test_pretrained import assert_close, change, logits

from model import GPT
from nanorecur import exports
from pretrained import load, tokenizer_of

D, H, K, T, V, INNER, BASE, EPS = 16, 4, 2, 9, 61, 48, 500.0, 1e-5
C = 32  # heads are wider together than the residual stream, as in Nanbeige4.2


# -----------------------------------------------------------------------------
# the reference: one Llama block


def rmsnorm(x, gain=1.0, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def rotated(x, paired):
    """Rotate channels 2i and 2i + 1 of (heads, T, D) if paired, else i and i + D/2."""
    angles = torch.arange(T).double()[:, None] * BASE ** (-torch.arange(0, D, 2).double() / D)
    a, b = (x[..., 0::2], x[..., 1::2]) if paired else x.chunk(2, -1)
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.stack(turned, -1).flatten(-2) if paired else torch.cat(turned, -1)


def llama_block(x, w, paired=False):
    """Return x (T, C) after a block. w: its matrices q, k, v, o, gate, up, down, and its gains."""

    def heads(matrix):
        return (rmsnorm(x, w["norm_1"]) @ matrix.T).view(T, -1, D).transpose(0, 1)

    q, k = rotated(heads(w["q"]), paired), rotated(heads(w["k"]), paired)
    k, v = (part.repeat_interleave(H // K, 0) for part in (k, heads(w["v"])))
    future = torch.ones(T, T).triu(1).bool()
    shares = (q @ k.mT / D**0.5).masked_fill(future, -math.inf).softmax(-1)
    x = x + (shares @ v).transpose(0, 1).flatten(1) @ w["o"].T
    h = rmsnorm(x, w["norm_2"])
    return x + (F.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T


def random_weights(shapes, seed=3):
    """Return tensors of these shapes by name."""
    draw = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write(folder, config_json, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(weights, folder / "model.safetensors")
    return folder


# -----------------------------------------------------------------------------
# Nanbeige4.2 (arXiv 2607.22083): Llama's names; the last norm after every loop, or once

NANBEIGE = {
    "architectures": ["NanbeigeForCausalLM"],
    "model_type": "nanbeige",
    "auto_map": {"AutoModelForCausalLM": "modeling_nanbeige.NanbeigeForCausalLM"},
    "vocab_size": V,
    "hidden_size": C,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": D,
    "kv_channels": D,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rope_theta": BASE,
    "rope_scaling": None,
    "attention_bias": False,
    "rms_norm_eps": EPS,
    "num_loops": 2,
    "loop_loss_weights": [],
    "skip_loop_final_norm": False,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMAS_NAMES = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
BLOCK_SHAPES = {
    "norm_1": (C,),
    "norm_2": (C,),
    "q": (H * D, C),
    "k": (K * D, C),
    "v": (K * D, C),
    "o": (C, H * D),
    "gate": (INNER, C),
    "up": (INNER, C),
    "down": (C, INNER),
}


def nanbeige(folder, **fields):
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    shapes["lm_head.weight"] = (V, C)
    for i in range(2):
        for part, name in LLAMAS_NAMES.items():
            shapes[f"model.layers.{i}.{name}.weight"] = BLOCK_SHAPES[part]
    weights = random_weights(shapes)
    for name, tensor in weights.items():
        if "norm" in name:
            tensor += 1
    return write(folder, NANBEIGE | fields, weights)


def nanbeige_logits(folder, idx):
    """Return the logits of a folder, read by the names of the release, for idx (T,)."""
    config_json = json.loads((folder / "config.json").read_text())
    w = {name: x.double() for name, x in load_file(folder / "model.safetensors").items()}
    x = w["model.embed_tokens.weight"][idx]
    for loop in range(config_json["num_loops"]):
        for i in range(config_json["num_hidden_layers"]):
            names = LLAMAS_NAMES.items()
            block = {part: w[f"model.layers.{i}.{name}.weight"] for part, name in names}
            x = llama_block(x, block)
        last = loop == config_json["num_loops"] - 1
        if last or not config_json["skip_loop_final_norm"]:
            x = rmsnorm(x, w["model.norm.weight"])
    head = "model.embed_tokens" if config_json["tie_word_embeddings"] else "lm_head"
    return (x @ w[f"{head}.weight"].T).float()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("num_loops", [1, 2, 3])
def test_nanbeiges_folder_gives_the_references_logits(num_loops, skip, tmp_path):
    folder = nanbeige(tmp_path / "a", num_loops=num_loops, skip_loop_final_norm=skip)
    model, idx = load(folder).double(), tokens(2, T)
    assert model.config.counts() == (num_loops,) and model.config.groups == ((0, 1),)
    for row in range(2):
        assert_close(logits(model, idx)[row], nanbeige_logits(folder, idx[row]))


@pytest.mark.parametrize("final_norm, loop_norm", [(False, "rmsnorm"), (True, "none")])
def test_a_servable_model_goes_out_as_nanbeige(final_norm, loop_norm, tmp_path):
    """The exported folder, read by the reference, gives the model's own logits."""
    model = build(
        **dict(n_prelude=0, n_block=2, n_coda=0, n_loop=3, input_injection="passthrough"),
        **dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, norm_eps=EPS),
        **dict(n_kv_head=K, head_size=D, n_hidden=INNER, rope_base=BASE),
        **dict(loop_norm=loop_norm, final_norm=final_norm, spread=0.2),
    )
    exported = exports.export(model, tmp_path)
    words = "Nanbeige's format; vLLM, SGLang, llama.cpp, MLX and pretrained.load open it"
    assert exports.describe(exported) == words
    config_json = json.loads((tmp_path / "config.json").read_text())
    assert config_json["skip_loop_final_norm"] == final_norm
    idx = tokens(2, T)
    for row in range(2):
        assert_close(nanbeige_logits(tmp_path, idx[row]), logits(model, idx)[row])
    assert torch.equal(logits(load(tmp_path), idx), logits(model, idx))
    exports.export(model, tmp_path, to_format="nanbeige", n_loop=5)
    expected = logits(model, idx, n_loop=5)[0]
    assert_close(nanbeige_logits(tmp_path, idx[0]), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(enable_mhc=True), "enable_mhc=True: must be False"),
        (dict(emb_neighbor_num=2), "emb_neighbor_num=2: must be None"),
        (dict(loop_share_kv=True), "loop_share_kv=True: must be False"),
        (dict(loop_loss_weights=[0.5]), r"loop_loss_weights=\[0.5\]: must be \[\]"),
        (dict(kv_channels=8), "kv_channels=8: must be head_dim=16"),
    ],
)
def test_nanbeiges_other_parts_are_refused(fields, message, tmp_path):
    folder = nanbeige(tmp_path / "a", **fields)
    with pytest.raises(ValueError, match=message):
        load(folder)


# -----------------------------------------------------------------------------
# xLLM, "Towards Looped Models Done Right", part 1 and 2 (github.com/ifm-ai/xllm-loop): gains of
# norms without their 1, pairs of channels rotated, and a state that evaluation makes by a hash

XLLM_NAMES = {
    "norm_1": "attention.norm",
    "norm_2": "nffn.norm",
    **{part: f"attention.w{part}" for part in "qkvo"},
    **dict(gate="nffn.fc1", up="nffn.fc3", down="nffn.fc2"),
}
XLLM = {
    "arch": "transformer",
    "num_layers": 4,
    "model_dim": C,
    "num_heads": H,
    "num_kv_heads": K,
    "head_dim": D,
    "rope_head_dim": D,
    "ffn_hidden_dim": INNER,
    "vocab_size": V,
    "output_size": -1,
    "swiglu": True,
    "apply_rmsnorm": True,
    "rmsnorm_eps": EPS,
    "rope_base": BASE,
    "apply_bias_term": True,
    "qknorm": False,
    "num_experts": 0,
    "loop_times": 1,
    "loop_start_layer": 0,
    "loop_end_layers": None,
    "loop_input_injection": "none",
    "dense_prelude_input_injection": "none",
    "huginn_hierarchical_state": "none",
    "huginn_prelude_orthogonal": False,
    "huginn_ortho_projection_eps": 1e-6,
}
CORE = dict(
    arch="huginn",
    loop_times=3,
    loop_start_layer=1,
    loop_end_layers=3,
    huginn_prelude_layers=1,
    huginn_recurrent_layers=2,
    huginn_coda_layers=1,
    huginn_input_injection="diagonal",
    huginn_state_init="normal",
    huginn_prelude_norm="none",
    huginn_recurrent_exit_norm="none",
    huginn_sampling_scheme="poisson-lognormal-capped",
    huginn_backprop_depth=10,
)
RELEASES = {  # {recipe: fields of its config}
    "dense_d28, d4": {},
    "dense_ouro": dict(loop_times=3),
    "dense_ouro_raw_injection": dict(loop_times=3, loop_input_injection="diagonal"),
    "dense_middle": CORE | dict(huginn_input_injection="none", huginn_state_init="input"),
    "dense_middle_prelude_injection": CORE | dict(huginn_state_init="input"),
    "fixed_r5, pln5, learned": CORE,
    "parcae": CORE | dict(huginn_prelude_norm="rms"),
    "norm after every loop": CORE | dict(huginn_recurrent_exit_norm="parameterless_rms"),
    "huginn_linear": CORE
    | dict(huginn_input_injection="linear", huginn_recurrent_exit_norm="parameterless_rms"),
    "linear, no bias": CORE | dict(huginn_input_injection="linear", apply_bias_term=False),
    "orthoinj": CORE | dict(huginn_prelude_orthogonal=True),
    "orthoinj, zero": CORE | dict(huginn_prelude_orthogonal=True, huginn_state_init="zero"),
}
INJECTIONS = {  # {recipe: input_injection of ours}
    "huginn_linear": "inject_bias",
    "linear, no bias": "inject",
    "orthoinj": "orthogonal",
    "parcae": "diagonal",
}


def xllm(folder, fields):
    """Write a tiny folder of xLLM's, in two files with an index, in bfloat16."""
    fields = XLLM | fields
    shapes = {"embed.weight": (V, C), "output.output.weight": (V, C)}
    shapes["output.final_norm.weight"] = (C,)
    for i in range(4):
        for part, name in XLLM_NAMES.items():
            shapes[f"layers.{i}.{name}.weight"] = BLOCK_SHAPES[part]
    inject = injection_of(fields)
    if inject and is_linear(fields):
        shapes[f"{inject}.adapter.weight"] = (C, 2 * C)
        if fields["apply_bias_term"]:
            shapes[f"{inject}.adapter.bias"] = (C,)
    elif inject:
        shapes |= {f"{inject}.input_adapter.weight": (C, C), f"{inject}.A_log": (C,)}
        shapes[f"{inject}.dt_bias"] = (C,)
    if fields.get("huginn_prelude_norm") == "rms":
        shapes["huginn_prelude_norm_module.weight"] = (C,)
    weights = {name: x.bfloat16() for name, x in random_weights(shapes).items()}
    names = sorted(weights)
    config_json = {"model": fields, "tokenizer": {"type": "huggingface", "path": "tokenizer"}}
    write(folder, config_json, {})
    (folder / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def injection_of(fields):
    """Return the name of the module that injects, or ""."""
    if fields["arch"] == "huginn":
        return "input_injection" if fields["huginn_input_injection"] != "none" else ""
    return "loop_input_injection_module" if fields["loop_input_injection"] != "none" else ""


def is_linear(fields):
    return fields["arch"] == "huginn" and fields["huginn_input_injection"] == "linear"


def hashed_state(row=0):
    """Return the first state (T, C) of one row in evaluation (Huginn._hashed_normal_state)."""
    place = 0.013579 * torch.arange(C).float() + 0.021713 * torch.arange(T).float()[:, None]
    hashed = 43758.5453123 * torch.sin(place + 0.037719 * row + 0.123457)
    share = (hashed - hashed.floor()).clamp(1e-6, 1 - 1e-6)
    return (2 / C) ** 0.5 * torch.erfinv(2 * share - 1)


def xllm_logits(folder, idx, fields, n_loop, row=0):
    """Return the logits of a folder for idx (T,), which is so many rows down in its batch."""
    fields, w = XLLM | fields, {}
    for path in folder.glob("*.safetensors"):
        w |= {name: x.double() for name, x in load_file(path).items()}

    def layer(x, i):
        block = {part: w[f"layers.{i}.{name}.weight"] for part, name in XLLM_NAMES.items()}
        gains = {part: 1 + block[part] for part in ("norm_1", "norm_2")}
        return llama_block(x, block | gains, paired=True)

    def inject(s, e):
        name = injection_of(fields)
        if not name:
            return s
        if is_linear(fields):
            of_s, of_e = w[f"{name}.adapter.weight"].chunk(2, -1)
            return s @ of_s.T + e @ of_e.T + w.get(f"{name}.adapter.bias", 0.0)
        dt = F.softplus(w[f"{name}.dt_bias"])
        kept = torch.exp(-dt * w[f"{name}.A_log"].exp()) * s
        update = dt * (e @ w[f"{name}.input_adapter.weight"].T)
        if fields["huginn_prelude_orthogonal"]:
            for t in range(T):  # without its component along the update, token by token
                along = torch.dot(kept[t], update[t]) / (torch.dot(update[t], update[t]) + 1e-6)
                kept[t] -= along * update[t]
        return kept + update

    first, last = (1, 3) if fields["arch"] == "huginn" else (0, 4)
    x = w["embed.weight"][idx]
    for i in range(first):
        x = layer(x, i)
    if fields.get("huginn_prelude_norm") == "rms":
        x = rmsnorm(x, 1 + w["huginn_prelude_norm_module.weight"])
    starts = {"normal": hashed_state(row).double(), "zero": torch.zeros_like(x)}
    e, s = x, starts.get(fields.get("huginn_state_init"), x)
    for _ in range(n_loop):
        s = inject(s, e)
        for i in range(first, last):
            s = layer(s, i)
        if fields.get("huginn_recurrent_exit_norm") == "parameterless_rms":
            s = rmsnorm(s)
    for i in range(last, 4):
        s = layer(s, i)
    x = rmsnorm(s, 1 + w["output.final_norm.weight"])
    return (x @ w["output.output.weight"].T).float()


@pytest.mark.parametrize("recipe", RELEASES)
def test_xllms_folder_gives_the_references_logits(recipe, tmp_path):
    fields = RELEASES[recipe]
    folder = xllm(tmp_path / "a", fields)
    model, idx = load(folder, block_size=16), tokens(1, T)
    assert isinstance(model, GPT) and not model.config.tie_weights
    if recipe in INJECTIONS:
        assert model.config.input_injection == INJECTIONS[recipe]
    loops = (1, 3) if model.config.groups else (1,)
    assert model.config.counts() == ((3,) if model.config.groups else ())
    for n_loop in loops:
        expected = xllm_logits(folder, idx[0], fields, n_loop)
        scale = expected.abs().max()
        assert_close(logits(model, idx, n_loop=n_loop)[0] / scale, expected / scale)


def test_every_row_starts_from_xllms_state_of_its_first(tmp_path):
    """Theirs hashes the number of the row too, so that a row's logits depend on its batch."""
    folder = xllm(tmp_path / "a", CORE)
    model, idx = load(folder, block_size=16), tokens(1, T)
    assert model.config.state_init == "hash" and model.config.loop_sampling == "poisson"
    first, second = (xllm_logits(folder, idx[0], CORE, 1, row) for row in (0, 1))
    scale = first.abs().max()
    for row in logits(model, idx.expand(3, -1), n_loop=1):
        assert_close(row / scale, first / scale)
    assert (second - first).abs().max() / scale > 1e-2


@pytest.mark.parametrize(
    "fields, message",
    [
        (CORE | dict(huginn_ortho_projection_eps=1e-3), "huginn_ortho_projection_eps=0.001: must"),
        (
            CORE | dict(huginn_prelude_orthogonal=True, huginn_input_injection="linear"),
            "huginn_prelude_orthogonal=True: must be false without diagonal injection",
        ),
        (CORE | dict(huginn_input_injection="typo"), "huginn_input_injection='typo': must be one"),
        (dict(loop_input_injection="linear"), "loop_input_injection='linear': must be one of none"),
        (CORE | dict(huginn_hierarchical_state="split_hl"), "hierarchical_state='split_hl': must"),
        (dict(num_experts=25), "num_experts=25: must be 0"),
        (dict(dense_prelude_input_injection="diagonal"), "dense_prelude_input_injection="),
        (dict(swiglu=False), "swiglu=False: must be true"),
        (
            dict(loop_times=2, loop_input_injection="diagonal", loop_start_layer=1),
            "loop_start_layer=1: must be 0",
        ),
        (dict(arch="gekko"), "model_type='xllm_gekko': must be one of"),
        (dict(num_layers="4"), "num_layers='4': must be a whole number"),
    ],
)
def test_what_xllm_has_beyond_ours_is_refused(fields, message, tmp_path):
    folder = xllm(tmp_path / "a", CORE)
    (folder / "config.json").write_text(json.dumps({"model": XLLM | fields}))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_xllms_tokenizer_is_in_a_folder_of_its_own(tmp_path):
    folder = xllm(tmp_path / "a", {})
    assert tokenizer_of(folder) is None
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}
    (folder / "tokenizer").mkdir()
    content = {"version": "1.0", "added_tokens": [], "model": model}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = tokenizer_of(folder)
    assert found["tokenizer"] == "huggingface" and found["separator"] == 1


# -----------------------------------------------------------------------------
# Ouro's descendants


def test_a_descendant_of_ouro_without_its_gate_opens_when_none_is_asked_for(tmp_path):
    from test_pretrained import IDS, ouro

    folder = ouro(tmp_path / "ouro")
    expected = logits(load(folder), IDS)
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if "early_exit_gate" not in name}
    save_file(kept, folder / "model.safetensors")
    rope = {"rope_type": "default", "rope_theta": 1e6}  # as transformers 5 writes it
    change(folder, rope_theta="gone", rope_scaling="gone", rope_parameters=rope, dtype="float32")
    with pytest.raises(ValueError, match="early_exit_gate.* is missing"):
        load(folder)
    assert torch.equal(logits(load(folder, exit_gate="none"), IDS), expected)
