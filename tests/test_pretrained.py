"""Other people's weights in, ours out: the same numbers as the reference libraries and as the released modules."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Run, build, tokens, train
from safetensors.torch import load_file, save_file

import pretrained
from model import GPT, GPTConfig
from nanorecur.exit_rules import exit_distribution
from pretrained import export, load

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
REFERENCES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, exact gelu": (
        "GPT2",
        dict(**GPT2, activation_function="gelu", n_inner=40, layer_norm_epsilon=1e-3),
    ),
    "llama": ("Llama", SIZES),
    "llama 3, tied": (
        "Llama",
        dict(**SIZES, tie_word_embeddings=True, rope_parameters=dict(**LLAMA3, rope_theta=500.0)),
    ),
    "qwen3": (
        "Qwen3",
        dict(**SIZES, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
    "olmo2": ("Olmo2", dict(**SIZES, rms_norm_eps=1e-4)),
}


def reference(name, **changes):
    """A tiny random model of the reference library; norms and biases are random too, weights large enough to bend."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, sizes = REFERENCES[name]
    config = getattr(transformers, f"{kind}Config")(
        **{**sizes, **changes}, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def logits(model, idx, **options):
    with torch.no_grad():
        return model(idx, idx, **options)[0]


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, (
        f"max difference {(a - b).abs().max():.2e}"
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_a_folder_gives_the_reference_librarys_logits(name, tmp_path):
    theirs, idx = reference(name), tokens(2, 20)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert not ours.training and all(
        p.dtype == torch.float32 and p.requires_grad for p in ours.parameters()
    )
    with torch.no_grad():
        scale = max(1, theirs(idx).logits.abs().max())
        close(logits(ours, idx) / scale, theirs(idx).logits / scale)
        ours.config  # noqa: B018
    assert ours.get_num_params(non_embedding=False) == sum(p.numel() for p in theirs.parameters())


# -----------------------------------------------------------------------------
# golden vectors: tensors filled by a rule under the released names, numbers from the released modules


def filled(shapes):
    """Sorted by name, 0.1 sin(0.37 j + 1.3 i) at flat index j of tensor i, plus 1 in the weights of norms."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        w = 0.1 * torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + 1.3 * i)
        weights[name] = (
            (w + (len(shape) == 1 and ("norm" in name or "ln_" in name))).float().view(shape)
        )
    return weights


def folder_of(path, config, weights):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return path


def huginn(path):
    d, inner, V = 48, 64, 96
    shapes = {
        "transformer.wte.weight": (V, d),
        "transformer.adapter.weight": (d, 2 * d),
        "transformer.ln_f.weight": (d,),
    }
    for block in [
        "prelude.0",
        "prelude.1",
        *(f"core_block.{i}" for i in range(4)),
        "coda.0",
        "coda.1",
    ]:
        for part, shape in {
            **{f"norm_{n}.weight": (d,) for n in (1, 2, 3, 4)},
            "attn.Wqkv.weight": (3 * d, d),
            "attn.qk_bias": (2, 1, 3, 16),
            "attn.proj.weight": (d, d),
            "mlp.fc.weight": (2 * inner, d),
            "mlp.proj.weight": (d, inner),
        }.items():
            shapes[f"transformer.{block}.{part}"] = shape
    config = {
        "model_type": "huginn_raven",
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
        },
        "n_embd": d,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "block_size": 64,
        "vocab_size": V,
        "padding_multiple": 4096,
        "tie_embeddings": True,
        "intermediate_size": inner,
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
    weights = filled(shapes)
    return folder_of(
        path,
        config,
        {
            **weights,
            "freqs_cis": torch.zeros(1, 64, 1, 8, 2),
            "lm_head.weight": weights["transformer.wte.weight"].clone(),
        },
    )


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
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (inner, d),
            f"{layer}.mlp.up_proj.weight": (inner, d),
            f"{layer}.mlp.down_proj.weight": (d, inner),
        }
        norms = (
            "input_layernorm",
            "input_layernorm_2",
            "post_attention_layernorm",
            "post_attention_layernorm_2",
        )
        shapes |= {f"{layer}.{norm}.weight": (d,) for norm in norms}
    config = {
        "model_type": "ouro",
        "architectures": ["OuroForCausalLM"],
        "vocab_size": V,
        "hidden_size": d,
        "intermediate_size": inner,
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
    return folder_of(path, config, filled(shapes))


def parcae(path):
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
    for number, block in enumerate(
        f"{part}.{i}" for part in ("prelude", "core_block", "coda") for i in range(2)
    ):
        block = f"transformer.{block}"
        shapes |= {
            f"{block}.norm_1.weight": (d,),
            f"{block}.norm_2.weight": (d,),
            f"{block}.mlp.fc.weight": (inner, d),
            f"{block}.mlp.proj.weight": (d, inner),
        }
        shapes |= {
            f"{block}.attn.{part}.weight": (d, d) for part in ("c_q", "c_k", "c_v", "c_proj")
        }
        if number % 2:
            shapes |= {
                f"{block}.attn.ve_gate.weight": (2, 32),
                f"value_embeds.{number}.weight": (V, d),
            }
    assert len(shapes) == 61
    config = {
        "_class_name": "ParcaeConfig",
        "name": "small",
        "block_size": 32,
        "n_embd": d,
        "intermediate_size": inner,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": V,
        "padding_multiple": 64,
        "padded_vocab_size": V,
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
        "recurrent_embedding_dimension": d,
        "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 2,
        "mean_recurrence": 4,
        "mean_backprop_depth": 2,
        "sampling_scheme": "poisson-truncated-full",
        "recurrent_iteration_method": "per-sequence",
    }
    return folder_of(path, config, {**filled(shapes), "freqs_cis": torch.zeros(1, 32, 1, 16, 2)})


IDS = torch.tensor([[3, 17, 5, 90, 41, 8, 60]])


def golden(values, first, total=None, mean_abs=None, tolerance=1e-5):
    close(values[: len(first)], torch.tensor(first), tolerance)
    assert total is None or abs(values.sum() - total) < tolerance
    assert mean_abs is None or abs(values.abs().mean() - mean_abs) < tolerance


def test_huginn_golden_vectors(tmp_path):
    model = load(huginn(tmp_path), state_init="zero")
    assert model.config.n_loop == 32 and model.config.bptt_k == 8
    for n_loop, want in {
        1: ([0.026473, 0.034325, 0.005304, -0.029415, -0.032535, -0.000704], 0.046617, 0.023134),
        3: ([0.025201, 0.034189, 0.006449, -0.028218, -0.032573, -0.001936], 0.047315, 0.022763),
    }.items():
        golden(logits(model, IDS, n_loop=n_loop)[0, -1], *want)
    state = model.loops_representation(IDS, n_loop=3)[0][-1]
    with torch.no_grad():
        last = model.transformer.ln_f(state)[0, -1]
    golden(last, [1.433829, -1.484165, 0.273414, 1.051486, -1.369806, 0.545132])
    start = 0.5 * torch.sin(0.11 * torch.arange(7 * 48, dtype=torch.float64)).float().view(1, 7, 48)
    model.transformer.loops[0].init_state = lambda e, where: start
    golden(
        logits(model, IDS, n_loop=2).flatten(),
        [0.113093, 0.035001, -0.080691, -0.109701, -0.020866, 0.090384],
        -0.013744,
        0.054240,
    )
    assert load(tmp_path).config.state_init == "noise"


def test_ouro_golden_vectors(tmp_path):
    model = load(ouro(tmp_path))
    states = model.loops_representation(IDS)[0]
    wanted = [
        ([0.118343, 0.146648, 0.100923, 0.004250, -0.094569, -0.145647], 0.096814, None),
        ([-0.000949, 0.000775, 0.002108, 0.002377, 0.001445, -0.000216], None, None),
        ([-0.079020, -0.066399, -0.020258, 0.036110, 0.074248, 0.074905], None, None),
        ([-0.113890, -0.089950, -0.020601, 0.059148, 0.109037, 0.103883], -0.096784, 0.073123),
    ]
    with torch.no_grad():
        for n, (state, want) in enumerate(zip(states, wanted), 1):
            golden(model.lm_head(state)[0, -1], *want)
            golden(logits(model, IDS, n_loop=n)[0, -1], *want)
        golden(
            torch.sigmoid(model.exit_gate(torch.stack(states, -2)))[0, -1, :, 0],
            [0.487451, 0.523986, 0.542336, 0.549259],
        )
        p = exit_distribution(model, states)[0, -1]
    golden(p, [0.487451, 0.268568, 0.132320, 0.111661])
    assert int((p.cumsum(0) >= 0.6).int().argmax()) == 1


def test_parcae_golden_vectors(tmp_path):
    model = load(parcae(tmp_path), state_init="zero")
    for n_loop, want in {
        1: ([0.066299, 0.062542, -0.051566, -0.074690, 0.033972, 0.082692], 0.052112, 0.055053),
        3: ([0.059235, 0.071409, -0.042414, -0.081400, 0.023239, 0.086875], 0.045068, 0.055981),
    }.items():
        golden(logits(model, IDS, n_loop=n_loop)[0, -1], *want)
    assert model.config.n_loop == 4 and model.config.bptt_k == 2


# -----------------------------------------------------------------------------
# sources


def test_sharded_folders_hub_names_and_base_models(tmp_path, monkeypatch):
    theirs, idx = reference("gpt2, exact gelu"), tokens()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    theirs.transformer.save_pretrained(
        tmp_path / "base"
    )  # as the hub's gpt2 is: no "transformer." and masks inside
    weights = {
        **load_file(tmp_path / "base" / "model.safetensors"),
        "h.0.attn.bias": torch.ones(1, 1, 32, 32),
    }
    assert "wte.weight" in weights
    given = json.loads((tmp_path / "base" / "config.json").read_text()) | {
        "architectures": ["GPT2LMHeadModel"]
    }
    folder_of(tmp_path / "base", given, weights)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(tmp_path / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    want = logits(load(tmp_path / "sharded"), idx)
    close(want, theirs(idx).logits.detach(), 1e-3)
    for source in (f"hf:{tmp_path}/sharded", str(tmp_path / "base"), "gpt2", "hf:someone/else"):
        assert torch.equal(logits(load(source), idx), want)
    patterns = ("*.json", "*.safetensors")
    assert asked == [("openai-community/gpt2", patterns), ("someone/else", patterns)]
    assert torch.equal(logits(load("gpt2", block_size=16), idx), want), (
        "a shorter context is the first positions"
    )


def test_a_failed_download_is_one_line(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("no network\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"^hf:a/b: cannot be downloaded \(OSError: no network\)$"):
        load("hf:a/b")


def change(folder, **fields):
    given = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in given.items() if value != "gone"})
    )


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("llama", dict(model_type="mamba"), "model_type='mamba': must be one of gpt2, llama"),
        ("llama", dict(model_type="gone", architectures="gone"), "model_type=None: must be one of"),
        ("llama", dict(attention_bias=True), "attention_bias=True"),
        ("llama", dict(mlp_bias=True), "mlp_bias=True"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope_scaling='yarn'"),
        (
            "llama",
            dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)),
            "rope_scaling='linear'",
        ),
        ("llama", dict(sliding_window=8), "sliding_window=8"),
        ("llama", dict(hidden_size="gone"), "hidden_size is missing"),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        (
            "gpt2, exact gelu",
            dict(activation_function="relu"),
            "activation_function='relu': must be one of",
        ),
        (
            "gpt2, exact gelu",
            dict(scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx=True",
        ),
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
        (
            huginn,
            dict(block_class_name="TransformerPreNormBlock"),
            "block_class_name='TransformerPreNormBlock'",
        ),
        (huginn, dict(state_init="unit"), "state_init='unit'"),
        (huginn, dict(test_time_noise=0.1), "test_time_noise=0.1"),
        (parcae, dict(recurrent_embedding_dimension=32), "recurrent_embedding_dimension=32"),
        (parcae, dict(rope_settings=dict(use_rope=False)), "use_rope"),
        (ouro, dict(hidden_act="relu"), "hidden_act='relu'"),
    ],
)
def test_looped_models_beyond_ours_are_refused(make, fields, message, tmp_path):
    change(make(tmp_path), **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, up = load_file(path), "model.layers.2.mlp.up_proj.weight"
    for weights, message in [
        ({k: v for k, v in whole.items() if k != up}, f"{up} is missing, expected \\(48, 32\\)"),
        (
            {**whole, "model.layers.0.extra.weight": torch.ones(2)},
            r"extra.weight is \(2,\), expected none",
        ),
        ({**whole, up: torch.ones(48, 31)}, rf"{up} is \(48, 31\), expected \(48, 32\)"),
        ({k: v for k, v in whole.items() if k != "lm_head.weight"}, "lm_head.weight is missing"),
    ]:
        save_file(weights, path)
        for options in ({}, dict(n_prelude=1, n_block=1, n_coda=1)):
            with pytest.raises(ValueError, match=message):
                load(tmp_path, **options)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no .*safetensors; pickled weights .* are not read"):
        load(tmp_path)


def test_shards_outside_the_folder_are_not_read(tmp_path):
    reference("llama").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="elsewhere.safetensors cannot be read"):
        load(tmp_path / "a")


# -----------------------------------------------------------------------------
# nanoLOOP, written out from its documented keys


def nanoloop(injection, bias):
    d, generator = 32, torch.Generator().manual_seed(3)
    random = lambda *shape: 0.3 * torch.randn(shape, generator=generator)  # noqa: E731
    weights = {
        "transformer.wte.weight": random(61, d),
        "transformer.wpe.weight": random(16, d),
        "transformer.ln_f.weight": 1 + random(d),
        "norm_recur.weight": 1 + random(d),
    }
    if injection != "passthrough":
        weights["inject.weight"] = random(d, 2 * d)
    for block in ("prelude.0", "recur.0", "recur.1", "coda.0", "coda.1"):
        for part, shape in {
            "attn.c_attn": (3 * d, d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (4 * d, d),
            "mlp.c_proj": (d, 4 * d),
        }.items():
            weights[f"transformer.{block}.{part}.weight"] = random(*shape)
        weights |= {f"transformer.{block}.ln_{n}.weight": 1 + random(d) for n in (1, 2)}
    if bias:
        matrices = [name for name in weights if any(part in name for part in (".c_", "inject"))]
        weights |= {name.replace("weight", "bias"): random(len(weights[name])) for name in matrices}
    return weights


def nanoloop_logits(w, idx, n_loop):
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt() * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def block(x, name):
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").split(32, -1)
        q, k, v = (part.view(*part.shape[:2], 4, 8).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.mT / 8**0.5).masked_fill(
            torch.ones(idx.size(1), idx.size(1)).triu(1).bool(), -math.inf
        )
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{name}.attn.c_proj")
        return x + linear(
            F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj"
        )

    e = block(
        w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)],
        "transformer.prelude.0",
    )
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
    args = dict(
        block_size=16,
        vocab_size=61,
        n_prelude=1,
        n_block=2,
        n_coda=2,
        n_loop=3,
        n_head=4,
        n_embd=32,
        dropout=0.0,
        bias=bias,
        bptt_k=None,
        input_injection=injection,
    )
    stored = {
        prefix + name: tensor
        for name, tensor in {**weights, "lm_head.weight": weights["transformer.wte.weight"]}.items()
    }
    torch.save(
        {
            "model": stored,
            "model_args": args,
            "iter_num": 1,
            "optimizer": {},
            "best_val_loss": 1.0,
            "config": {},
        },
        tmp_path / "ckpt.pt",
    )
    model = load(tmp_path)
    assert model.config.n_loop == 3 and model.config.bptt_k == 0
    for n_loop in (1, 3):
        want = nanoloop_logits(weights, tokens(), n_loop)
        close(logits(model, tokens(), n_loop=n_loop) / want.abs().max(), want / want.abs().max())


def test_nanoloops_random_start_and_truncation():
    weights = nanoloop("inject_random", False)
    args = dict(
        block_size=16,
        vocab_size=61,
        n_prelude=1,
        n_block=2,
        n_coda=2,
        n_loop=3,
        n_head=4,
        n_embd=32,
        bias=False,
        bptt_k=2,
        input_injection="inject_random",
    )
    config = pretrained.build({"model": weights, "model_args": args}).config
    assert (config.input_injection, config.state_init, config.bptt_k) == ("inject", "noise", 2)


# -----------------------------------------------------------------------------
# folding


def cut(theirs, layers):
    """The reference with these layers only."""
    body = theirs.transformer if hasattr(theirs, "transformer") else theirs.model
    name = "h" if hasattr(body, "h") else "layers"
    old = getattr(body, name)
    setattr(body, name, torch.nn.ModuleList(old[i] for i in layers))
    theirs.config.num_hidden_layers = len(layers)
    return theirs


INJECTIONS = ("inject", "passthrough", "residual")


@pytest.mark.parametrize("name", ["gpt2, exact gelu", "llama", "olmo2"])
@pytest.mark.parametrize(
    "sizes, layers",
    [
        ((1, 1, 1), (0, 2, 3)),
        ((0, 3, 0), (0, 2, 3)),
        ((1, 2, 1), (0, 1, 2, 3)),
        ((1, 1, 0), (3, 0)),
    ],
)
def test_a_folded_model_at_one_loop_is_its_source_cut_to_these_layers(
    name, sizes, layers, tmp_path
):
    theirs, idx = reference(name, **({"use_cache": False})), tokens()
    theirs.save_pretrained(tmp_path)
    chosen = dict(layers=layers) if layers in ((3, 0),) else {}
    fold = dict(zip(("n_prelude", "n_block", "n_coda"), sizes))
    model = load(tmp_path, **chosen, **fold, n_loop=1)
    with torch.no_grad():
        want = cut(theirs, layers)(idx, use_cache=False).logits
    scale = want.abs().max()
    close(logits(model, idx) / scale, want / scale)
    assert torch.equal(logits(model, idx), logits(load(tmp_path, layers=layers), idx))
    for injection in INJECTIONS:
        options = (
            dict(input_injection=injection, residual_share=1e-9)
            if injection == "residual"
            else dict(input_injection=injection)
        )
        folded = load(
            tmp_path,
            layers=layers,
            **fold,
            **options,
            loop_embedding="learned",
            loop_exit="linear",
            n_loop=4,
        )
        close(logits(folded, idx, n_loop=1) / scale, want / scale)
        assert not torch.allclose(
            logits(folded, idx) / scale, want / scale, atol=1e-3
        ) or injection.startswith("inject")
    assert (logits(folded, idx) - want).abs().max() > 1e-3


def test_what_cannot_be_folded(tmp_path):
    reference("llama").save_pretrained(tmp_path / "llama")
    for options, message in [
        (dict(n_prelude=2, n_block=1, n_coda=2), "n_block=1: only 0 layers are left"),
        (dict(n_block=2, layers=(0, 1, 2)), "must be 2 numbers below 4"),
        (dict(n_block=2, layers=(0, 4)), "must be 2 numbers below 4"),
        (dict(n_loop=2), "n_loop=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "llama", **options)
    with pytest.raises(
        ValueError, match="layers: only those of a model in which nothing is looped"
    ):
        load(ouro(tmp_path / "ouro"), layers=(0,))


def test_smollm2_folded_to_a_quarter():
    """SmolLM2-360M, 32 layers, as 2 + 4 x 7 + 2."""
    given = dict(
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
    source = GPTConfig(**pretrained.read_config(pretrained.family_of(given), given))
    config, layers, _ = pretrained.fold(
        source, (), dict(n_prelude=2, n_block=4, n_coda=2, n_loop=7)
    )
    with torch.device("meta"):
        before, after = GPT(source), GPT(config)
    assert (
        layers == (0, 1, 5, 12, 19, 26, 30, 31) and config.n_effective == source.n_effective == 32
    )
    block = 960 * (15 + 2 * 5) * 64 + 960 * 960 + 3 * 960 * 2560 + 2 * 960
    count = lambda model: sum(p.numel() for p in model.transformer.h.parameters())  # noqa: E731
    assert (count(before), count(after)) == (32 * block, 8 * block) and block == 9_832_320
    assert before.get_num_params() == 361_821_120
    loop = sum(p.numel() for p in after.transformer.loops.parameters())
    assert loop == 2 * 960 * 960 and after.get_num_params() == 361_821_120 - 24 * block + loop


def test_a_retrofitted_llama_at_one_loop_is_the_llama_cut(tmp_path):
    """Huginn's frame around Llama's and OLMo's blocks, adapter [0 | I] (arXiv 2511.07384)."""
    for kind, name in (("llama", "llama 3, tied"), ("olmo", "olmo2")):
        theirs, idx, layers = reference(name), tokens(), (0, 2, 3)
        w = theirs.state_dict()
        out = {
            "transformer.wte.weight": w["model.embed_tokens.weight"].clone(),
            "lm_head.weight": w["lm_head.weight"].clone(),
            "transformer.ln_f.weight": w["model.norm.weight"],
            "transformer.adapter.weight": torch.eye(32, 64).roll(32, 1),
        }
        norms = (
            ("input_layernorm", "post_attention_layernorm")
            if kind == "llama"
            else ("post_attention_layernorm", "post_feedforward_layernorm")
        )
        for i, block in zip(layers, ("prelude.0", "core_block.0", "coda.0")):
            old, new = f"model.layers.{i}", f"transformer.{block}"
            out[f"{new}.attn.Wqkv.weight"] = torch.cat(
                [w[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"]
            )
            out[f"{new}.attn.proj.weight"] = w[f"{old}.self_attn.o_proj.weight"]
            out[f"{new}.mlp.fc.weight"] = torch.cat(
                [w[f"{old}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
            )
            out[f"{new}.mlp.proj.weight"] = w[f"{old}.mlp.down_proj.weight"]
            out |= {
                f"{new}.norm_{n}.weight": w[f"{old}.{norm}.weight"]
                for n, norm in enumerate(norms, 1)
            }
            if kind == "olmo":
                out |= {
                    f"{new}.attn.{n}_norm.weight": w[f"{old}.self_attn.{n}_norm.weight"]
                    for n in "qk"
                }
        config = {
            "model_type": "huginn_raven",
            "architectures": ["RavenForCausalLM"],
            "n_embd": 32,
            "n_heads": 4,
            "num_key_value_heads": 2,
            "auto_map": {"AutoModelForCausalLM": f"raven_modeling_minimal_{kind}.RavenForCausalLM"},
            "qk_bias": False,
            "intermediate_size": 48,
            "norm_eps": theirs.config.rms_norm_eps,
            "vocab_size": 61,
            "tie_embeddings": False,
            "n_layers_in_prelude": 1,
            "n_layers_in_recurrent_block": 1,
            "n_layers_in_coda": 1,
            "mean_recurrence": 4,
            "block_size": 32,
            "init_values": {"embed_scale": 1.0},
            "block_class_name": "SandwichBlock",
        }
        if kind == "llama":
            config |= {"rope_theta": 500.0, "rope_scaling": LLAMA3}
        else:
            config |= {"rope_base": 10000.0}
        folder = folder_of(
            tmp_path / kind, config, {name: tensor.contiguous() for name, tensor in out.items()}
        )
        with torch.no_grad():
            want = cut(theirs, layers)(idx, use_cache=False).logits
        close(logits(load(folder), idx, n_loop=1) / want.abs().max(), want / want.abs().max())


# -----------------------------------------------------------------------------
# ours out

OURS = {
    "plain": dict(n_layer=2),
    "plain, exact": dict(n_layer=2, mlp="gelu", dropout=0.1),
    "no bias": dict(n_layer=2, bias=False),
    "llama": dict(
        n_layer=2,
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
        n_kv_head=2,
        n_hidden=48,
        tie_weights=False,
        rope_scaling=(8.0, 1.0, 4.0, 8.0),
        rope_base=500.0,
    ),
    "qwen3": dict(
        n_layer=2,
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
        qk_norm="head",
        head_size=16,
        norm_eps=1e-6,
    ),
    "olmo2": dict(
        n_layer=2,
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
        qk_norm="width",
        norm_place="post",
        n_kv_head=1,
    ),
    "baseline": dict(n_layer=4, n_block=4, n_prelude=0, n_coda=0, use_model_baseline=True),
    "prelude, core, coda": dict(),
    "groups": dict(
        n_layer=4,
        loop_groups=((0, 1), (3,)),
        loop_counts=(2, 3),
        n_loop=1,
        n_prelude=0,
        n_block=0,
        n_coda=0,
    ),
    "huginn": dict(
        norm="rmsnorm",
        norm_eps=1e-6,
        norm_place="sum",
        position="rope",
        mlp="swiglu",
        bias=False,
        qk_bias=True,
        embedding_scale=32**0.5,
        input_injection="inject",
        state_init="noise",
        loop_norm="none",
        loop_exit="final_norm",
        init="small",
        loop_sampling="poisson",
    ),
    "retrofitted": dict(
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
        n_kv_head=2,
        input_injection="inject",
        state_init="noise",
        loop_norm="none",
        tie_weights=False,
    ),
    "ouro": dict(
        n_prelude=0,
        n_coda=0,
        norm="rmsnorm",
        norm_place="branch",
        position="rope",
        mlp="swiglu",
        bias=False,
        final_norm=False,
        input_injection="passthrough",
        exit_gate="state",
        tie_weights=False,
        n_hidden=48,
    ),
    "parcae": dict(
        norm="rmsnorm",
        norm_eps=1e-5,
        position="rope",
        mlp="relu2",
        mlp_scale=0.5,
        bias=False,
        qk_norm="rotated",
        value_embedding=True,
        input_injection="diagonal",
        state_init="noise",
        loop_norm="none",
        loop_entry="rmsnorm",
        loop_exit="linear",
        init="orthogonal",
        rope_base=50000.0,
    ),
    "parcae, capped": dict(
        norm="rmsnorm",
        norm_eps=1e-5,
        position="rope",
        mlp="relu2",
        mlp_scale=0.5,
        bias=False,
        value_embedding=True,
        input_injection="diagonal",
        state_init="zero",
        loop_norm="none",
        loop_exit="linear",
        logit_softcap=15.0,
        n_prelude=2,
        n_block=1,
    ),
    "mla": dict(
        attention="mla",
        position="rope",
        norm="weightless",
        loop_embedding="sinusoidal",
        document_separator=3,
    ),
    "everything else": dict(
        embedding_norm=True,
        loop_embedding="learned",
        input_injection="residual",
        mlp="relu2",
        position="none",
        loop_entry="rmsnorm",
        exit_gate="state",
        tie_weights=False,
        logit_softcap=5.0,
    ),
}
FORMATS = {
    "plain": "gpt2",
    "plain, exact": "gpt2",
    "baseline": "gpt2",
    "llama": "llama",
    "qwen3": "qwen3",
    "olmo2": "olmo2",
    "huginn": "huginn_raven",
    "retrofitted": "huginn_raven",
    "ouro": "ouro",
    "parcae": "parcae",
    "parcae, capped": "parcae",
}


@pytest.mark.parametrize("name", OURS)
def test_export_and_load_are_the_identity(name, tmp_path):
    model = build(spread=0.2, **OURS[name])
    export(model, tmp_path, {"tokenizer": "bytes"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    given = json.loads((tmp_path / "config.json").read_text())
    assert given["model_type"] == FORMATS.get(name, "nanorecur") and given["tokenizer"] == {
        "tokenizer": "bytes"
    }
    again = load(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tie_weights
    if name not in FORMATS:
        assert again.config == GPTConfig(**{**vars(model.config)})
    export(again, tmp_path / "twice")
    first, second = (
        load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "twice")
    )
    assert first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def test_a_released_folder_comes_back_as_it_was(tmp_path):
    for make in (huginn, ouro, parcae):
        source, copy = make(tmp_path / make.__name__), tmp_path / f"{make.__name__}_copy"
        export(load(source), copy)
        given, written = (load_file(path / "model.safetensors") for path in (source, copy))
        given = {
            name: tensor
            for name, tensor in given.items()
            if name in written or name not in ("freqs_cis", "lm_head.weight")
        }
        assert given.keys() == written.keys() and all(
            torch.equal(given[name], written[name]) for name in given
        )
        old, new = (json.loads((path / "config.json").read_text()) for path in (source, copy))
        assert {name for name in new if name in old and old[name] != new[name]} <= {"auto_map"}


@pytest.mark.parametrize("name", ["plain", "plain, exact", "llama", "qwen3", "olmo2"])
def test_an_export_opens_in_the_reference_library(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model, idx = build(spread=0.2, **OURS[name]), tokens()
    export(model, tmp_path, {"tokenizer": "bytes"})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    with torch.no_grad():
        want = theirs.eval()(idx).logits
    close(logits(model, idx) / want.abs().max(), want / want.abs().max())


def test_an_export_that_dies_leaves_what_was_there(tmp_path, monkeypatch):
    export(build(seed=1), tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(build(seed=2), tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens()), logits(build(seed=1), tokens()))


def test_the_command(corpus, tmp_path):
    assert train(corpus, tmp_path / "run", "--max_iters=1").code == 0
    run = Run("pretrained.py", "export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/out")
    assert run.code == 0, run.err
    meta = json.loads((corpus / "meta.json").read_text())
    given = json.loads((tmp_path / "out" / "config.json").read_text())
    assert given["model_type"] == "nanorecur" and given["tokenizer"]["chars"] == meta["chars"]
    assert torch.equal(
        logits(load(tmp_path / "out"), tokens()), logits(load(tmp_path / "run"), tokens())
    )
    for wrong in (
        [],
        ["export"],
        ["import"],
        ["export", "--too=x"],
        ["export", f"--out_dir={tmp_path}", "--to=x"],
    ):
        run = Run("pretrained.py", *wrong)
        assert (run.code, run.err.count("\n")) == ((2, 1) if wrong else (0, 0)), run.err
    assert "--out_dir" in Run("pretrained.py", "-h").out


def test_our_unknown_options_are_not_guessed(tmp_path):
    export(build(), tmp_path)
    change(tmp_path, n_expert=8)
    with pytest.raises(ValueError, match="n_expert"):
        load(tmp_path)


MEASURE = """
import re, sys
import torch
torch.set_num_threads(1)
import pretrained, safetensors.torch
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # unlike ru_maxrss, not the parent's
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
model = pretrained.load(sys.argv[1])
print((peak() - before) / sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_little_more_memory_than_the_model(dtype, tmp_path):
    with torch.device("meta"):
        config = GPTConfig(
            block_size=256,
            vocab_size=16000,
            n_layer=8,
            n_head=8,
            n_embd=768,
            n_kv_head=4,
            n_hidden=2048,
            norm="rmsnorm",
            position="rope",
            mlp="swiglu",
            bias=False,
        )
        shapes = pretrained.shapes(config)
    weights = {
        piece.theirs: torch.ones(piece.shape, dtype=dtype)
        for piece in pretrained.pieces(pretrained.LLAMA, config, shapes, range(8))
    }
    given = pretrained.write_config(pretrained.LLAMA, pretrained.spelt_out(config))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, folder_of(tmp_path, given, weights)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert 0.9 < float(run.stdout) < 1.15, run.stderr


def test_our_own_plain_checkpoint_is_folded_too(tmp_path):
    model = build(n_layer=4, spread=0.2)
    torch.save(
        {"model": model.state_dict(), "model_args": vars(model.config), "iter_num": 1},
        tmp_path / "ckpt.pt",
    )
    want = logits(load(tmp_path, layers=(0, 2, 3)), tokens())
    assert torch.equal(
        logits(load(tmp_path, n_prelude=1, n_block=1, n_coda=1, n_loop=5), tokens(), n_loop=1), want
    )
    assert torch.equal(
        logits(load(tmp_path, loop_groups=((1, 2),), n_loop=5), tokens(), n_loop=1),
        logits(model, tokens()),
    )


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
    for (name, a), b in zip(
        more.named_parameters(), load(tmp_path / "new").parameters(), strict=True
    ):
        assert torch.equal(a, b), name
