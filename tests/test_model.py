"""The model against independent arithmetic: written out here, or the reference library's."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import LOOPED, TINY, build, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, TABLES, GPTConfig, Where, spectral_clip
from nanorecur.objectives import parameter_groups


def nanogpt(weights, idx, n_head):
    """Logits (B, T, V) of nanoGPT's model, its arithmetic written out: pre-norm, exact GELU, softmax attention."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5
        )

    B, T = idx.shape
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][:T]
    C, future = x.size(-1), torch.ones(T, T).triu(1).bool()
    for i in range(1 + max(int(name.split(".")[2]) for name in weights if ".h." in name)):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, dim=2)
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(C // n_head)).masked_fill(future, -torch.inf)
        x = x + linear(
            (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C), f"{h}.attn.c_proj"
        )
        inner = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_plain_gpt_is_nanogpt(bias):
    model, idx = build(n_layer=3, bias=bias, spread=0.1), tokens()
    torch.testing.assert_close(
        model(idx, idx)[0], nanogpt(model.state_dict(), idx, 4), atol=1e-5, rtol=1e-5
    )


def test_plain_gpt_is_the_reference_librarys_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=4,
            activation_function="gelu",
        )
    ).eval()
    ours, weights = build(n_layer=2), {}
    for name, tensor in theirs.state_dict().items():  # their Conv1D keeps matrices transposed
        transposed = ".c_" in name and name.endswith("weight")
        weights[name] = torch.randn_like(tensor) * 0.2
        weights[name] = weights[name].T if transposed else weights[name]
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    theirs.load_state_dict(
        {n: w.T if ".c_" in n and n.endswith("weight") else w for n, w in weights.items()}
    )
    ours.load_state_dict(weights)
    torch.testing.assert_close(
        ours(tokens(), tokens())[0], theirs(tokens()).logits, atol=1e-4, rtol=1e-4
    )


def test_plain_gpt_has_nanogpts_keys():
    keys = {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
    }
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    keys |= {
        f"transformer.h.{i}.{part}.{kind}"
        for i in range(2)
        for part in parts
        for kind in ("weight", "bias")
    }
    assert set(build(n_layer=2).state_dict()) == keys
    assert set(build(n_layer=2, bias=False).state_dict()) == {
        key for key in keys if not key.endswith("bias")
    }


def test_parameters_stand_in_nanogpts_order():
    """Optimizer states are kept by number, and sums over all parameters depend on it in the last digit."""
    names = [
        name.removeprefix("transformer.") for name in build(n_layer=1, bias=False).state_dict()
    ]
    assert names == [
        "wte.weight",
        "wpe.weight",
        "h.0.ln_1.weight",
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.0.ln_2.weight",
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
        "ln_f.weight",
        "lm_head.weight",
    ]


