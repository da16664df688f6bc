"""The loops of model.py against the same thing written out: unrolled, detached, drawn by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LOOPED, TINY, build, tokens
from torch.testing import assert_close

from model import GPT, Context, GPTConfig, sample_loops

PLAIN_LOOP = dict(input_injection="passthrough", loop_norm="none")
TWO_GROUPS = dict(n_layer=5, loop_groups=[[0, 1], [3]])

# -----------------------------------------------------------------------------
# which blocks are looped


def compose(model, idx, order):
    """Return logits by the model's blocks alone, in this order of their numbers."""
    x, ctx = model.embed(idx)
    for number in order:
        x = model.transformer.h[number](x, ctx)
    return model.lm_head(model.transformer.ln_f(x))


def test_looped_is_the_same_weights_unrolled():
    looped, idx = build(**PLAIN_LOOP, spread=0.1), tokens()
    order = [0, 1, 2, 1, 2, 1, 2, 3]
    unrolled = GPT(GPTConfig(**TINY, n_layer=len(order)))
    weights = {name: w for name, w in looped.state_dict().items() if ".h." not in name}
    for number, source in enumerate(order):
        for name, w in looped.transformer.h[source].state_dict().items():
            weights[f"transformer.h.{number}.{name}"] = w
    unrolled.load_state_dict(weights)
    assert torch.equal(looped(idx, idx)[0], unrolled(idx, idx)[0])


def test_one_loop_without_injection_is_plain():
    looped, plain, idx = build(**PLAIN_LOOP, n_loop=1, spread=0.1), build(n_layer=4), tokens()
    plain.load_state_dict(looped.state_dict())
    assert torch.equal(looped(idx, idx)[0], plain(idx, idx)[0])


def test_groups_loop_as_written_out():
    model = build(**TWO_GROUPS, loop_counts=[2, 3], **PLAIN_LOOP, spread=0.1)
    idx = tokens()
    by_count = {
        None: [0, 1, 0, 1, 2, 3, 3, 3, 4],
        1: [0, 1, 2, 3, 4],
        (1, 4): [0, 1, 2, 3, 3, 3, 3, 4],
    }
    for n_loop, order in by_count.items():
        assert torch.equal(model(idx, idx, n_loop=n_loop)[0], compose(model, idx, order))
    assert torch.equal(model(idx)[0], model(idx, n_loop=[2, 3])[0])


def test_prelude_block_coda_and_loop_groups_are_two_spellings_of_one_model():
    idx = tokens()
    by_parts = build(spread=0.1)
    by_groups = build(n_layer=4, n_loop=3, max_loops=8, loop_groups=[[1, 2]])
    by_groups.load_state_dict(by_parts.state_dict())
    stages = (((0,), False), ((1, 2), True), ((3,), False))
    assert by_parts.config.layout == by_groups.config.layout == stages
    assert torch.equal(by_parts(idx, idx)[0], by_groups(idx, idx)[0])


def test_baseline_loops_nothing():
    model, idx = build(use_model_baseline=True, spread=0.1), tokens()
    assert not any("loops" in name for name in model.state_dict())
    assert torch.equal(model(idx, idx)[0], compose(model, idx, range(4)))
    assert torch.equal(model(idx, idx, n_loop=7)[0], model(idx, idx)[0])


def test_parameters_do_not_depend_on_the_number_of_loops():
    few, many = build(n_loop=1).state_dict(), build(n_loop=8).state_dict()
    assert {name: w.shape for name, w in few.items()} == {name: w.shape for name, w in many.items()}
    assert set(few) - set(build(n_layer=4).state_dict()) == {
        "transformer.loops.0.inject.weight",
        "transformer.loops.0.inject.bias",
        "transformer.loops.0.norm.weight",
    }


# -----------------------------------------------------------------------------
# a loop


