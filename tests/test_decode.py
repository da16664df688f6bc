"""Decoding against the plain forward pass: cached, batched, exiting, drafted, compiled."""

import pytest
import torch
from conftest import ROPE, build, few_ids, halfway_rule, slow, tokens
from torch.testing import assert_close

from decode import SLOTS, Cache, CacheView, Decoder, Sampling, generate, one_loop
from model import TABLES, Context
from nanorecur.exit_rules import EXITS, StateExit, make_exit

MLA = dict(attention="mla", n_latent=24, **ROPE)
GROUPS = dict(n_layer=4, loop_groups=[[0, 1], [3]], loop_counts=[2, 3], **ROPE)
GROUPS |= dict(loop_embedding="learned")
FEW_KINDS = [
    {},
    dict(n_kv_head=2, **ROPE),
    MLA,
    dict(document_separator=3),
    dict(predict_ahead=True),
    dict(n_layer=2),
]
MORE_KINDS = [
    ROPE,
    dict(position="none"),
    dict(n_kv_head=1, qk_norm="rotated", **ROPE),
    dict(attention="mla"),
    dict(attention="mla", position="none"),
    dict(input_injection="diagonal", state_init="noise"),
    dict(value_embedding=True, qk_bias=True, qk_norm="width", norm_place="sum"),
    GROUPS,
    dict(document_separator=3, **ROPE),
    dict(attention_window=3, **ROPE),
    dict(attention_window=2, document_separator=3, attention="mla"),
    *(dict(input_injection=name) for name in TABLES["input_injection"] if name != "inject"),
]


def unlike(**kind):
    """Return a model whose greedy text is no near tie and hardly repeats itself.

    By large weights and a head of its own, in float64.
    """
    return build(spread=0.3, tie_weights=False, **kind).double()


def closed_pass(cache, idx):
    """Return a pass over tokens idx (B, T), all of which stay in the cache."""
    opened = cache.open(idx.size(1))
    cache.close(opened, idx.size(1))
    return opened


def greedy(model, idx, count, **options):
    """Return (tokens, stats) of greedy decoding."""
    return generate(model, idx, count, temperature=0, **options)


# -----------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize("kind", FEW_KINDS + MORE_KINDS, ids=str)
@torch.no_grad()
def test_cached_logits_are_those_of_the_full_forward_pass(kind):
    """A prompt in two parts, then tokens one by one."""
    model, idx = build(spread=0.1, **kind), few_ids(2, 14)
    cache, logits = Cache(model, 2), []
    for part in idx.split([5, 4, 1, 1, 1, 1, 1], dim=1):
        logits.append(model(part, part, cache=closed_pass(cache, part))[0])
    assert_close(torch.cat(logits, 1), model(idx, idx)[0], atol=2e-5, rtol=1e-4)


