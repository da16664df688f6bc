"""Loops against the same thing written out: unrolled, detached by hand, drawn by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LOOPED, TINY, build, tokens

from model import GPT, GPTConfig, Where, sample_loops, shift_labels
from nanorecur.exit_rules import after_each_loop
from nanorecur.objectives import hidden_by_row, sample_shifts

PLAIN_LOOP = dict(input_injection="passthrough", loop_norm="none")


def compose(model, idx, step_counts):
    """Logits by the model's blocks alone, in this order of block numbers."""
    x, where = model.embed(idx)
    for block in step_counts:
        x = model.transformer.h[block](x, where)
    return model.lm_head(model.transformer.ln_f(x))


def test_looped_is_the_same_weights_unrolled():
    looped, idx = build(**PLAIN_LOOP, spread=0.1), tokens()
    order = [0, 1, 2, 1, 2, 1, 2, 3]
    unrolled = GPT(GPTConfig(**TINY, n_layer=len(order)))
    weights = {name: w for name, w in looped.state_dict().items() if ".h." not in name}
    for to, origin in enumerate(order):
        weights |= {
            f"transformer.h.{to}.{name}": w
            for name, w in looped.transformer.h[origin].state_dict().items()
        }
    unrolled.load_state_dict(weights)
    assert torch.equal(looped(idx, idx)[0], unrolled(idx, idx)[0])


def test_one_loop_without_injection_is_plain():
    looped, plain, idx = build(**PLAIN_LOOP, n_loop=1, spread=0.1), build(n_layer=4), tokens()
    plain.load_state_dict(looped.state_dict())
    assert torch.equal(looped(idx, idx)[0], plain(idx, idx)[0])


def test_groups_loop_as_written_out():
    model, idx = (
        build(n_layer=5, loop_groups=[[0, 1], [3]], loop_counts=[2, 3], **PLAIN_LOOP, spread=0.1),
        tokens(),
    )
    assert torch.equal(model(idx, idx)[0], compose(model, idx, [0, 1, 0, 1, 2, 3, 3, 3, 4]))
    assert torch.equal(model(idx, idx, n_loop=1)[0], compose(model, idx, range(5)))
    assert torch.equal(
        model(idx, idx, n_loop=(1, 4))[0], compose(model, idx, [0, 1, 2, 3, 3, 3, 3, 4])
    )
    assert torch.equal(model(idx)[0], model(idx, n_loop=[2, 3])[0])


def test_both_spellings_are_one_model():
    sugar, groups, idx = (
        build(spread=0.1),
        build(n_layer=4, loop_groups=[[1, 2]], n_loop=3),
        tokens(),
    )
    groups.load_state_dict(sugar.state_dict())
    assert (
        sugar.config.stages
        == groups.config.stages
        == (((0,), False), ((1, 2), True), ((3,), False))
    )
    assert torch.equal(sugar(idx, idx)[0], groups(idx, idx)[0])


def test_baseline_loops_nothing():
    model, idx = build(use_model_baseline=True, spread=0.1), tokens()
    assert not any("loops" in name for name in model.state_dict())
    assert torch.equal(model(idx, idx)[0], compose(model, idx, range(4)))
    assert torch.equal(model(idx, idx, n_loop=7)[0], model(idx, idx)[0])


def test_parameters_do_not_depend_on_the_count():
    few, many = build(n_loop=1).state_dict(), build(n_loop=8).state_dict()
    assert {name: w.shape for name, w in few.items()} == {name: w.shape for name, w in many.items()}
    assert {name for name in few if name not in build(n_layer=4).state_dict()} == {
        "transformer.loops.0.inject.weight",
        "transformer.loops.0.inject.bias",
        "transformer.loops.0.norm.weight",
    }


