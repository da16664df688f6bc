"""
Other people's weights are loaded, and ours exported: the same numbers as in the reference library,
and as the released modules of Huginn, Ouro and Parcae gave.
"""

import json
import math
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Run, assert_refused, build, tokens
from safetensors.torch import load_file, save_file

import pretrained
from model import GPT, TABLES, GPTConfig
from nanorecur import families
from nanorecur.exit_rules import exit_distribution
from pretrained import export, load

# -----------------------------------------------------------------------------
# tiny models of the reference library

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
GPT2 = dict(vocab_size=61, n_positions=32, n_embd=32, n_head=4, n_layer=4)
EXACT = dict(activation_function="gelu", n_inner=40, layer_norm_epsilon=1e-3)
TIED = dict(tie_word_embeddings=True, rope_parameters={**LLAMA3, "rope_theta": 500.0})
QWEN3 = dict(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
REFERENCES = {  # {name: (prefix of its classes in transformers, fields of its config)}
    "gpt2": ("GPT2", GPT2),
    "gpt2, exact gelu": ("GPT2", {**GPT2, **EXACT}),
    "llama": ("Llama", SIZES),
    "llama 3, tied": ("Llama", {**SIZES, **TIED}),
    "qwen3": ("Qwen3", {**SIZES, **QWEN3}),
    "olmo2": ("Olmo2", {**SIZES, "rms_norm_eps": 1e-4}),
}


def reference(name, **changes):
    """Return a tiny random model of transformers; its norms and biases are random too."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prefix, sizes = REFERENCES[name]
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **changes}, **special)
    torch.manual_seed(0)
    suffix = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    model = getattr(transformers, prefix + suffix)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def logits(model, idx, **options):
    with torch.no_grad():
        return model(idx, idx, **options)[0]


@torch.no_grad()
def reference_logits(model, idx):
    return model(idx, use_cache=False).logits


def assert_close(values, expected, tolerance=1e-5):
    difference = (values - expected).abs().max()
    assert values.shape == expected.shape and difference < tolerance, f"{difference:.2e}"


def assert_same_logits(values, expected):
    """Compare logits relative to the largest."""
    scale = expected.abs().max()
    assert_close(values / scale, expected / scale)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_folder_gives_the_reference_librarys_logits(name, tmp_path):
    their_model, idx = reference(name), tokens(2, 20)
    their_model.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        expected = their_model(idx).logits
    scale = max(1, expected.abs().max())
    assert_close(logits(model, idx) / scale, expected / scale)
    n_parameters = sum(p.numel() for p in their_model.parameters())
    assert model.get_num_params(non_embedding=False) == n_parameters


# -----------------------------------------------------------------------------
# golden vectors: tensors filled by a rule under the released names, and the numbers that the
# released modules gave for them


def filled(shapes):
    """Return tensors of these shapes by name, filled by a rule.

    Value j of the i-th name in order is 0.1 sin(0.37 j + 1.3 i), plus 1 in the weights of norms.
    """
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        j = torch.arange(math.prod(shape), dtype=torch.float64)
        w = 0.1 * torch.sin(0.37 * j + 1.3 * i)
        if len(shape) == 1 and ("norm" in name or "ln_" in name):
            w = w + 1
        weights[name] = w.float().view(shape)
    return weights


def folder_of(path, config_json, weights):
    """Write a folder with config.json and model.safetensors and return its path."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json))
    save_file(weights, path / "model.safetensors")
    return path


HUGINN = {
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {
        "AutoConfig": "raven_config_minimal.RavenConfig",
        "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
    },
    "n_embd": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "block_size": 64,
    "vocab_size": 96,
    "padding_multiple": 4096,
    "tie_embeddings": True,
    "intermediate_size": 64,
    "bias": False,
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-6,
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "state_init": "like-init",
    "injection_type": "linear",
    "n_layers_in_recurrent_block": 4,
    "mean_recurrence": 32,
    "sampling_scheme": "poisson-lognormal-filling",
    "mean_backprop_depth": 8,
    "n_layers_in_prelude": 2,
    "n_layers_in_coda": 2,
    "qk_bias": True,
    "torch_dtype": "bfloat16",
}


def huginn(path):
    d, inner, V = 48, 64, 96
    shapes = {
        "transformer.wte.weight": (V, d),
        "transformer.adapter.weight": (d, 2 * d),
        "transformer.ln_f.weight": (d,),
    }
    for section, count in (("prelude", 2), ("core_block", 4), ("coda", 2)):
        for i in range(count):
            block = f"transformer.{section}.{i}"
            shapes |= {f"{block}.norm_{n}.weight": (d,) for n in (1, 2, 3, 4)}
            shapes[f"{block}.attn.Wqkv.weight"] = (3 * d, d)
            shapes[f"{block}.attn.qk_bias"] = (2, 1, 3, 16)
            shapes[f"{block}.attn.proj.weight"] = (d, d)
            shapes[f"{block}.mlp.fc.weight"] = (2 * inner, d)
            shapes[f"{block}.mlp.proj.weight"] = (d, inner)
    weights = filled(shapes)
    weights["freqs_cis"] = torch.zeros(1, 64, 1, 8, 2)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    return folder_of(path, HUGINN, weights)


OURO = {
    "model_type": "ouro",
    "architectures": ["OuroForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "attention_dropout": 0.0,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "torch_dtype": "bfloat16",
}


def ouro(path):
    d, inner, V = 32, 48, 96
    shapes = {
        "model.embed_tokens.weight": (V, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (V, d),
        "model.early_exit_gate.weight": (1, d),
        "model.early_exit_gate.bias": (1,),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (d, d) for part in "qkvo"}
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, d)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, d)
        shapes[f"{layer}.mlp.down_proj.weight"] = (d, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (d,)
            shapes[f"{layer}.{norm}_2.weight"] = (d,)
    return folder_of(path, OURO, filled(shapes))


PARCAE = {
    "_class_name": "ParcaeConfig",
    "name": "small",
    "block_size": 32,
    "n_embd": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "padding_multiple": 64,
    "padded_vocab_size": 96,
    "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50000},
    "norm_eps": 1e-5,
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU2",
    "bias": False,
    "qk_norm": True,
    "logit_softcap": None,
    "tie_embeddings": True,
    "init_strategy": "scaled-zero",
    "init_orthogonal": True,
    "injection_type": "diagonal",
    "state_init": "like-init",
    "prelude_norm": True,
    "recurrent_embedding_dimension": 64,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 2,
    "mean_recurrence": 4,
    "mean_backprop_depth": 2,
    "sampling_scheme": "poisson-truncated-full",
    "recurrent_iteration_method": "per-sequence",
}


def gated_sections(sizes, mean, backprop):
    """Return the blocks that the released code gives a gate, such as core_block.1.

    Layers are numbered with the looped blocks counted once for each of the mean loops; a layer's
    parity is compared with that of the looped blocks times the loops with a gradient.
    """
    n_prelude, n_block, n_coda = sizes
    numbers = {f"prelude.{i}": i for i in range(n_prelude)}
    numbers |= {f"core_block.{i}": n_prelude + i for i in range(n_block)}
    numbers |= {f"coda.{i}": n_prelude + n_block * mean + i for i in range(n_coda)}
    return {name for name, i in numbers.items() if i % 2 == (n_block * backprop - 1) % 2}


def parcae(path, sizes=(2, 2, 2), mean=4, backprop=2):
    """Write a tiny Parcae folder. sizes: blocks of prelude, core, coda. mean, backprop: loops."""
    d, inner, V = 64, 96, 96
    shapes = {
        "transformer.wte.weight": (V, d),
        "transformer.ln_prelude.weight": (d,),
        "transformer.adapter.A_log": (d,),
        "transformer.adapter.dt_bias": (d,),
        "transformer.adapter.B": (d, d),
        "transformer.C.weight": (d, d),
        "transformer.ln_f.weight": (d,),
    }
    gated, n_blocks = gated_sections(sizes, mean, backprop), sum(sizes)
    for layer, section in enumerate(parcae_sections(sizes)):
        block = f"transformer.{section}"
        shapes |= {f"{block}.norm_{n}.weight": (d,) for n in (1, 2)}
        shapes[f"{block}.mlp.fc.weight"] = (inner, d)
        shapes[f"{block}.mlp.proj.weight"] = (d, inner)
        for part in ("c_q", "c_k", "c_v", "c_proj"):
            shapes[f"{block}.attn.{part}.weight"] = (d, d)
        if section in gated:
            shapes[f"{block}.attn.ve_gate.weight"] = (2, 32)
        if layer % 2 == (n_blocks - 1) % 2:
            shapes[f"value_embeds.{layer}.weight"] = (V, d)
    fields = dict(zip(("prelude", "recurrent_block", "coda"), sizes))
    config_json = PARCAE | {f"n_layers_in_{name}": count for name, count in fields.items()}
    config_json |= {"mean_recurrence": mean, "mean_backprop_depth": backprop}
    weights = {**filled(shapes), "freqs_cis": torch.zeros(1, 32, 1, 16, 2)}
    return folder_of(path, config_json, weights)


def parcae_sections(sizes):
    parts = zip(("prelude", "core_block", "coda"), sizes)
    return [f"{part}.{i}" for part, count in parts for i in range(count)]


def parcae_logits(folder, idx, sizes, n_loop):
    """Return Parcae's logits of idx (1, T) from a zero state, written out in float64."""
    w = {name: x.double() for name, x in load_file(folder / "model.safetensors").items()}
    T, H, D = idx.size(1), 2, 32

    def norm(x, gain=1.0, eps=1e-5):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def rotated(x):  # (H, T, D), channels 2i and 2i + 1 together
        pairs = torch.view_as_complex(x.reshape(H, T, D // 2, 2))
        rates = 50000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = torch.arange(T, dtype=torch.float64)[:, None] * rates
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return norm(torch.view_as_real(turned).flatten(-2), eps=torch.finfo(torch.float32).eps)

    def heads(x):
        return x.view(T, H, D).transpose(0, 1)

    def block(x, layer):
        name = f"transformer.{parcae_sections(sizes)[layer]}"
        h = norm(x, w[f"{name}.norm_1.weight"])
        q, k, v = (h @ w[f"{name}.attn.c_{part}.weight"].T for part in "qkv")
        gate, table = w.get(f"{name}.attn.ve_gate.weight"), w.get(f"value_embeds.{layer}.weight")
        if gate is not None and table is not None:
            share = 2 * torch.sigmoid(h[:, :32] @ gate.T)
            v = v + share.repeat_interleave(D, -1) * table[idx[0]]
        scores = rotated(heads(q)) @ rotated(heads(k)).mT / D**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        mixed = (scores.softmax(-1) @ heads(v)).transpose(0, 1).flatten(1)
        x = x + mixed @ w[f"{name}.attn.c_proj.weight"].T
        inner = norm(x, w[f"{name}.norm_2.weight"]) @ w[f"{name}.mlp.fc.weight"].T
        return x + 0.5 * inner.relu().square() @ w[f"{name}.mlp.proj.weight"].T

    n_prelude, n_block, n_coda = sizes
    x = w["transformer.wte.weight"][idx[0]]
    for layer in range(n_prelude):
        x = block(x, layer)
    e = norm(x, w["transformer.ln_prelude.weight"])
    dt = F.softplus(w["transformer.adapter.dt_bias"])
    decay = torch.exp(-dt * w["transformer.adapter.A_log"].exp())
    s = torch.zeros_like(e)
    for _ in range(n_loop):
        s = decay * s + dt * (e @ w["transformer.adapter.B"].T)
        for layer in range(n_prelude, n_prelude + n_block):
            s = block(s, layer)
    x = s @ w["transformer.C.weight"].T
    for layer in range(n_prelude + n_block, n_prelude + n_block + n_coda):
        x = block(x, layer)
    x = norm(x, w["transformer.ln_f.weight"])
    return (x @ w["transformer.wte.weight"].T).float()[None]


IDS = torch.tensor([[3, 17, 5, 90, 41, 8, 60]])


def golden(values, first, total=None, mean_abs=None, tolerance=1e-5):
    """Compare the first values, their sum and their mean absolute value; None: not known."""
    assert_close(values[: len(first)], torch.tensor(first), tolerance)
    assert total is None or abs(values.sum() - total) < tolerance
    assert mean_abs is None or abs(values.abs().mean() - mean_abs) < tolerance


class GivenState(torch.nn.Module):
    """An initial state of the loop that is given."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, e, ctx):
        return self.state


def test_huginn_golden_vectors(tmp_path):
    model = load(huginn(tmp_path), state_init="zero")
    assert model.config.n_loop == 32 and model.config.bptt_k == 8
    for n_loop, expected in {
        1: ([0.026473, 0.034325, 0.005304, -0.029415, -0.032535, -0.000704], 0.046617, 0.023134),
        3: ([0.025201, 0.034189, 0.006449, -0.028218, -0.032573, -0.001936], 0.047315, 0.022763),
    }.items():
        golden(logits(model, IDS, n_loop=n_loop)[0, -1], *expected)
    state = model.loops_representation(IDS, n_loop=3)[0][-1]
    with torch.no_grad():
        last = model.transformer.ln_f(state)[0, -1]
    golden(last, [1.433829, -1.484165, 0.273414, 1.051486, -1.369806, 0.545132])
    start = 0.5 * torch.sin(0.11 * torch.arange(7 * 48, dtype=torch.float64)).float().view(1, 7, 48)
    model.transformer.loops[0].init_state = GivenState(start)
    golden(
        logits(model, IDS, n_loop=2).flatten(),
        [0.113093, 0.035001, -0.080691, -0.109701, -0.020866, 0.090384],
        total=-0.013744,
        mean_abs=0.054240,
    )
    assert load(tmp_path).config.state_init == "noise"


@torch.no_grad()
def test_ouro_golden_vectors(tmp_path):
    model = load(ouro(tmp_path))
    states = model.loops_representation(IDS)[0]
    expected = [
        ([0.118343, 0.146648, 0.100923, 0.004250, -0.094569, -0.145647], 0.096814, None),
        ([-0.000949, 0.000775, 0.002108, 0.002377, 0.001445, -0.000216], None, None),
        ([-0.079020, -0.066399, -0.020258, 0.036110, 0.074248, 0.074905], None, None),
        ([-0.113890, -0.089950, -0.020601, 0.059148, 0.109037, 0.103883], -0.096784, 0.073123),
    ]
    assert len(states) == len(expected)
    for i in range(4):
        golden(model.lm_head(states[i])[0, -1], *expected[i])
        golden(logits(model, IDS, n_loop=i + 1)[0, -1], *expected[i])
    gate = torch.sigmoid(model.exit_gate(torch.stack(states, -2)))[0, -1, :, 0]
    golden(gate, [0.487451, 0.523986, 0.542336, 0.549259])
    p = exit_distribution(model, states)[0, -1]
    golden(p, [0.487451, 0.268568, 0.132320, 0.111661])
    assert int((p.cumsum(0) >= 0.6).int().argmax()) == 1


def test_parcae_golden_vectors(tmp_path):
    model = load(parcae(tmp_path), state_init="zero")
    for n_loop, expected in {
        1: ([0.066299, 0.062542, -0.051566, -0.074690, 0.033972, 0.082692], 0.052112, 0.055053),
        3: ([0.059235, 0.071409, -0.042414, -0.081400, 0.023239, 0.086875], 0.045068, 0.055981),
    }.items():
        golden(logits(model, IDS, n_loop=n_loop)[0, -1], *expected)
        assert_close(
            parcae_logits(tmp_path, IDS, (2, 2, 2), n_loop)[0, -1, :6], torch.tensor(expected[0])
        )
    assert model.config.n_loop == 4 and model.config.bptt_k == 2


@pytest.mark.parametrize(
    "sizes, mean, backprop, acting",
    [  # blocks that have both a gate and a table
        ((1, 1, 1), 3, 2, []),
        ((1, 1, 1), 4, 2, [2]),
        ((2, 1, 1), 3, 2, [1, 3]),
        ((2, 1, 1), 4, 2, [1]),
        ((1, 3, 2), 5, 3, []),
        ((1, 3, 2), 5, 2, [1, 3, 5]),
        ((2, 2, 1), 3, 2, []),
    ],
)
def test_parcaes_value_embeddings_act_where_a_block_has_gate_and_table(
    sizes, mean, backprop, acting, tmp_path, capsys
):
    """Odd numbers of blocks: the released code may give a gate to one block, a table to the next.

    The arithmetic is written out from the description of the released code, not compared with it.
    """
    folder = parcae(tmp_path / "theirs", sizes, mean, backprop)
    model = load(folder, state_init="zero")
    weights = load_file(folder / "model.safetensors")
    gates = [name for name in weights if name.endswith("ve_gate.weight")]
    tables = [name for name in weights if name.startswith("value_embeds.")]
    n_idle = len(gates) + len(tables) - 2 * len(acting)
    printed = capsys.readouterr().err
    assert printed.count(".weight") == n_idle and printed.count("\n") == (n_idle > 0)
    assert model.config.value_embedding == bool(acting)
    for n_loop in (1, mean):
        expected = parcae_logits(folder, IDS, sizes, n_loop)
        assert_close(logits(model, IDS, n_loop=n_loop), expected, 2e-5)
    acts = []
    for block, module in enumerate(model.transformer.h):
        value = getattr(module.attn.value, "table", None)
        if value is not None and value.weight.any():
            acts.append(block)
    assert acts == acting
    export(model, tmp_path / "ours")
    assert_same_state(model, load(tmp_path / "ours"))


def test_parcae_without_a_gate_that_it_must_have_is_damaged(tmp_path):
    folder = parcae(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.core_block.1.attn.ve_gate.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="core_block.1.attn.ve_gate.weight is missing"):
        load(folder)


# -----------------------------------------------------------------------------
# sources


def change(folder, **fields):
    """Replace fields of a folder's config.json, or remove those whose value is GONE."""
    config_json = json.loads((folder / "config.json").read_text()) | fields
    config_json = {name: value for name, value in config_json.items() if value != GONE}
    (folder / "config.json").write_text(json.dumps(config_json))


def change_gpt(folder, **fields):
    """Replace fields of GPTConfig in a folder of ours."""
    gpt = json.loads((folder / "config.json").read_text())["gpt"]
    change(folder, gpt=gpt | fields)


GONE = "gone"


def test_sharded_folders_hub_names_and_base_models(tmp_path, monkeypatch):
    their_model, idx = reference("gpt2, exact gelu"), tokens()
    sharded, base = tmp_path / "sharded", tmp_path / "base"
    their_model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    # as the hub's gpt2 is: no "transformer." before the names, and masks among the tensors
    their_model.transformer.save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    assert "wte.weight" in weights
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(weights, base / "model.safetensors")
    change(base, architectures=["GPT2LMHeadModel"])
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    expected = logits(load(sharded), idx)
    assert_close(expected, their_model(idx).logits.detach(), 1e-3)
    for source in (f"hf:{sharded}", str(base), "gpt2", "hf:someone/else"):
        assert torch.equal(logits(load(source), idx), expected)
    patterns = ("*.json", "*.safetensors")
    assert asked == [("openai-community/gpt2", patterns), ("someone/else", patterns)]
    shorter = load("gpt2", block_size=16)  # the first positions
    assert torch.equal(logits(shorter, idx), expected)


def test_a_failed_download_is_one_line(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("no network\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"^hf:a/b: cannot be downloaded \(OSError: no network\)$"):
        load("hf:a/b")


YARN = dict(rope_type="yarn", factor=2.0)
LINEAR = dict(type="linear", factor=2.0)
SLIDING = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("llama", dict(model_type="mamba"), "model_type='mamba': must be one of gpt2, llama"),
        ("llama", dict(model_type=GONE, architectures=GONE), "model_type=None: must be one of"),
        ("llama", dict(attention_bias=True), "attention_bias=True: must be False"),
        ("llama", dict(mlp_bias=True), "mlp_bias=True: must be False"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu': must be 'silu'"),
        ("llama", dict(rope_parameters=YARN), "rope_scaling='yarn': must be default or llama3"),
        ("llama", dict(rope_parameters=None, rope_scaling=LINEAR), "rope_scaling='linear'"),
        ("llama", dict(sliding_window=8), "sliding_window=8: must be null"),
        ("llama", dict(hidden_size=GONE), "hidden_size is missing"),
        ("qwen3", dict(layer_types=SLIDING), "sliding_attention.*: must be full_attention"),
        ("gpt2", dict(activation_function="relu"), "activation_function='relu': must be one of"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx=True"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(name, fields, message, tmp_path):
    reference(name).save_pretrained(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    "make, fields, message",
    [
        (huginn, dict(injection_type="gate"), "injection_type='gate': must be one of linear, add"),
        (huginn, dict(block_class_name="PreNorm"), "block_class_name='PreNorm': must be 'Sandwich"),
        (huginn, dict(state_init="unit"), "state_init='unit': must be one of like-init, zero"),
        (huginn, dict(test_time_noise=0.1), "test_time_noise=0.1: must be 0"),
        (huginn, dict(num_key_value_heads=1), "n_kv_head=1: must be n_head=3 with qk_bias"),
        (huginn, dict(n_layers_in_recurrent_block=0), "recurrent_block=0: must be at least 1"),
        (parcae, dict(recurrent_embedding_dimension=32), "recurrent_embedding_dimension=32"),
        (parcae, dict(rope_settings=dict(use_rope=False)), "rope_settings=.*use_rope"),
        (parcae, dict(qk_bias=True), "qk_bias=True: must be false"),
        (ouro, dict(hidden_act="relu"), "hidden_act='relu': must be 'silu'"),
    ],
)
def test_looped_models_beyond_ours_are_refused(make, fields, message, tmp_path):
    change(make(tmp_path), **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights, up = load_file(path), "model.layers.2.mlp.up_proj.weight"
    without_up = {name: tensor for name, tensor in weights.items() if name != up}
    without_head = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    extra = {"model.layers.0.extra.weight": torch.ones(2)}
    for changed, message in [
        (without_up, rf"{up} is missing, expected \(48, 32\)"),
        (weights | extra, r"extra.weight is \(2,\), expected none"),
        (weights | {up: torch.ones(48, 31)}, rf"{up} is \(48, 31\), expected \(48, 32\)"),
        (without_head, "lm_head.weight is missing"),
    ]:
        save_file(changed, path)
        for options in ({}, dict(n_prelude=1, n_block=1, n_coda=1)):
            with pytest.raises(ValueError, match=message):
                load(tmp_path, **options)


def test_damaged_and_pickled_weights_are_refused(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no .*safetensors; pickled weights .* are not read"):
        load(tmp_path)


def test_shards_outside_the_folder_are_not_read(tmp_path):
    folder = tmp_path / "a"
    reference("llama").save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="elsewhere.safetensors cannot be read"):
        load(folder)


# -----------------------------------------------------------------------------
# checkpoints of earlier versions


def old_checkpoint(**fields):
    """Return a checkpoint dict with further fields in its model_args, and its model."""
    model = build(spread=0.1)
    args = vars(model.config) | fields
    return {"model": model.state_dict(), "model_args": args, "iter_num": 1}, model


@pytest.mark.parametrize("name, default", families.DROPPED.items())
def test_a_dropped_field_is_ignored_at_its_default(name, default, tmp_path):
    ckpt, model = old_checkpoint(**{name: default})
    expected = logits(model, tokens())
    assert torch.equal(logits(pretrained.build(ckpt), tokens()), expected)
    export(model, tmp_path)
    change_gpt(tmp_path, **{name: default})
    assert torch.equal(logits(load(tmp_path), tokens()), expected)


def test_a_dropped_option_that_was_used_is_refused_by_name(tmp_path):
    ckpt, model = old_checkpoint(embedding_norm=True)
    message = "embedding_norm=True: must be False, GPTConfig no longer has this option"
    with pytest.raises(ValueError, match=f"^{message}$"):
        pretrained.build(ckpt)
    export(model, tmp_path)
    change_gpt(tmp_path, embedding_norm=True)
    with pytest.raises(ValueError, match=f": {message}$"):
        load(tmp_path)


def test_unknown_fields_are_not_guessed(tmp_path):
    ckpt, model = old_checkpoint(n_expert=8)
    with pytest.raises(ValueError, match="model_args has n_expert, which GPTConfig does not know"):
        pretrained.build(ckpt)
    export(model, tmp_path)
    change_gpt(tmp_path, n_expert=8)
    with pytest.raises(ValueError, match="config.json has n_expert, which GPTConfig does not know"):
        load(tmp_path)


# -----------------------------------------------------------------------------
# nanoLOOP, written out from its documented keys

NANOLOOP = dict(
    block_size=16,
    vocab_size=61,
    n_prelude=1,
    n_block=2,
    n_coda=2,
    n_loop=3,
    n_head=4,
    n_embd=32,
    dropout=0.0,
)


def nanoloop(injection, bias):
    """Return random tensors under nanoLOOP's names."""
    d, generator = 32, torch.Generator().manual_seed(3)

    def random(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    weights = {
        "transformer.wte.weight": random(61, d),
        "transformer.wpe.weight": random(16, d),
        "transformer.ln_f.weight": 1 + random(d),
        "norm_recur.weight": 1 + random(d),
    }
    if injection != "passthrough":
        weights["inject.weight"] = random(d, 2 * d)
    for block in ("prelude.0", "recur.0", "recur.1", "coda.0", "coda.1"):
        name = f"transformer.{block}"
        weights[f"{name}.attn.c_attn.weight"] = random(3 * d, d)
        weights[f"{name}.attn.c_proj.weight"] = random(d, d)
        weights[f"{name}.mlp.c_fc.weight"] = random(4 * d, d)
        weights[f"{name}.mlp.c_proj.weight"] = random(d, 4 * d)
        weights |= {f"{name}.ln_{n}.weight": 1 + random(d) for n in (1, 2)}
    if bias:
        matrices = [name for name in weights if any(part in name for part in (".c_", "inject"))]
        weights |= {name.replace("weight", "bias"): random(len(weights[name])) for name in matrices}
    return weights


def nanoloop_logits(w, idx, n_loop):
    """Return nanoLOOP's logits of idx, written out."""
    eps = 1.1920929e-07

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def attention(x, name):
        qkv = linear(x, f"{name}.c_attn").split(32, -1)
        q, k, v = (part.view(*part.shape[:2], 4, 8).transpose(1, 2) for part in qkv)
        future = torch.ones(idx.size(1), idx.size(1)).triu(1).bool()
        scores = (q @ k.mT / 8**0.5).masked_fill(future, -math.inf)
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.c_proj")

    def block(x, name):
        x = x + attention(norm(x, f"{name}.ln_1"), f"{name}.attn")
        inner = F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        return x + linear(inner, f"{name}.mlp.c_proj")

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)]
    e = block(x, "transformer.prelude.0")
    s = e
    for _ in range(n_loop):
        u = linear(torch.cat((e, s), -1), "inject") if "inject.weight" in w else s
        s = norm(block(block(u, "transformer.recur.0"), "transformer.recur.1"), "norm_recur")
    x = norm(block(block(s, "transformer.coda.0"), "transformer.coda.1"), "transformer.ln_f")
    return x @ w["transformer.wte.weight"].T


@pytest.mark.parametrize(
    "injection, bias, prefix",
    [("inject", True, ""), ("inject", False, "_orig_mod."), ("passthrough", False, "")],
)
def test_nanoloops_checkpoint_opens_as_it_is(injection, bias, prefix, tmp_path):
    weights = nanoloop(injection, bias)
    stored = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    ckpt = {
        "model": {prefix + name: tensor for name, tensor in stored.items()},
        "model_args": dict(**NANOLOOP, bias=bias, bptt_k=None, input_injection=injection),
        "iter_num": 1,
        "optimizer": {},
        "best_val_loss": 1.0,
        "config": {},
    }
    torch.save(ckpt, tmp_path / "ckpt.pt")
    model = load(tmp_path)
    assert model.config.n_loop == 3 and model.config.bptt_k == 0
    for n_loop in (1, 3):
        expected = nanoloop_logits(weights, tokens(), n_loop)
        assert_same_logits(logits(model, tokens(), n_loop=n_loop), expected)


def test_nanoloops_random_start_and_truncation():
    weights = nanoloop("inject_random", False)
    args = dict(**NANOLOOP, bias=False, bptt_k=2, input_injection="inject_random")
    config = pretrained.build({"model": weights, "model_args": args}).config
    assert (config.input_injection, config.state_init, config.bptt_k) == ("inject", "noise", 2)


# -----------------------------------------------------------------------------
# folding


def cut(their_model, layers):
    """Return a model of the reference library with these layers alone."""
    body = their_model.transformer if hasattr(their_model, "transformer") else their_model.model
    name = "h" if hasattr(body, "h") else "layers"
    old = getattr(body, name)
    setattr(body, name, torch.nn.ModuleList(old[i] for i in layers))
    their_model.config.num_hidden_layers = len(layers)
    return their_model


FOLDED_SOURCES = ("gpt2, exact gelu", "llama", "olmo2")
FOLDS = [  # (n_prelude, n_block, n_coda), layers of the source
    ((1, 1, 1), (0, 2, 3)),
    ((0, 3, 0), (0, 2, 3)),
    ((1, 2, 1), (0, 1, 2, 3)),
    ((1, 1, 0), (3, 0)),
]


@pytest.mark.parametrize("name", FOLDED_SOURCES)
@pytest.mark.parametrize("sizes, layers", FOLDS)
def test_a_folded_model_at_one_loop_is_its_source_cut(name, sizes, layers, tmp_path):
    their_model, idx = reference(name, use_cache=False), tokens()
    their_model.save_pretrained(tmp_path)
    expected = reference_logits(cut(their_model, layers), idx)
    scale = expected.abs().max()
    fold = dict(zip(("n_prelude", "n_block", "n_coda"), sizes))
    chosen = dict(layers=layers) if layers == (3, 0) else {}  # the others are evenly spaced
    model = load(tmp_path, **chosen, **fold, n_loop=1)
    assert_close(logits(model, idx) / scale, expected / scale)
    assert torch.equal(logits(model, idx), logits(load(tmp_path, layers=layers), idx))
    for injection in ("inject", "passthrough", "residual"):
        options = dict(input_injection=injection, loop_embedding="learned", loop_exit="linear")
        if injection == "residual":
            options["residual_share"] = 1e-9
        folded = load(tmp_path, layers=layers, **fold, **options, n_loop=4)
        assert_close(logits(folded, idx, n_loop=1) / scale, expected / scale)
        if injection != "inject":  # which begins by returning e in every loop
            difference = (logits(folded, idx) - expected).abs() / scale
            assert difference.max() > 1e-3


EXACT_STARTS = {  # {input_injection: values of state_init from which one loop is the source}
    "passthrough": ("input",),
    "add": ("zero",),
    "inject": ("input", "zero", "noise", "hash"),
    "inject_bias": ("input", "zero", "noise", "hash"),
    "diagonal": ("input", "zero"),
    "orthogonal": ("input", "zero"),
    "residual": (),
}
ANNOUNCED = {  # what is allowed without being exact: the line on stderr
    **{
        (injection, start): f"at one loop not the source: state_init={start}\n"
        for injection in ("add", "diagonal", "orthogonal")
        for start in ("noise", "hash")
    },
    ("residual", "input"): (
        "at one loop not the source: input_injection=residual adds 0.1 of the input\n"
    ),
}


@pytest.mark.parametrize("loop_norm", TABLES["loop_norm"])
@pytest.mark.parametrize("start", TABLES["state_init"])
@pytest.mark.parametrize("injection", EXACT_STARTS)
def test_one_loop_is_the_source_or_refused_or_announced(
    injection, start, loop_norm, tmp_path, capsys
):
    source = build(n_layer=4, spread=0.2, bias=False)
    export(source, tmp_path)
    fold = dict(n_prelude=1, n_block=1, n_coda=1, n_loop=3)
    options = dict(input_injection=injection, state_init=start, loop_norm=loop_norm)
    exact = loop_norm == "none" and start in EXACT_STARTS[injection]
    announced = loop_norm == "none" and (injection, start) in ANNOUNCED
    if not exact and not announced:
        with pytest.raises(ValueError, match="must be (none|zero|input|used with)"):
            load(tmp_path, **fold, **options)
        return
    folded = load(tmp_path, **fold, **options)
    expected, idx = logits(load(tmp_path, layers=(0, 2, 3)), tokens()), tokens()
    difference = (logits(folded, idx, n_loop=1) - expected).abs().max()
    assert (difference < 1e-5) == exact, difference
    assert capsys.readouterr().err == ANNOUNCED.get((injection, start), "")


def test_every_injection_has_a_place_in_the_law_above():
    assert EXACT_STARTS.keys() == TABLES["input_injection"].keys()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(input_injection="add"), "state_init='input': must be zero with input_injection=add"),
        (dict(input_injection="residual", state_init="zero"), "state_init='zero': must be input"),
        (dict(loop_norm="rmsnorm"), "loop_norm='rmsnorm': must be none so that one loop is the so"),
        (dict(loop_entry="rmsnorm"), "loop_entry='rmsnorm': must be none"),
        (dict(loop_exit="final_norm"), "loop_exit='final_norm': must be linear, none so that"),
    ],
)
def test_an_option_with_which_one_loop_is_not_the_source_is_refused(options, message, tmp_path):
    export(build(n_layer=4), tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, n_block=2, **options)
    assert "\n" not in str(error.value)
    load(tmp_path, n_block=2, use_model_baseline=True, **options)  # nothing is looped


def test_the_looped_gpt2_config_begins_as_its_source(tmp_path):
    path = ROOT / "config/train_gpt2_looped.py"
    fields = GPTConfig.__dataclass_fields__
    options = {name: v for name, v in runpy.run_path(str(path)).items() if name in fields}
    options |= dict(n_head=4, n_embd=32, block_size=16)
    model, idx = build(n_layer=12, spread=0.2), tokens()
    export(model, tmp_path)
    without_biases = load(tmp_path, layers=(0, 1, 3, 5, 7, 9, 10, 11))
    with torch.no_grad():
        for name, p in without_biases.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    folded = load(tmp_path, drop_weights=True, **options)
    assert_same_logits(logits(folded, idx, n_loop=1), logits(without_biases, idx))


def test_what_cannot_be_folded(tmp_path):
    reference("llama").save_pretrained(tmp_path / "llama")
    for options, message in [
        (
            dict(n_prelude=2, n_block=1, n_coda=2),
            "n_block=1: must be at most 0, the layers between",
        ),
        (dict(n_block=2, layers=(0, 1, 2)), "must be 2 numbers below 4"),
        (dict(n_block=2, layers=(0, 4)), "must be 2 numbers below 4"),
        (dict(n_loop=2), "n_loop=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "llama", **options)
    with pytest.raises(ValueError, match=r"layers=\(0,\): must be \(\), since only plain models"):
        load(ouro(tmp_path / "ouro"), layers=(0,))


def test_smollm2_folded_to_a_quarter():
    """SmolLM2-360M, 32 layers, as 2 + 4 x 7 + 2."""
    config_json = dict(
        model_type="llama",
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=100000,
        tie_word_embeddings=True,
    )
    source = GPTConfig(**families.read_config(families.family_of(config_json), config_json))
    overrides = dict(n_prelude=2, n_block=4, n_coda=2, n_loop=7)
    config, layers, _ = pretrained.fold(source, (), overrides)
    with torch.device("meta"):
        before, after = GPT(source), GPT(config)
    assert layers == (0, 1, 5, 12, 19, 26, 30, 31)
    assert config.n_effective == source.n_effective == 32

    def count(module):
        return sum(p.numel() for p in module.parameters())

    block = 960 * (15 + 2 * 5) * 64 + 960 * 960 + 3 * 960 * 2560 + 2 * 960
    assert block == 9_832_320
    assert count(before.transformer.h) == 32 * block and count(after.transformer.h) == 8 * block
    assert before.get_num_params() == 361_821_120
    loop = count(after.transformer.loops)
    assert loop == 2 * 960 * 960 and after.get_num_params() == 361_821_120 - 24 * block + loop


def retrofitted(path, kind, their_model, layers):
    """Write blocks of a reference model in Huginn's frame, adapter [0 | I] (arXiv 2511.07384)."""
    w = their_model.state_dict()
    weights = {
        "transformer.wte.weight": w["model.embed_tokens.weight"].clone(),
        "lm_head.weight": w["lm_head.weight"].clone(),
        "transformer.ln_f.weight": w["model.norm.weight"],
        "transformer.adapter.weight": torch.eye(32, 64).roll(32, 1),
    }
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    if kind == "llama":
        norms = ("input_layernorm", "post_attention_layernorm")
    for i, section in zip(layers, ("prelude.0", "core_block.0", "coda.0")):
        old, new = f"model.layers.{i}", f"transformer.{section}"
        qkv = [w[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"]
        gate_up = [w[f"{old}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        weights[f"{new}.attn.Wqkv.weight"] = torch.cat(qkv)
        weights[f"{new}.attn.proj.weight"] = w[f"{old}.self_attn.o_proj.weight"]
        weights[f"{new}.mlp.fc.weight"] = torch.cat(gate_up)
        weights[f"{new}.mlp.proj.weight"] = w[f"{old}.mlp.down_proj.weight"]
        weights[f"{new}.norm_1.weight"] = w[f"{old}.{norms[0]}.weight"]
        weights[f"{new}.norm_2.weight"] = w[f"{old}.{norms[1]}.weight"]
        if kind == "olmo":
            for part in ("q_norm", "k_norm"):
                weights[f"{new}.attn.{part}.weight"] = w[f"{old}.self_attn.{part}.weight"]
    rope = {"rope_base": 10000.0}
    if kind == "llama":
        rope = {"rope_theta": 500.0, "rope_scaling": LLAMA3}
    config_json = {
        "model_type": "huginn_raven",
        "architectures": ["RavenForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": f"raven_modeling_minimal_{kind}.RavenForCausalLM"},
        "n_embd": 32,
        "n_heads": 4,
        "num_key_value_heads": 2,
        "qk_bias": False,
        "intermediate_size": 48,
        "norm_eps": their_model.config.rms_norm_eps,
        "vocab_size": 61,
        "tie_embeddings": False,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 1,
        "n_layers_in_coda": 1,
        "mean_recurrence": 4,
        "block_size": 32,
        "init_values": {"embed_scale": 1.0},
        "block_class_name": "SandwichBlock",
        **rope,
    }
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    return folder_of(path, config_json, weights)


@pytest.mark.parametrize("kind, name", [("llama", "llama 3, tied"), ("olmo", "olmo2")])
def test_a_retrofitted_model_at_one_loop_is_its_source_cut(kind, name, tmp_path):
    their_model, idx, layers = reference(name), tokens(), (0, 2, 3)
    folder = retrofitted(tmp_path / kind, kind, their_model, layers)
    expected = reference_logits(cut(their_model, layers), idx)
    assert_same_logits(logits(load(folder), idx, n_loop=1), expected)


def test_our_own_plain_checkpoint_is_folded_too(tmp_path):
    model, idx = build(n_layer=4, spread=0.2), tokens()
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config), "iter_num": 1}
    torch.save(ckpt, tmp_path / "ckpt.pt")
    three_layers = logits(load(tmp_path, layers=(0, 2, 3)), idx)
    folded = load(tmp_path, n_prelude=1, n_block=1, n_coda=1, n_loop=5)
    assert torch.equal(logits(folded, idx, n_loop=1), three_layers)
    grouped = load(tmp_path, loop_groups=((1, 2),), n_loop=5)
    assert torch.equal(logits(grouped, idx, n_loop=1), logits(model, idx))


@pytest.mark.parametrize("options", [dict(exit_gate="mean_state"), dict(n_ahead=3)], ids=str)
def test_a_finished_model_may_be_given_a_gate_or_more_heads(tmp_path, options):
    """They begin so that nothing changes, and are kept by export and load."""
    model, idx = build(spread=0.1), tokens()
    export(model, tmp_path / "old")
    more = load(tmp_path / "old", **options)
    assert torch.equal(more(idx, idx)[0], model(idx, idx)[0])
    added = [p for name, p in more.named_parameters() if name.startswith(("exit_gate.", "ahead."))]
    assert added and not any(p.any() for p in added)
    with torch.no_grad():
        for p in added:
            p.normal_()
    export(more, tmp_path / "new")
    assert_same_state(more, load(tmp_path / "new"))


# -----------------------------------------------------------------------------
# weights that a model has no place for

FOLD = dict(n_prelude=1, n_block=1, n_coda=1, n_loop=2)
DROPS = [  # options, number of tensors without a place in a plain model of 4 blocks, first of them
    (dict(bias=False), 4 * 6 + 1, "transformer.h.0.attn.c_attn.bias"),
    (dict(position="rope"), 1, "transformer.wpe.weight"),
    (dict(norm="rmsnorm"), 4 * 2 + 1, "transformer.h.0.ln_1.bias"),
    (dict(final_norm=False), 2, "transformer.ln_f.bias"),
]


@pytest.mark.parametrize("options, count, first", DROPS, ids=str)
@pytest.mark.parametrize("fold", [{}, FOLD], ids=["plain", "folded"])
@pytest.mark.parametrize("kind", ["ours", "gpt2"])
def test_no_weight_is_dropped_unasked(kind, fold, options, count, first, tmp_path, capsys):
    model = build(n_layer=4, spread=0.2)
    if kind == "gpt2":
        export(model, tmp_path)
    else:
        ckpt = {"model": model.state_dict(), "model_args": vars(model.config), "iter_num": 1}
        torch.save(ckpt, tmp_path / "ckpt.pt")
    if fold and count > 2:  # three of the four blocks
        count = count // 4 * 3 + 1
    name, value = next(iter(options.items()))
    before = getattr(model.config, name)
    shown = f"({first}, ...)" if count > 1 else f"({first})"
    what = f"{count} tensors? that the new model has no place for {re.escape(shown)}"
    message = rf"drop_weights=False: must be True to drop {what}, {name}={value} where .* {before}$"
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, **fold, **options)
    assert "\n" not in str(error.value)
    changed = load(tmp_path, drop_weights=True, **fold, **options)
    assert re.fullmatch(f"dropped: {what}\n", capsys.readouterr().err)
    kept = model.state_dict()
    layers = (0, 2, 3) if fold else (0, 1, 2, 3)
    for name, tensor in changed.state_dict().items():
        block, part = families.split_name(name)
        theirs = name if block is None else f"transformer.h.{layers[block]}.{part}"
        assert name.startswith("transformer.loops.") or torch.equal(tensor, kept[theirs])


def test_what_a_changed_model_has_no_place_for_is_never_silent(tmp_path, capsys):
    untied, looped = tmp_path / "untied", tmp_path / "looped"
    export(build(n_layer=2, tie_weights=False), untied)
    with pytest.raises(ValueError, match=r"1 tensor that .* \(lm_head.weight\), tie_weights=True"):
        load(untied, tie_weights=True)
    export(build(spread=0.1), looped)
    with pytest.raises(ValueError, match=r"2 tensors that .* \(transformer.loops.0.inject.bias, "):
        load(looped, input_injection="passthrough")
    assert not capsys.readouterr().err
    load(looped, input_injection="passthrough", drop_weights=True)
    assert capsys.readouterr().err.startswith("dropped: 2 tensors that")


def test_whole_layers_and_unknown_tensors_are_not_dropped_for_the_asking(tmp_path):
    export(build(n_layer=4), tmp_path)
    with pytest.raises(ValueError, match="h.2.attn.c_attn.bias is .*n_layer=2 where .* has 4"):
        load(tmp_path, n_layer=2, drop_weights=True)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "transformer.extra": torch.ones(2)}, path)
    for options in ({}, FOLD):
        with pytest.raises(ValueError, match="transformer.extra is .*, expected none"):
            load(tmp_path, drop_weights=True, **options)


def test_a_folded_source_says_what_does_not_fit_and_not_how_it_is_folded(tmp_path):
    export(build(n_layer=4), tmp_path)
    with pytest.raises(ValueError) as error:
        load(tmp_path, **FOLD, max_loops=8, loop_norm="none", bias=False)
    assert str(error.value).endswith("bias=False where the checkpoint has True")


# -----------------------------------------------------------------------------
# sources to train on


def test_load_run_passes_everything_on_and_reads_a_given_checkpoint(tmp_path, monkeypatch, capsys):
    model = build(n_layer=4, spread=0.2)
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    run, exported = tmp_path / "run", tmp_path / "exported"
    run.mkdir()
    ckpt = {"model": average, "training_model": model.state_dict(), "iter_num": 1}
    ckpt |= {"model_args": vars(model.config)}
    torch.save(ckpt, run / "ckpt.pt")
    export(model, exported)
    layers, options = (3, 0, 1), dict(bias=False, n_prelude=1, n_block=1, n_coda=1)
    with pytest.raises(ValueError, match="drop_weights=False"):
        pretrained.load_run(exported, False, layers=layers, **options)
    for source, resume, given in [
        (exported, False, None),
        (run, True, None),
        (run / "ckpt.pt", True, None),
        ("is not read", True, ckpt),
    ]:
        found, loaded = pretrained.load_run(source, resume, given, layers, True, **options)
        assert capsys.readouterr().err.startswith("dropped: ")
        for i in range(3):
            old, new = model.transformer.h[layers[i]], loaded.transformer.h[i]
            assert torch.equal(old.mlp.c_fc.weight, new.mlp.c_fc.weight)
        if source != exported:
            assert_same_tensors(found["averaged_model"], average)
            assert_same_tensors(found["model"], model.state_dict())
    assert ckpt["model"] is average and "averaged_model" not in ckpt
    found, loaded = pretrained.load_run("is not read", False, ckpt)
    assert_same_tensors(loaded.state_dict(), average)


# -----------------------------------------------------------------------------
# exporting


def assert_same_state(model, other):
    assert_same_tensors(model.state_dict(), other.state_dict())


def assert_same_tensors(old, new):
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name], new[name]), name


LLAMA_BLOCKS = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False)
PARCAE_BLOCKS = dict(
    norm="rmsnorm",
    norm_eps=1e-5,
    position="rope",
    mlp="relu2",
    mlp_scale=0.5,
    bias=False,
    value_embedding=True,
    input_injection="diagonal",
    loop_norm="none",
    loop_exit="linear",
)
OURS = {
    "plain": dict(n_layer=2),
    "plain, exact": dict(n_layer=2, mlp="gelu", dropout=0.1, loop_norm="none", rope_base=500.0),
    "no bias": dict(n_layer=2, bias=False),
    "llama": dict(
        n_layer=2,
        **LLAMA_BLOCKS,
        n_kv_head=2,
        n_hidden=48,
        tie_weights=False,
        rope_scaling=(8.0, 1.0, 4.0, 8.0),
        rope_base=500.0,
    ),
    "qwen3": dict(n_layer=2, **LLAMA_BLOCKS, qk_norm="head", head_size=16, norm_eps=1e-6),
    "olmo2": dict(n_layer=2, **LLAMA_BLOCKS, qk_norm="width", norm_place="post", n_kv_head=1),
    "baseline": dict(n_layer=4, n_block=4, use_model_baseline=True),
    "prelude, core, coda": dict(),
    "groups": dict(n_layer=4, loop_groups=((0, 1), (3,)), loop_counts=(2, 3)),
    "huginn": dict(
        **LLAMA_BLOCKS,
        norm_eps=1e-6,
        norm_place="sum",
        qk_bias=True,
        embedding_scale=32**0.5,
        input_injection="inject",
        state_init="noise",
        loop_norm="none",
        loop_exit="final_norm",
        init="small",
        loop_sampling="poisson",
    ),
    "huginn, fewer heads of keys": dict(
        **LLAMA_BLOCKS,
        norm_place="sum",
        qk_bias=True,
        n_kv_head=2,
        state_init="noise",
        loop_norm="none",
        loop_exit="final_norm",
    ),
    "huginn, nothing looped": dict(
        n_layer=12,
        **LLAMA_BLOCKS,
        n_block=12,
        norm_place="sum",
        qk_bias=True,
        loop_exit="final_norm",
        use_model_baseline=True,
    ),
    "retrofitted": dict(
        **LLAMA_BLOCKS,
        n_kv_head=2,
        input_injection="inject",
        state_init="noise",
        loop_norm="none",
        tie_weights=False,
    ),
    "ouro": dict(
        n_prelude=0,
        n_coda=0,
        **LLAMA_BLOCKS,
        norm_place="branch",
        final_norm=False,
        input_injection="passthrough",
        exit_gate="state",
        tie_weights=False,
        n_hidden=48,
    ),
    "nanbeige": dict(
        n_prelude=0,
        n_coda=0,
        **LLAMA_BLOCKS,
        final_norm=False,
        input_injection="passthrough",
        n_kv_head=2,
    ),
    "parcae": dict(
        **PARCAE_BLOCKS,
        qk_norm="rotated",
        state_init="noise",
        loop_entry="rmsnorm",
        init="orthogonal",
        rope_base=50000.0,
    ),
    "parcae, capped": dict(
        **PARCAE_BLOCKS, state_init="zero", logit_softcap=15.0, n_prelude=2, n_coda=0
    ),
    "parcae, odd": dict(**PARCAE_BLOCKS, state_init="zero", n_prelude=2, n_block=1),
    "mla": dict(
        attention="mla",
        position="rope",
        norm="weightless",
        loop_embedding="sinusoidal",
        document_separator=3,
    ),
    "everything else": dict(
        loop_embedding="learned",
        loop_norm="weightless",
        input_injection="residual",
        mlp="relu2",
        position="none",
        loop_entry="rmsnorm",
        exit_gate="state",
        tie_weights=False,
        logit_softcap=5.0,
    ),
}
FORMATS = {  # model_type of the exported config.json; of the others nanorecur
    "plain": "gpt2",
    "plain, exact": "gpt2",
    "baseline": "gpt2",
    "llama": "llama",
    "qwen3": "qwen3",
    "olmo2": "olmo2",
    "huginn": "huginn_raven",
    "retrofitted": "huginn_raven",
    "ouro": "ouro",
    "nanbeige": "nanbeige",
    "parcae": "parcae",
    "parcae, capped": "parcae",
}


@pytest.mark.parametrize("name", OURS)
def test_export_and_load_are_the_identity(name, tmp_path):
    model = build(spread=0.2, **OURS[name])
    tokenizer = {"tokenizer": "bytes"}
    export(model, tmp_path, tokenizer)
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    files |= {"tokenizer.json", "tokenizer_config.json"}
    if name not in FORMATS:
        files |= {"model.py", "modeling_nanorecur.py"}
    assert {path.name for path in tmp_path.iterdir()} == files
    config_json = json.loads((tmp_path / "config.json").read_text())
    assert config_json["model_type"] == FORMATS.get(name, "nanorecur")
    assert config_json["tokenizer"] == pretrained.tokenizer_of(tmp_path) == tokenizer
    again = load(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert_same_state(model, again)
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tie_weights
    if name not in FORMATS:
        assert again.config == model.config
    export(again, tmp_path / "twice")
    first, second = load_file(tmp_path / "model.safetensors"), tmp_path / "twice"
    assert_same_tensors(first, load_file(second / "model.safetensors"))


@pytest.mark.parametrize("make", [huginn, ouro, parcae])
def test_a_released_folder_comes_back_as_it_was(make, tmp_path):
    source, copy = make(tmp_path / "source"), tmp_path / "copy"
    export(load(source), copy)
    stored, written = load_file(source / "model.safetensors"), load_file(copy / "model.safetensors")
    for name in ("freqs_cis", "lm_head.weight"):  # a table, and the embedding where it is tied
        if name not in written:
            stored.pop(name, None)
    assert_same_tensors(stored, written)
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, copy))
    differing = {name for name in new if name in old and old[name] != new[name]}
    assert differing <= {"auto_map"}


@pytest.mark.parametrize("name", ["plain", "plain, exact", "llama", "qwen3", "olmo2"])
def test_an_export_opens_in_the_reference_library(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model, idx = build(spread=0.2, **OURS[name]), tokens()
    export(model, tmp_path, {"tokenizer": "bytes"})
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    their_model, report = opened
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], problem
    assert_same_logits(logits(model, idx), reference_logits(their_model.eval(), idx))


HF_TOKENIZER = {  # of tokenizers, as its own library writes it
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "é": 1, "</s>": 2}, "unk_token": "a"},
}