def plain_greedy(model, idx, count, slide=4, **options):
    """Decode by full forward passes; a window of 16 that is full moves on by slide tokens."""
    for _ in range(count):
        first = -(-max(0, idx.size(1) - 16) // slide) * slide
        last = model(idx[:, first:], **options)[0][:, -1]
        idx = torch.cat([idx, last.argmax(-1, keepdim=True)], 1)
    return idx


SLIDES = [(kind, 4) for kind in FEW_KINDS] + [({}, 1), ({}, 15)]
SLIDES += [slow(kind, slide) for kind in FEW_KINDS[1:] for slide in (1, 15)]


@pytest.mark.parametrize("kind, slide", SLIDES, ids=str)
def test_greedy_decoding_is_the_plain_forward_pass_beyond_the_window_too(kind, slide):
    model, prompt = unlike(**kind), few_ids(2, 5)
    got, stats = greedy(model, prompt, 24, slide=slide)
    assert torch.equal(got, plain_greedy(model, prompt, 24, slide))
    assert stats["loops"] == model.config.counts()


@pytest.mark.parametrize("n_loop", [1, 5])
def test_greedy_decoding_at_other_numbers_of_loops(n_loop):
    model, prompt = unlike(), few_ids(2, 5)
    got, stats = greedy(model, prompt, 8, n_loop=n_loop)
    assert torch.equal(got, plain_greedy(model, prompt, 8, n_loop=n_loop))
    assert (stats["loops_used"] == n_loop).all()


def test_the_loops_of_a_token_are_those_of_all_groups():
    _, stats = greedy(build(**GROUPS), few_ids(2, 5), 4)
    assert (stats["loops_used"] == 2 + 3).all()


def test_embeddings_in_place_of_tokens():
    """With and without a cache; hidden states are what the head reads."""
    model, idx = build(spread=0.1), tokens(2, 9)
    embeddings, logits = model.transformer.wte(idx), model(idx, idx)[0]
    assert torch.equal(model(embeddings, idx)[0], logits)
    hidden = model.hidden(embeddings)
    assert torch.equal(model.lm_head(hidden), logits)
    cache, parts = Cache(model, 2), []
    with torch.no_grad():
        for part in embeddings.split(3, dim=1):
            parts.append(model.hidden(part, cache=closed_pass(cache, part)))
    assert_close(torch.cat(parts, 1), hidden, atol=1e-5, rtol=1e-4)


# -----------------------------------------------------------------------------
# batches

RAGGED = torch.tensor([5, 1, 12, 8])  # lengths of prompts
MODES = {
    "plain": {},
    "mod": dict(slots="mod", n_slot=2),
    "warm": dict(warm_start=True),
    "drafts": dict(draft_tokens=3, draft_loops=1),
    "penalty": dict(repetition_penalty=1.3),
}


def assert_rows_are_as_alone(model, idx, count, **options):
    """Return the loops of each row's tokens."""
    got, stats = greedy(model, idx, count, lengths=RAGGED, **options)
    for row, length in enumerate(RAGGED.tolist()):
        want, alone = greedy(model, idx[[row], :length], count, **options)
        assert torch.equal(got[row, : length + count], want[0])
        assert (got[row, length + count :] == -1).all()
        assert torch.equal(stats["loops_used"][row], alone["loops_used"][0])
    return stats["loops_used"]


MORE_MODES = [mode for mode in MODES if mode != "plain"]
CASES = [(kind, "plain") for kind in FEW_KINDS] + [({}, mode) for mode in MORE_MODES]
CASES += [slow(kind, mode) for kind in FEW_KINDS[1:5] for mode in MORE_MODES]
CASES += [slow(FEW_KINDS[5], "penalty")]  # the others need a loop


@pytest.mark.parametrize("kind, mode", CASES, ids=str)
def test_rows_of_a_batch_are_as_alone(kind, mode):
    """Prompts of different lengths, whatever stands in the padding, to beyond the window."""
    assert_rows_are_as_alone(unlike(**kind), few_ids(4, 12), 16, **MODES[mode])


EXITING = [{}, MLA, *(slow(kind) for kind in FEW_KINDS[:5] if kind not in ({}, MLA))]


@pytest.mark.parametrize("kind", EXITING, ids=str)
def test_rows_of_a_batch_that_exit_are_as_alone(kind):
    model, idx = unlike(**kind), few_ids(4, 12)
    rule = halfway_rule(model, idx)
    used = assert_rows_are_as_alone(model, idx, 16, n_loop=6, exit_rule=rule)
    assert len(used.unique()) > 1


@pytest.mark.parametrize("kind", EXITING, ids=str)
def test_rows_of_a_batch_that_exit_by_the_gate_on_the_mean_state_are_as_alone(kind):
    model, idx = unlike(exit_gate="mean_state", **kind), few_ids(4, 12)
    rule = halfway_rule(model, idx, "gate")
    assert_rows_are_as_alone(model, idx, 4, n_loop=6, exit_rule=rule)


TWO_GROUPS = dict(n_layer=4, loop_groups=[[1], [2, 3]], **ROPE)
THREE_GROUPS = dict(n_layer=6, loop_groups=[[0], [1, 2], [4]], **ROPE)
EXITING_GROUPS = {  # loops, and a threshold that tells rows apart in every group
    "two": (TWO_GROUPS, dict(n_loop=(6, 5), exit_rule=StateExit(0.68))),
    "three": (THREE_GROUPS, dict(n_loop=(5, 4, 6), exit_rule=StateExit(0.68))),
}
EXIT_MODES = {slots: dict(slots=slots, n_slot=2) for slots in SLOTS}
EXIT_MODES |= {"min_loops": dict(min_loops=3), "warm": MODES["warm"]}
CASES = [("two", mode) for mode in EXIT_MODES] + [("three", "full")]
CASES += [slow("three", mode) for mode in EXIT_MODES if mode != "full"]


@pytest.mark.parametrize("groups, mode", CASES)
def test_rows_that_exit_in_several_groups_are_as_alone(groups, mode):
    kind, options = EXITING_GROUPS[groups]
    used = assert_rows_are_as_alone(
        unlike(**kind), few_ids(4, 12), 16, **options, **EXIT_MODES[mode]
    )
    assert len(used.unique()) > 2


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
    """Return logits of the parts of a text in turn, by masks over the keys of all loops.

    Loop i sees of its own part loop i, of earlier parts the last loop that wrote its slot. slot(i):
    the slot of loop i.
    """
    prelude, loop, coda = (stage.loop for stage in model.schedule())
    first, *core, last = (Record() for _ in range(4))
    seen, logits = 0, []
    written = []  # (loop, part, position) of every entry in a record of the core
    for number, part in enumerate(parts):
        position = torch.arange(seen, seen + part.size(1))
        seen += part.size(1)
        causal = position[:, None] >= torch.arange(seen)
        ctx = Context(position, causal, model.cos_sin(position), part, first)
        x = model.transformer.wpe(model.transformer.wte(part), ctx)
        e = loop.entry(prelude(x, ctx, 1))
        s = loop.init_state(e, ctx)
        for i in range(n):
            written += [(i, number, int(p)) for p in position]
            final = max(j for j in range(n) if slot(j) == slot(i))
            mask = torch.zeros(len(position), len(written), dtype=torch.bool)
            for column, (of_loop, of_part, p) in enumerate(written):
                visible = of_loop == (i if of_part == number else final)
                mask[:, column] = visible & (p <= position)
            s = loop.index(loop.inject(s, e), i)
            for block, record in zip(loop.blocks, core):
                s = block(s, ctx._replace(mask=mask, cache=record))
            s = loop.norm(loop.reinject(s, e))
        x = coda(loop.exit(s), ctx._replace(cache=last), 1)
        logits.append(model.logits(model.transformer.ln_f(x)))
    return torch.cat(logits, 1)


POLICIES = [  # slots, n_slot, slots of loops 0, 1, 2
    ("full", 1, [0, 1, 2]),
    ("last", 2, [0, 0, 1]),
    ("first+shared", 1, [0, 1, 1]),
    ("mod", 2, [0, 1, 0]),
    ("shared", 1, [0, 0, 0]),
]


@pytest.mark.parametrize("kind", FEW_KINDS[:3], ids=str)
@pytest.mark.parametrize("slots, n_slot, slot_of", POLICIES)
@torch.no_grad()
def test_each_policy_is_a_mask_over_all_loops(kind, slots, n_slot, slot_of):
    model, idx = build(spread=0.1, **kind), few_ids(2, 12)
    parts = idx.split([5, 3, 1, 1, 1, 1], dim=1)
    cache, logits = Cache(model, 2, slots=slots, n_slot=n_slot), []
    for part in parts:
        logits.append(model(part, part, cache=closed_pass(cache, part))[0])
    logits = torch.cat(logits, 1)
    want = masked_reference(model, parts, slot_of.__getitem__)
    assert_close(logits, want, atol=2e-5, rtol=1e-4)
    is_plain = torch.allclose(logits, model(idx, idx)[0], atol=2e-5)
    assert is_plain == (slots == "full")


N_SLOTS = {"full": 3, "last": 2, "first+shared": 2, "mod": 2, "shared": 1}  # of three loops
STORED = [  # numbers that a block and slot store of a token: keys and values, or latent and rotary
    ({}, 2 * 32),
    (dict(n_kv_head=2), 2 * 16),
    (dict(attention="mla", n_latent=8), 8 + 4),
]


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("kind, stored", STORED, ids=str)
def test_bytes_of_each_policy(slots, kind, stored):
    """A prelude, a coda, and two looped blocks of as many slots as the policy has."""
    model = build(**ROPE, **kind)
    _, stats = generate(model, tokens(2, 4), 2, slots=slots, n_slot=2)
    assert stats["cache_bytes_per_token"] == 4 * stored * (1 + 2 * N_SLOTS[slots] + 1)


# -----------------------------------------------------------------------------
# exit


SHARED_SLOTS = [slots for slots in SLOTS if slots != "full"]
NEVER = [(rule, "full") for rule in EXITS] + [("state", slots) for slots in SHARED_SLOTS]
NEVER += [slow(rule, slots) for rule in EXITS if rule != "state" for slots in SHARED_SLOTS]


@pytest.mark.parametrize("rule, slots", NEVER)
def test_rules_that_never_stop_are_the_full_depth(rule, slots):
    """Threshold 0, which is no rule; and rules that are asked and never say yes."""
    model, idx = unlike(exit_gate="state"), few_ids(3, 5)
    options = dict(n_loop=4, slots=slots, n_slot=2)
    want, _ = greedy(model, idx, 8, **options)
    for exit_rule in (make_exit(model, rule, 0), StateExit(0.0), make_exit(model, "gate", 1.0)):
        got, stats = greedy(model, idx, 8, exit_rule=exit_rule, **options)
        assert torch.equal(got, want)
        assert (stats["loops_used"] == 4).all()


@pytest.mark.parametrize("slots", SLOTS)
def test_with_several_groups_a_rule_that_never_stops_is_the_full_depth(slots):
    model, idx = unlike(exit_gate="state", **GROUPS), few_ids(3, 5)
    options = dict(n_loop=(2, 4), slots=slots, n_slot=2)
    want, _ = greedy(model, idx, 8, **options)
    for exit_rule in (StateExit(0.0), make_exit(model, "gate", 1.0)):
        got, stats = greedy(model, idx, 8, exit_rule=exit_rule, **options)
        assert torch.equal(got, want)
        assert (stats["loops_used"] == 2 + 4).all()


SOURCES = [  # slots, n_slot, after two of four loops: the loop whose keys are in each slot
    ("full", 1, [0, 1, 1, 1]),
    ("last", 3, [1, 1, 1]),
    ("mod", 3, [0, 1, 1]),
    ("first+shared", 1, [0, 1]),
    ("shared", 1, [1]),
]


@pytest.mark.parametrize("slots, n_slot, source", SOURCES)
@torch.no_grad()
def test_of_a_stopped_token_deeper_loops_read_its_deepest_keys_and_values(
    monkeypatch, slots, n_slot, source
):
    model, idx = build(spread=0.1), few_ids(1, 5)
    rows = torch.arange(1)
    cache = Cache(model, 1, 4, slots=slots, n_slot=n_slot)
    decoder = Decoder(model, cache, 4, StateExit(1e9), min_loops=2)
    decoder.prefill(idx[:, :4], rows, torch.tensor([4]))
    wrote, extend = [], CacheView.extend

    def record(cache_pass, *new):
        wrote.append([part[0, :, 0] for part in new])
        return extend(cache_pass, *new)

    monkeypatch.setattr(CacheView, "extend", record)
    _, used = decoder.step(idx[:, 4:], rows)
    assert used == 2
    assert len(wrote) == 1 + 2 * 2 + 1  # prelude, two blocks in two loops, coda
    for block, parts in enumerate(cache.stages[1].parts):
        for part, stored in enumerate(parts):
            want = torch.stack([wrote[1 + 2 * i + block][part] for i in source])
            assert torch.equal(stored[:, 0, :, 4], want)


@torch.no_grad()
def test_in_every_group_deeper_loops_read_the_deepest_keys_and_values():
    model, idx, rows = build(spread=0.1, **GROUPS), few_ids(3, 5), torch.arange(3)
    cache = Cache(model, 3, 4)
    decoder = Decoder(model, cache, 4, StateExit(1e9), min_loops=2)
    decoder.prefill(idx[:, :4], rows, torch.full((3,), 4))
    _, used = decoder.step(idx[:, 4:], rows)
    assert (used == 2 + 2).all()
    for number in (0, 2):  # the stages of the two groups
        for part in (part for pair in cache.stages[number].parts for part in pair):
            first, deepest, *deeper = part[:, :, :, 4]
            assert not torch.equal(first, deepest)
            assert len(deeper) == 2
            assert all(torch.equal(slot, deepest) for slot in deeper)


def shapes_of_calls(model, block=1):
    """Return a list that fills with (rows, tokens) of each call of a block."""
    shapes = []

    def note(module, arguments, out):
        shapes.append(tuple(out.shape[:2]))

    model.transformer.h[block].register_forward_hook(note)
    return shapes


def test_rows_that_have_stopped_cost_nothing():
    """The rows that each loop computes add up to the loops that the rows used."""
    model, idx = build(spread=0.2), few_ids(6, 5)
    exit_rule, shapes = halfway_rule(model, idx, n_loop=8), shapes_of_calls(model)
    _, stats = generate(model, idx, 9, n_loop=8, exit_rule=exit_rule)
    rows = [n_rows for n_rows, n_tokens in shapes if n_tokens == 1]
    assert sum(rows) == stats["loops_used"][:, 1:].sum()
    assert sum(rows) < 6 * 8 * 7
    assert len(set(rows)) > 2


def test_rows_that_have_stopped_in_a_group_cost_nothing_there():
    kind, options = EXITING_GROUPS["two"]
    model, idx = unlike(**kind), few_ids(6, 5)
    of_groups = [shapes_of_calls(model, block) for block in (1, 2)]  # the first of each
    _, stats = generate(model, idx, 9, **options)
    rows_of_groups = []
    for shapes in of_groups:
        rows_of_groups.append([n_rows for n_rows, n_tokens in shapes if n_tokens == 1])
    assert sum(map(sum, rows_of_groups)) == stats["loops_used"][:, 1:].sum()
    for rows, n in zip(rows_of_groups, (6, 5)):
        assert sum(rows) < 6 * 8 * n
        assert len(set(rows)) > 2


def test_min_loops_is_at_most_the_loops_of_a_group_that_exits():
    model, idx = build(exit_gate="state", **GROUPS), few_ids(2, 5)
    options = dict(n_loop=(4, 3), min_loops=4)
    generate(model, idx, 2, exit_rule=StateExit(0.1), **options)
    with pytest.raises(ValueError, match="min_loops=4: must be from 1 to the 3 loops"):
        generate(model, idx, 2, exit_rule=make_exit(model, "gate", 0.5), **options)


def test_a_gate_on_the_mean_state_has_to_fit_into_the_window():
    """The mean of states at positions that have left the window cannot be kept."""
    model, idx = unlike(exit_gate="mean_state"), few_ids(2, 5)
    rule = make_exit(model, "gate", 0.5)
    text, _ = generate(model, idx, 12, exit_rule=rule)
    assert text.size(1) == 17  # the last token is not run
    with pytest.raises(ValueError, match="exit_gate=mean_state: prompt and new tokens must fit"):
        generate(model, idx, 13, exit_rule=rule)


# -----------------------------------------------------------------------------
# speculation


DRAFTS = [(1, 1), (3, 1), (4, 2), (6, 4), (3, 0)]  # tokens, loops; no loops: by further heads
DRAFTED = [({}, *drafts) for drafts in DRAFTS]
DRAFTED += [(kind, 3, 1) for kind in (*FEW_KINDS[1:5], GROUPS)]
DRAFTED += [slow(kind, *d) for kind in (*FEW_KINDS[1:5], GROUPS) for d in DRAFTS if d != (3, 1)]


@pytest.mark.parametrize("kind, draft_tokens, draft_loops", DRAFTED, ids=str)
def test_speculation_is_plain_greedy_decoding(kind, draft_tokens, draft_loops):
    """In a batch of different lengths and acceptance, to beyond the window."""
    model, idx = unlike(n_ahead=4, **kind), few_ids(4, 12)
    options = dict(n_loop=(2, 4) if kind is GROUPS else 4, lengths=RAGGED)
    drafts = dict(draft_tokens=draft_tokens, draft_loops=draft_loops)
    got, stats = greedy(model, idx, 20, **drafts, **options)
    assert torch.equal(got, greedy(model, idx, 20, **options)[0])
    assert 0 < stats["accepted"] <= stats["drafted"]
    if draft_loops == 4:  # full depth
        assert stats["accepted"] == stats["drafted"]
    if draft_loops == 1 and draft_tokens >= 3:
        assert stats["accepted"] < stats["drafted"]


def test_verification_continues_the_drafts():
    """No loop of a token is computed twice, and where all drafts stand there is one more token."""
    model = build(spread=0.1)
    shapes = shapes_of_calls(model)
    options = dict(n_loop=4, draft_tokens=4, draft_loops=4)
    _, stats = greedy(model, few_ids(1, 5), 6, **options)
    assert stats["accepted"] == 4
    assert shapes == 4 * [(1, 5)] + 5 * 4 * [(1, 1)]  # the prompt; a token and four drafts


def test_no_more_is_drafted_than_fits():
    model = build(spread=0.1)
    shapes = shapes_of_calls(model)
    greedy(model, few_ids(1, 5), 3, n_loop=4, draft_tokens=9, draft_loops=1)
    assert shapes[:7] == 4 * [(1, 5)] + 2 * [(1, 1)] + [(1, 2)]


def probabilities_of_triples(model, idx, sampling):
    """Return the model's probabilities (125,) of the next three of five tokens."""
    texts, p_of_text = idx, torch.ones(1)
    for _ in range(3):
        seen = torch.zeros(len(texts), 5, dtype=torch.bool).scatter(1, texts, True)
        with torch.no_grad():
            p = sampling.probabilities(model(texts)[0][:, -1], seen)
        p_of_text = (p_of_text[:, None] * p).flatten()
        following = torch.arange(5).repeat(len(texts))[:, None]
        texts = torch.cat((texts.repeat_interleave(5, 0), following), 1)
    return p_of_text


def assert_drawn_from(counts, p):
    """Check counts of independent draws against probabilities p by chi-square."""
    expected = counts.sum() * p
    assert not counts[p == 0].any()
    often = expected > 5
    freedom = int(often.sum())
    assert freedom > 20
    chi2 = ((counts - expected).square() / expected)[often].sum()
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("draft_loops", [1, 0])
def test_sampled_speculation_is_distributed_as_sampling(draft_loops):
    """Triples of tokens of 8,000 rows against their probabilities."""
    model, idx = build(spread=0.3, vocab_size=5, n_ahead=4), torch.tensor([[1, 4]])
    options = dict(temperature=4.0, repetition_penalty=1.5, top_p=0.97)
    drafts = dict(draft_tokens=2, draft_loops=draft_loops)
    generator = torch.Generator().manual_seed(1)
    text, stats = generate(model, idx.expand(8000, 2), 3, generator=generator, **drafts, **options)
    assert 0.05 < stats["accepted"] / stats["drafted"] < 0.95
    counts = torch.bincount(text[:, 2:] @ torch.tensor([25, 5, 1]), minlength=125)
    assert_drawn_from(counts, probabilities_of_triples(model, idx, Sampling(**options)))


# -----------------------------------------------------------------------------
# warm start


@torch.no_grad()
def test_a_warm_start_begins_with_the_last_state():
    """With one loop, in which nothing is forgotten."""
    options = dict(input_injection="diagonal", state_init="zero", n_loop=1, n_coda=0)
    model, prompt = unlike(**options), few_ids(8, 5)
    prelude, loop = (stage.loop for stage in model.schedule())
    cache, text, new, s = Cache(model, 8), prompt, prompt, None
    for _ in range(10):
        x, ctx = model.embed(new, closed_pass(cache, new))
        e = loop.entry(prelude(x, ctx, 1))
        s = loop.init_state(e, ctx) if s is None else s
        s = loop.step(s, e, 0, ctx)
        logits = model.logits(model.transformer.ln_f(loop.exit(s)))
        new, s = logits[:, -1:].argmax(-1), s[:, -1:]
        text = torch.cat((text, new), 1)
    assert torch.equal(greedy(model, prompt, 10, warm_start=True)[0], text)
    assert not torch.equal(greedy(model, prompt, 10)[0], text)


# -----------------------------------------------------------------------------
# sampling


def test_draws_follow_the_distribution():
    model, idx = build(n_layer=1, spread=0.3), tokens(1, 4)
    p = (model(idx)[0][0, -1] / 0.7).softmax(-1)
    generator = torch.Generator().manual_seed(3)
    text, _ = generate(model, idx.expand(4000, 4), 1, temperature=0.7, generator=generator)
    assert_drawn_from(torch.bincount(text[:, -1], minlength=61), p)


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
SEEN = torch.tensor([True, False, False, True, False])
P = LOGITS.softmax(-1)


def only(*ids):
    """Return the probabilities P, of these tokens alone."""
    p = torch.zeros(5)
    p[list(ids)] = P[list(ids)]
    return p / p.sum()


FILTERS = [
    ({}, P),
    (dict(top_k=2), only(0, 1)),
    (dict(top_k=9), P),
    (dict(top_p=0.5), only(0)),
    (dict(top_p=P[0].item() + 1e-4), only(0, 1)),
    (dict(min_p=0.1), only(0, 1, 2)),
    (dict(vocab_size=3), only(0, 1, 2)[:3]),
    (dict(temperature=0), only(0)),
    (dict(temperature=2.0), (LOGITS / 2).softmax(-1)),
    (dict(top_k=4, top_p=0.9, min_p=0.2), only(0, 1)),
    (dict(repetition_penalty=2.0), torch.tensor([1.0, 1.0, 0.0, -2.0, -3.0]).softmax(-1)),
]


@pytest.mark.parametrize("options, want", FILTERS, ids=lambda part: str(part)[:40])
def test_each_filter_keeps_what_its_comment_says(options, want):
    p = Sampling(**options).probabilities(LOGITS[None], SEEN[None])[0]
    assert_close(p, want, atol=1e-6, rtol=1e-5)


def test_ids_from_vocab_size_on_are_never_drawn():
    text, _ = generate(build(spread=0.3), tokens(50, 4), 30, vocab_size=7)
    assert text[:, 4:].max() == 6


def test_the_same_seed_draws_the_same_text():
    model, idx = build(spread=0.3), tokens(50, 4)
    first, again, other = (
        generate(model, idx, 5, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{}, dict(draft_tokens=4, draft_loops=1)], ids=str)
def test_watch_sees_every_token_and_ends_rows(options):
    model, idx = unlike(), few_ids(3, 5)
    want, _ = greedy(model, idx, 8)
    seen = {0: [], 1: [], 2: []}

    def watch(row, token, loops):
        seen[row].append(token)
        return len(seen[row]) == 2 * row + 3

    got, stats = greedy(model, idx, 8, watch=watch, **options)
    for row, count in enumerate((3, 5, 7)):
        new = got[row, 5 : 5 + count].tolist()
        assert seen[row] == new == want[row, 5 : 5 + count].tolist()
        assert (got[row, 5 + count :] == -1).all()
        assert stats["lengths"][row] == 5 + count


# -----------------------------------------------------------------------------
# compilation


@pytest.mark.slow
def test_one_compilation_serves_every_loop_count_and_slot():
    model, idx = build(spread=0.1, n_prelude=2, loop_embedding="learned"), few_ids(2, 9)
    stats = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs = []
    for options in (dict(n_loop=3), dict(n_loop=1), dict(n_loop=6, slots="mod", n_slot=2)):
        eager, _ = greedy(model, idx, 9, **options)
        compiled, _ = greedy(model, idx, 9, static=True, **options)
        assert torch.equal(eager, compiled)
        graphs.append(stats["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, graphs


@pytest.mark.slow
def test_a_static_cache_decodes_the_same_without_compilation(monkeypatch):
    monkeypatch.setattr("decode.compiled_loop", lambda n_blocks: one_loop)
    model, idx = unlike(), few_ids(4, 12)
    drafts = dict(draft_tokens=3, draft_loops=1)
    for options in ({}, dict(slots="mod", n_slot=2), drafts):
        eager, _ = greedy(model, idx, 20, lengths=RAGGED, **options)
        static, _ = greedy(model, idx, 20, lengths=RAGGED, static=True, **options)
        assert torch.equal(eager, static)


def test_with_a_static_cache_every_token_reads_equally_many_cells(monkeypatch):
    monkeypatch.setattr("decode.compiled_loop", lambda n_blocks: one_loop)
    n_cells, extend = set(), CacheView.extend

    def record(cache_pass, *new):
        stored = extend(cache_pass, *new)
        if new[0].size(2) == 1:  # a token behind the prompt
            n_cells.add(stored[0].size(2))
        return stored

    monkeypatch.setattr(CacheView, "extend", record)
    greedy(build(), few_ids(2, 5), 6, static=True)
    assert n_cells == {16}
    greedy(build(), few_ids(2, 5), 6)
    assert len(n_cells) > 1


def test_cells_read_in_steps_of_several_change_no_token(monkeypatch):
    """As on a GPU, where attention has a plan for every length."""
    model, idx, seen, begin = unlike(), few_ids(4, 12), set(), CacheView.__init__

    def begin_rounded(view, cache, *arguments):
        cache.rounding = 5
        begin(view, cache, *arguments)
        if view.length:
            seen.add(view.end)

    drafts = dict(draft_tokens=3, draft_loops=1)
    for options in ({}, dict(slots="mod", n_slot=2), drafts):
        plain, _ = greedy(model, idx, 20, lengths=RAGGED, **options)
        with monkeypatch.context() as patch:
            patch.setattr(CacheView, "__init__", begin_rounded)
            rounded, _ = greedy(model, idx, 20, lengths=RAGGED, **options)
        assert torch.equal(plain, rounded)
    assert all(end % 5 == 0 or end == 16 for end in seen)


# -----------------------------------------------------------------------------
# what is refused

WRONG = [
    ("the prompt is empty", dict(lengths=[3, 0])),
    ("longer than the window", dict(idx=tokens(2, 17))),
    ("slots='none': must be one of full", dict(slots="none")),
    ("n_slot=4", dict(slots="mod", n_slot=4)),
    ("n_slot=0", dict(slots="last", n_slot=0)),
    ("at most the 0 heads further ahead", dict(draft_tokens=1)),
    ("not with", dict(draft_tokens=1, draft_loops=1, slots="shared")),
    ("not with", dict(draft_tokens=1, draft_loops=1, warm_start=True)),
    ("slide=16", dict(slide=16)),
    ("n_loop=", dict(n_loop=torch.tensor([1, 2]))),
    ("max_new_tokens=-1", dict(max_new_tokens=-1)),
    ("draft_tokens=-1", dict(draft_tokens=-1)),
    ("draft_loops=9", dict(draft_tokens=1, draft_loops=9)),
    ("min_loops=9", dict(min_loops=9, exit_rule=StateExit(0.1))),
    ("temperature=-1", dict(temperature=-1)),
    ("top_p=1.5", dict(top_p=1.5)),
    ("repetition_penalty=0", dict(repetition_penalty=0)),
]


@pytest.mark.parametrize("words, options", WRONG)
def test_wrong_requests_are_refused(words, options):
    options = {"idx": tokens(2, 4), "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=words):
        generate(build(), **options)


@pytest.mark.parametrize(
    "options", [dict(exit_rule=StateExit(0.1)), dict(warm_start=True), dict(slots="shared")]
)
def test_what_needs_a_loop_is_refused_without_one(options):
    with pytest.raises(ValueError, match="nothing is looped|something is looped"):
        generate(build(n_layer=2), tokens(2, 4), 3, **options)