@pytest.mark.parametrize("n", [1, 2, 9, 20])
@pytest.mark.parametrize("injection", ["passthrough", "add", "inject", "residual"])
def test_group_is_the_equation(injection, n):
    """s = norm(after(blocks(inject(s, e)))) for n loops, whatever the model's own number."""
    model, idx = (
        build(input_injection=injection, residual_share=0.3, loop_embedding="learned", spread=0.1),
        tokens(),
    )
    h, loop, s = model.transformer.h, model.transformer.loops[0], None
    x, where = model.embed(idx)
    e = s = h[0](x, where)
    for i in range(n):
        if injection == "add":
            s = s + e
        if injection == "inject":
            s = torch.cat((e, s), -1) @ loop.inject.weight.T + loop.inject.bias
        s = s + loop.index.weight[min(i, 7)]
        s = h[2](h[1](s, where), where)
        if injection == "residual":
            s = s + 0.3 * e
        s = loop.norm.weight * s / (s.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()
    logits = model.lm_head(model.transformer.ln_f(h[3](s, where)))
    torch.testing.assert_close(model(idx, idx, n_loop=n)[0], logits, atol=1e-5, rtol=1e-5)


def test_inject_starts_as_the_groups_input():
    model, s, e = build(), torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    assert torch.equal(model.transformer.loops[0].inject(s, e), e)


def test_loop_embeddings_tell_loops_apart():
    s = torch.zeros(1, 1, 32)
    for kind in ("learned", "sinusoidal"):
        index = build(loop_embedding=kind, spread=0.1).transformer.loops[0].index
        rows = torch.stack([index(s, i)[0, 0] for i in range(12)])
        known = 8 if kind == "learned" else 12  # rows of max_loops, or no bound
        assert torch.cdist(rows[:known], rows[:known]).add(torch.eye(known)).min() > 1e-3
        assert kind == "sinusoidal" or torch.equal(rows[7], rows[11])
    angle = 5 * 10000 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(rows[5], index.gain * torch.cat((angle.sin(), angle.cos())))


# -----------------------------------------------------------------------------
# state and noise


def first_state(model, e, n=2):
    """The state that the first loop gets."""
    loop = model.transformer.loops[0]
    return loop.noise(loop.init_state(e, Where(torch.arange(e.size(1)), None)), n)


def test_state_init():
    e = torch.randn(2, 9, 32)
    assert torch.equal(first_state(build(state_init="input"), e), e)
    assert torch.equal(first_state(build(state_init="zero"), e), torch.zeros_like(e))
    model = build(state_init="noise")
    fixed = first_state(model, e)
    assert torch.equal(fixed, first_state(model, e)) and torch.equal(fixed[0], fixed[1])
    assert torch.equal(
        first_state(model, e[:1, :4]), fixed[:1, :4]
    )  # a prefix starts as it does in the whole
    model.train()
    fresh = first_state(model, torch.zeros(64, 16, 32))
    assert not torch.equal(fresh[0], fresh[1])
    assert fresh.var().item() == pytest.approx(2 / (5 * 32), rel=0.05)


def test_loop_noise_is_training_only_first_loop_only_more_than_one_loop_only():
    e = torch.zeros(64, 16, 32)
    model = build(loop_noise_scale=3.0)
    assert torch.equal(first_state(model, e), e)
    model.train()
    assert torch.equal(first_state(model, e, n=1), e)
    assert first_state(model, e).var().item() == pytest.approx(9 * 2 / (5 * 32), rel=0.05)
    assert torch.equal(first_state(build(loop_noise_scale=0.0).train(), e), e)
    once = build(loop_noise_scale=3.0, n_loop=1, input_injection="add").train()
    assert torch.equal(once(tokens())[0], once(tokens())[0])


@pytest.mark.parametrize(
    "options", [dict(state_init="noise"), dict(loop_noise_scale=1.0), dict(dropout=0.3)], ids=str
)
def test_eval_is_deterministic_and_rows_are_independent(options):
    model, idx = build(**options, spread=0.1), tokens(3)
    together = model(idx, idx)[0]
    assert torch.equal(together, model(idx, idx)[0])
    for row in range(3):
        alone = model(idx[[row]], idx[[row]])[0]
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


# -----------------------------------------------------------------------------
# truncated backpropagation


def detached_by_hand(model, idx, n, k):
    """The loss with the state cut off from its past where the last k of n loops begin."""
    h, loop = model.transformer.h, model.transformer.loops[0]
    x, where = model.embed(idx)
    e = s = h[0](x, where)
    for i in range(n):
        if 0 < i == n - k:
            s = s.detach()
        s = loop.norm(loop.after(h[2](h[1](loop.inject(s, e), where), where), e))
    logits = model.lm_head(model.transformer.ln_f(h[3](s, where)))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten())


@pytest.mark.parametrize("injection", ["add", "inject", "residual"])
@pytest.mark.parametrize("n,k", [(1, 2), (3, 1), (3, 2), (5, 3), (4, 4)])
def test_truncated_gradients_are_those_by_hand(injection, n, k):
    model, idx = build(input_injection=injection, bptt_k=k, spread=0.1).train(), tokens()
    by_hand = torch.autograd.grad(detached_by_hand(model, idx, n, k), list(model.parameters()))
    model(idx, idx, n_loop=n)[1].backward()
    for (name, p), want in zip(model.named_parameters(), by_hand, strict=True):
        torch.testing.assert_close(p.grad, want, atol=1e-6, rtol=1e-4, msg=name)
    if k < n:  # and they are not the full ones
        model.zero_grad()
        full = torch.autograd.grad(detached_by_hand(model, idx, n, n + 1), list(model.parameters()))
        assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(full, by_hand, strict=True))


