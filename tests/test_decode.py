"""Decoding against the plain forward pass, and sample.py as a user runs it."""

import copy
import io
import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, build, tokens, train

from decode import SLOTS, Cache, Decoder, Sampling, generate
from model import Where
from nanorecur.exit_rules import (
    EXITS,
    StateExit,
    after_each_loop,
    exit_distribution,
    exit_evaluation,
    make_exit,
)
from nanorecur.hardware import pack

ROPE = dict(position="rope")
KINDS = [
    {},
    ROPE,
    dict(position="none"),
    dict(n_kv_head=2, **ROPE),
    dict(n_kv_head=1, qk_norm="rotated", **ROPE),
    dict(attention="mla"),
    dict(attention="mla", n_latent=24, **ROPE),
    dict(attention="mla", position="none"),
    dict(input_injection="diagonal", state_init="noise"),
    dict(value_embedding=True, qk_bias=True, qk_norm="width", norm_place="sum"),
    dict(
        n_prelude=0,
        n_coda=0,
        n_block=0,
        n_layer=4,
        loop_groups=[[0, 1], [3]],
        loop_counts=[2, 3],
        loop_embedding="learned",
        **ROPE,
    ),
    dict(document_separator=3),
    dict(document_separator=3, **ROPE),
    dict(predict_ahead=True),
    dict(n_layer=3),
]
SOME = [
    {},
    dict(n_kv_head=2, **ROPE),
    dict(attention="mla", n_latent=24, **ROPE),
    dict(document_separator=3),
    dict(predict_ahead=True),
    dict(n_layer=2),
]


def sharp(**kind):
    """A model whose text is no near tie and does not repeat itself: float64, large weights, a head of its own."""
    return build(spread=0.3, tie_weights=False, **kind).double()


def ids(rows=2, length=9, seed=1):
    """Tokens of a small range, so that document_separator=3 occurs."""
    return tokens(rows, length, seed) % 8


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_the_cache_changes_nothing(kind):
    """Logits of a prompt in two parts and of further tokens one by one, against the full forward pass."""
    model, idx = build(spread=0.1, **kind), ids(2, 14)
    want, got, cache = model(idx, idx)[0], [], Cache(model, 2)
    for part in idx.split([5, 4, 1, 1, 1, 1, 1], dim=1):
        got.append(model(part, part, cache=cache)[0])
        cache.advance(part.size(1))
    torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-5, rtol=1e-4)


