"""
Decoding: text from a model, token by token, with a cache of keys and values.

    pass:       embed -> stages before the last loop -> its loops -> stages after it -> head
    exit:       a rule is asked after each loop of a stage; rows that stop wait behind the stage
    speculate:  draft tokens with a few loops, then continue the same states to full depth: verify

generate() runs rounds: each runs the newest token of every row, and behind it the drafted ones;
without drafts that is plain decoding. Every pass is a composition of the model's public pieces.
From top to bottom: the cache, sampling, the Decoder's passes, generate() and its checks. Exit rules
are in nanorecur/exit_rules.py.
Shapes: B rows of the batch, R rows of a pass, T new tokens, S cells, C channels, V vocabulary.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Context, GPTConfig, LatentAttention, Loop
from nanorecur.exit_rules import ExitRule, GateExit, exit_stages

# -----------------------------------------------------------------------------
# the cache: token t of a row lies in cell t of the slot that belongs to its stage and loop

SLOTS = {  # the slot of loop i of n; k: n_slot
    "full": lambda i, n, k: i,
    "last": lambda i, n, k: max(0, i - (n - k)),  # the last k loops; the first of them for earlier
    "first+shared": lambda i, n, k: min(i, 1),
    "mod": lambda i, n, k: i % k,
    "shared": lambda i, n, k: 0,
}


def cached_parts(attn: nn.Module) -> list[tuple[int, int]]:
    """Return (heads, channels) of the two parts that attention stores of a token."""
    if isinstance(attn, LatentAttention):
        return [(1, attn.n_latent), (1, attn.rope_dim)]
    return [(attn.heads[1], attn.head_dim), (attn.heads[2], attn.head_dim)]  # keys, values


class StageCache:
    """Storage of one stage: what attention stores, by block and slot."""

    def __init__(self, blocks: tuple, slots: list[int], batch: int, size: int, like: Tensor):
        """Allocate batch rows of size cells. slots: of each loop. like: gives device and dtype."""
        self.slots = slots
        n_slots = max(slots) + 1
        self.parts = []  # of each block two tensors (slots, B, heads, S, channels)
        for block in blocks:
            shapes = cached_parts(block.attn)
            self.parts.append([like.new_zeros(n_slots, batch, h, size, c) for h, c in shapes])
        self.views = []  # of each slot a list over blocks
        for slot in range(n_slots):
            self.views.append([[part[slot] for part in pair] for pair in self.parts])

    def of_loop(self, i: int) -> list[list[Tensor]]:
        """Return what loop i reads and writes: two tensors (B, heads, S, channels) per block."""
        return self.views[self.slots[i]]

    def copy_to_deeper(self, i: int, view: "CacheView") -> None:
        """Copy a pass's tokens, which stop after loop i, to the slots that they will not reach."""
        first = max(self.slots[: i + 1]) + 1
        rows, cells = view.rows, view.cells
        for pair in self.parts:
            for part in pair:
                deepest = part[self.slots[i]][rows, :, cells]  # (R, T, heads, channels)
                part[first:, rows, :, cells] = deepest.unsqueeze(2)