def saved_bytes(model, n):
    """Bytes that autograd keeps for the backward pass of n loops, each storage once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
    ):
        loss = model(tokens(), tokens(), n_loop=n)[1]
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del loss
    return total


def test_memory_is_flat_in_the_loops():
    model = build(bptt_k=2, max_loops=64).train()
    assert saved_bytes(model, 2) == saved_bytes(model, 32)
    assert saved_bytes(build(max_loops=64).train(), 32) > 5 * saved_bytes(build().train(), 2)


# -----------------------------------------------------------------------------
# analysis


def test_loops_representation_is_the_state_after_every_loop():
    model, idx = build(n_layer=5, loop_groups=[[0, 1], [3]], n_loop=3, spread=0.1), tokens()
    states = model.loops_representation(idx, n_loop=(2, 4))
    assert [len(group) for group in states] == [2, 4]
    x, where = model.embed(idx)
    for i in range(2):
        assert torch.equal(states[0][i], model.transformer.loops[0](x, where, i + 1))
    x = model.transformer.h[2](states[0][-1], where)
    for i in range(4):
        assert torch.equal(states[1][i], model.transformer.loops[1](x, where, i + 1))
    logits = model.logits(
        model.transformer.ln_f(model.transformer.h[4](states[1][-1], where))[:, [-1]]
    )
    assert torch.equal(logits, model(idx, n_loop=(2, 4))[0])
    assert not any(loop.norm._forward_hooks for loop in model.transformer.loops)


# -----------------------------------------------------------------------------
# sampled depth


def draws(sampling, mean, count=4000, bound=1000, seed=0):
    config = GPTConfig(**{**LOOPED, "loop_sampling": sampling, "n_loop": mean, "max_loops": bound})
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(
        [sample_loops(config, generator)[0] for _ in range(count)], dtype=torch.float64
    )


def test_poisson_draws_are_huginns():
    """The first twelve depths of its sampler at mean recurrence 32, seeded by step as there."""
    config = GPTConfig(**{**LOOPED, "loop_sampling": "poisson", "n_loop": 32, "max_loops": 1000})
    depths = [
        sample_loops(config, torch.Generator().manual_seed(514229 + step))[0]
        for step in range(1, 13)
    ]
    assert depths == [29, 29, 33, 52, 40, 16, 35, 29, 17, 17, 53, 20]


def test_samplers_have_their_distribution():
    assert set(draws("fixed", 5).tolist()) == {5}
    uniform = draws("uniform", 4)
    assert set(uniform.tolist()) == set(range(1, 8)) and uniform.mean().item() == pytest.approx(
        4, abs=0.1
    )
    geometric = draws("geometric", 4)
    assert geometric.mean().item() == pytest.approx(4, rel=0.05) and (
        geometric == 1
    ).double().mean().item() == pytest.approx(0.25, abs=0.03)
    poisson = draws("poisson", 8)
    assert poisson.mean().item() == pytest.approx(9, rel=0.05)  # the "+ 1" of Huginn
    assert poisson.var().item() == pytest.approx(8 + 64 * (math.exp(0.25) - 1), rel=0.1)


@pytest.mark.parametrize("sampling", ["fixed", "uniform", "geometric", "poisson"])
def test_samples_are_repeatable_ints_in_bounds(sampling):
    config = GPTConfig(
        **TINY,
        n_layer=4,
        loop_groups=((0,), (2, 3)),
        loop_counts=(1, 5),
        max_loops=6,
        loop_sampling=sampling,
    )

    def sequence(seed):
        generator = torch.Generator().manual_seed(seed)
        return [sample_loops(config, generator) for _ in range(200)]

    assert sequence(3) == sequence(3)
    assert sampling == "fixed" or sequence(3) != sequence(4)
    assert all(
        len(counts) == 2 and all(type(n) is int and 1 <= n <= 6 for n in counts)
        for counts in sequence(3)
    )


# -----------------------------------------------------------------------------
# another depth for each row


ROWS = [
    dict(),
    dict(bptt_k=2),
    dict(input_injection="diagonal", state_init="zero", loop_norm="none", loop_exit="linear"),
    dict(loop_embedding="learned", loop_entry="rmsnorm"),
    dict(loop_embedding="sinusoidal", position="rope"),
    dict(document_separator=7),
    dict(state_init="noise", value_embedding=True),
]


@pytest.mark.parametrize("options", ROWS, ids=str)
def test_each_row_by_its_own_count_is_the_row_alone(options):
    """Logits and gradients: the batch at its own counts = one row after the other."""
    model, idx, counts = build(**options, spread=0.1), tokens(4), torch.tensor([2, 5, 1, 3])
    together = model.logits(hidden_by_row(model, idx, [counts]))
    F.cross_entropy(together.flatten(0, 1), idx.flatten()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, n in enumerate(counts.tolist()):
        logits, loss = model(idx[[row]], idx[[row]], n_loop=n)
        torch.testing.assert_close(logits[0], together[row], atol=1e-5, rtol=1e-5)
        (loss / len(idx)).backward()
    for (name, p), got in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(got, p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_rows_cost_the_mean_of_their_counts():
    """Rows that pass through a looped block: their loops, not the batch's most."""
    model, counts, seen = build(), torch.tensor([2, 8, 1, 1]), []
    model.transformer.h[1].register_forward_hook(lambda block, given, x: seen.append(len(x)))
    hidden_by_row(model, tokens(4), [counts])
    assert sum(seen) == counts.sum() and max(seen) == 4