def window(length, slide, size=16):
    """The first token that is looked at, of length: the window moves on by slide when it is full."""
    return -(-max(0, length - size) // slide) * slide


def plain_greedy(model, idx, count, slide=4, **options):
    for _ in range(count):
        last = model(idx[:, window(idx.size(1), slide) :], **options)[0][:, -1]
        idx = torch.cat([idx, last.argmax(-1, keepdim=True)], 1)
    return idx


@pytest.mark.parametrize("slide", [1, 4, 15])
@pytest.mark.parametrize("kind", SOME, ids=str)
def test_greedy_is_the_plain_forward_pass(kind, slide):
    """Beyond block_size=16 too."""
    model, prompt = sharp(**kind), ids(2, 5)
    got, stats = generate(model, prompt, 24, temperature=0, slide=slide)
    assert (
        torch.equal(got, plain_greedy(model, prompt, 24, slide))
        and stats["loops"] == model.config.counts()
    )


@pytest.mark.parametrize("n_loop", [1, 5])
def test_greedy_at_other_depths(n_loop):
    model, prompt = sharp(), ids(2, 5)
    got, stats = generate(model, prompt, 8, n_loop=n_loop, temperature=0)
    assert (
        torch.equal(got, plain_greedy(model, prompt, 8, n_loop=n_loop))
        and (stats["loops_used"] == n_loop).all()
    )


RAGGED = torch.tensor([5, 1, 12, 8])
WAYS = {
    "plain": {},
    "mod": dict(slots="mod", n_slot=2),
    "warm": dict(warm_start=True),
    "exit": dict(n_loop=6),
    "gate": dict(n_loop=6),
    "drafts": dict(draft_tokens=3, draft_loops=1),
    "penalty": dict(repetition_penalty=1.3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SOME, ids=str)
def test_rows_of_a_batch_are_as_alone(kind, way):
    """Prompts of different lengths, whatever stands in the padding, to beyond the window."""
    if "n_layer" in kind and way not in ("plain", "penalty"):
        pytest.skip("nothing is looped")
    model, idx = (
        sharp(**kind, **(dict(exit_gate="mean_state") if way == "gate" else {})),
        ids(4, 12),
    )
    rule = {"exit": "state", "gate": "gate"}.get(way)
    options = WAYS[way] | (dict(exit_rule=middling(model, idx, rule)) if rule else {})
    got, stats = generate(model, idx, 16, lengths=RAGGED, temperature=0, **options)
    for row, length in enumerate(RAGGED.tolist()):
        want, alone = generate(model, idx[[row], :length], 16, temperature=0, **options)
        assert (
            torch.equal(got[row, : length + 16], want[0]) and (got[row, length + 16 :] == -1).all()
        )
        assert torch.equal(stats["loops_used"][row], alone["loops_used"][0])
    assert way != "exit" or len(stats["loops_used"].unique()) > 1


# -----------------------------------------------------------------------------
# slots


class Record:
    """A cache of one block that forgets nothing: a mask chooses what is seen."""

    def __init__(self):
        self.kept = []

    def extend(self, *new):
        self.kept.append(new)
        return [torch.cat(parts, 2) for parts in zip(*self.kept)]


def masked_reference(model, parts, slot, n=3):
    """Logits of parts of a text in turn. Loop i sees of its own part loop i, of earlier parts the loop that was the last
    to write its slot: a mask over the keys and values of all loops, none of which was ever overwritten."""
    (prelude, _), (loop, _), (coda, _) = model.schedule()
    first, *core, last = (Record() for _ in range(4))
    seen, owner, out = (
        0,
        [],
        [],
    )  # owner: loop, part and place of every entry in a record of the core
    for number, part in enumerate(parts):
        place = torch.arange(seen, seen + part.size(1))
        seen += part.size(1)
        plain = Where(place, place[:, None] >= torch.arange(seen), model.turn(place), part, first)
        e = loop.entry(prelude(model.transformer.wpe(model.transformer.wte(part), plain), plain))
        s = loop.init_state(e, plain)
        for i in range(n):
            owner += [(i, number, int(p)) for p in place]
            final = max(j for j in range(n) if slot(j) == slot(i))
            mask = torch.tensor(
                [
                    [j == (i if m == number else final) and p <= q for j, m, p in owner]
                    for q in place.tolist()
                ]
            )
            s = loop.index(loop.inject(s, e), i)
            for block, record in zip(loop.blocks, core):
                s = block(s, plain._replace(mask=mask, cache=record))
            s = loop.norm(loop.after(s, e))
        x = coda(loop.exit(s), plain._replace(cache=last))
        out.append(model.logits(model.transformer.ln_f(x)))
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    "kind", [{}, dict(n_kv_head=2, **ROPE), dict(attention="mla", n_latent=24, **ROPE)], ids=str
)
@pytest.mark.parametrize(
    "slots,n_slot,slot",
    [
        ("full", 1, lambda i: i),
        ("last", 2, lambda i: [0, 0, 1][i]),
        ("first+shared", 1, lambda i: [0, 1, 1][i]),
        ("mod", 2, lambda i: [0, 1, 0][i]),
        ("shared", 1, lambda i: 0),
    ],
)
@torch.no_grad()
def test_each_policy_is_a_mask_over_all_loops(kind, slots, n_slot, slot):
    model, parts = build(spread=0.1, **kind), ids(2, 12).split([5, 3, 1, 1, 1, 1], dim=1)
    cache, got = Cache(model, 2, slots=slots, n_slot=n_slot), []
    for part in parts:
        got.append(model(part, part, cache=cache)[0])
        cache.advance(part.size(1))
    got, want = torch.cat(got, 1), masked_reference(model, parts, slot)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert (slots == "full") == torch.allclose(got, model(*2 * [torch.cat(parts, 1)])[0], atol=2e-5)


def test_bytes_of_each_policy():
    """A prelude, a coda and two blocks of as many slots as it says; latents are as small as they say."""
    want = {"full": 3, "last": 2, "first+shared": 2, "mod": 2, "shared": 1}
    assert set(want) == set(SLOTS)
    for kind, width in {
        (): 2 * 32,
        (("n_kv_head", 2),): 2 * 16,
        (("attention", "mla"), ("n_latent", 8)): 8 + 4,
    }.items():
        model = build(position="rope", **dict(kind))
        for slots, count in want.items():
            stats = generate(model, tokens(2, 4), 2, slots=slots, n_slot=2)[1]
            assert stats["cache_bytes_per_token"] == (1 + 2 * count + 1) * width * 4


# -----------------------------------------------------------------------------
# exit

RULES = ["state", "gate", "kl", "entropy", "argmax"]


def middling(model, idx, rule="state", n_loop=6):
    """The rule with a threshold at which tokens stop after about half of the loops, some sooner than others."""
    thresholds = [1.0, 2.0] if rule == "argmax" else torch.logspace(-4, 0.5, 80).tolist()
    rules = [
        make_exit(model, rule, 1 / (1 + threshold) if rule == "gate" else threshold)
        for threshold in thresholds
    ]
    return min(
        rules,
        key=lambda exit_rule: abs(
            exit_evaluation(model, idx, idx, exit_rule, n_loop)[1] - n_loop / 2 - 0.5
        ),
    )


def decoder_behind(model, idx, n_loop, rule=None, least=1, **slots):
    """A decoder that has seen idx (B, T) at full depth."""
    cache = Cache(model, len(idx), n_loop, **slots)
    decoder = Decoder(model, cache, n_loop, rule, least)
    if idx.size(1):
        decoder.prefill(idx, torch.arange(len(idx)), torch.full((len(idx),), idx.size(1)))
    return decoder


EXIT_KINDS = [
    {},
    dict(attention="mla", n_latent=24, exit_gate="state", **ROPE),
    dict(n_kv_head=2, loop_embedding="sinusoidal", exit_gate="state", n_coda=0),
    dict(exit_gate="mean_state", n_coda=0, **ROPE),
]


@pytest.mark.parametrize(
    "kind,rule",
    [
        (kind, rule)
        for kind in EXIT_KINDS
        for rule in RULES
        if rule == "state" or (rule == "gate" and "exit_gate" in kind) or kind.get("n_coda", 1) == 0
    ],
    ids=str,
)
@torch.no_grad()
def test_evaluation_with_exit_is_decoding_with_exit(kind, rule):
    """All tokens at once, where those that are done keep their keys, against one by one, where rows leave the batch."""
    model, idx, logits, used = build(spread=0.2, **kind), ids(5, 12), [], []
    for p in model.exit_gate.parameters():
        p *= 5  # a gate that is not sure of itself would not tell states apart
    exit_rule = middling(model, idx, rule)
    decoder = decoder_behind(model, idx[:, :0], 6, exit_rule)
    for token in idx.split(1, dim=1):
        hidden, loops = decoder.step(token, torch.arange(5))
        logits.append(model.logits(hidden))
        used.append(loops)
    used, want = (
        torch.stack(used, 1).float(),
        F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), idx.flatten()),
    )
    loss, loops = exit_evaluation(model, idx, idx, exit_rule, 6)
    assert 1 < used.mean() < 6 and len(used.unique()) > 1, used.unique(return_counts=True)
    assert loops == pytest.approx(used.mean().item()) and loss == pytest.approx(
        want.item(), abs=1e-5
    )
    deep = model(idx, idx, n_loop=6)[1].item()
    assert abs(loss - deep) > 1e-5 and exit_evaluation(model, idx, idx, None, 6) == (
        pytest.approx(deep, abs=1e-5),
        6,
    )


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_each_rule_stops_where_its_formula_says(rule):
    model, idx, rows = build(spread=0.2, exit_gate="state"), ids(20, 6), torch.arange(20)
    exit_rule = middling(model, idx, rule, 8)
    threshold = exit_rule.threshold
    decoder = decoder_behind(model, idx[:, :-1], 8)
    e, s, where = decoder.enter(idx[:, -1:], rows)
    states, p = [s], [torch.full((20, 1, 61), 1 / 61)]
    for i in range(8):
        states.append(decoder.loops([i], states[-1], e, where))
        p.append(model.logits(decoder.leave(states[-1], where)).softmax(-1))
    entropy, best = [-(part * part.log()).sum(-1) for part in p], [part.argmax(-1) for part in p]
    gate = exit_distribution(model, states[1:]).cumsum(-1)
    done = {  # after loop i, counted from 1
        "state": lambda i: (
            (states[i] - states[i - 1]).norm(dim=-1) / states[i].norm(dim=-1) < threshold
        ),
        "kl": lambda i: (p[i - 1] * (p[i - 1] / p[i]).log()).sum(-1) < threshold,
        "entropy": lambda i: ((entropy[i] - entropy[i - 1]).abs() < threshold) & (i > 1),
        "argmax": lambda i: (
            (i > threshold)
            & torch.stack([best[i] == best[i - k] for k in range(min(i, int(threshold) + 1))]).all(
                0
            )
        ),
        "gate": lambda i: gate[..., i - 1] >= threshold,
    }[rule]
    for least in (1, 5):
        want = torch.full((20, 1), 8)
        for i in range(7, least - 1, -1):
            want = torch.where(done(i), i, want)
        decoder = decoder_behind(model, idx[:, :-1], 8, exit_rule, least)
        assert torch.equal(decoder.step(idx[:, -1:], rows)[1], want[:, 0]) and (
            least > 1 or len(want.unique()) > 1
        ), want.unique()