def test_gpt2_init():
    model = build(n_layer=8, n_embd=128, vocab_size=512)
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(
        0.02 / 4, rel=0.05
    )  # 1 / sqrt(2 * 8)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    "kind, std", [("small", (2 / 5 / 128) ** 0.5), ("orthogonal", (2 / 5 / 128) ** 0.5)]
)
def test_other_inits(kind, std):
    model = build(n_embd=128, vocab_size=512, init=kind, n_loop=3)  # 1 + 2x3 + 1: effective depth 8
    weights = dict(model.named_parameters())
    inner, wte = weights["transformer.h.2.mlp.c_fc.weight"], weights["transformer.wte.weight"]
    outputs = [p for name, p in weights.items() if name.endswith("c_proj.weight")]
    if kind == "small":
        assert (
            inner.std().item() == pytest.approx(0.98658 * std, rel=0.02)
            and inner.abs().max() <= 3 * std + 1e-6
        )
        assert all(
            p.std().item() == pytest.approx(0.98658 * std / 4, rel=0.03) for p in outputs
        )  # sqrt(2 * 8)
    else:
        torch.testing.assert_close(
            inner.mT @ inner, torch.eye(128) * std**2 * 512, atol=1e-5, rtol=1e-4
        )
        assert all((p == 0).all() for p in outputs)
        x, where = model.embed(tokens())
        assert torch.equal(model.transformer.h[0](x, where), x)  # every block is the identity
    assert wte.std().item() == pytest.approx(std, rel=0.03)
    assert torch.equal(model.transformer.loops[0].inject.weight, torch.eye(128, 256))


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
def test_latent_attention_is_the_formula(position):
    """DeepSeek-V2's equations, head by head: a latent, keys and values from it, a turned part that the heads share."""
    model = build(n_layer=1, attention="mla", n_latent=12, position=position, spread=0.1)
    attn, x, turn = (
        model.transformer.h[0].attn,
        torch.randn(2, 9, 32),
        4 if position == "rope" else 0,
    )
    latent, shared = attn.c_latent(x).split((12, turn), -1)
    latent = (
        attn.ln_latent.weight * latent / (latent.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    )
    up, queries, where = (
        attn.c_up.weight.view(4, 16, 12),
        attn.c_q(x).view(2, 9, 4, 8 + turn),
        model.embed(tokens())[1],
    )
    outputs = []
    for head in range(4):
        k, v = latent @ up[head, :8].T, latent @ up[head, 8:].T
        q, scores = queries[:, :, head, :8], 0
        if turn:
            q_turned, k_turned = (
                attn.rotate(part[:, None], where)[:, 0]
                for part in (queries[:, :, head, 8:], shared)
            )
            scores = q_turned @ k_turned.mT
        scores = (scores + q @ k.mT) / math.sqrt(8 + turn) + torch.full((9, 9), -torch.inf).triu(1)
        outputs.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(
        attn(x, where), attn.c_proj(torch.cat(outputs, -1)), atol=1e-5, rtol=1e-4
    )


def test_grouped_queries_are_repeated_keys_and_values():
    few, many = build(n_layer=1, n_kv_head=2, spread=0.1), build(n_layer=1)
    weights = few.state_dict()
    for name in ("weight", "bias"):
        q, k, v = weights[f"transformer.h.0.attn.c_attn.{name}"].split((32, 16, 16))
        k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))
        weights[f"transformer.h.0.attn.c_attn.{name}"] = torch.cat((q, k, v))
    many.load_state_dict(weights)
    torch.testing.assert_close(
        few(tokens(), tokens())[0], many(tokens(), tokens())[0], atol=1e-5, rtol=1e-4
    )


def test_the_options_around_the_blocks():
    """Soft cap, untied head, norm and scale of the embedding, no last norm."""
    options = dict(
        logit_softcap=2.0,
        tie_weights=False,
        embedding_norm=True,
        embedding_scale=3.0,
        final_norm=False,
    )
    model, idx = (
        build(n_layer=2, norm="weightless", position="none", spread=0.1, **options),
        tokens(),
    )
    assert model.lm_head.weight is not model.transformer.wte.weight and not any(
        "ln_" in name for name in model.state_dict()
    )
    x = 3 * model.transformer.wte(idx)
    x = x / (x.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    for block in model.transformer.h:
        x = block(x, Where(torch.arange(9)))
    torch.testing.assert_close(
        model(idx, idx)[0], 2 * torch.tanh(x @ model.lm_head.weight.T / 2), atol=1e-5, rtol=1e-4
    )


def test_a_copy_is_a_model_of_its_own():
    """Also where a loop shares the model's last norm or blocks: averaged weights are such copies."""
    model, idx = build(loop_exit="final_norm", spread=0.1), tokens()
    before, twin = model(idx)[0], copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(idx)[0], before)


def test_loss_ignores_minus_one_and_readout_keeps_the_last_position():
    model, idx = build(spread=0.1), tokens()
    targets = idx.clone()
    targets[:, 4:] = -1
    logits, loss = model(idx, targets)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, :4].reshape(-1, 61), targets[:, :4].reshape(-1))
    )
    last, none = model(idx)
    assert none is None and last.shape == (2, 1, 61)
    torch.testing.assert_close(last, logits[:, [-1]])


@pytest.mark.parametrize("position", TABLES["position"])
def test_no_token_sees_the_future(position):
    model, idx = build(spread=0.1, position=position), tokens()
    other = idx.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 61
    before, after = model(idx, idx)[0], model(other, idx)[0]
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(
        before[:, 5:], after[:, 5:]
    )


@pytest.mark.parametrize("position", TABLES["position"])
@pytest.mark.parametrize(
    "loop", [{}, {"input_injection": "diagonal", "state_init": "noise"}], ids=["inject", "diagonal"]
)
def test_documents_are_read_as_if_each_stood_alone(position, loop):
    """Logits of a window of three documents, two of them whole, against each document by itself."""
    model, separator = build(spread=0.1, position=position, document_separator=7, **loop), 7
    documents = [
        torch.tensor([3, 4, 5, 7]),
        torch.tensor([7]),
        torch.tensor([1, 2, 3, 9, 7]),
        torch.tensor([8, 9]),
    ]
    windows = torch.stack(
        (torch.cat(documents), torch.cat(documents[::-1]))
    )  # the last one ends without a separator
    packed = model(windows, windows)[0]
    for row, order in zip(packed, (documents, documents[::-1])):
        order = order if order[0][-1] == separator else [torch.cat(order[:2]), *order[2:]]
        for part, document in zip(row.split([len(document) for document in order]), order):
            alone = model(document[None], document[None])[0][0]
            torch.testing.assert_close(part, alone, atol=2e-5, rtol=1e-4)
    plain = build(spread=0.1, position=position, **loop)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(
        plain(windows, windows)[0], packed, atol=1e-3
    )  # the mask does something


