"""
Text from a model, token by token; every pass is another composition of the model's public pieces.

    pass:       embed -> stages before the last loop -> its loops -> stages after it -> head
    exit:       a rule looks after each loop; rows that are done leave the batch for the loops that remain
    speculate:  draft tokens with a few loops, then go on from the same states and cache to full depth, which verifies

A round of generate() runs the newest token of every row, and behind it what was drafted; without drafts it is plain
decoding. From top to bottom: the cache, sampling, the passes, generate(). Exit rules are in exit_rules.py.
Shapes: B rows of a batch, R those of them that a pass is about, T new tokens, S cells, C channels, V vocabulary.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanorecur.exit_rules import GateExit, rows_of

# -----------------------------------------------------------------------------
# the cache: token t of a row lies in cell t of the slot that belongs to its loop

SLOTS = {  # the slot of loop i of n, numbered in the order of their first use; k: how many there are
    "full": lambda i, n, k: i,
    "last": lambda i, n, k: max(
        0, i - (n - k)
    ),  # the last k loops have their own, the first of which earlier ones use
    "first+shared": lambda i, n, k: min(i, 1),
    "mod": lambda i, n, k: i % k,
    "shared": lambda i, n, k: 0,
}
KEPT = {  # what attention keeps of a token: (heads, channels) of each part
    "mha": lambda attn: 2 * [(attn.heads[1], attn.size)],  # keys, values
    "mla": lambda attn: [(1, attn.n_latent), (1, attn.turning)],
}


class Group(NamedTuple):
    turn: int  # how often attention was called before, in a pass that makes every loop
    slots: list  # of each loop
    kept: list  # of each block its parts (slots, B, heads, size, channels)


class Cache:
    """What attention keeps of the tokens so far, preallocated; rows of the batch may be of different lengths.

    A query sees its own cell and those before it. So what padding or rejected drafts left in cells beyond a row's
    length is overwritten before anything sees it, and taking tokens back is setting a smaller length.
    """

    def __init__(
        self,
        model,
        batch=1,
        n_loop=None,
        slots="full",
        n_slot=1,
        size=None,
        dtype=None,
        static=False,
    ):
        """Room for size tokens (None: block_size) in each of batch rows, at n_loop loops as GPT.forward has them.

        slots: a key of SLOTS, n_slot: its k. static: attention reads all cells, so that shapes never change.
        """
        config, like = model.config, model.lm_head.weight
        self.offset, self.separator, self.static = (
            int(config.predict_ahead),
            config.document_separator,
            static,
        )
        self.size = min(size or config.block_size, config.block_size) + self.offset  # cells
        self.groups, self.views = [], []
        for stage, count in model.schedule(n_loop):
            numbers = [SLOTS[slots](i, *count, n_slot) for i in range(*count)] if count else [0]
            shape, dtype = (max(numbers) + 1, batch), dtype or like.dtype
            kept = [
                [
                    like.new_zeros(*shape, heads, self.size, channels, dtype=dtype)
                    for heads, channels in parts
                ]
                for parts in (
                    KEPT[config.attention](block.attn)
                    for block in (stage.blocks if count else [stage])
                )
            ]
            self.groups.append(Group(len(self.views), numbers, kept))
            self.views += [[part[slot] for part in parts] for slot in numbers for parts in kept]
        for view in (part for parts in self.views for part in parts) if static else ():
            torch._dynamo.mark_static_address(
                view, guard=False
            )  # CUDA graphs write to no other input
        self.lengths = torch.zeros(batch, dtype=torch.long)  # tokens of each row, on the CPU
        self.ids = like.new_zeros(batch, self.size, dtype=torch.long)
        self.point()

    def point(self, rows=None, seen=None):
        """The next pass is about rows (R,), None for all, each with seen (R,) tokens before it, None for all it has."""
        self.numbers = torch.arange(len(self.lengths)) if rows is None else rows
        self.seen = self.lengths[self.numbers] if seen is None else seen
        self.length = int(self.seen.max())
        self.rows = self.numbers.to(self.ids.device).unsqueeze(1)
        self.open(0, len(self.views))

    def open(self, turn, count):
        """The next calls of attention are these of a pass that makes every loop."""
        self.queue, self.turn = self.views[turn : turn + count], 0

    def look(self, x, idx):
        """Position and mask of new tokens x (R, T, C): each sees itself and all before it in its document."""
        start, T = (self.seen + self.offset * (self.seen > 0)).to(x.device), x.size(1)
        self.places = start.unsqueeze(1) + torch.arange(T, device=x.device)  # (R, T)
        self.end = (
            self.size
            if self.static and self.length
            else self.length + self.offset * (self.length > 0) + T
        )
        self.select(None)
        if self.separator < 0 and not self.length:
            return self.places, None
        cell, place = torch.arange(self.end, device=x.device), self.places.unsqueeze(-1)
        mask = cell <= place  # (R, T, S)
        if self.separator < 0:
            return self.places, mask.unsqueeze(1)
        self.ids[self.rows, self.places] = idx
        ended = (self.ids[self.rows, cell] == self.separator).unsqueeze(1) & (cell < place)
        start = ((cell + 1) * ended).amax(-1)  # of each token's document
        return self.places - start, (mask & (cell >= start.unsqueeze(-1))).unsqueeze(1)

    def extend(self, *new):
        """Keep parts (R, heads, T, channels) of new tokens where it is their turn; returns all cells (R, .., S, ..)."""
        kept, self.turn = self.queue[self.turn], self.turn + 1
        for part, more in zip(kept, new):
            part[self.row, :, self.place] = more.transpose(1, 2).to(part.dtype)
        return [
            part[:, :, : self.end] if self.whole else part[self.row[:, 0], :, : self.end]
            for part in kept
        ]

    def select(self, pick):
        """Go on with some rows of the pass, (R',) numbers; None for all of them again."""
        self.row, self.place = (
            (self.rows, self.places) if pick is None else (self.rows[pick], self.places[pick])
        )
        self.whole = len(self.row) == len(self.lengths)

    def stand_in(self, group, i):
        """Tokens of the selected rows that stop after loop i: slots that they have not reached get their deepest."""
        first = max(group.slots[: i + 1]) + 1
        for part in (part for parts in group.kept for part in parts):
            deepest = part[group.slots[i]][self.row, :, self.place]  # (R, T, heads, channels)
            part[first:, self.row, :, self.place] = deepest.unsqueeze(2)

    def advance(self, count):
        """The pass is over, of count tokens for each row, an int or (R,)."""
        self.lengths[self.numbers] = self.seen + count
        self.point()

    def bytes_per_token(self):
        """Of one row of the batch."""
        return sum(
            part[:, 0, :, 0].nbytes
            for group in self.groups
            for parts in group.kept
            for part in parts
        )


def check_slots(config, n_loop, slots, n_slot):
    """ValueError where a model cannot have these slots."""
    counts = config.counts(n_loop)
    if slots not in SLOTS:
        raise ValueError(f"slots={slots!r}: must be one of {', '.join(SLOTS)}")
    if slots != "full" and not counts:
        raise ValueError(f"slots={slots!r}: must be full where nothing is looped")
    if slots in ("last", "mod") and not 1 <= n_slot <= min(counts):
        raise ValueError(f"n_slot={n_slot}: must be from 1 to the {min(counts)} loops")


# -----------------------------------------------------------------------------
# sampling


class Sampling(NamedTuple):
    """From logits to probabilities, in this order; what is 0 or None does nothing, but for temperature."""

    temperature: float = 1.0  # 0: all on the likeliest token
    top_k: int | None = None  # the k likeliest
    top_p: float | None = (
        None  # the fewest likeliest that together have this probability (arXiv 1904.09751)
    )
    min_p: float | None = (
        None  # those with this share of the likeliest's probability (arXiv 2407.01082)
    )
    repetition_penalty: float = (
        1.0  # of tokens that occurred: divides positive logits (CTRL, arXiv 1909.05858)
    )
    vocab_size: int | None = None  # ids from here on are padding and never drawn

    def probabilities(self, logits, seen):
        """(.., V) of logits (.., V) and of which tokens occurred, seen (.., V)."""
        logits, penalty = logits[..., : self.vocab_size].float(), self.repetition_penalty
        if penalty != 1:
            logits = torch.where(
                seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
            )
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
        logits = logits / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.size(-1))).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(-1)
        if self.top_p:
            ordered = p.sort(descending=True)
            kept = ordered.values.cumsum(-1) - ordered.values < self.top_p
            p = p * torch.zeros_like(kept).scatter(-1, ordered.indices, kept)
        if self.min_p:
            p = p * (p >= self.min_p * p.amax(-1, keepdim=True))
        return p / p.sum(-1, keepdim=True)