@torch.no_grad()
def test_a_gate_on_the_mean_state_counts_the_prompt():
    """The states of all tokens of each row's prompt after as many loops, and its newest token's, which stop alone."""
    model, lengths = (
        build(spread=0.2, exit_gate="mean_state", n_coda=0, position="rope"),
        [3, 6, 5, 1] * 5,
    )
    idx, want = ids(20, 7), []
    exit_rule = middling(model, idx, "gate", 8)
    for row, length in enumerate(lengths):
        states = [s for s, _ in after_each_loop(model, idx[[row], : length + 1], 8)]
        stopped = exit_distribution(model, states)[0, -1].cumsum(-1) >= exit_rule.threshold
        want.append(min(8, int((~stopped).sum()) + 1))
    decoder = Decoder(model, Cache(model, 20, 8), 8, exit_rule)
    decoder.prefill(idx, torch.arange(20), torch.tensor(lengths))
    token = idx[torch.arange(20), lengths].unsqueeze(1)
    assert decoder.step(token, torch.arange(20))[1].tolist() == want and len(set(want)) > 1


@torch.no_grad()
def test_a_gate_on_the_mean_state_forgets_what_left_the_window():
    """A window of one token: each stops by its own state."""
    model, idx = (
        build(block_size=1, exit_gate="mean_state", spread=0.3, tie_weights=False, position="none"),
        tokens(12, 1),
    )
    rule = middling(model, idx, "gate", 8)
    got, stats = generate(model, idx, 4, n_loop=8, temperature=0, exit_rule=rule)
    alone = [
        [exit_evaluation(model, token.view(1, 1), token.view(1, 1), rule, 8)[1] for token in row]
        for row in got[:, 1:-1]
    ]
    assert stats["loops_used"][:, 1:].tolist() == alone and len(stats["loops_used"].unique()) > 2


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("rule", EXITS)
def test_threshold_0_is_fixed_depth(rule, slots):
    """As an option, and in the loop that asks a rule which never says yes."""
    model, idx = sharp(exit_gate="state"), ids(3, 5)
    want = generate(model, idx, 8, n_loop=4, temperature=0, slots=slots, n_slot=2)[0]
    for exit_rule in (make_exit(model, rule, 0), StateExit(0.0), make_exit(model, "gate", 1.0)):
        got, stats = generate(
            model, idx, 8, n_loop=4, temperature=0, exit_rule=exit_rule, slots=slots, n_slot=2
        )
        assert torch.equal(got, want) and (stats["loops_used"] == 4).all()