def test_a_hugging_face_tokenizer_is_kept_in_its_own_file(tmp_path):
    theirs, ours, again = tmp_path / "theirs", tmp_path / "ours", tmp_path / "again"
    reference("llama").save_pretrained(theirs)
    assert pretrained.tokenizer_of(theirs) is None
    (theirs / "tokenizer.json").write_text(json.dumps(HF_TOKENIZER, ensure_ascii=False), "utf-8")
    tokenizer = pretrained.tokenizer_of(theirs)
    assert tokenizer["tokenizer"] == "huggingface" and tokenizer["separator"] == 2
    assert pretrained.tokenizer_of(f"hf:{theirs}") == tokenizer
    export(load(theirs), ours, tokenizer)
    assert json.loads((ours / "tokenizer.json").read_text("utf-8")) == HF_TOKENIZER
    kept = json.loads((ours / "config.json").read_text())["tokenizer"]
    assert kept == {k: v for k, v in tokenizer.items() if k != "tokenizer_json"}
    assert pretrained.tokenizer_of(ours) == tokenizer and "tokenizer_json" in tokenizer
    run = Run("pretrained.py", "export", f"--source={ours}", f"--to={again}")
    assert run.code == 0, run.err
    assert pretrained.tokenizer_of(again) == tokenizer
    export(load(ours), again)  # another one, or none, takes the old one's place
    assert pretrained.tokenizer_of(again) is None