def check_sampling(sampling):
    """ValueError where a value is outside its range."""
    ranges = {
        "temperature": (0, torch.inf),
        "top_k": (1, torch.inf),
        "top_p": (1e-9, 1),
        "min_p": (0, 1),
        "repetition_penalty": (1e-9, torch.inf),
        "vocab_size": (1, torch.inf),
    }
    for name, (least, most) in ranges.items():
        value = getattr(sampling, name)
        if value is not None and not (least <= value <= most and value < torch.inf):
            raise ValueError(f"{name}={value}: must be from {least} to {most}")


def draw(p, generator):
    """One token (R,) from probabilities (R, V): where their running sum passes a uniform number."""
    total = p.double().cumsum(-1)
    u = 1 - torch.rand(
        len(p), 1, generator=generator, dtype=torch.double, device=p.device
    )  # in (0, 1]
    return (total < u * total[:, -1:]).sum(-1)


def accept(p, q, drafts, generator):
    """How many drafts (R, m) of distributions q (R, m, V) stand, and the token after them, each (R,).

    What comes out is distributed as p (R, m + 1, V), the model's own, by rejection (arXiv 2211.17192, appendix A.1).
    """
    chosen = [part.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for part in (p[:, :-1], q)]
    stands = torch.rand(drafts.shape, generator=generator, device=p.device) * chosen[1] < chosen[0]
    count = stands.cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    rest = (p[row, count] - F.pad(q, (0, 0, 0, 1))[row, count]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[row, count])  # 0 only by rounding
    return count, draw(rest, generator)