@pytest.mark.parametrize(
    "slots,n_slot,source",
    [
        ("full", 1, [0, 1, 1, 1]),
        ("last", 3, [1, 1, 1]),
        ("mod", 3, [0, 1, 1]),
        ("first+shared", 1, [0, 1]),
        ("shared", 1, [1]),
    ],
)
@torch.no_grad()
def test_what_deeper_loops_read_of_a_token_that_stopped(slots, n_slot, source):
    """Its deepest keys and values, in every slot that it has not reached: here after two loops, of which source tells."""
    model, idx = build(spread=0.1), ids(1, 5)
    decoder = decoder_behind(model, idx[:, :4], 4, StateExit(1e9), 2, slots=slots, n_slot=n_slot)
    wrote, extend = [], decoder.cache.extend
    decoder.cache.extend = lambda *new: (
        wrote.append([part[0, :, 0] for part in new]) or extend(*new)
    )
    assert decoder.step(idx[:, 4:], torch.arange(1))[1] == 2 and len(wrote) == 1 + 2 * 2 + 1
    for block, parts in enumerate(decoder.cache.groups[1].kept):
        for part, kept in enumerate(parts):
            want = torch.stack([wrote[1 + 2 * i + block][part] for i in source])
            assert torch.equal(kept[:, 0, :, 4], want)