def test_the_tokenizer_of_a_hub_name_is_looked_for_where_its_weights_are(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(HF_TOKENIZER), "utf-8")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: tmp_path)
    for source in ("gpt2", "hf:someone/else"):
        assert pretrained.tokenizer_of(source) == pretrained.tokenizer_of(tmp_path)
    assert pretrained.tokenizer_of(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    "name",
    ["ckpt.pt", "ckpt_prev.pt", "ckpt.json", "log.jsonl", "model-00001-of-00002.safetensors"],
)
def test_export_damages_no_run_and_no_other_weights(name, tmp_path):
    for file in (name, "config.json"):
        (tmp_path / file).write_text("kept")
    with pytest.raises(ValueError, match=f"must be another one, since it holds {name}"):
        export(build(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "config.json"])
    assert {path.read_text() for path in tmp_path.iterdir()} == {"kept"}


def test_export_writes_again_over_an_earlier_export(tmp_path):
    export(build(seed=1), tmp_path, {"tokenizer": "bytes"})
    (tmp_path / "model.safetensors.part").write_text("of a write that was killed")
    export(build(seed=2), tmp_path)
    assert_same_state(load(tmp_path), build(seed=2))


def test_an_export_that_dies_leaves_what_was_there(tmp_path, monkeypatch):
    export(build(seed=1), tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(build(seed=2), tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens()), logits(build(seed=1), tokens()))