def test_counts_per_row_and_group():
    model, idx = (
        build(n_layer=5, loop_groups=[[0, 1], [3]], loop_counts=[2, 3], spread=0.1),
        tokens(3),
    )
    mixed = model.logits(
        hidden_by_row(model, idx, (torch.tensor([1, 4, 2]), torch.tensor([3, 1, 3])))
    )
    for row, counts in enumerate([(1, 3), (4, 1), (2, 3)]):
        torch.testing.assert_close(
            mixed[[row], -1:], model(idx[[row]], n_loop=counts)[0], atol=1e-5, rtol=1e-5
        )


# -----------------------------------------------------------------------------
# exits and shifted labels


@pytest.mark.parametrize(
    "options",
    [dict(), dict(predict_ahead=True), dict(loop_exit="final_norm"), dict(n_coda=0)],
    ids=str,
)
def test_exits_are_the_hidden_states_at_fewer_loops(options):
    model, idx = build(**options, spread=0.1), tokens()
    for n, (s, x) in enumerate(after_each_loop(model, idx, 5), 1):
        torch.testing.assert_close(x, model.hidden(idx, n), atol=1e-6, rtol=1e-5)
        assert s.shape == (2, 9, 32)
    assert n == 5


def test_shift_labels():
    targets = torch.arange(12).view(2, 6)
    assert torch.equal(shift_labels(targets, 1), targets)
    assert shift_labels(targets, torch.tensor([2, 4])).tolist() == [
        [1, 2, 3, 4, 5, -1],
        [9, 10, 11, -1, -1, -1],
    ]


def test_a_shift_is_a_token_before_the_input():
    """Written out: embeddings with the learned token in front, plain blocks, the rest of the positions read out."""
    model, idx = build(predict_ahead=True, n_layer=3, spread=0.1), tokens()
    x = torch.cat((model.prefix.weight[2].expand(2, 1, -1), model.transformer.wte(idx)), dim=1)
    x, where = x + model.transformer.wpe.weight[:10], Where(torch.arange(10))
    for block in model.transformer.h:
        x = block(x, where)
    logits = model.lm_head(model.transformer.ln_f(x))[:, 1:]
    got, loss = model(idx, idx, shift=3)
    torch.testing.assert_close(got, logits, atol=1e-6, rtol=1e-5)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), idx[:, 2:].flatten())
    torch.testing.assert_close(loss, wanted)
    each = model(idx, idx, shift=torch.tensor([1, 3]))[0]
    torch.testing.assert_close(each[1], logits[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(each[0], logits[0], atol=1e-3)
    model(torch.randint(61, (1, 16)))  # a whole window still fits


def test_sampled_shifts_are_geometric():
    config = GPTConfig(**LOOPED, predict_ahead=True, max_shift=3, label_shift_prob=0.6)
    drawn = sample_shifts(config, torch.Generator().manual_seed(0), 10000)
    shares = [(drawn == s).double().mean().item() for s in (1, 2, 3)]
    assert shares == pytest.approx([0.6, 0.24, 0.16], abs=0.02)
    assert torch.equal(drawn, sample_shifts(config, torch.Generator().manual_seed(0), 10000))