def test_rows_that_are_done_cost_nothing():
    """The rows that each loop computes add up to the loops that the rows used."""
    model, idx, computed = build(spread=0.2), ids(6, 5), []
    exit_rule = middling(model, idx, n_loop=8)
    model.transformer.h[1].register_forward_hook(
        lambda module, args, out: computed.append(out.shape[:2])
    )
    stats = generate(model, idx, 9, n_loop=8, exit_rule=exit_rule)[1]
    steps = [rows for rows, length in computed if length == 1]
    assert sum(steps) == stats["loops_used"][:, 1:].sum() < 6 * 8 * 7 and len(set(steps)) > 2


# -----------------------------------------------------------------------------
# speculation


@pytest.mark.parametrize("draft_tokens,draft_loops", [(1, 1), (3, 1), (4, 2), (6, 4), (3, 0)])
@pytest.mark.parametrize("kind", [*SOME[:5], KINDS[10]], ids=str)
def test_speculation_is_plain_greedy(kind, draft_tokens, draft_loops):
    """Token for token, in a batch of different lengths and acceptance, to beyond the window."""
    model, idx = sharp(n_ahead=4, **kind), ids(4, 12)
    options = dict(n_loop=(2, 4) if "loop_groups" in kind else 4, lengths=RAGGED, temperature=0)
    got, stats = generate(
        model, idx, 20, draft_tokens=draft_tokens, draft_loops=draft_loops, **options
    )
    assert torch.equal(got, generate(model, idx, 20, **options)[0])
    assert 0 < stats["accepted"] <= stats["drafted"] and (
        draft_loops != 4 or stats["accepted"] == stats["drafted"]
    )
    assert draft_loops != 1 or draft_tokens < 3 or stats["accepted"] < stats["drafted"]


def test_a_round_continues_the_drafts():
    """No loop of a token is computed twice, and when all drafts stand there is one more token."""
    model, computed = build(spread=0.1), []
    model.transformer.h[1].register_forward_hook(
        lambda module, args, out: computed.append(tuple(out.shape[:2]))
    )
    stats = generate(model, ids(1, 5), 6, n_loop=4, temperature=0, draft_tokens=4, draft_loops=4)[1]
    assert stats["accepted"] == 4 and computed == 4 * [(1, 5)] + 5 * 4 * [
        (1, 1)
    ]  # the prompt; a token and four drafts
    computed.clear()
    generate(model, ids(1, 5), 3, n_loop=4, temperature=0, draft_tokens=9, draft_loops=1)
    assert computed[:7] == 4 * [(1, 5)] + 2 * [(1, 1)] + [(1, 2)], "no more is drafted than fits"


@pytest.mark.parametrize("draft_loops", [1, 0])
def test_sampled_speculation_is_distributed_as_sampling(draft_loops):
    """Triples of tokens of 8,000 rows against their probabilities: chi-square."""
    model, rows, idx = build(spread=0.3, vocab_size=5, n_ahead=4), 8000, torch.tensor([[1, 4]])
    options = dict(temperature=4.0, repetition_penalty=1.5, top_p=0.97)
    texts, want = idx, torch.ones(1)
    for _ in range(3):
        seen = torch.zeros(len(texts), 5, dtype=torch.bool).scatter(1, texts, True)
        with torch.no_grad():
            p = Sampling(**options).probabilities(model(texts)[0][:, -1], seen)
        want = (want[:, None] * p).flatten()
        texts = torch.cat(
            (texts.repeat_interleave(5, 0), torch.arange(5).repeat(len(texts))[:, None]), 1
        )
    draws = torch.Generator().manual_seed(1)
    got, stats = generate(
        model,
        idx.expand(rows, 2),
        3,
        draft_tokens=2,
        draft_loops=draft_loops,
        generator=draws,
        **options,
    )
    assert 0.05 < stats["accepted"] / stats["drafted"] < 0.95
    counts = torch.bincount(got[:, 2:] @ torch.tensor([25, 5, 1]), minlength=125)
    often = want * rows > 5
    chi2, freedom = ((counts - rows * want).square() / (rows * want))[often].sum(), int(often.sum())
    assert (
        not counts[want == 0].any() and freedom > 20 and chi2 < freedom + 4 * (2 * freedom) ** 0.5
    ), (chi2, freedom)


# -----------------------------------------------------------------------------
# warm start, sampling, compilation