# -----------------------------------------------------------------------------
# passes


def pass_block(block, x, where):
    return block(x, where)


def pass_loop(loop, s, e, i, where):
    return loop.step(s, e, i, where)


@functools.cache
def compiled(function):
    """One graph for all blocks, slots and loops; another shape is another one. On a GPU replayed as a CUDA graph."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode="reduce-overhead")


class Decoder:
    """The passes of a model over a cache, cut open around the last looped group, where exits and drafts are."""

    def __init__(
        self, model, cache, n_loop=None, exit_rule=None, min_loops=1, warm_start=False, shapes=()
    ):
        """exit_rule: of make_exit, asked from min_loops on. warm_start: a token's first state is the last one of the
        token before it. shapes: (R, T) of the passes that are compiled."""
        self.model, self.cache, self.rule, self.min_loops, self.shapes = (
            model,
            cache,
            exit_rule,
            min_loops,
            shapes,
        )
        self.schedule = model.schedule(n_loop)
        looped = [number for number, (_, count) in enumerate(self.schedule) if count]
        self.last = looped[-1] if looped else len(self.schedule)
        (self.loop, (self.n,)) = self.schedule[self.last] if looped else (None, (0,))
        most, like = max((*model.config.counts(n_loop), 1)), model.lm_head.weight
        self.index = torch.arange(most, device=like.device).split(
            1
        )  # of each loop; an int would be compiled in
        self.warm = (
            like.new_zeros(len(cache.lengths), 1, model.config.n_embd) if warm_start else None
        )
        pooling = isinstance(exit_rule, GateExit) and model.config.exit_gate == "mean_state"
        self.sums = (
            like.new_zeros(self.n, len(cache.lengths), 1, model.config.n_embd) if pooling else None
        )

    def enter(self, idx, rows, seen=None):
        """What enters the loop, its first state, where: of tokens idx (R, T) of rows (R,), seen (R,) before them."""
        self.cache.point(rows, seen)
        x, where = self.model.embed(idx, self.cache)
        x = self.through(range(self.last), x, where)
        return (*self.begin(self.loop, x, where), where) if self.loop else (x, x, where)

    def leave(self, s, where):
        """The last hidden states, which the head reads, of states s (R, T, C)."""
        s = self.loop.exit(s) if self.loop else s
        return self.model.transformer.ln_f(
            self.through(range(self.last + 1, len(self.schedule)), s, where)
        )

    def begin(self, loop, x, where):
        e = loop.entry(x)
        return e, loop.init_state(e, where)

    def through(self, numbers, x, where):
        """x (R, T, C) after the stages of the schedule with these numbers."""
        for number in numbers:
            stage, count = self.schedule[number]
            if count:
                e, s = self.begin(stage, x, where)
                x = stage.exit(self.loops(range(*count), s, e, where, number))
            else:
                self.cache.open(self.cache.groups[number].turn, 1)
                x = self.way(pass_block, x)(stage, x, where)
        return x

    def loops(self, loops, s, e, where, number=None):
        """The state after these loops of a stage, the last group by default."""
        number = self.last if number is None else number
        for i in loops:
            stage, turn = self.schedule[number][0], self.cache.groups[number].turn
            self.cache.open(turn + i * len(stage.blocks), len(stage.blocks))
            s = self.way(pass_loop, s)(stage, s, e, self.index[i], where)
        return s

    def way(self, function, x):
        return compiled(function) if tuple(x.shape[:2]) in self.shapes else function

    def adaptive(self, s, e, where):
        """The state (R, 1, C) at which the rule stops each row, and after how many loops (R,)."""
        rows, carry, whole = torch.arange(len(s), device=s.device), self.rule.start(s), (e, where)
        gone, final, used = [], [], []
        for i in range(self.n):
            s = self.loops([i], s, e, where)
            going, carry = self.going(i, carry, s, where)
            if going.all():
                continue
            gone.append(rows[~going])
            final.append(s[~going])
            used.append(torch.full_like(gone[-1], i + 1))
            self.cache.select(gone[-1])
            if self.sums is not None:
                self.sums[i + 1 :, self.cache.row[:, 0]] += final[-1]
            self.cache.stand_in(self.cache.groups[self.last], i)
            rows = rows[going]
            self.cache.select(rows)
            if not len(rows):
                break
            s, e, where, carry = (
                s[going],
                whole[0][rows],
                rows_of(whole[1], rows),
                [part[going] for part in carry],
            )
        self.cache.select(None)
        order = torch.cat(gone).argsort()
        return torch.cat(final)[order], torch.cat(used)[order].cpu()

    def going(self, i, carry, s, where):
        """Which rows (R,) are not done after loop i, and what the rule carries on."""
        every, pooled = torch.ones(len(s), dtype=torch.bool, device=s.device), self.pooled(i, s)
        if i + 1 == self.n:
            return ~every, carry
        done, carry = self.rule.done(carry, pooled, lambda: self.model.logits(self.leave(s, where)))
        return every if i + 1 < self.min_loops else ~done[:, 0], carry

    def pooled(self, i, s):
        """States s (R, 1, C) after loop i, or where the gate asks for it their mean with those of the tokens before,
        each after as many loops or its last one."""
        if self.sums is None:
            return s
        rows = self.cache.row[:, 0]
        self.sums[i, rows] += s
        return self.sums[i, rows] / (self.cache.place + 1).unsqueeze(-1)

    def prefill(self, idx, rows, lengths):
        """The last hidden state (R, 1, C) of each of rows (R,), prompts idx (R, T) of lengths (R,), at full depth."""
        e, s, where = self.enter(idx, rows)
        last = (lengths - 1 + self.cache.offset).to(s.device)
        real = torch.arange(s.size(1), device=s.device) <= last.unsqueeze(1)  # (R, T)
        for i in range(self.n):
            s = self.loops([i], s, e, where)
            if self.sums is not None:
                self.sums[i, rows] = (s * real.unsqueeze(-1)).sum(1, keepdim=True)
        hidden = self.leave(s, where)
        self.cache.advance(lengths)
        row = torch.arange(len(s), device=s.device)
        if self.warm is not None:
            self.warm[rows] = s[row, last].unsqueeze(1).to(self.warm.dtype)
        return hidden[row, last].unsqueeze(1)

    def step(self, token, rows):
        """The last hidden state (R, 1, C) of one more token (R, 1) of each row, and the loops that it took, (R,)."""
        e, s, where = self.enter(token, rows)
        s = s if self.warm is None else self.warm[rows]
        if self.rule:
            s, used = self.adaptive(s, e, where)
        else:
            s, used = self.loops(range(self.n), s, e, where), torch.full((len(s),), self.n)
        if self.warm is not None:
            self.warm[rows] = s.to(self.warm.dtype)
        hidden = self.leave(s, where)
        self.cache.advance(1)
        return hidden, used

    def draft(self, token, rows, count, n_draft, guess):
        """Draft count tokens behind token (R, 1) with n_draft loops, then go on from their states and cache to all.

        guess(hidden (R, 1, C), drafts so far) -> (tokens (R,), q (R, 1, V)). Returns the last hidden states of both,
        (R, count + 1, C), the drafts (R, count) and their distributions (R, count, V).
        """
        seen, chunk, states, q = self.cache.lengths[rows], token, [], []
        for j in range(count + 1):
            e, s, where = self.enter(chunk[:, -1:], rows, seen + j)
            s = self.loops(range(n_draft), s, e, where)
            states.append((s, e))
            if j < count:
                new, p = guess(self.leave(s, where), chunk[:, 1:])
                chunk, q = torch.cat((chunk, new.unsqueeze(1)), 1), [*q, p]
        self.cache.point(rows, seen)
        where = self.model.embed(chunk, self.cache)[1]
        s, e = (torch.cat(parts, 1) for parts in zip(*states))
        s = self.loops(range(n_draft, self.n), s, e, where)
        return self.leave(s, where), chunk[:, 1:], torch.cat(q, 1)

    def heads(self, token, rows, count, hidden, guess):
        """As draft, in one pass: the heads further ahead draft from hidden (R, 1, C), which gave the token."""
        chunk, q = token, []
        for head in self.model.ahead[:count]:
            new, p = guess(head(hidden), chunk[:, 1:])
            chunk, q = torch.cat((chunk, new.unsqueeze(1)), 1), [*q, p]
        e, s, where = self.enter(chunk, rows)
        s = self.loops(range(self.n), s, e, where)
        return self.leave(s, where), chunk[:, 1:], torch.cat(q, 1)

    def slide(self, rows, tokens, lengths, step):
        """Windows that are full move on by step tokens: what stays in them is computed anew, at its new positions."""
        full, keep = (
            rows[self.cache.lengths[rows] == self.model.block_size],
            self.model.block_size - step,
        )
        self.cache.lengths[full] = 0
        if self.sums is not None:
            self.sums[:, full] = 0
        if len(full) and keep:
            place = lengths[full].unsqueeze(1) - 1 - keep + torch.arange(keep)
            self.prefill(tokens[full.unsqueeze(1), place], full, torch.full((len(full),), keep))


# -----------------------------------------------------------------------------
# generation


class Text:
    """The tokens of all rows so far, and how the next are drawn."""

    def __init__(self, idx, lengths, max_new_tokens, sampling, generator, watch, width):
        self.tokens = F.pad(idx, (0, max_new_tokens), value=-1)
        self.tokens[torch.arange(self.tokens.size(1)) >= lengths.unsqueeze(1)] = -1
        self.starts, self.lengths, self.ends = (
            lengths,
            lengths.clone(),
            lengths + max_new_tokens,
        )  # (B,), on the CPU
        self.used = torch.zeros(len(idx), max_new_tokens, dtype=torch.long)
        self.sampling, self.generator, self.watch, self.seen = sampling, generator, watch, None
        self.drafted = self.accepted = 0
        if sampling.repetition_penalty != 1:
            real = torch.where(self.tokens < 0, self.tokens[:, :1], self.tokens)
            self.seen = torch.zeros(len(idx), width, dtype=torch.bool, device=idx.device).scatter(
                1, real, True
            )

    def unfinished(self):
        return (self.lengths < self.ends).nonzero().squeeze(1)

    def newest(self, rows):
        return self.tokens[rows, self.lengths[rows] - 1].unsqueeze(1)

    def probabilities(self, logits, rows, drafts):
        """(R, T, V) of logits (R, T, V), the last behind all drafts (R, m), each before it behind one less."""
        seen = self.seen
        if seen is not None:
            more = F.one_hot(drafts, seen.size(1)).cumsum(1).bool()
            seen = (seen[rows].unsqueeze(1) | F.pad(more, (0, 0, 1, 0)))[
                :, -logits.size(1) :, : logits.size(-1)
            ]
            seen = seen[..., : self.sampling.vocab_size]
        return self.sampling.probabilities(logits, seen)

    def append(self, rows, new, counts, used):
        """The first counts (R,) of tokens new (R, m) to rows (R,), each after used (R,) loops, as far as they fit."""
        counts = torch.minimum(counts, self.ends[rows] - self.lengths[rows])
        if self.watch:
            counts = self.show(rows, new.tolist(), counts, used)
        fits = torch.arange(new.size(1)) < counts.unsqueeze(1)
        row, number = fits.nonzero(as_tuple=True)
        place = self.lengths[rows][row] + number
        self.tokens[rows[row], place] = new[row, number]
        self.used[rows[row], place - self.starts[rows[row]]] = used[row]
        self.lengths[rows] += counts
        if self.seen is not None:
            self.seen[rows[row], new[row, number]] = True

    def show(self, rows, new, counts, used):
        """Hand each token to watch(row, token, loops); how many (R,) until it says True, which ends the row."""
        for number, row in enumerate(rows.tolist()):
            for j, token in enumerate(new[number][: counts[number]], 1):
                if self.watch(row, token, int(used[number])):
                    counts[number], self.ends[row] = j, self.lengths[row] + j
                    break
        return counts


@torch.no_grad()
def generate(
    model,
    idx,
    max_new_tokens,
    *,
    n_loop=None,
    lengths=None,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    vocab_size=None,
    generator=None,
    slots="full",
    n_slot=1,
    slide=0,
    exit_rule=None,
    min_loops=1,
    warm_start=False,
    draft_tokens=0,
    draft_loops=0,
    static=False,
    watch=None,
):
    """Continue the prompts idx (B, T), int64, by max_new_tokens tokens each, in a batch as if each were alone.

    n_loop: loops of the model, an int, one per group, or None (the config's). lengths (B,): of the prompts, where
    padding follows them. temperature to vocab_size: see Sampling; generator: a torch.Generator on the model's device.
    slots, n_slot: what loops share in the cache (SLOTS); the tokens of a prompt see each other in full.
    slide: by how many tokens a full window of block_size moves on, to be computed anew; 1: nanoGPT's cropping, slow;
    0: a quarter. exit_rule, from make_exit: ends the loops of each token but the prompt's, from min_loops on; deeper
    loops of later tokens read the deepest keys and values it has. warm_start: states start from the last token's.
    draft_tokens are drafted in each round with draft_loops loops, 0: by the model's heads further ahead; output is
    distributed as without, at temperature 0 the same. static: decoding is compiled, once for any number of loops.
    watch(row, token, loops): called with each new token, True ends the row.
    Returns (tokens (B, T + max_new_tokens), -1 behind the end of a row, stats): loops of each group, loops_used (B,
    max_new_tokens) of the last group for each new token, lengths (B,), cache_bytes_per_token, drafted and accepted.
    """
    lengths = (
        torch.full((len(idx),), idx.size(1)) if lengths is None else torch.as_tensor(lengths).cpu()
    )
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, vocab_size)
    check_sampling(sampling)
    check_slots(model.config, n_loop, slots, n_slot)
    check_prompt(model, idx, lengths, max_new_tokens, slide)
    deepest = (0, *model.config.counts(n_loop))[-1]
    check_loops(model, deepest, exit_rule, min_loops, warm_start, draft_tokens, draft_loops, slots)
    size = None if static else idx.size(1) + max_new_tokens + draft_tokens
    cache = Cache(
        model, len(idx), n_loop, slots, n_slot, size, autocast_dtype(idx.device.type), static
    )
    shapes = {(len(idx), 1), (len(idx), draft_tokens + 1)} if static else ()
    decoder = Decoder(model, cache, n_loop, exit_rule, min_loops, warm_start, shapes)
    text = Text(idx, lengths, max_new_tokens, sampling, generator, watch, model.config.vocab_size)
    stats = {"loops": model.config.counts(n_loop), "cache_bytes_per_token": cache.bytes_per_token()}
    stats |= {"loops_used": text.used, "lengths": text.lengths}
    rows = text.unfinished()
    if len(rows):
        hidden = decoder.prefill(idx.clamp(min=0), rows, lengths)
        p = text.probabilities(model.logits(hidden), rows, idx[:, :0])
        new = draw(p[:, 0], generator).unsqueeze(1)
        text.append(rows, new, torch.ones_like(rows), torch.full_like(rows, decoder.n))
    while len(rows := text.unfinished()):
        decoder.slide(rows, text.tokens, text.lengths, slide or max(1, model.block_size // 4))
        hidden[rows] = one_round(decoder, text, rows, hidden[rows], draft_tokens, draft_loops)
    return text.tokens, stats | {"drafted": text.drafted, "accepted": text.accepted}


def one_round(decoder, text, rows, hidden, draft_tokens, draft_loops):
    """Run each row's newest token and drafts behind it. hidden (R, 1, C), also returned: what the newest came from."""
    if decoder.shapes:
        torch.compiler.cudagraph_mark_step_begin()  # what compiled passes gave before may be overwritten
    model, cache, token = decoder.model, decoder.cache, text.newest(rows)
    room = min(
        model.block_size - int(cache.lengths[rows].max()),
        int((text.ends - text.lengths)[rows].max()),
    )
    count = min(draft_tokens, room - 1)
    if not count:
        hidden, used = decoder.step(token, rows)
        p = text.probabilities(model.logits(hidden), rows, token[:, :0])
        text.append(rows, draw(p[:, 0], text.generator).unsqueeze(1), torch.ones_like(rows), used)
        return hidden

    def guess(hidden, drafts):
        q = text.probabilities(model.logits(hidden), rows, drafts)
        return draw(q[:, 0], text.generator), q

    way = (decoder.draft, draft_loops) if draft_loops else (decoder.heads, hidden)
    hidden, drafts, q = way[0](token, rows, count, way[1], guess)
    p = text.probabilities(model.logits(hidden), rows, drafts)
    stand, last = accept(p, q, drafts, text.generator)
    row = torch.arange(len(rows), device=last.device)
    new = F.pad(drafts, (0, 1))
    new[row, stand] = last
    cache.lengths[rows] += stand.cpu() + 1
    text.append(rows, new, stand.cpu() + 1, torch.full((len(rows),), decoder.n))
    text.drafted, text.accepted = text.drafted + drafts.numel(), text.accepted + int(stand.sum())
    return hidden[row, stand].unsqueeze(1)


def autocast_dtype(kind):
    """What linear layers return on this kind of device, None where it is what they hold."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def check_prompt(model, idx, lengths, max_new_tokens, slide):
    """ValueError for a prompt or a window that cannot be."""
    if (
        len(lengths) != len(idx)
        or not idx.size(1)
        or not 1 <= lengths.min() <= lengths.max() <= idx.size(1)
    ):
        raise ValueError(
            "the prompt is empty, or lengths do not fit: one for each row, from 1 to its columns"
        )
    if lengths.max() > model.block_size:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens is longer than the window, block_size={model.block_size}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if not 0 <= slide <= max(1, model.block_size - 1):
        raise ValueError(f"slide={slide}: must be from 0 to {max(1, model.block_size - 1)}")


def check_loops(model, n, exit_rule, min_loops, warm_start, draft_tokens, draft_loops, slots):
    """ValueError for ways to decode that a model of n loops cannot go, or not together."""
    if not n and (exit_rule or warm_start or draft_loops):
        raise ValueError(
            "exit_rule, warm_start and draft_loops need a model in which something is looped"
        )
    if n and not (1 <= min_loops <= n and 0 <= draft_loops <= n):
        raise ValueError(
            f"min_loops={min_loops}, draft_loops={draft_loops}: must be from 1 and 0 to the {n} loops"
        )
    if draft_tokens < 0:
        raise ValueError(f"draft_tokens={draft_tokens}: must be at least 0")
    if draft_tokens and (exit_rule or warm_start or slots != "full"):
        raise ValueError(
            "draft_tokens: not with exit_rule, warm_start or slots other than full: drafts verify neither"
        )
    if not draft_loops and draft_tokens > len(model.ahead):
        heads = f"at most the {len(model.ahead)} heads further ahead"
        raise ValueError(f"draft_tokens={draft_tokens}: {heads}, or draft_loops of at least 1")