@pytest.mark.parametrize("n", [1, 2, 9, 20])
@pytest.mark.parametrize("injection", ["passthrough", "add", "inject", "inject_bias", "residual"])
def test_group_is_the_equation(injection, n):
    """s = norm(blocks(inject(s, e) + index)), with residual norm(blocks(..) + 0.3 e), at any n."""
    options = dict(input_injection=injection, residual_share=0.3, loop_embedding="learned")
    options["bias"] = injection != "inject_bias"  # which has one where nothing else has
    model, idx = build(**options, spread=0.1), tokens()
    h, loop = model.transformer.h, model.transformer.loops[0]
    x, ctx = model.embed(idx)
    e = s = h[0](x, ctx)
    for i in range(n):
        if injection == "add":
            s = s + e
        if "inject" in injection:
            s = torch.cat((e, s), -1) @ loop.inject.weight.T + loop.inject.bias
        s = s + loop.index.weight[min(i, 7)]
        s = h[2](h[1](s, ctx), ctx)
        if injection == "residual":
            s = s + 0.3 * e
        s = loop.norm.weight * s / (s.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    logits = model.lm_head(model.transformer.ln_f(h[3](s, ctx)))
    assert_close(model(idx, idx, n_loop=n)[0], logits, atol=1e-5, rtol=1e-5)


def test_diagonal_injection_is_the_equation():
    """Parcae's exp(-dt A) s + dt B e per channel; it starts with a decay of sqrt(1/5) and B = I."""
    inject = build(input_injection="diagonal").transformer.loops[0].inject
    s, e = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    assert_close(inject(s, 0 * e), math.sqrt(1 / 5) * s)
    assert_close(inject(0 * s, e), math.log(5) / 2 * e)  # dt, where A is 1
    inject = build(input_injection="diagonal", spread=0.3).transformer.loops[0].inject
    dt = torch.log1p(inject.dt_bias.exp())
    want = torch.exp(-dt * inject.A_log.exp()) * s + dt * (e @ inject.weight.T)
    assert_close(inject(s, e), want)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # of e: updates that are small beside the 1e-6 too
def test_orthogonal_injection_is_the_equation(scale):
    """A token's decayed state v without its component along the update a, plus a (IFM)."""
    inject = build(input_injection="orthogonal", spread=0.3).transformer.loops[0].inject
    s, e = torch.randn(2, 3, 32), scale * torch.randn(2, 3, 32)
    dt = torch.log1p(inject.dt_bias.exp())
    v = torch.exp(-dt * inject.A_log.exp()) * s
    a = dt * (e @ inject.weight.T)
    want = torch.empty_like(s)
    for row in range(2):
        for t in range(3):
            share = torch.dot(v[row, t], a[row, t]) / (torch.dot(a[row, t], a[row, t]) + 1e-6)
            want[row, t] = v[row, t] - share * a[row, t] + a[row, t]
    assert_close(inject(s, e), want, atol=1e-5, rtol=1e-5)
    assert_close(inject(s, 0 * e), v)  # nothing to be orthogonal to
    if scale == 1:
        kept = inject(s, e) - a
        assert ((kept * a).sum(-1).abs() < 1e-4).all() and kept.norm() > 1


def test_orthogonal_injection_starts_as_diagonal_does():
    options = dict(state_init="zero", n_loop=1)
    inject = build(input_injection="orthogonal", **options).transformer.loops[0].inject
    diagonal = build(input_injection="diagonal", **options).transformer.loops[0].inject
    assert inject.state_dict().keys() == diagonal.state_dict().keys()
    s, e = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    s -= (s * e).sum(-1, keepdim=True) / e.square().sum(-1, keepdim=True) * e  # orthogonal already
    assert_close(inject(s, e), diagonal(s, e), atol=1e-5, rtol=1e-5)


def test_orthogonal_injection_adds_up_in_float32():
    """With weights and states in bfloat16 the result is float64's, rounded once."""
    inject = build(input_injection="orthogonal", n_embd=64, spread=0.3).transformer.loops[0].inject
    inject, s, e = inject.bfloat16(), torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    got = inject(s, e)
    seen = []
    inject.combine = lambda v, a: seen.extend((v, a)) or v
    inject(s, e)
    assert got.dtype == seen[0].dtype == torch.bfloat16
    v, a = (part.double() for part in seen)
    share = (v * a).sum(-1, keepdim=True) / (a.square().sum(-1, keepdim=True) + 1e-6)
    assert torch.equal(got, (v - share * a + a).bfloat16())


@pytest.mark.parametrize("injection", ["inject", "inject_bias"])
def test_inject_starts_as_the_groups_input(injection):
    s, e = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    model = build(input_injection=injection)
    assert torch.equal(model.transformer.loops[0].inject(s, e), e)


def test_of_all_parts_inject_bias_alone_has_a_bias():
    model = build(input_injection="inject_bias", bias=False)
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert biases == ["transformer.loops.0.inject.bias"]


def index_vectors(kind, count):
    """Return (loop's index part, what it adds in each of count loops)."""
    index = build(loop_embedding=kind, spread=0.1).transformer.loops[0].index
    s = torch.zeros(1, 1, 32)
    return index, torch.stack([index(s, i)[0, 0] for i in range(count)])


def assert_all_apart(vectors):
    distances = torch.cdist(vectors, vectors) + torch.eye(len(vectors))
    assert distances.min() > 1e-3


def test_a_learned_loop_embedding_has_max_loops_rows_and_repeats_the_last():
    _, vectors = index_vectors("learned", 12)
    assert_all_apart(vectors[:8])
    assert torch.equal(vectors[8:], vectors[[7]].expand(4, -1))


def test_a_sinusoidal_loop_embedding_is_the_formula_at_any_loop():
    index, vectors = index_vectors("sinusoidal", 12)
    assert_all_apart(vectors)
    angles = 5 * 10000 ** (-torch.arange(0, 32, 2) / 32)
    assert_close(vectors[5], index.gain * torch.cat((angles.sin(), angles.cos())))


# -----------------------------------------------------------------------------
# the first state, and noise on it


def first_state(model, e, n=2):
    """Return the state that the first of n loops gets."""
    loop = model.transformer.loops[0]
    return loop.noise(loop.init_state(e, Context(torch.arange(e.size(1)))), n)


def test_the_first_state_is_the_groups_input_or_zero():
    e = torch.randn(2, 9, 32)
    assert torch.equal(first_state(build(state_init="input"), e), e)
    assert torch.equal(first_state(build(state_init="zero"), e), torch.zeros_like(e))


@pytest.mark.parametrize("kind, variance", [("noise", 2 / (5 * 32)), ("hash", 1 / 32)])
def test_a_first_state_of_noise_is_fixed_in_eval_and_fresh_in_training(kind, variance):
    model, e = build(state_init=kind), torch.randn(2, 9, 32)
    fixed = first_state(model, e)
    assert torch.equal(fixed, first_state(model, e))
    assert torch.equal(fixed[0], fixed[1])
    prefix = first_state(model, e[:1, :4])  # as if the other tokens were to come
    assert torch.equal(prefix, fixed[:1, :4])
    model.train()
    fresh = first_state(model, torch.zeros(64, 16, 32))
    assert not torch.equal(fresh[0], fresh[1])
    assert fresh.var().item() == pytest.approx(variance, rel=0.05)


def test_a_hashed_first_state_is_the_formula():
    """At every channel and position, the gaussian quantile of the fractional part of a sine."""
    state = first_state(build(state_init="hash"), torch.zeros(1, 16, 32))[0]
    quantile = torch.distributions.Normal(0, 32**-0.5).icdf
    for channel in range(32):
        x = 0.021713 * torch.arange(16.0) + torch.tensor(0.013579) * channel + 0.123457
        share = (torch.sin(x) * 43758.5453123).remainder(1).clamp(1e-6, 1 - 1e-6)
        assert_close(state[:, channel].double(), quantile(share.double()), atol=1e-4, rtol=1e-3)
    wide = build(state_init="hash", n_embd=256, block_size=512)
    sample = first_state(wide, torch.zeros(1, 512, 256))
    assert sample.mean().abs() < 1e-3 and sample.std() == pytest.approx(256**-0.5, rel=0.02)


def test_loop_noise_is_in_training_alone_and_only_where_a_group_loops_more_than_once():
    e = torch.zeros(64, 16, 32)
    model = build(loop_noise_scale=3.0)
    assert torch.equal(first_state(model, e), e)
    model.train()
    assert torch.equal(first_state(model, e, n=1), e)
    assert first_state(model, e).var().item() == pytest.approx(9 * 2 / (5 * 32), rel=0.05)
    assert torch.equal(first_state(build(loop_noise_scale=0.0).train(), e), e)
    once = build(loop_noise_scale=3.0, n_loop=1, input_injection="add").train()
    assert torch.equal(once(tokens())[0], once(tokens())[0])


RANDOM = [dict(state_init="noise"), dict(state_init="hash"), dict(loop_noise_scale=1.0)]
RANDOM.append(dict(dropout=0.3))


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_eval_is_deterministic_and_rows_are_independent(options):
    model, idx = build(**options, spread=0.1), tokens(3)
    together = model(idx, idx)[0]
    assert torch.equal(together, model(idx, idx)[0])
    for row in range(3):
        alone = model(idx[[row]], idx[[row]])[0]
        assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


# -----------------------------------------------------------------------------
# truncated backpropagation


def loss_by_hand(model, idx, n, k):
    """Return the loss with the state detached from its past where the last k of n loops begin."""
    h, loop = model.transformer.h, model.transformer.loops[0]
    x, ctx = model.embed(idx)
    e = s = h[0](x, ctx)
    for i in range(n):
        if 0 < i == n - k:
            s = s.detach()
        s = loop.norm(loop.reinject(h[2](h[1](loop.inject(s, e), ctx), ctx), e))
    logits = model.lm_head(model.transformer.ln_f(h[3](s, ctx)))
    return F.cross_entropy(logits.flatten(0, 1), idx.flatten())


@pytest.mark.parametrize("injection", ["add", "inject", "orthogonal", "residual"])
@pytest.mark.parametrize("n, k", [(1, 2), (3, 1), (3, 2), (5, 3), (4, 4)])
def test_truncated_gradients_are_those_by_hand(injection, n, k):
    model, idx = build(input_injection=injection, bptt_k=k, spread=0.1).train(), tokens()
    params = list(model.parameters())
    by_hand = torch.autograd.grad(loss_by_hand(model, idx, n, k), params)
    model(idx, idx, n_loop=n)[1].backward()
    for (name, p), want in zip(model.named_parameters(), by_hand, strict=True):
        assert_close(p.grad, want, atol=1e-6, rtol=1e-4, msg=name)
    if k < n:  # and they are not those of all loops
        full = torch.autograd.grad(loss_by_hand(model, idx, n, n + 1), params)
        pairs = zip(full, by_hand, strict=True)
        assert not all(torch.allclose(a, b, rtol=1e-2) for a, b in pairs)


def saved_bytes(model, n):
    """Return the bytes that autograd keeps for the backward pass of n loops, each storage once."""
    kept = {}  # a tensor of each storage, by address

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens(), tokens(), n_loop=n)[1]
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_with_truncation_memory_does_not_grow_with_the_loops():
    truncated = build(bptt_k=2, max_loops=64).train()
    assert saved_bytes(truncated, 2) == saved_bytes(truncated, 32)
    full = build(max_loops=64).train()
    assert saved_bytes(full, 32) > 5 * saved_bytes(full, 2)