@torch.no_grad()
def test_a_warm_start_begins_with_the_last_state():
    """With one loop, in which nothing is forgotten."""
    model, text = (
        sharp(input_injection="diagonal", state_init="zero", n_loop=1, n_coda=0),
        ids(8, 5),
    )
    cache, s, new, prompt = Cache(model, 8), None, text, text
    (prelude, _), (loop, _) = model.schedule()
    for _ in range(10):
        x, where = model.embed(new, cache)
        e = loop.entry(prelude(x, where))
        s = loop.step(loop.init_state(e, where) if s is None else s, e, 0, where)
        cache.advance(new.size(1))
        new, s = model.logits(model.transformer.ln_f(loop.exit(s)))[:, -1:].argmax(-1), s[:, -1:]
        text = torch.cat((text, new), 1)
    assert torch.equal(generate(model, prompt, 10, temperature=0, warm_start=True)[0], text)
    assert not torch.equal(generate(model, prompt, 10, temperature=0)[0], text)


def test_draws_follow_the_distribution():
    model, idx = build(n_layer=1, spread=0.3), tokens(1, 4).expand(4000, 4)
    probabilities = (model(idx[:1])[0][0, -1] / 0.7).softmax(-1)
    drawn = generate(model, idx, 1, temperature=0.7, generator=torch.Generator().manual_seed(3))[0][
        :, -1
    ]
    counts = torch.bincount(drawn, minlength=61)
    often = probabilities > 0.005
    chi2 = ((counts - 4000 * probabilities).square() / (4000 * probabilities))[often].sum()
    assert chi2 < 2 * often.sum() + 20


def test_what_is_drawn_from():
    logits, seen = (
        torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]]),
        torch.tensor([[True, False, False, True, False]]),
    )
    p = logits.softmax(-1)[0]

    def only(*ids):
        return p * sum(torch.eye(5)[i] for i in ids) / p[list(ids)].sum()

    for options, want in [
        ({}, p),
        (dict(top_k=2), only(0, 1)),
        (dict(top_k=9), p),
        (dict(top_p=0.5), only(0)),
        (dict(top_p=p[0].item() + 1e-4), only(0, 1)),
        (dict(min_p=0.1), only(0, 1, 2)),
        (dict(vocab_size=3), only(0, 1, 2)[:3]),
        (dict(temperature=0), torch.eye(5)[0]),
        (dict(temperature=2.0), (logits[0] / 2).softmax(-1)),
        (dict(top_k=4, top_p=0.9, min_p=0.2), only(0, 1)),
        (dict(repetition_penalty=2.0), torch.tensor([1.0, 1.0, 0.0, -2.0, -3.0]).softmax(-1)),
    ]:
        torch.testing.assert_close(
            Sampling(**options).probabilities(logits, seen)[0], want, atol=1e-6, rtol=1e-5
        )


def test_padding_and_seed():
    model, idx = build(spread=0.3), tokens(50, 4)
    assert generate(model, idx, 30, vocab_size=7)[0][:, 4:].max() == 6
    same = [
        generate(model, idx, 5, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)
    ]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


@pytest.mark.parametrize("options", [{}, dict(draft_tokens=4, draft_loops=1)], ids=str)
def test_watch_sees_every_token_and_ends_rows(options):
    model, idx, seen = sharp(), ids(3, 5), {0: [], 1: [], 2: []}
    want = generate(model, idx, 8, temperature=0)[0]

    def watch(row, token, loops):
        seen[row].append(token)
        return len(seen[row]) == 2 * row + 3

    got, stats = generate(model, idx, 8, temperature=0, watch=watch, **options)
    for row, count in enumerate((3, 5, 7)):
        assert seen[row] == got[row, 5 : 5 + count].tolist() == want[row, 5 : 5 + count].tolist()
        assert (got[row, 5 + count :] == -1).all() and stats["lengths"][row] == 5 + count


