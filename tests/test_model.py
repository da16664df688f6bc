"""The model against independent arithmetic: written out here, or the reference library's."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LOOPED, TINY, build, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import (
    TABLES,
    Context,
    GPTConfig,
    ShiftToken,
    SinusoidalIndex,
    shift_labels,
    spectral_clip,
)

# -----------------------------------------------------------------------------
# the plain GPT


def nanogpt(weights, idx, n_head):
    """Return nanoGPT's logits (B, T, V): pre-norm, exact GELU, attention by softmax."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    B, T = idx.shape
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][:T]
    C = x.size(-1)
    future = torch.ones(T, T).triu(1).bool()
    n_layer = 1 + max(int(name.split(".")[2]) for name in weights if ".h." in name)
    for i in range(n_layer):
        h = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, dim=2)
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2) for part in qkv)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // n_head)
        p = scores.masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear((p @ v).transpose(1, 2).reshape(B, T, C), f"{h}.attn.c_proj")
        inner = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        active = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(active, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_plain_gpt_is_nanogpt(bias):
    model, idx = build(n_layer=3, bias=bias, spread=0.1), tokens()
    want = nanogpt(model.state_dict(), idx, n_head=4)
    assert_close(model(idx, idx)[0], want, atol=1e-5, rtol=1e-5)


def test_plain_gpt_is_the_reference_librarys_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    theirs = GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu")).eval()
    ours = build(n_layer=2)
    our_weights, their_weights = {}, {}
    for name, tensor in theirs.state_dict().items():
        weight = 0.2 * torch.randn_like(tensor)
        if name == "lm_head.weight":
            weight = their_weights["transformer.wte.weight"]
        transposed = ".c_" in name and name.endswith("weight")  # in their Conv1D
        their_weights[name] = weight
        our_weights[name] = weight.T if transposed else weight
    theirs.load_state_dict(their_weights)
    ours.load_state_dict(our_weights)
    idx = tokens()
    assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


def test_plain_gpt_has_nanogpts_keys():
    keys = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    keys |= {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    for i in range(2):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            keys |= {f"transformer.h.{i}.{part}.weight", f"transformer.h.{i}.{part}.bias"}
    without_bias = {key for key in keys if not key.endswith("bias")}
    assert set(build(n_layer=2).state_dict()) == keys
    assert set(build(n_layer=2, bias=False).state_dict()) == without_bias


def test_parameters_stand_in_nanogpts_order():
    """Optimizer states are saved by number, and sums over parameters are rounded in this order."""
    names = build(n_layer=1, bias=False).state_dict()
    assert [name.removeprefix("transformer.") for name in names] == [
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


def test_number_of_parameters_is_nanogpts():
    """A block has 12 C^2 + 13 C, of the position embedding none is counted unless asked for."""
    model = build(n_layer=2)
    blocks = 2 * (12 * 32**2 + 13 * 32)
    embedding, last_norm, positions = 61 * 32, 2 * 32, 16 * 32
    assert model.get_num_params() == blocks + embedding + last_norm
    assert model.get_num_params(non_embedding=False) == model.get_num_params() + positions


def test_a_copy_is_a_model_of_its_own():
    """Also where a loop shares blocks and the last norm: averaged weights are such copies."""
    model, idx = build(loop_exit="final_norm", spread=0.1), tokens()
    before, twin = model(idx)[0], copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(idx)[0], before)


# -----------------------------------------------------------------------------
# inits


def test_gpt2_init():
    model = build(n_layer=8, n_embd=128, vocab_size=512)
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.05)
    output = 0.02 / math.sqrt(2 * 8)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(output, rel=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        assert not name.endswith("bias") or (p == 0).all(), name


SMALL = math.sqrt(2 / (5 * 128))  # Huginn's unit at 128 channels


def large_enough_to_measure(init):
    """Return (model, its weights by name, its output matrices)."""
    model = build(n_embd=128, vocab_size=512, init=init, n_loop=3)
    weights = dict(model.named_parameters())
    outputs = [p for name, p in weights.items() if name.endswith("c_proj.weight")]
    return model, weights, outputs


@pytest.mark.parametrize("init", ["small", "orthogonal"])
def test_other_inits_have_huginns_unit_and_an_injection_that_returns_e(init):
    model, weights, _ = large_enough_to_measure(init)
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(SMALL, rel=0.03)
    assert torch.equal(model.transformer.loops[0].inject.weight, torch.eye(128, 256))


def test_small_init_is_cut_at_three_std_and_scales_outputs_by_effective_depth():
    model, weights, outputs = large_enough_to_measure("small")
    inner = weights["transformer.h.2.mlp.c_fc.weight"]
    cut = 0.98658  # the std of a standard normal that is cut at 3
    assert inner.std().item() == pytest.approx(cut * SMALL, rel=0.02)
    assert inner.abs().max() <= 3 * SMALL + 1e-6
    assert model.config.n_effective == 1 + 3 * 2 + 1
    for p in outputs:
        assert p.std().item() == pytest.approx(cut * SMALL / math.sqrt(2 * 8), rel=0.03)


def test_orthogonal_init_makes_every_block_the_identity():
    model, weights, outputs = large_enough_to_measure("orthogonal")
    inner = weights["transformer.h.2.mlp.c_fc.weight"]  # (512, 128)
    assert_close(inner.mT @ inner, torch.eye(128) * SMALL**2 * 512, atol=1e-5, rtol=1e-4)
    for p in outputs:
        assert (p == 0).all()
    x, ctx = model.embed(tokens())
    assert torch.equal(model.transformer.h[0](x, ctx), x)


# -----------------------------------------------------------------------------
# parts of a block


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
def test_latent_attention_is_the_formula(position):
    """DeepSeek-V2's equations head by head: keys and values from a latent, one rotated part."""
    model = build(n_layer=1, attention="mla", n_latent=12, position=position, spread=0.1)
    attn, ctx = model.transformer.h[0].attn, model.embed(tokens())[1]
    rotary = 4 if position == "rope" else 0  # channels
    x = torch.randn(2, 9, 32)
    latent, k_rotary = attn.c_latent(x).split((12, rotary), -1)
    rms = (latent.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    latent = attn.ln_latent.weight * latent / rms
    up = attn.c_up.weight.view(4, 16, 12)
    queries = attn.c_q(x).view(2, 9, 4, 8 + rotary)
    future = torch.full((9, 9), -torch.inf).triu(1)
    outputs = []
    for head in range(4):
        k, v = latent @ up[head, :8].T, latent @ up[head, 8:].T
        q, q_rotary = queries[:, :, head].split((8, rotary), -1)
        scores = q @ k.mT
        if rotary:
            rotated_q = attn.rotate(q_rotary[:, None], ctx)[:, 0]
            rotated_k = attn.rotate(k_rotary[:, None], ctx)[:, 0]
            scores = scores + rotated_q @ rotated_k.mT
        scores = scores / math.sqrt(8 + rotary) + future
        outputs.append(scores.softmax(-1) @ v)
    assert_close(attn(x, ctx), attn.c_proj(torch.cat(outputs, -1)), atol=1e-5, rtol=1e-4)


def test_grouped_queries_are_repeated_keys_and_values():
    few, many, idx = build(n_layer=1, n_kv_head=2, spread=0.1), build(n_layer=1), tokens()
    weights = few.state_dict()
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"):
        q, k, v = weights[name].split((32, 16, 16))
        k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))
        weights[name] = torch.cat((q, k, v))
    many.load_state_dict(weights)
    assert_close(few(idx, idx)[0], many(idx, idx)[0], atol=1e-5, rtol=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    model = build(position="rope")
    attn, ctx = model.transformer.h[0].attn, model.embed(tokens(1, 16))[1]
    q, k = torch.randn(2, 8)
    rotated_q, rotated_k = (attn.rotate(part.expand(1, 1, 16, 8), ctx)[0, 0] for part in (q, k))
    scores = rotated_q @ rotated_k.mT
    for distance in range(-15, 16):
        diagonal = scores.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    angles = 3 * 10000 ** (-torch.arange(4) / 4)  # of position 3
    pairs = torch.complex(q[:4], q[4:]) * torch.polar(torch.ones(4), angles)
    assert_close(rotated_q[3], torch.cat((pairs.real, pairs.imag)))


ACTIVATIONS = {  # of Linear's output, or of its two halves where it is gated
    "gelu": F.gelu,
    "gelu_tanh": lambda inner: F.gelu(inner, approximate="tanh"),
    "relu2": lambda inner: inner.clamp(min=0) ** 2,
    "swiglu": lambda inner: inner[..., :128] * inner[..., :128].sigmoid() * inner[..., 128:],
}


@pytest.mark.parametrize("kind", TABLES["mlp"])
def test_feed_forward(kind):
    mlp = build(mlp=kind, spread=0.1).transformer.h[0].mlp
    x = torch.randn(2, 5, 32)
    active = ACTIVATIONS[kind](x @ mlp.c_fc.weight.T + mlp.c_fc.bias)
    assert_close(mlp(x), active @ mlp.c_proj.weight.T + mlp.c_proj.bias)


def test_rmsnorm_is_the_formula():
    norm, x = build(norm="rmsnorm", spread=0.1).transformer.h[0].ln_1, torch.randn(2, 5, 32)
    rms = (x.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    assert_close(norm(x), norm.weight * x / rms)


def test_the_options_around_the_blocks():
    """Soft cap, a head of its own, scaled embedding, no last norm, norms without a gain."""
    options = dict(logit_softcap=2.0, tie_weights=False, embedding_scale=3.0, final_norm=False)
    options |= dict(norm="weightless", position="none")
    model, idx = build(n_layer=2, spread=0.1, **options), tokens()
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not any("ln_" in name for name in model.state_dict())
    x = 3 * model.transformer.wte(idx)
    for block in model.transformer.h:
        x = block(x, Context(torch.arange(9)))
    want = 2 * torch.tanh(x @ model.lm_head.weight.T / 2)
    assert_close(model(idx, idx)[0], want, atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_alone():
    model, idx = build(dropout=0.5), tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# -----------------------------------------------------------------------------
# what a token sees


@pytest.mark.parametrize("position", TABLES["position"])
def test_no_token_sees_the_future(position):
    model, idx = build(spread=0.1, position=position), tokens()
    other = idx.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 61
    before, after = model(idx, idx)[0], model(other, idx)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("position", TABLES["position"])
@pytest.mark.parametrize("options", [{}, dict(input_injection="diagonal", state_init="noise")])
def test_documents_are_read_as_if_each_stood_alone(position, options):
    """Windows of several documents against each document by itself; 7 ends a document."""
    model = build(spread=0.1, position=position, document_separator=7, **options)
    first = [3, 4, 5, 7, 7, 1, 2, 3, 9, 7, 8, 9]  # its last document has no end
    second = [8, 9, 1, 2, 3, 9, 7, 7, 3, 4, 5, 7]
    windows, lengths = torch.tensor([first, second]), [[4, 1, 5, 2], [7, 1, 4]]
    packed = model(windows, windows)[0]
    for row in range(2):
        parts = zip(packed[row].split(lengths[row]), windows[row].split(lengths[row]))
        for logits, document in parts:
            alone = model(document[None], document[None])[0][0]
            assert_close(logits, alone, atol=2e-5, rtol=1e-4)
    plain = build(position=position, **options)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(windows, windows)[0], packed, atol=1e-3)  # the mask acts


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_a_window_hides_what_is_further_back(attention):
    """A token reaches window - 1 tokens further back with each block that is applied."""
    model = build(spread=0.1, attention_window=3, attention=attention, n_block=1, n_loop=2)
    applied = model.config.n_effective
    x = model.transformer.wte(tokens(1, 16)).detach().requires_grad_()
    model(x, tokens(1, 16))[0][0, -1].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [16 - i <= 1 + 2 * applied for i in range(16)]
    assert 1 + 2 * applied < 16


def test_a_window_over_all_tokens_is_causal_attention():
    idx = tokens()
    for options in ({}, dict(document_separator=5)):
        whole = build(spread=0.1, **options)
        windowed = build(spread=0.1, attention_window=16, **options)
        windowed.load_state_dict(whole.state_dict())
        assert_close(windowed(idx, idx)[0], whole(idx, idx)[0])


def test_documents_in_a_window_are_masked_by_both():
    options = dict(n_block=0, n_prelude=0, n_coda=0, n_loop=1, n_layer=1)
    model = build(attention_window=3, document_separator=7, **options)
    _, ctx = model.embed(torch.tensor([[1, 2, 3, 4, 7, 5, 6]]))
    sees = [row.nonzero().flatten().tolist() for row in ctx.mask[0, 0]]
    assert sees == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [5], [5, 6]]


def test_a_context_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match="block_size=16"):
        build()(tokens(1, 17))


# -----------------------------------------------------------------------------
# losses and labels


def test_loss_ignores_minus_one_and_without_targets_the_last_position_is_read_out():
    model, idx = build(spread=0.1), tokens()
    targets = idx.clone()
    targets[:, 4:] = -1
    logits, loss = model(idx, targets)
    assert_close(loss, F.cross_entropy(logits[:, :4].flatten(0, 1), targets[:, :4].flatten()))
    last, none = model(idx)
    assert none is None
    assert last.shape == (2, 1, 61)
    assert_close(last, logits[:, [-1]])


class Transfers(TorchDispatchMode):
    """Counts what makes a tensor of numbers of Python, which on a GPU would be a copy to it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._to_copy.default, torch.ops.aten.lift_fresh.default)
        return func(*args, **(kwargs or {}))


def test_the_shift_and_the_loops_number_are_not_copied_to_the_device():
    index = SinusoidalIndex(GPTConfig(n_embd=8, n_head=2))
    prefix, s = ShiftToken(4, 8), torch.randn(2, 3, 8)
    for shift in (2, torch.tensor([1, 3])):
        with Transfers() as transfers:
            shift_labels(tokens(2, 3), shift)
            prefix(s, shift)
        assert transfers.count == 0
    with Transfers() as transfers:
        index(s, 3)
    assert transfers.count == 0
    assert_close(index(s, 3), index(s, torch.full((2, 1), 3)))
    with Transfers() as transfers:
        torch.as_tensor(3)
    assert transfers.count == 1


def test_shift_labels():
    targets = torch.arange(12).view(2, 6)
    assert torch.equal(shift_labels(targets, 1), targets)
    shifted = [[1, 2, 3, 4, 5, -1], [9, 10, 11, -1, -1, -1]]
    assert shift_labels(targets, torch.tensor([2, 4])).tolist() == shifted


def test_a_shift_is_a_token_before_the_input():
    """Written out: the learned token in front, plain blocks, all positions but the first read."""
    model, idx = build(predict_ahead=True, n_layer=3, spread=0.1), tokens()
    prefix = model.prefix.weight[2].expand(2, 1, -1)  # of shift 3
    x = torch.cat((prefix, model.transformer.wte(idx)), dim=1)
    x = x + model.transformer.wpe.weight[:10]
    for block in model.transformer.h:
        x = block(x, Context(torch.arange(10)))
    want = model.lm_head(model.transformer.ln_f(x))[:, 1:]
    logits, loss = model(idx, idx, shift=3)
    assert_close(logits, want, atol=1e-6, rtol=1e-5)
    assert_close(loss, F.cross_entropy(want[:, :-2].flatten(0, 1), idx[:, 2:].flatten()))
    by_row = model(idx, idx, shift=torch.tensor([1, 3]))[0]
    assert_close(by_row[1], want[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(by_row[0], want[0], atol=1e-3)
    assert model(tokens(1, 16), shift=2)[0].shape == (1, 1, 61)  # a full window still fits


# -----------------------------------------------------------------------------
# every option


LEGAL = [
    (field, value)
    for field, table in TABLES.items()
    for value in table
    if field != "exit_gate"  # it takes part in the losses of nanorecur/objectives.py alone
]


@pytest.mark.parametrize("field, value", LEGAL)
def test_every_legal_value_trains(field, value):
    """A step against the gradient lowers the loss, and every parameter takes part."""
    model, idx = build(**{field: value}), tokens(4, 16)
    before = model(idx[:, :-1], idx[:, 1:])[1]
    before.backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            p -= 0.01 * p.grad
    assert model(idx[:, :-1], idx[:, 1:])[1] < before - 1e-4


PARCAE = dict(
    value_embedding=True, loop_exit="linear", loop_entry="rmsnorm", input_injection="diagonal"
)
FLOPS = {
    "plain": dict(n_layer=2),
    "plain swiglu": dict(n_layer=2, mlp="swiglu", position="rope"),
    "looped": {},
    "truncated": dict(bptt_k=1),
    "truncated wide": dict(bptt_k=5),
    "truncated add": dict(bptt_k=2, input_injection="add"),
    "truncated residual": dict(bptt_k=2, input_injection="residual"),
    "zero state": dict(bptt_k=2, state_init="zero"),
    "groups": dict(n_layer=5, loop_groups=((0, 1), (3,)), loop_counts=(2, 3), bptt_k=1),
    "baseline": dict(use_model_baseline=True),
    "grouped queries": dict(n_kv_head=2, n_hidden=48, tie_weights=False),
    "latent": dict(attention="mla", bptt_k=1),
    "latent rope": dict(attention="mla", n_latent=8, position="rope"),
    "parcae": PARCAE,
    **{name: dict(input_injection=name) for name in TABLES["input_injection"]},
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_those_torch_counts(name):
    model, idx = build(**FLOPS[name]).train(), tokens(3, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counted = counter.get_total_flops()
    assert model.flops_per_token() * idx.numel() == pytest.approx(counted, rel=1e-9)


# -----------------------------------------------------------------------------
# what is refused


WRONG = [  # the field that is named, what is given to the looped model
    ("n_embd", dict(n_embd=30)),
    ("n_head", dict(n_head=0)),
    ("n_loop", dict(n_loop=0)),
    ("n_loop", dict(n_loop=9)),
    ("n_loop", dict(n_loop=1.5)),
    ("n_loop", dict(n_loop=True)),
    ("n_loop", dict(n_block=0, n_prelude=0, n_coda=0)),
    ("dropout", dict(dropout=1.0)),
    ("dropout", dict(dropout=math.nan)),
    ("norm", dict(norm="typo")),
    ("norm", dict(norm=3)),
    ("bptt_k", dict(bptt_k=-1)),
    ("n_block", dict(n_block=0)),
    ("loop_counts", dict(loop_counts=(1, 2))),
    ("loop_counts", dict(loop_counts=(0,), n_loop=1)),
    ("loop_counts", dict(loop_counts=(9,), n_loop=1)),
    ("n_loop", dict(loop_counts=(2,))),
    ("loop_groups", dict(loop_groups=((0,),))),
    ("position", dict(position="rope", n_head=32)),
    ("position", dict(position="rope", attention="mla", n_embd=24)),
    ("n_embd", dict(loop_embedding="sinusoidal", n_embd=5, n_head=1)),
    ("input_injection", dict(input_injection="passthrough", bptt_k=1)),
    ("input_injection", dict(input_injection="passthrough", state_init="noise")),
    ("attention", dict(attention="mla", qk_bias=True)),
    ("n_kv_head", dict(n_kv_head=3)),
    ("document_separator", dict(document_separator=61)),
    ("predict_ahead", dict(predict_ahead=True, document_separator=3)),
    ("predict_ahead", dict(predict_ahead=True, attention_window=3)),
    ("label_shift_prob", dict(label_shift_prob=1.5)),
    ("rope_scaling", dict(rope_scaling=(1, 2))),
    ("exit_gate", dict(exit_gate="state", n_block=0, n_prelude=0, n_coda=0, n_loop=1)),
    ("vocab_size", dict(vocab_size=0)),
    ("block_size", dict(block_size="16")),
    ("max_loops", dict(max_loops=0)),
    ("loop_noise_scale", dict(loop_noise_scale=-1.0)),
    ("residual_share", dict(residual_share=math.inf)),
]


@pytest.mark.parametrize("field, wrong", WRONG, ids=str)
def test_a_wrong_config_names_the_field_its_value_and_what_is_allowed(field, wrong):
    given = {**LOOPED, **wrong}
    value = given.get(field, getattr(GPTConfig, field))
    with pytest.raises(ValueError) as error:
        GPTConfig(**given)
    assert str(error.value).startswith(f"{field}={value!r}: must be ")


NO_GROUPS = [
    ((0, 2),),
    ((0, 1), (1, 2)),
    ((1,), (0,)),
    ((4,),),
    ((-1, 0),),
    ((),),
    (0, 1),
    (("0",),),
    ((0, 0),),
]


@pytest.mark.parametrize("groups", NO_GROUPS, ids=str)
def test_loop_groups_are_ascending_runs_of_blocks(groups):
    with pytest.raises(ValueError, match="loop_groups=.*: must be"):
        GPTConfig(**TINY, n_layer=4, loop_groups=groups)


@pytest.mark.parametrize("n_loop", [0, -1, (), (1, 2), 1.5, (0,), True, "3"])
def test_wrong_loops_at_call_time_are_refused(n_loop):
    with pytest.raises(ValueError, match="n_loop=.*: must be an int >= 1, or one for each of 1"):
        build()(tokens(), n_loop=n_loop)


# -----------------------------------------------------------------------------
# spectral clipping


def matrices():
    """Return matrices (m, n) of all the kinds that could go wrong, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

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
    assert torch.linalg.matrix_norm(clipped, 2) <= 1.01 * beta
    assert_close(clipped, u * s.clamp(max=beta) @ v, atol=2e-3 * beta, rtol=0)
    inside = u.mT @ clipped @ v.mT  # diagonal where the singular vectors are kept
    new = inside.diagonal()
    below = (s < 0.9 * beta) & (s > 1e-4)
    assert ((new - s).abs() <= 0.01 * s)[below].all()
    assert (inside - new.diag()).norm() <= 2e-3 * max(new.norm(), 1e-6)


def test_spectral_clip_of_a_batch_is_that_of_each_matrix():
    W = torch.stack([matrices()[name] for name in ("random", "ill-conditioned", "around beta")])
    one_by_one = torch.stack([spectral_clip(w, 0.5) for w in W])
    assert_close(spectral_clip(W, 0.5), one_by_one, atol=1e-5, rtol=1e-4)


def test_spectral_clip_keeps_bfloat16():
    clipped = spectral_clip(matrices()["random"].bfloat16(), 0.5)
    assert clipped.dtype == torch.bfloat16
    assert torch.linalg.matrix_norm(clipped.float(), 2) < 0.51


@pytest.mark.parametrize(
    "options", [dict(value_embedding=True), dict(document_separator=0)], ids=str
)
def test_parts_that_read_token_ids_refuse_embeddings_in_words(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: needs token ids"):
        build(**options)(torch.randn(2, 5, 32))