# -----------------------------------------------------------------------------
# states to look at


def test_loops_representation_is_the_state_after_every_loop():
    model, idx = build(**TWO_GROUPS, n_loop=3, spread=0.1), tokens()
    first, second = model.loops_representation(idx, n_loop=(2, 4))
    assert len(first) == 2
    assert len(second) == 4
    assert not any(s.requires_grad for s in (*first, *second))
    h, loops = model.transformer.h, model.transformer.loops
    x, ctx = model.embed(idx)
    for n, s in enumerate(first, 1):
        assert torch.equal(s, loops[0](x, ctx, n))
    x = h[2](first[-1], ctx)
    for n, s in enumerate(second, 1):
        assert torch.equal(s, loops[1](x, ctx, n))
    hidden = model.transformer.ln_f(h[4](second[-1], ctx))
    assert torch.equal(model.logits(hidden[:, [-1]]), model(idx, n_loop=(2, 4))[0])


# -----------------------------------------------------------------------------
# sampled depth


def draws(sampling, mean, count=4000):
    """Return so many sampled numbers of loops (count,)."""
    options = {"loop_sampling": sampling, "n_loop": mean, "max_loops": 1000}
    config = GPTConfig(**{**LOOPED, **options})
    generator = torch.Generator().manual_seed(0)
    depths = [sample_loops(config, generator)[0] for _ in range(count)]
    return torch.tensor(depths, dtype=torch.float64)