class Cache:
    """Keys and values of the tokens so far, preallocated; rows may be of different lengths.

    A query sees its own cell and those before it. So what padding or rejected drafts left in cells
    beyond a row's length is overwritten before anything sees it, and to take tokens back is to set
    a smaller length.
    """

    def __init__(
        self,
        model: GPT,
        batch: int = 1,
        n_loop: int | tuple | None = None,
        slots: str = "full",
        n_slot: int = 1,
        size: int | None = None,
        dtype: torch.dtype | None = None,
        static: bool = False,
    ):
        """Allocate batch rows of size tokens (None: block_size), at n_loop loops as in GPT.forward.

        slots: a key of SLOTS, n_slot: its k. static: attention reads all cells, so that shapes
        never change.
        """
        config, weight = model.config, model.lm_head.weight
        like = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        self.offset = int(config.predict_ahead)  # cells of the token before the prompt
        self.separator, self.window = config.document_separator, config.attention_window
        self.static = static
        # cells are read in steps of so many: cuDNN plans anew for every length (about 30 ms)
        self.rounding = 128 if like.device.type == "cuda" else 1
        self.size = min(size or config.block_size, config.block_size) + self.offset  # cells
        self.stages = []
        for stage in model.schedule(n_loop):
            if stage.looped:
                numbers = [SLOTS[slots](i, stage.n, n_slot) for i in range(stage.n)]
            else:
                numbers = [0]
            blocks = stage.loop.blocks
            self.stages.append(StageCache(blocks, numbers, batch, self.size, like))
        if static:
            self.mark_static()
        self.lengths = torch.zeros(batch, dtype=torch.long)  # tokens of each row, on the CPU
        self.ids = torch.zeros(batch, self.size, dtype=torch.long, device=like.device)

    def mark_static(self) -> None:
        """Tell torch.compile that addresses stay, since CUDA graphs write to no other inputs."""
        for stage in self.stages:
            for slot in stage.views:
                for part in (part for pair in slot for part in pair):
                    torch._dynamo.mark_static_address(part, guard=False)

    def open(
        self, n_new: int, rows: Tensor | None = None, seen: Tensor | None = None
    ) -> "CacheView":
        """Begin a pass of n_new tokens in rows (R,), None for all, behind seen (R,) tokens of each.

        seen is by default all that the cache has. GPT.forward and GPT.embed take the pass as cache.
        """
        return CacheView(self, n_new, rows, seen)

    def close(self, view: "CacheView", count: int | Tensor) -> None:
        """End a pass: of its tokens the first count (an int or (R,)) stay in each row."""
        self.lengths[view.row_numbers] = view.seen + count

    def bytes_per_token(self) -> int:
        """Return the bytes that one token of one row takes."""
        pairs = [pair for stage in self.stages for pair in stage.parts]
        return sum(part[:, 0, :, 0].nbytes for pair in pairs for part in pair)