def test_the_command(corpus, plain_run, tmp_path):
    folder, _ = plain_run
    out = tmp_path / "out"
    run = Run("pretrained.py", "export", f"--out_dir={folder}", f"--to={out}")
    assert run.code == 0, run.err
    meta = json.loads((corpus / "meta.json").read_text())
    config_json = json.loads((out / "config.json").read_text())
    assert config_json["model_type"] == "nanorecur"
    assert config_json["tokenizer"]["chars"] == meta["chars"]
    assert torch.equal(logits(load(out), tokens()), logits(load(folder), tokens()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export"], "to='': must be the folder to write"),
        (["import"], "command='import': must be export"),
        (["export", "--too=x"], "unknown option 'too', did you mean 'to'"),
        (["export", "--out_dir={}", "--to=x"], "{}: no such checkpoint; runs here: none"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, message, tmp_path):
    run = Run("pretrained.py", *[argument.format(tmp_path) for argument in arguments], cwd=tmp_path)
    assert run.code == 2 and run.err.count("\n") == 1, run.err
    assert message.format(tmp_path) in run.err


def test_a_run_that_is_missing_is_answered_with_those_that_lie_here(tmp_path):
    for name in ("out-b", "out-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ckpt.pt").write_bytes(b"")
        os.utime(tmp_path / name / "ckpt.pt", (0, 10 if name == "out-a" else 20))
    for arguments, name in [([], "out"), (["out-c"], "out-c"), (["--source=out-c"], "out-c")]:
        run = Run("pretrained.py", "export", *arguments, "--to=x", cwd=tmp_path)
        assert_refused(run, f"{name}: no such checkpoint; runs here: out-b, out-a")


@pytest.mark.parametrize(
    "name, words",
    [
        ("plain", "GPT-2's format; transformers and pretrained.load open it"),
        ("llama", "Llama's format; transformers and pretrained.load open it"),
        ("retrofitted", "Huginn's format; pretrained.load opens it"),
        (
            "mla",
            "nanoRecur's own format; transformers with trust_remote_code=True and pretrained.load"
            " open it",
        ),
    ],
)
def test_export_takes_any_source_and_says_what_opens_the_result(name, words, tmp_path):
    model, source, to = build(spread=0.2, **OURS[name]), tmp_path / "source", tmp_path / "to"
    export(model, source, {"tokenizer": "bytes"})
    run = Run("pretrained.py", "export", source, f"--to={to}")
    assert run.code == 0, run.err
    assert run.out == f"{to}: {words}\n"
    assert_same_state(load(to), model)
    assert pretrained.tokenizer_of(to) == {"tokenizer": "bytes"}
    named = Run("pretrained.py", "export", f"--source={source}", "--out_dir=no-run", f"--to={to}")
    assert named.code == 0 and named.out == run.out


def test_without_a_command_there_is_help():
    for arguments in ([], ["-h"], ["export", "--help"]):
        run = Run("pretrained.py", *arguments)
        assert run.code == 0 and "--out_dir" in run.out and not run.err


# -----------------------------------------------------------------------------
# memory

# ru_maxrss would be at least that of the process which started this one
MEASURE = """
import re, sys
import torch
torch.set_num_threads(1)
import pretrained, safetensors.torch

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])

torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
model = pretrained.load(sys.argv[1])
print((peak() - before) / sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_little_more_memory_than_the_model(dtype, tmp_path):
    sizes = dict(vocab_size=16000, n_layer=8, n_head=8, n_embd=768, n_kv_head=4, n_hidden=2048)
    config = GPTConfig(block_size=256, **sizes, **LLAMA_BLOCKS)
    weights = {}
    shapes = pretrained.meta_tensors(config)
    for piece in families.pieces(families.LLAMA, config, shapes, range(8)):
        weights[piece.theirs] = torch.ones(piece.shape, dtype=dtype)
    folder = folder_of(tmp_path, families.write_config(families.LLAMA, config), weights)
    command = [sys.executable, "-c", MEASURE, folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert 0.9 < float(run.stdout) < 1.15, run.stderr