def test_poisson_draws_are_huginns():
    """The first twelve depths of its sampler at mean recurrence 32, seeded by step as there."""
    config = GPTConfig(**{**LOOPED, "loop_sampling": "poisson", "n_loop": 32, "max_loops": 1000})
    depths = []
    for step in range(1, 13):
        generator = torch.Generator().manual_seed(514229 + step)
        depths += sample_loops(config, generator)
    assert depths == [29, 29, 33, 52, 40, 16, 35, 29, 17, 17, 53, 20]


def test_a_fixed_number_of_loops_is_always_the_mean():
    assert set(draws("fixed", 5, count=20).tolist()) == {5}


def test_uniform_loops_are_from_one_to_twice_the_mean_less_one():
    depths = draws("uniform", 4)
    assert set(depths.tolist()) == set(range(1, 8))
    assert depths.mean().item() == pytest.approx(4, abs=0.1)


def test_geometric_loops_stop_with_one_over_the_mean():
    depths = draws("geometric", 4)
    assert depths.mean().item() == pytest.approx(4, rel=0.05)
    assert (depths == 1).double().mean().item() == pytest.approx(1 / 4, abs=0.03)


def test_poisson_loops_have_the_moments_of_one_plus_a_log_normal_poisson():
    depths = draws("poisson", 8)
    assert depths.mean().item() == pytest.approx(9, rel=0.05)
    assert depths.var().item() == pytest.approx(8 + 64 * (math.exp(0.25) - 1), rel=0.1)


@pytest.mark.parametrize("sampling", ["fixed", "uniform", "geometric", "poisson"])
def test_samples_are_repeatable_ints_in_bounds_for_each_group(sampling):
    groups = dict(loop_groups=((0,), (2, 3)), loop_counts=(1, 5), max_loops=6)
    config = GPTConfig(**TINY, n_layer=4, **groups, loop_sampling=sampling)

    def sequence(seed):
        generator = torch.Generator().manual_seed(seed)
        return [sample_loops(config, generator) for _ in range(200)]

    assert sequence(3) == sequence(3)
    assert sampling == "fixed" or sequence(3) != sequence(4)
    for counts in sequence(3):
        assert len(counts) == 2
        assert all(type(n) is int and 1 <= n <= 6 for n in counts)
