"""Exit rules against their formulas, and evaluation with exit against decoding with exit."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROPE, build, few_ids, halfway_rule, slow, tokens
from torch.testing import assert_close

from decode import Cache, Decoder
from nanorecur.exit_rules import (
    EXITS,
    StateExit,
    after_each_loop,
    exit_distribution,
    exit_evaluation,
    exit_logits,
    make_exit,
    state_change,
)
from nanorecur.measure import THRESHOLDS

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

MLA = dict(attention="mla", n_latent=24, **ROPE)
EXIT_KINDS = [
    {},
    dict(exit_gate="state", **MLA),
    dict(n_kv_head=2, loop_embedding="sinusoidal", exit_gate="state", n_coda=0),
    dict(exit_gate="mean_state", n_coda=0, **ROPE),
]
CASES = [(kind, "state") for kind in EXIT_KINDS]
CASES += [(kind, "gate") for kind in EXIT_KINDS[1:]]
# rules that read logits are evaluated as they decode only where no block is behind the loop
CASES += [(kind, rule) for kind in EXIT_KINDS[2:] for rule in ("kl", "entropy", "argmax")]


def decode_with_exit(model, idx, exit_rule, n_loop, min_loops=1):
    """Return logits (B, T, V) and loops (B, T) of idx (B, T), decoded token by token."""
    rows = torch.arange(len(idx))
    decoder = Decoder(model, Cache(model, len(idx), n_loop), n_loop, exit_rule, min_loops)
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
def test_rows_that_stop_as_one_have_the_loops_of_their_slowest_token():
    """Of the tokens with a target: against each row alone, at the depth where all of these rest."""
    model, idx = build(spread=0.2, n_coda=0, **ROPE), few_ids(8, 12)
    together = torch.zeros_like(idx, dtype=torch.bool)
    for row in range(8):
        together[row, 4 : 5 + row] = True
    exit_rule = StateExit(0.05)
    logits, used = exit_logits(model, idx, exit_rule, 8, together=together)
    ends = []
    for row in range(8):
        states = [s[0, together[row]] for s, _ in after_each_loop(model, idx[[row]], 8)]
        changes = [state_change(*pair).max().item() for pair in zip(states, states[1:])]
        ends.append(next((n for n, change in enumerate(changes, 2) if change < 0.05), 8))
        alone = model.logits(model.hidden(idx[[row]], ends[row]))[0]
        assert_close(logits[row], alone, atol=1e-5, rtol=1e-4)
    assert len(set(ends)) > 2
    assert torch.equal(used, torch.tensor(ends)[:, None].expand(8, 12))


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
# several looped groups

TWO = dict(n_layer=4, loop_groups=[[1], [2, 3]], exit_gate="state", max_loops=8, **ROPE)
THREE = dict(n_layer=6, loop_groups=[[0], [1, 2], [5]], n_kv_head=2, max_loops=8)
THREE |= dict(exit_gate="mean_state")
BLOCK_BEHIND = dict(n_layer=5, loop_groups=[[1], [2, 3]], loop_embedding="learned", max_loops=8)
CASES = [(TWO, (4, 6), rule) for rule in EXITS] + [(THREE, (4, 6, 5), rule) for rule in EXITS]
CASES += [(BLOCK_BEHIND, (4, 6), "state"), (TWO, (5, 1), "state")]
CASES += [slow({**TWO, **MLA}, (4, 6), rule) for rule in EXITS]


def telling_rule(model, idx, rule, n_loop, *options):
    """Return an exit rule whose threshold makes the loops of tokens differ most.

    options: those of exit_logits behind n_loop.
    """
    rules = [make_exit(model, rule, threshold) for threshold in THRESHOLDS[rule][1:]]

    def spread(exit_rule):
        return exit_logits(model, idx, exit_rule, n_loop, *options)[1].float().std()

    return max(rules, key=spread)


@pytest.mark.parametrize("min_loops", [1, 3])
@pytest.mark.parametrize("kind, n_loop, rule", CASES, ids=str)
@torch.no_grad()
def test_with_several_groups_evaluation_with_exit_is_decoding_with_exit(
    kind, n_loop, rule, min_loops
):
    model = build(seed=1, spread=0.3, **kind).double()  # else a few changes would be near ties
    idx = few_ids(5, 12)
    exit_rule = telling_rule(model, idx, rule, n_loop, min_loops)
    logits, used = decode_with_exit(model, idx, exit_rule, n_loop, min_loops)
    assert len(used.unique()) > 1
    all_logits, all_used = exit_logits(model, idx, exit_rule, n_loop, min_loops)
    assert torch.equal(all_used, used)
    assert_close(all_logits, logits, atol=1e-10, rtol=1e-9)
    _, loops = exit_evaluation(model, idx, idx, exit_rule, n_loop, min_loops)
    assert loops == pytest.approx(used.float().mean().item())


def loops_of_one_token(model, token, n_loop, threshold, least):
    """Return the loops of each group after which the state of a token (1, 1) hardly changes."""
    x, ctx = model.embed(token)
    used = []
    for loop, n, looped in model.schedule(n_loop):
        if not looped:
            x = loop(x, ctx, 1)
            continue
        e, s = loop.begin(x, ctx, n)
        count, changes = 0, torch.tensor([torch.inf])
        while count < n and (count < least or changes >= threshold):
            before, s = s, loop.step(s, e, count, ctx)
            changes, count = state_change(before, s), count + 1
        x = loop.exit(s)
        used.append(count)
    return used


OF_STATES = [(TWO, (6, 8), 0.1), (THREE, (5, 7, 6), 0.53)]  # loops; threshold that tells apart


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("kind, n_loop, threshold", OF_STATES, ids=str)
@torch.no_grad()
def test_the_change_of_its_own_state_stops_each_group(kind, n_loop, threshold, least):
    """In evaluation by group, and all groups together in evaluation and in decoding."""
    model, idx = build(spread=0.3, **kind), torch.arange(61)[:, None]
    exit_rule = make_exit(model, "state", threshold)
    asked = (n_loop, threshold, least)
    want = torch.tensor([loops_of_one_token(model, token, *asked) for token in idx.split(1)])
    assert want.min() >= least
    for group, loops in enumerate(want.unbind(1)):
        assert least == 3 or len(loops.unique()) > 1
        _, used = exit_logits(model, idx, exit_rule, n_loop, least, group)
        assert torch.equal(used[:, 0], loops)
    for of_all in (exit_logits, decode_with_exit):
        _, used = of_all(model, idx, exit_rule, n_loop, least)
        assert torch.equal(used[:, 0], want.sum(1))


@pytest.mark.parametrize("rule", [rule for rule in EXITS if rule != "state"])
@torch.no_grad()
def test_what_reads_predictions_or_the_gate_stops_in_the_last_group_alone(rule):
    """Other groups run in full; unless it is asked what it would do there."""
    model, idx, n_loop = build(spread=0.2, **THREE), few_ids(5, 12), (6, 5, 6)
    exit_rule = telling_rule(model, idx, rule, n_loop)
    _, used = exit_logits(model, idx, exit_rule, n_loop)
    _, used_in_last = exit_logits(model, idx, exit_rule, n_loop, group=2)
    assert len(used.unique()) > 1
    assert torch.equal(used, 6 + 5 + used_in_last)
    exit_rule = telling_rule(model, idx, rule, n_loop, 1, 0)
    _, used_in_first = exit_logits(model, idx, exit_rule, n_loop, group=0)
    assert len(used_in_first.unique()) > 1


@pytest.mark.parametrize("kind, n_loop", [(TWO, (4, 6)), (THREE, (4, 6, 5))], ids=str)
@torch.no_grad()
def test_with_several_groups_a_rule_that_never_stops_is_the_full_depth(kind, n_loop):
    model, idx = build(spread=0.2, **kind), few_ids(5, 12)
    full = model(idx, idx, n_loop=n_loop)[0]
    for exit_rule in (None, StateExit(0.0), make_exit(model, "gate", 1.0)):
        logits, used = exit_logits(model, idx, exit_rule, n_loop)
        assert (used == sum(n_loop)).all()
        assert_close(logits, full, atol=2e-5, rtol=1e-4)


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
