"""Exit rules against their formulas, and evaluation with exit against decoding with exit."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROPE, build, few_ids, halfway_rule, tokens
from torch.testing import assert_close

from decode import Cache, Decoder
from nanorecur.exit_rules import (
    EXITS,
    after_each_loop,
    exit_distribution,
    exit_evaluation,
    exit_logits,
    make_exit,
)

# -----------------------------------------------------------------------------
# after each loop

ENDS = [dict(), dict(predict_ahead=True), dict(loop_exit="final_norm"), dict(n_coda=0)]


@pytest.mark.parametrize("options", ENDS, ids=str)
def test_after_each_loop_are_the_hidden_states_of_a_model_with_fewer_loops(options):
    model, idx = build(**options, spread=0.1), tokens()
    pairs = list(after_each_loop(model, idx, 5))
    assert len(pairs) == 5
    for n, (s, x) in enumerate(pairs, 1):
        assert s.shape == (2, 9, 32)
        assert_close(x, model.hidden(idx, n), atol=1e-6, rtol=1e-5)


def test_after_each_loop_of_another_group_the_groups_behind_it_loop_as_configured():
    groups = dict(n_layer=5, loop_groups=[[0, 1], [3]], loop_counts=[2, 3])
    model, idx = build(**groups, spread=0.1), tokens()
    pairs = list(after_each_loop(model, idx, (4, 3), group=0))
    assert len(pairs) == 4
    for n, (_, x) in enumerate(pairs, 1):
        assert_close(x, model.hidden(idx, (n, 3)), atol=1e-6, rtol=1e-5)


def test_the_distribution_of_exits_is_stopping_now_and_not_before():
    model = build(exit_gate="state", spread=0.5)
    states = list(torch.randn(4, 2, 9, 32))
    p = exit_distribution(model, states)
    assert_close(p.sum(-1), torch.ones(2, 9))
    going = torch.ones(2, 9)
    for i, s in enumerate(states):
        stop = (s @ model.exit_gate.weight[0] + model.exit_gate.bias).sigmoid()
        want = going * stop if i < 3 else going  # all that is left stops after the last loop
        assert_close(p[..., i], want)
        going = going * (1 - stop)


# -----------------------------------------------------------------------------
# formulas


def loops_by_formula(model, rule, threshold, idx, n, least):
    """Return after how many of n loops each of idx (B, 1) stops, at least `least`."""
    before, (loop, _, _), _ = model.around_group()
    x, ctx = model.embed(idx)
    for stage in before:
        x = stage(x, ctx)
    _, first = loop.begin(x, ctx, n)
    states, p = [first[:, 0]], [torch.full((len(idx), 61), 1 / 61)]  # at loop 0
    for s, hidden in after_each_loop(model, idx, n):
        states.append(s[:, 0])
        p.append(model.logits(hidden[:, 0]).softmax(-1))
    entropy = [-(q * q.log()).sum(-1) for q in p]
    likeliest = [q.argmax(-1) for q in p]
    stopped = exit_distribution(model, [s[:, None] for s in states[1:]])[:, 0].cumsum(-1)

    def stops(i):  # after loop i, counted from 1
        if rule == "state":
            return (states[i] - states[i - 1]).norm(dim=-1) / states[i].norm(dim=-1) < threshold
        if rule == "kl":
            return (p[i - 1] * (p[i - 1] / p[i]).log()).sum(-1) < threshold
        if rule == "entropy":
            return ((entropy[i] - entropy[i - 1]).abs() < threshold) & (i > 1)
        if rule == "gate":
            return stopped[:, i - 1] >= threshold
        unchanged = range(1, min(i, int(threshold) + 1))
        as_before = [likeliest[i] == likeliest[i - k] for k in unchanged]
        return torch.stack([torch.full((len(idx),), i > threshold), *as_before]).all(0)

    used = torch.full((len(idx),), n)
    for i in range(n - 1, least - 1, -1):
        used = torch.where(stops(i), i, used)
    return used


@pytest.mark.parametrize("least", [1, 5])
@pytest.mark.parametrize("rule", EXITS)
@torch.no_grad()
def test_each_rule_stops_where_its_formula_says(rule, least):
    """In evaluation and in decoding, from min_loops on."""
    model, idx = build(spread=0.2, exit_gate="state"), torch.arange(61)[:, None]
    exit_rule = halfway_rule(model, idx, rule, 8)
    want = loops_by_formula(model, rule, exit_rule.threshold, idx, 8, least)
    assert len(want.unique()) > (2 if least == 1 else 1)
    _, used = exit_logits(model, idx, exit_rule, 8, least)
    assert torch.equal(used[:, 0], want)
    decoder = Decoder(model, Cache(model, 61, 8), 8, exit_rule, least)
    assert torch.equal(decoder.step(idx, torch.arange(61))[1], want)


# -----------------------------------------------------------------------------
# evaluation with exit

EXIT_KINDS = [
    {},
    dict(attention="mla", n_latent=24, exit_gate="state", **ROPE),
    dict(n_kv_head=2, loop_embedding="sinusoidal", exit_gate="state", n_coda=0),
    dict(exit_gate="mean_state", n_coda=0, **ROPE),
]
CASES = [(kind, "state") for kind in EXIT_KINDS]
CASES += [(kind, "gate") for kind in EXIT_KINDS[1:]]
# rules that read logits are evaluated as they decode only where no block is behind the loop
CASES += [(kind, rule) for kind in EXIT_KINDS[2:] for rule in ("kl", "entropy", "argmax")]


def decode_with_exit(model, idx, exit_rule, n_loop):
    """Return logits (B, T, V) and loops (B, T) of idx (B, T), decoded token by token."""
    rows = torch.arange(len(idx))
    decoder = Decoder(model, Cache(model, len(idx), n_loop), n_loop, exit_rule)
    logits, used = [], []
    for token in idx.split(1, dim=1):
        hidden, loops = decoder.step(token, rows)
        logits.append(model.logits(hidden))
        used.append(loops)
    return torch.cat(logits, 1), torch.stack(used, 1)


@pytest.mark.parametrize("kind, rule", CASES, ids=str)
@torch.no_grad()
def test_evaluation_with_exit_is_decoding_with_exit(kind, rule):
    """All tokens at once, where stopped ones keep their keys, against one token after another."""
    model, idx = build(spread=0.2, **kind), few_ids(5, 12)
    for p in model.exit_gate.parameters():
        p *= 5  # else the gate would hardly tell states apart
    exit_rule = halfway_rule(model, idx, rule)
    logits, used = decode_with_exit(model, idx, exit_rule, 6)
    assert 1 < used.float().mean() < 6
    loss, loops = exit_evaluation(model, idx, idx, exit_rule, 6)
    want = F.cross_entropy(logits.flatten(0, 1), idx.flatten()).item()
    assert loss == pytest.approx(want, abs=1e-5)
    assert loops == pytest.approx(used.float().mean().item())
    assert torch.equal(exit_logits(model, idx, exit_rule, 6)[1], used)


@torch.no_grad()
def test_without_a_rule_evaluation_is_the_full_depth():
    model, idx = build(spread=0.2), few_ids(5, 12)
    loss, loops = exit_evaluation(model, idx, idx, None, 6)
    full = model(idx, idx, n_loop=6)[1].item()
    assert loops == 6
    assert loss == pytest.approx(full, abs=1e-5)
    with_exit, _ = exit_evaluation(model, idx, idx, halfway_rule(model, idx), 6)
    assert abs(with_exit - full) > 1e-5


def test_evaluation_with_exit_ignores_targets_of_minus_one():
    model, idx = build(spread=0.2), few_ids(5, 12)
    exit_rule, targets = halfway_rule(model, idx), few_ids(5, 12, seed=2)
    targets[:, :7] = -1
    logits, used = exit_logits(model, idx, exit_rule, 6)
    loss, loops = exit_evaluation(model, idx, targets, exit_rule, 6)
    want = F.cross_entropy(logits[:, 7:].flatten(0, 1), targets[:, 7:].flatten()).item()
    assert loss == pytest.approx(want, rel=1e-5)
    assert loops == pytest.approx(used[:, 7:].float().mean().item())


@torch.no_grad()
def test_a_gate_on_the_mean_state_counts_the_prompt():
    """The mean is of the states of a row's prompt and newest token after as many loops."""
    model = build(spread=0.2, exit_gate="mean_state", n_coda=0, **ROPE)
    lengths, idx = [3, 6, 5, 1] * 5, few_ids(20, 7)
    exit_rule = halfway_rule(model, idx, "gate", 8)
    want = []
    for row, length in enumerate(lengths):
        states = [s for s, _ in after_each_loop(model, idx[[row], : length + 1], 8)]
        stopped = exit_distribution(model, states)[0, -1].cumsum(-1) >= exit_rule.threshold
        want.append(min(8, 1 + int((~stopped).sum())))
    assert len(set(want)) > 1
    rows = torch.arange(20)
    decoder = Decoder(model, Cache(model, 20, 8), 8, exit_rule)
    decoder.prefill(idx, rows, torch.tensor(lengths))
    _, used = decoder.step(idx[rows, lengths].unsqueeze(1), rows)
    assert used.tolist() == want


# -----------------------------------------------------------------------------
# make_exit


@pytest.mark.parametrize("rule", EXITS)
def test_threshold_0_is_no_rule(rule):
    assert make_exit(build(exit_gate="state"), rule, 0) is None


WRONG = [  # rule, threshold, model, words of the error
    ("gate", 0.5, {}, "exit_rule=gate: needs a model with a gate"),
    ("gate", 1.5, dict(exit_gate="state"), "threshold=1.5: must be from 0 to 1"),
    ("kl", -1, {}, "threshold=-1"),
    ("state", float("nan"), {}, "threshold=nan"),
    ("state", float("inf"), {}, "threshold=inf"),
    ("loss", 1, {}, "exit_rule='loss': must be one of state, kl, entropy, argmax, gate"),
    ("kl", 1, dict(n_layer=2), "nothing is looped"),
]


@pytest.mark.parametrize("rule, threshold, kind, words", WRONG)
def test_wrong_exits_are_refused(rule, threshold, kind, words):
    with pytest.raises(ValueError, match=words):
        make_exit(build(**kind), rule, threshold)