class CacheView:
    """New tokens on their way through the model: their rows and cells, and the slots of each call.

    Every call of attention calls extend() once, and takes the next of the slots.
    """

    def __init__(self, cache: Cache, n_new: int, rows: Tensor | None, seen: Tensor | None):
        self.cache = cache
        self.row_numbers = torch.arange(len(cache.lengths)) if rows is None else rows  # on the CPU
        self.seen = cache.lengths[self.row_numbers] if seen is None else seen  # (R,), on the CPU
        self.length = int(self.seen.max())  # tokens before the new ones, in the longest row
        device, offset = cache.ids.device, cache.offset
        n_cells = n_new if self.length else n_new + offset
        start = (self.seen + offset * (self.seen > 0)).to(device)
        self.rows = self.row_numbers.to(device).unsqueeze(1)  # (R, 1)
        self.all_rows = len(self.rows) == len(cache.lengths)
        self.cells = start.unsqueeze(1) + torch.arange(n_cells, device=device)  # (R, T)
        self.end = n_cells + (self.length + offset if self.length else 0)  # cells that are read
        if self.length:  # the mask hides what is read beyond the tokens
            self.end = min(cache.size, -(-self.end // cache.rounding) * cache.rounding)
        if cache.static and self.length:
            self.end = cache.size
        self.slots = []  # of each call of attention in a forward pass at full depth
        for stage in cache.stages:
            for i in range(len(stage.slots)):
                self.slots += stage.of_loop(i)
        self.calls = 0

    def with_slots(self, slots: list[list[Tensor]]) -> "CacheView":
        """Return the same pass for calls of attention that use these slots."""
        other = copy.copy(self)
        other.slots, other.calls = slots, 0
        return other

    def of_rows(self, pick: Tensor) -> "CacheView":
        """Return the same pass for some of its rows, by number or as a mask (R,)."""
        other = copy.copy(self)
        other.rows, other.cells = self.rows[pick], self.cells[pick]
        other.all_rows = len(other.rows) == len(self.cache.lengths)
        return other

    def positions_and_mask(self, x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return positions (R, T) and mask (R, 1, T, S) of new tokens, each in its document."""
        cache, cells = self.cache, self.cells
        if cache.separator < 0 and not cache.window and not self.length:
            return cells, None  # causal
        cell = torch.arange(self.end, device=x.device)  # (S,)
        mask = cell <= cells.unsqueeze(-1)  # (R, T, S)
        if cache.window:
            mask = mask & (cell > cells.unsqueeze(-1) - cache.window)
        if cache.separator < 0:
            return cells, mask.unsqueeze(1)
        cache.ids[self.rows, cells] = idx
        is_end = (cache.ids[self.rows, cell] == cache.separator).unsqueeze(1)  # (R, 1, S)
        is_end = is_end & (cell < cells.unsqueeze(-1))
        start = ((cell + 1) * is_end).amax(-1)  # of each new token's document
        mask = mask & (cell >= start.unsqueeze(-1))
        return cells - start, mask.unsqueeze(1)

    def extend(self, *new: Tensor) -> list[Tensor]:
        """Store parts (R, heads, T, channels) of new tokens; return those of all cells."""
        stored = self.slots[self.calls]
        self.calls += 1
        for part, more in zip(stored, new):
            part[self.rows, :, self.cells] = more.transpose(1, 2).to(part.dtype)
        if self.all_rows:  # no copy
            return [part[:, :, : self.end] for part in stored]
        return [part[self.rows[:, 0], :, : self.end] for part in stored]


def check_slots(config: GPTConfig, n_loop, slots: str, n_slot: int) -> None:
    """Raise ValueError where a model cannot have these slots."""
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
    """Filters on the logits, applied in this order; 0 or None turns one off."""

    temperature: float = 1.0  # 0: greedy, all probability on the likeliest token
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the fewest that reach this probability (arXiv 1904.09751)
    min_p: float | None = None  # keep those above this share of the likeliest's (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divides positive logits of tokens that occurred (1909.05858)
    vocab_size: int | None = None  # ids from here on are padding and never drawn

    def probabilities(self, logits: Tensor, occurred: Tensor | None) -> Tensor:
        """Return probabilities (.., V) of logits (.., V). occurred: (.., V), tokens in the text."""
        logits, penalty = logits[..., : self.vocab_size].float(), self.repetition_penalty
        if penalty != 1:
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(occurred, penalized, logits)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
        logits = logits / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.size(-1))).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(-1)
        if self.top_p:
            ordered = p.sort(descending=True)
            in_nucleus = ordered.values.cumsum(-1) - ordered.values < self.top_p
            p = p * torch.zeros_like(in_nucleus).scatter(-1, ordered.indices, in_nucleus)
        if self.min_p:
            p = p * (p >= self.min_p * p.amax(-1, keepdim=True))
        return p / p.sum(-1, keepdim=True)

    def check(self) -> None:
        """Raise ValueError where a value is outside its range."""
        ranges = {
            "temperature": (0, torch.inf),
            "top_k": (1, torch.inf),
            "top_p": (1e-9, 1),
            "min_p": (0, 1),
            "repetition_penalty": (1e-9, torch.inf),
            "vocab_size": (1, torch.inf),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (least <= value <= most and value < torch.inf):
                raise ValueError(f"{name}={value}: must be from {least} to {most}")


def draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one token (R,) from probabilities (R, V): where their running sum passes a number."""
    total = p.double().cumsum(-1)
    u = 1 - torch.rand(len(p), 1, generator=generator, dtype=torch.double, device=p.device)
    return (total < u * total[:, -1:]).sum(-1)  # u in (0, 1]


def accept(p: Tensor, q: Tensor, drafts: Tensor, generator) -> tuple[Tensor, Tensor]:
    """Return how many drafts (R, m), drawn from q (R, m, V), are accepted, and the next token.

    The accepted drafts and the token after them are distributed as p (R, m + 1, V), the model's
    own probabilities, by rejection sampling (arXiv 2211.17192, appendix A.1). Both are (R,).
    """
    p_of_draft = p[:, :-1].gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    q_of_draft = q.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    u = torch.rand(drafts.shape, generator=generator, device=p.device)
    accepted = u * q_of_draft < p_of_draft
    count = accepted.cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    p_next = p[row, count]
    remainder = (p_next - F.pad(q, (0, 0, 0, 1))[row, count]).clamp(min=0)
    remainder = torch.where(remainder.sum(-1, keepdim=True) > 0, remainder, p_next)  # 0: rounding
    return count, draw(remainder, generator)


# -----------------------------------------------------------------------------
# passes


def one_loop(loop: Loop, s: Tensor, e: Tensor, i: Tensor, ctx: Context) -> Tensor:
    return loop.step(s, e, i, ctx)


@functools.cache
def compiled_loop(n_blocks: int) -> Callable:
    """Return one_loop compiled: a graph for all slots and loops, per shape of its input.

    On a GPU it is replayed as a CUDA graph. n_blocks: of the loops that it is called with; dynamo
    keeps graphs by code object, and fails where loops of different lengths share one.
    """
    code = one_loop.__code__.replace(co_name=f"loop_of_{n_blocks}")
    function = types.FunctionType(code, globals())
    return torch.compile(function, fullgraph=True, dynamic=False, mode="reduce-overhead")


class Decoder:
    """The passes of a model over a cache, split at the last looped group: there drafts begin."""

    def __init__(
        self,
        model: GPT,
        cache: Cache,
        n_loop: int | tuple | None = None,
        exit_rule: ExitRule | None = None,
        min_loops: int = 1,
        warm_start: bool = False,
        shapes: set | tuple = (),
    ):
        """exit_rule: from make_exit, obeyed from min_loops on. shapes: (R, T) that are compiled.

        warm_start: in the last group a token's first state is the last one of the token before it.
        """
        self.model, self.cache = model, cache
        self.rule, self.min_loops, self.shapes = exit_rule, min_loops, shapes
        before, stage, after = model.around_group(n_loop)
        self.stages = [*before, stage, *after]
        self.split = len(before)  # number of the last looped stage
        self.exits = exit_stages(exit_rule, self.stages)
        self.loop, self.n = stage.loop, stage.n
        self.n_used = sum(model.config.counts(n_loop))  # loops of a token that does not stop early
        rows, C, weight = len(cache.lengths), model.config.n_embd, model.lm_head.weight
        deepest = max(stage.n for stage in self.stages)
        # a tensor per loop index: torch.compile would compile an int into the graph
        self.index = torch.arange(deepest, device=weight.device).split(1)
        self.warm = weight.new_zeros(rows, 1, C) if warm_start else None
        averages = isinstance(exit_rule, GateExit) and model.config.exit_gate == "mean_state"
        self.state_sums = weight.new_zeros(self.n, rows, 1, C) if averages else None

    def enter(self, idx: Tensor, rows: Tensor, seen: Tensor | None = None, used=None):
        """Run tokens idx (R, T) of rows (R,) up to the last loop: return e, first state, Context.

        seen as in Cache.open, used as in run_stage.
        """
        x, ctx = self.model.embed(idx, self.cache.open(idx.size(1), rows, seen))
        x = self.run_stages(range(self.split), x, ctx, used)
        e, s = self.loop.begin(x, ctx, self.n)
        return e, s, ctx

    def leave(self, s: Tensor, ctx: Context) -> Tensor:
        """Return the last hidden states (R, T, C), which the head reads, of states s (R, T, C)."""
        x = self.run_stages(range(self.split + 1, len(self.stages)), self.loop.exit(s), ctx)
        return self.model.transformer.ln_f(x)

    def run_stages(self, numbers: range, x: Tensor, ctx: Context, used=None) -> Tensor:
        """Return x (R, T, C) after the stages of these numbers. used as in run_stage."""
        for number in numbers:
            loop, n, _ = self.stages[number]
            e, s = loop.begin(x, ctx, n)
            x = loop.exit(self.run_stage(number, s, e, ctx, used))
        return x

    def run_stage(self, number: int, s: Tensor, e: Tensor, ctx: Context, used) -> Tensor:
        """Return the state (R, T, C) after a stage. used: None, or loops (R,) if rows may exit.

        The loops that a row leaves out are subtracted from it.
        """
        n = self.stages[number].n
        if used is None or number not in self.exits:
            return self.run_loops(range(n), s, e, ctx, number)
        s, loops = self.loop_until_exit(number, s, e, ctx)
        used -= n - loops
        return s

    def run_loops(self, loops: range, s: Tensor, e: Tensor, ctx: Context, number=None) -> Tensor:
        """Return the state after these loops of a stage, by default of the last looped one."""
        number = self.split if number is None else number
        loop = self.stages[number].loop
        compiled = tuple(s.shape[:2]) in self.shapes
        step = compiled_loop(len(loop.blocks)) if compiled else one_loop
        for i in loops:
            slots = self.cache.stages[number].of_loop(i)
            step_ctx = ctx._replace(cache=ctx.cache.with_slots(slots))
            s = step(loop, s, e, self.index[i], step_ctx)
        return s

    def prefill(self, idx: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
        """Run the prompts idx (R, T), of lengths (R,), of rows (R,) at full depth.

        Returns the last hidden state (R, 1, C) of each.
        """
        e, s, ctx = self.enter(idx, rows)
        last = (lengths - 1 + self.cache.offset).to(s.device)
        is_token = torch.arange(s.size(1), device=s.device) <= last.unsqueeze(1)  # not padding
        for i in range(self.n):
            s = self.run_loops(range(i, i + 1), s, e, ctx)
            if self.state_sums is not None:
                self.state_sums[i, rows] = (s * is_token.unsqueeze(-1)).sum(1, keepdim=True)
        hidden = self.leave(s, ctx)
        self.cache.close(ctx.cache, lengths)
        row = torch.arange(len(s), device=s.device)
        if self.warm is not None:
            self.warm[rows] = s[row, last].unsqueeze(1).to(self.warm.dtype)
        return hidden[row, last].unsqueeze(1)

    def step(self, token: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run one more token (R, 1) of each row.

        Returns its last hidden state (R, 1, C) and the loops that it took in all groups, (R,).
        """
        used = torch.full((len(rows),), self.n_used)
        e, s, ctx = self.enter(token, rows, used=used)
        if self.warm is not None:
            s = self.warm[rows]
        s = self.run_stage(self.split, s, e, ctx, used)
        if self.warm is not None:
            self.warm[rows] = s.to(self.warm.dtype)
        hidden = self.leave(s, ctx)
        self.cache.close(ctx.cache, 1)
        return hidden, used

    def loop_until_exit(self, number: int, s: Tensor, e: Tensor, ctx: Context):
        """Return the state (R, 1, C) where the rule stops each row in a stage, and loops (R,)."""
        all_e, all_ctx = e, ctx
        looping = torch.arange(len(s), device=s.device)  # rows that have not stopped
        carry = self.rule.start(s)
        rows, states, loops = [], [], []  # of those that have
        for i in range(self.stages[number].n):
            s = self.run_loops(range(i, i + 1), s, e, ctx, number)
            stops, carry = self.asks_to_stop(number, i, carry, s, ctx)
            if not stops.any():
                continue
            rows.append(looping[stops])
            states.append(s[stops])
            loops.append(torch.full_like(rows[-1], i + 1))
            self.record_exit(number, i, states[-1], all_ctx.cache.of_rows(rows[-1]))
            looping = looping[~stops]
            if len(looping) == 0:
                break
            s, e, carry = s[~stops], all_e[looping], [part[~stops] for part in carry]
            ctx = all_ctx.rows(looping)._replace(cache=all_ctx.cache.of_rows(looping))
        order = torch.cat(rows).argsort()
        return torch.cat(states)[order], torch.cat(loops)[order].cpu()

    def asks_to_stop(self, number: int, i: int, carry: tuple, s: Tensor, ctx: Context):
        """Return which rows (R,) stop after loop i of a stage, and what the rule carries on."""
        if self.state_sums is not None:
            s = self.mean_states(i, s, ctx)
        if i + 1 == self.stages[number].n:
            return torch.ones(len(s), dtype=torch.bool, device=s.device), carry

        def logits() -> Tensor:
            return self.model.logits(self.leave(s, ctx))

        measure, carry = self.rule.measure(carry, s, logits)
        stops = self.rule.reached(measure)[:, 0]
        return stops if i + 1 >= self.min_loops else torch.zeros_like(stops), carry

    def mean_states(self, i: int, s: Tensor, ctx: Context) -> Tensor:
        """Return the mean state after loop i of each row's tokens so far; s (R, 1, C): of the last.

        Tokens that stopped earlier count by their last state.
        """
        rows = ctx.cache.rows[:, 0]
        self.state_sums[i, rows] += s
        return self.state_sums[i, rows] / (ctx.cache.cells + 1).unsqueeze(-1)

    def record_exit(self, number: int, i: int, s: Tensor, view: CacheView) -> None:
        """Let deeper loops of later tokens read what tokens that stop after loop i have there."""
        if self.state_sums is not None:
            self.state_sums[i + 1 :, view.rows[:, 0]] += s
        self.cache.stages[number].copy_to_deeper(i, view)

    def draft(self, token: Tensor, rows: Tensor, count: int, n_draft: int, guess: Callable):
        """Draft count tokens behind token (R, 1) with n_draft loops, then verify at full depth.

        Full depth continues from the drafts' states and cache. guess(hidden (R, 1, C), drafts so
        far) -> (tokens (R,), q (R, 1, V)). Returns the last hidden states at full depth (R, count +
        1, C), the drafts (R, count) and their probabilities (R, count, V).
        """
        seen, chunk, states, inputs, q = self.cache.lengths[rows], token, [], [], []
        for j in range(count + 1):
            e, s, ctx = self.enter(chunk[:, -1:], rows, seen + j)
            s = self.run_loops(range(n_draft), s, e, ctx)
            states.append(s)
            inputs.append(e)
            if j < count:
                new, p = guess(self.leave(s, ctx), chunk[:, 1:])
                chunk = torch.cat((chunk, new.unsqueeze(1)), 1)
                q.append(p)
        _, ctx = self.model.embed(chunk, self.cache.open(count + 1, rows, seen))
        s, e = torch.cat(states, 1), torch.cat(inputs, 1)
        s = self.run_loops(range(n_draft, self.n), s, e, ctx)
        return self.leave(s, ctx), chunk[:, 1:], torch.cat(q, 1)

    def draft_by_heads(self, token: Tensor, rows: Tensor, count: int, hidden: Tensor, guess):
        """Draft as draft() does, in one pass: the model's heads further ahead read hidden.

        hidden: (R, 1, C), which the token was drawn from.
        """
        chunk, q = token, []
        for head in self.model.ahead[:count]:
            new, p = guess(head(hidden), chunk[:, 1:])
            chunk = torch.cat((chunk, new.unsqueeze(1)), 1)
            q.append(p)
        e, s, ctx = self.enter(chunk, rows)
        s = self.run_loops(range(self.n), s, e, ctx)
        return self.leave(s, ctx), chunk[:, 1:], torch.cat(q, 1)

    def slide(self, rows: Tensor, tokens: Tensor, lengths: Tensor, step: int) -> None:
        """Move full windows on by step tokens; the rest is computed anew, at its new positions."""
        full = rows[self.cache.lengths[rows] == self.model.block_size]
        stays = self.model.block_size - step
        self.cache.lengths[full] = 0
        if len(full) and stays:
            place = lengths[full].unsqueeze(1) - 1 - stays + torch.arange(stays)
            self.prefill(tokens[full.unsqueeze(1), place], full, torch.full((len(full),), stays))


# -----------------------------------------------------------------------------
# generation


class Text:
    """The tokens of all rows so far, and how the next ones are drawn. Counts are on the CPU."""

    def __init__(self, idx, lengths, max_new_tokens, sampling, generator, watch, vocab_size):
        self.tokens = F.pad(idx, (0, max_new_tokens), value=-1)
        self.tokens[torch.arange(self.tokens.size(1)) >= lengths.unsqueeze(1)] = -1
        self.starts = lengths  # (B,)
        self.lengths = lengths.clone()
        self.ends = lengths + max_new_tokens
        self.used = torch.zeros(len(idx), max_new_tokens, dtype=torch.long)
        self.sampling, self.generator, self.watch = sampling, generator, watch
        self.drafted = self.accepted = 0
        self.occurred = None  # (B, V), where the repetition penalty asks for it
        if sampling.repetition_penalty != 1:
            known = torch.where(self.tokens < 0, self.tokens[:, :1], self.tokens)
            shape = (len(idx), vocab_size)
            self.occurred = torch.zeros(shape, dtype=torch.bool, device=idx.device)
            self.occurred.scatter_(1, known, True)

    def unfinished(self) -> Tensor:
        """Return the numbers of the rows that want more tokens."""
        return (self.lengths < self.ends).nonzero().squeeze(1)

    def newest(self, rows: Tensor) -> Tensor:
        """Return the last token (R, 1) of each row."""
        return self.tokens[rows, self.lengths[rows] - 1].unsqueeze(1)

    def probabilities(self, logits: Tensor, rows: Tensor, drafts: Tensor) -> Tensor:
        """Return (R, T, V) of logits (R, T, V), the last behind all drafts (R, m), and so on."""
        if self.occurred is None:
            return self.sampling.probabilities(logits, None)
        V, T = logits.size(-1), logits.size(1)
        in_drafts = F.one_hot(drafts, self.occurred.size(1)).cumsum(1).bool()
        occurred = self.occurred[rows].unsqueeze(1) | F.pad(in_drafts, (0, 0, 1, 0))
        occurred = occurred[:, -T:, :V][..., : self.sampling.vocab_size]
        return self.sampling.probabilities(logits, occurred)

    def append(self, rows: Tensor, new: Tensor, counts: Tensor, used: Tensor) -> None:
        """Append the first counts (R,) of tokens new (R, m), as far as they fit, to rows (R,).

        used: (R,), loops that each row's tokens took.
        """
        counts = torch.minimum(counts, self.ends[rows] - self.lengths[rows])
        if self.watch:
            counts = self.show(rows, new.tolist(), counts, used)
        fits = torch.arange(new.size(1)) < counts.unsqueeze(1)
        row, number = fits.nonzero(as_tuple=True)
        place = self.lengths[rows][row] + number
        self.tokens[rows[row], place] = new[row, number]
        self.used[rows[row], place - self.starts[rows[row]]] = used[row]
        self.lengths[rows] += counts
        if self.occurred is not None:
            self.occurred[rows[row], new[row, number]] = True

    def show(self, rows: Tensor, new: list, counts: Tensor, used: Tensor) -> Tensor:
        """Hand each token to watch(row, token, loops); True ends the row there. Return counts."""
        for number, row in enumerate(rows.tolist()):
            for j, token in enumerate(new[number][: counts[number]], 1):
                if self.watch(row, token, int(used[number])):
                    counts[number], self.ends[row] = j, self.lengths[row] + j
                    break
        return counts


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    n_loop: int | tuple | None = None,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    slots: str = "full",
    n_slot: int = 1,
    slide: int = 0,
    exit_rule: ExitRule | None = None,
    min_loops: int = 1,
    warm_start: bool = False,
    draft_tokens: int = 0,
    draft_loops: int = 0,
    static: bool = False,
    watch: Callable | None = None,
) -> tuple[Tensor, dict]:
    """Continue the prompts idx (B, T), int64, by max_new_tokens tokens each.

    Rows of a batch are continued as if each were alone.
    n_loop: loops of the model, an int, one per group, or None (the config's).
    lengths: (B,), of the prompts, where padding follows them.
    temperature to vocab_size: see Sampling. generator: a torch.Generator on the model's device.
    slots, n_slot: which loops share cells of the cache (SLOTS); tokens of a prompt see all loops.
    slide: tokens by which a full window of block_size moves on; what stays is computed anew.
        1: nanoGPT's cropping, slow; 0: a quarter of the window.
    exit_rule: from make_exit; ends the loops of each new token, from min_loops on: a StateExit in
        every looped group, the others in the last, all other groups running in full. Deeper loops
        of later tokens read the deepest keys and values that it has.
    warm_start: in the last group, a token's first state is the last token's last state.
    draft_tokens: tokens drafted in each round with draft_loops loops, 0: by the model's heads
        further ahead. Output is distributed as without; at temperature 0 it is the same.
    static: compile decoding, once for any number of loops.
    watch(row, token, loops): called with each new token; True ends the row.
    Returns tokens (B, T + max_new_tokens), -1 behind the end of a row, and stats: loops of each
    group, loops_used (B, max_new_tokens) of each new token in all groups together, lengths (B,),
    cache_bytes_per_token, drafted and accepted. ValueError for options that cannot be.
    """
    if lengths is None:
        lengths = torch.full((len(idx),), idx.size(1))
    lengths = torch.as_tensor(lengths).cpu()
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, vocab_size)
    sampling.check()
    check_slots(model.config, n_loop, slots, n_slot)
    check_prompt(model, idx, lengths, max_new_tokens, slide)
    check_exits(model, lengths, max_new_tokens, n_loop, exit_rule, min_loops, warm_start)
    check_drafts(model, n_loop, draft_tokens, draft_loops, exit_rule or warm_start, slots)
    size = None if static else idx.size(1) + max_new_tokens + draft_tokens
    dtype = autocast_dtype(idx.device.type)
    cache = Cache(model, len(idx), n_loop, slots, n_slot, size, dtype, static)
    shapes = {(len(idx), 1), (len(idx), draft_tokens + 1)} if static else ()
    decoder = Decoder(model, cache, n_loop, exit_rule, min_loops, warm_start, shapes)
    ids = model.config.vocab_size
    text = Text(idx, lengths, max_new_tokens, sampling, generator, watch, ids)
    rows = text.unfinished()
    if len(rows):
        hidden = decoder.prefill(idx.clamp(min=0), rows, lengths)
        p = text.probabilities(model.logits(hidden), rows, idx[:, :0])
        new = draw(p[:, 0], generator).unsqueeze(1)
        text.append(rows, new, torch.ones_like(rows), torch.full_like(rows, decoder.n_used))
    while len(rows := text.unfinished()):
        decoder.slide(rows, text.tokens, text.lengths, slide or max(1, model.block_size // 4))
        hidden[rows] = one_round(decoder, text, rows, hidden[rows], draft_tokens, draft_loops)
    return text.tokens, {
        "loops": model.config.counts(n_loop),
        "cache_bytes_per_token": cache.bytes_per_token(),
        "loops_used": text.used,
        "lengths": text.lengths,
        "drafted": text.drafted,
        "accepted": text.accepted,
    }


def one_round(
    decoder: Decoder,
    text: Text,
    rows: Tensor,
    hidden: Tensor,
    draft_tokens: int,
    draft_loops: int,
) -> Tensor:
    """Run each row's newest token, and drafts behind it, and append what follows.

    hidden (R, 1, C): the last hidden state that the newest token was drawn from. Returns the one
    that the next token was drawn from.
    """
    if decoder.shapes:
        torch.compiler.cudagraph_mark_step_begin()  # earlier results may be overwritten now
    model, cache, token = decoder.model, decoder.cache, text.newest(rows)
    room = min(
        model.block_size - int(cache.lengths[rows].max()),
        int((text.ends - text.lengths)[rows].max()),
    )
    count = min(draft_tokens, room - 1)
    if count == 0:
        hidden, used = decoder.step(token, rows)
        p = text.probabilities(model.logits(hidden), rows, token[:, :0])
        new = draw(p[:, 0], text.generator).unsqueeze(1)
        text.append(rows, new, torch.ones_like(rows), used)
        return hidden

    def guess(hidden: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        q = text.probabilities(model.logits(hidden), rows, drafts)
        return draw(q[:, 0], text.generator), q

    if draft_loops:
        hidden, drafts, q = decoder.draft(token, rows, count, draft_loops, guess)
    else:
        hidden, drafts, q = decoder.draft_by_heads(token, rows, count, hidden, guess)
    p = text.probabilities(model.logits(hidden), rows, drafts)
    accepted, following = accept(p, q, drafts, text.generator)
    row = torch.arange(len(rows), device=following.device)
    new = F.pad(drafts, (0, 1))
    new[row, accepted] = following
    n_new = accepted.cpu() + 1
    cache.lengths[rows] += n_new
    text.append(rows, new, n_new, torch.full((len(rows),), decoder.n_used))
    text.drafted += drafts.numel()
    text.accepted += int(accepted.sum())
    return hidden[row, accepted].unsqueeze(1)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype of linear layers' outputs under autocast, None where it is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def check_prompt(model: GPT, idx: Tensor, lengths: Tensor, max_new_tokens: int, slide: int) -> None:
    """Raise ValueError for a prompt or a window that cannot be."""
    T, most = idx.size(1), max(1, model.block_size - 1)
    if len(lengths) != len(idx) or T == 0 or not 1 <= lengths.min() <= lengths.max() <= T:
        fits = "lengths do not fit: one for each row, from 1 to its columns"
        raise ValueError(f"the prompt is empty, or {fits}")
    if lengths.max() > model.block_size:
        window = f"the window, block_size={model.block_size}"
        raise ValueError(f"a prompt of {lengths.max()} tokens is longer than {window}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if not 0 <= slide <= most:
        raise ValueError(f"slide={slide}: must be from 0 to {most}")


def check_exits(
    model: GPT, lengths: Tensor, max_new_tokens: int, n_loop, exit_rule, min_loops: int, warm_start
) -> None:
    """Raise ValueError for exits or warm starts that a model cannot make."""
    counts = model.config.counts(n_loop)
    if not counts and (exit_rule or warm_start):
        raise ValueError("exit_rule and warm_start need a model in which something is looped")
    every_group = exit_rule is not None and exit_rule.every_group
    exiting = counts if every_group else counts[-1:]
    if counts and not 1 <= min_loops <= max(exiting):
        raise ValueError(f"min_loops={min_loops}: must be from 1 to the {max(exiting)} loops")
    averages = isinstance(exit_rule, GateExit) and model.config.exit_gate == "mean_state"
    if averages and lengths.max() + max_new_tokens > model.block_size + 1:
        window = f"block_size={model.block_size}, beyond which its mean cannot be kept"
        raise ValueError(f"exit_gate=mean_state: prompt and new tokens must fit into {window}")


def check_drafts(
    model: GPT, n_loop, draft_tokens: int, draft_loops: int, exits: object, slots: str
) -> None:
    """Raise ValueError for drafts that a model cannot make or verify."""
    counts = model.config.counts(n_loop)
    if draft_loops and not counts:
        raise ValueError("draft_loops needs a model in which something is looped")
    if counts and not 0 <= draft_loops <= counts[-1]:
        raise ValueError(f"draft_loops={draft_loops}: must be from 0 to the {counts[-1]} loops")
    if draft_tokens < 0:
        raise ValueError(f"draft_tokens={draft_tokens}: must be at least 0")
    if draft_tokens and (exits or slots != "full"):
        refused = "not with exit_rule, warm_start or slots other than full"
        raise ValueError(f"draft_tokens: {refused}, which drafts cannot verify")
    if not draft_loops and draft_tokens > len(model.ahead):
        most = f"at most the {len(model.ahead)} heads further ahead, or draft_loops of at least 1"
        raise ValueError(f"draft_tokens={draft_tokens}: {most}")