def test_embeddings_in_place_of_tokens():
    """With and without a cache; and hidden states are what the head reads."""
    model, idx = build(spread=0.1), tokens(2, 9)
    embedded, cache = model.transformer.wte(idx), Cache(model, 2)
    assert torch.equal(model(embedded, idx)[0], model(idx, idx)[0])
    hidden, parts = model.hidden(embedded), []
    assert torch.equal(model.lm_head(hidden), model(idx, idx)[0])
    with torch.no_grad():
        for part in embedded.split(3, dim=1):
            parts.append(model.hidden(part, cache=cache))
            cache.advance(3)
    torch.testing.assert_close(torch.cat(parts, 1), hidden, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@torch.no_grad()
def test_packed_weights_compute_the_same(dtype, near):
    """Of one row and of several."""
    model = build(spread=0.1, attention="mla", tie_weights=False)
    for idx in (ids(1, 1), ids(3, 7)):
        want = model(idx, idx)[0]
        plain = copy.deepcopy(model)
        assert (
            not pack(plain, dtype)
            or (plain(idx, idx)[0] - want).abs().max() < near * want.abs().max()
        )
        assert torch.equal(model(idx, idx)[0], want)


def test_one_compilation_serves_every_loop_count_and_slot():
    model, idx, counters, graphs = (
        build(spread=0.1, n_prelude=2, loop_embedding="learned"),
        ids(2, 9),
        torch._dynamo.utils.counters,
        [],
    )
    torch._dynamo.reset()
    for n_loop, options in ((3, {}), (1, {}), (6, dict(slots="mod", n_slot=2))):
        eager, got = (
            generate(model, idx, 9, n_loop=n_loop, temperature=0, static=static, **options)[0]
            for static in (False, True)
        )
        graphs.append(counters["stats"]["unique_graphs"])
        assert torch.equal(eager, got)
    assert graphs[0] > 0 and len(set(graphs)) == 1, graphs


@pytest.mark.parametrize(
    "words,options",
    [
        ("empty", dict(lengths=[3, 0])),
        ("longer than the window", dict(idx=tokens(2, 17))),
        ("slots", dict(slots="none")),
        ("n_slot=4", dict(slots="mod", n_slot=4)),
        ("n_slot=0", dict(slots="last", n_slot=0)),
        ("heads", dict(draft_tokens=1)),
        ("not with", dict(draft_tokens=1, draft_loops=1, slots="shared")),
        ("slide=16", dict(slide=16)),
        ("n_loop", dict(n_loop=torch.tensor([1, 2]))),
        ("at least 0", dict(draft_tokens=-1)),
        ("draft_loops=9", dict(draft_tokens=1, draft_loops=9)),
        ("min_loops=9", dict(min_loops=9, exit_rule=StateExit(0.1))),
        ("temperature", dict(temperature=-1)),
        ("top_p", dict(top_p=1.5)),
        ("repetition", dict(repetition_penalty=0)),
    ],
)
def test_wrong_requests(words, options):
    with pytest.raises(ValueError, match=words):
        generate(
            build(),
            options.get("idx", tokens(2, 4)),
            3,
            **{k: v for k, v in options.items() if k != "idx"},
        )


@pytest.mark.parametrize(
    "rule,threshold,kind,words",
    [
        ("gate", 0.5, {}, "exit_gate"),
        ("gate", 1.5, dict(exit_gate="state"), "threshold=1.5"),
        ("kl", -1, {}, "threshold"),
        ("state", float("nan"), {}, "threshold"),
        ("loss", 1, {}, "exit_rule"),
        ("kl", 1, dict(n_layer=2), "looped"),
    ],
)
def test_wrong_exits(rule, threshold, kind, words):
    with pytest.raises(ValueError, match=words):
        make_exit(build(**kind), rule, threshold)


# -----------------------------------------------------------------------------
# sample.py


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train(corpus, folder).code == 0
    return folder


def test_sample_continues_the_prompt(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("def step(")
    arguments = (f"--out_dir={folder}", "--num_samples=2", "--max_new_tokens=30", "--device=cpu")
    typed, read = (
        Run("sample.py", *arguments, "--start=def step("),
        Run("sample.py", *arguments, f"--start=FILE:{tmp_path / 'prompt.txt'}"),
    )
    assert typed.code == 0 and typed.out == read.out
    samples = typed.out.split("\n---------------\n")
    assert (
        len(samples) == 3
        and all(s.startswith("def step(") and len(s) == 39 for s in samples[:2])
        and samples[0] != samples[1]
    )
    assert Run("sample.py", *arguments, "--start=def step(", "--seed=2").out != typed.out
    deep = [Run("sample.py", *arguments, "--temperature=0", f"--n_loop={n}") for n in (0, 2, 9)]
    assert deep[0].out == deep[1].out and all(run.code == 0 for run in deep)


@pytest.mark.parametrize(
    "wrong,words",
    {
        "--start=\u2603": "alphabet",
        "--start=": "empty",
        "--start=FILE:nowhere.txt": "nowhere.txt",
        "--start=FILE:empty.txt": "empty",
        "--start=FILE:latin.txt": "alphabet",
        "--out_dir=nowhere": "no such checkpoint",
        "--n_loop=-1": "n_loop=-1",
        "--temperature=-1": "temperature",
        "--num_samples=0": "num_samples",
        "--device=tpu": "device=",
        "--tpo_k=1": "top_k",
        "--start=more than sixteen": "longer than the window",
        "--automatic_loop_exit --exit_rule=gate": "exit_gate",
        "--automatic_loop_exit --automatic_loop_exit_threshold=-1": "threshold=-1",
        "--slots=mod --n_slot=9": "n_slot=9",
        "--slots=some": "full, last",
        "--draft_tokens=2": "heads",
        "--top_p=2": "top_p=2",
        "--stop=FILE:no.txt": "no.txt",
    }.items(),
)
def test_sample_on_wrong_input(folder, tmp_path, wrong, words):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    arguments = [wrong] if wrong.startswith("--start") else wrong.split()
    run = Run("sample.py", f"--out_dir={folder}", "--device=cpu", *arguments, cwd=tmp_path)
    assert run.code == 2 and run.err.count("\n") == 1 and words in run.err, run.err


def test_sample_of_a_checkpoint_without_a_tokenizer(tmp_path):
    model = build(n_layer=1)
    torch.save(
        {"model": model.state_dict(), "model_args": vars(model.config)}, tmp_path / "ckpt.pt"
    )
    run = Run("sample.py", f"--out_dir={tmp_path}")
    assert run.code == 2 and "names no tokenizer" in run.err


def test_sample_from_an_exported_folder(folder, tmp_path):
    assert (
        Run("pretrained.py", "export", f"--out_dir={folder}", f"--to={tmp_path / 'model'}").code
        == 0
    )
    arguments = ("--num_samples=1", "--max_new_tokens=20", "--device=cpu", "--start=def ")
    ours, exported = (
        Run("sample.py", f"--out_dir={path}", *arguments) for path in (folder, tmp_path / "model")
    )
    assert ours.code == exported.code == 0 and ours.out == exported.out


QUICK = ("--device=cpu", "--max_new_tokens=30", "--start=def ", "--n_loop=4")


def test_json_lines_stop_strings_and_drafts(folder, tmp_path):
    """A sample ends before its stop string, at the same place when it was drafted."""
    (tmp_path / "stops.txt").write_text("\x00\n \n")
    options = (
        "--num_samples=4",
        "--jsonl",
        "--temperature=0",
        "--repetition_penalty=1.5",
        f"--stop=FILE:{tmp_path / 'stops.txt'}",
    )
    run = Run("sample.py", f"--out_dir={folder}", *QUICK, *options)
    lines = [json.loads(line) for line in run.out.splitlines()]
    assert len(lines) == 4 and all(
        line["prompt"] == "def " and line["loops"] == len(line["tokens"]) * [4] for line in lines
    )
    assert all(" " not in line["text"] for line in lines) and any(
        len(line["tokens"]) < 30 for line in lines
    )
    drafted = Run(
        "sample.py", f"--out_dir={folder}", *QUICK, *options, "--draft_tokens=3", "--draft_loops=2"
    )
    assert drafted.out == run.out and "drafts accepted" in drafted.err


def test_color_follows_the_loops(folder):
    options = (
        "--num_samples=2",
        "--automatic_loop_exit",
        "--automatic_loop_exit_threshold=0.3",
        "--temperature=0",
    )
    plain, color = (
        Run("sample.py", f"--out_dir={folder}", *QUICK, *options, *more).out
        for more in ([], ["--color"])
    )
    assert re.sub(r"\x1b\[[0-9;]*m", "", color) == plain and color.count("\x1b[30;48;5;") >= 60
    assert len(set(re.findall(r"48;5;(\d+)m", color))) > 1


def test_chat_goes_on_from_each_line(folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(x):\nreturn a long line\n"))
    run = Run("sample.py", f"--out_dir={folder}", *QUICK, "--chat", "--temperature=0")
    first, second = run.out.split("> ")[1:3]
    assert run.code == 0 and len(first) == len(second) == 31
    alone = Run(
        "sample.py",
        f"--out_dir={folder}",
        *QUICK,
        "--temperature=0",
        "--num_samples=1",
        "--start=def f(x):\n",
    )
    assert alone.out.startswith("def f(x):\n" + first)