def test_rotary_scores_depend_on_the_distance_alone():
    model = build(position="rope")
    rotate = partial(model.transformer.h[0].attn.rotate, where=model.embed(tokens(1, 16))[1])
    q, k = torch.randn(2, 8)
    scores = rotate(q.expand(1, 1, 16, 8)) @ rotate(k.expand(1, 1, 16, 8)).mT
    for distance in range(-15, 16):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    by_hand = torch.view_as_complex(torch.stack((q[:4], q[4:]), -1)) * torch.polar(
        torch.ones(4), 3 * 10000 ** (-torch.arange(4) / 4)
    )
    torch.testing.assert_close(
        rotate(q.expand(1, 1, 16, 8))[0, 0, 3], torch.cat((by_hand.real, by_hand.imag))
    )


@pytest.mark.parametrize("kind", TABLES["mlp"])
def test_feed_forward(kind):
    mlp, x = build(mlp=kind, spread=0.1).transformer.h[0].mlp, torch.randn(2, 5, 32)
    inner = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    gate, up = inner[..., :128], inner[..., 128:]
    active = {
        "gelu": lambda: F.gelu(inner),
        "gelu_tanh": lambda: F.gelu(inner, approximate="tanh"),
        "relu2": lambda: inner.clamp(min=0) ** 2,
        "swiglu": lambda: gate * gate.sigmoid() * up,
    }
    torch.testing.assert_close(mlp(x), active[kind]() @ mlp.c_proj.weight.T + mlp.c_proj.bias)


def test_rmsnorm_blocks():
    model, x = build(norm="rmsnorm", spread=0.1), torch.randn(2, 5, 32)
    norm = model.transformer.h[0].ln_1
    torch.testing.assert_close(
        norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    )


def test_dropout_acts_in_training_alone():
    model, idx = build(dropout=0.5), tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    "field,value",
    [(field, value) for field, table in TABLES.items() for value in table if field != "exit_gate"],
)  # the gate is not in the model's own loss but in objectives.py
def test_every_legal_value_trains(field, value):
    """A step against the gradient lowers the loss, and every parameter takes part."""
    model, idx = build(**{field: value}), tokens(4, 16)
    before = model(idx[:, :-1], idx[:, 1:])[1]
    before.backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            p -= 0.01 * p.grad
    assert model(idx[:, :-1], idx[:, 1:])[1] < before - 1e-4


FLOPS = {
    "plain": dict(n_layer=2),
    "plain swiglu": dict(n_layer=2, mlp="swiglu", position="rope"),
    "looped": {},
    "truncated": dict(bptt_k=1),
    "truncated wide": dict(bptt_k=5),
    "add": dict(bptt_k=2, input_injection="add"),
    "zero state": dict(bptt_k=2, state_init="zero"),
    "residual": dict(bptt_k=2, input_injection="residual"),
    "passthrough": dict(input_injection="passthrough"),
    "groups": dict(n_layer=5, loop_groups=((0, 1), (3,)), loop_counts=(2, 3), bptt_k=1),
    "baseline": dict(use_model_baseline=True),
    "grouped queries": dict(n_kv_head=2, n_hidden=48, tie_weights=False),
    "latent": dict(attention="mla", bptt_k=1),
    "latent rope": dict(attention="mla", n_latent=8, position="rope"),
    "parcae": dict(
        value_embedding=True, loop_exit="linear", loop_entry="rmsnorm", input_injection="diagonal"
    ),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_those_torch_counts(name):
    model = build(**FLOPS[name]).train()
    idx = tokens(3, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert model.flops_per_token() * idx.numel() == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )


def test_parameter_groups_hold_every_parameter_once():
    model = build(loop_embedding="learned")
    groups = parameter_groups(model)
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(
        id(p) for p in model.parameters()
    )
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in groups["embeddings"]} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.loops.0.index.weight",
    }
    assert all(p.dim() == 2 for p in groups["matrices"]) and all(
        p.dim() == 1 for p in groups["vectors"]
    )


def test_number_of_parameters_is_nanogpts():
    assert (
        GPT(GPTConfig(**TINY, n_layer=2)).get_num_params()
        == 2 * (12 * 32**2 + 13 * 32) + 61 * 32 + 2 * 32
    )


WRONG = [
    dict(n_embd=30),
    dict(n_head=0),
    dict(n_loop=0),
    dict(n_loop=9),
    dict(n_loop=1.5),
    dict(n_loop=True),
    dict(dropout=1.0),
    dict(dropout=float("nan")),
    dict(norm="typo"),
    dict(norm=3),
    dict(bptt_k=-1),
    dict(n_block=0),
    dict(loop_counts=(1, 2)),
    dict(loop_counts=(0,), n_loop=1),
    dict(loop_counts=(2,)),
    dict(loop_groups=((0,),)),
    dict(position="rope", n_head=32),
    dict(loop_embedding="sinusoidal", n_embd=5, n_head=1),
    dict(input_injection="passthrough", bptt_k=1),
    dict(input_injection="passthrough", state_init="noise"),
    dict(vocab_size=0),
    dict(block_size="16"),
    dict(max_loops=0),
    dict(loop_noise_scale=-1.0),
    dict(residual_share=math.inf),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_config_names_the_field(wrong):
    with pytest.raises(ValueError) as error:
        GPTConfig(**{**LOOPED, **wrong})
    assert any(
        str(error.value).startswith(f"{field}=")
        for field in (*wrong, "n_block", "n_loop", "n_embd", "input_injection")
    )
    assert "must be" in str(error.value)


@pytest.mark.parametrize(
    "groups",
    [
        ((0, 2),),
        ((0, 1), (1, 2)),
        ((1,), (0,)),
        ((4,),),
        ((-1, 0),),
        ((),),
        (0, 1),
        (("0",),),
        ((0, 0),),
    ],
)
def test_wrong_loop_groups(groups):
    with pytest.raises(ValueError, match="loop_groups="):
        GPTConfig(**TINY, n_layer=4, loop_groups=groups)


@pytest.mark.parametrize("n_loop", [0, -1, (), (1, 2), 1.5, (0,), True])
def test_wrong_loops_at_call_time(n_loop):
    with pytest.raises((ValueError, TypeError)):
        build()(tokens(), n_loop=n_loop)


def test_too_long_a_context():
    with pytest.raises(ValueError, match="block_size=16"):
        build()(tokens(1, 17))


# -----------------------------------------------------------------------------
# spectral clipping


def matrices():
    """Of all the kinds that could go wrong: name -> W (m, n)."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    u, v = (torch.linalg.qr(draw(96, 96))[0] for _ in range(2))
    return {
        "random": draw(96, 96) / 8,
        "tall": draw(256, 64) / 8,
        "wide": draw(64, 256) / 8,
        "fused qkv": 0.05 * draw(288, 96),
        "ill-conditioned": u * torch.logspace(1, -5, 96) @ v,
        "rank-deficient": draw(96, 5) @ draw(5, 96) / 8,
        "huge": 30 * draw(96, 96),
        "around beta": u * torch.linspace(0.8, 1.2, 96) @ v,
        "zero": torch.zeros(8, 12),
    }


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("name", matrices())
def test_spectral_clip_is_the_clipped_svd(name, beta):
    W = matrices()[name]
    u, s, v = torch.linalg.svd(W.double(), full_matrices=False)
    clipped = spectral_clip(W, beta).double()
    inside = u.mT @ clipped @ v.mT  # diagonal where the singular vectors are kept
    new, low = inside.diagonal(), (s < 0.9 * beta) & (s > 1e-4)
    assert torch.linalg.matrix_norm(clipped, 2) <= 1.01 * beta
    assert ((new - s).abs() <= 0.01 * s)[low].all()
    torch.testing.assert_close(clipped, u * s.clamp(max=beta) @ v, atol=2e-3 * beta, rtol=0)
    assert (inside - new.diag()).norm() <= 2e-3 * max(new.norm(), 1e-6)


def test_spectral_clip_of_a_batch_and_in_bfloat16():
    W = torch.stack([matrices()[name] for name in ("random", "ill-conditioned", "around beta")])
    one_by_one = torch.stack([spectral_clip(w, 0.5) for w in W])
    torch.testing.assert_close(spectral_clip(W, 0.5), one_by_one, atol=1e-5, rtol=1e-4)
    half = spectral_clip(W.bfloat16(), 0.5)
    assert half.dtype == torch.bfloat16 and torch.linalg.matrix_norm(half.float(), 2).max() < 0.51
