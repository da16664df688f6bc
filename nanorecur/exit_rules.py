"""
What a model would say after each loop; rules that stop looping then, for decode.generate(), and what they cost.

A rule is asked by done(carry, s, logits): which tokens (R, T) are done, by the state s (R, T, C) after a loop or by
logits(), the (R, T, V) that it would give; and what to carry to the next loop, a tuple of tensors (R, ..). start(s)
gives the first of these from the state before all loops.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


def around_the_loop(model, n_loop=None, group=-1):
    """Of a schedule: the stages before the loop of a group, that loop, its count, the stages after it."""
    schedule = model.schedule(n_loop)
    place = [number for number, (_, count) in enumerate(schedule) if count][group]
    return schedule[:place], schedule[place][0], *schedule[place][1], schedule[place + 1 :]


def pass_through(stages, x, where):
    """x (B, T, C) after some stages of a schedule."""
    for stage, count in stages:
        x = stage(x, where, *count)
    return x


def rows_of(where, pick):
    """Of a model.Where some rows of the batch: a slice, or their numbers."""
    each = [where.position, where.mask, *(where.turn or ())] if where.position.dim() > 1 else []
    position, mask, *turn = [part if part is None else part[pick] for part in each] or where[:2]
    return where._replace(
        position=position, mask=mask, turn=tuple(turn) or where.turn, idx=where.idx[pick]
    )


def after_each_loop(model, idx, n_loop=None, shift=1, group=-1):
    """Yields state and last hidden states (B, T, C) after each loop of a group, as if it were the last."""
    (x, where), T = model.embed(idx, shift=shift), idx.size(1)
    before, loop, n, after = around_the_loop(model, n_loop, group)
    for s in loop.states(pass_through(before, x, where), where, n):
        x = pass_through(after, loop.exit(s), where)
        yield s[:, -T:], model.transformer.ln_f(x[:, -T:])


def exit_distribution(model, states):
    """(B, T, n): how likely the gate stops after each of n loops, from the states after them (Ouro, section 3)."""
    go_on = torch.sigmoid(-torch.cat([model.exit_gate(s) for s in states], dim=-1))  # (B, T, n)
    reached = F.pad(go_on[..., :-1], (1, 0), value=1.0).cumprod(-1)
    return torch.cat((reached[..., :-1] * (1 - go_on[..., :-1]), reached[..., -1:]), dim=-1)


# -----------------------------------------------------------------------------
# rules


def state_change(before, s):
    """|s - before| / |s| of states (.., C): (..)."""
    return (s - before).norm(dim=-1) / s.norm(dim=-1)


def kl(p, q):
    """KL(p || q) in nats of log-probabilities (.., V): (..)."""
    return (p.exp() * (p - q)).sum(-1)


def entropy(p):
    """In nats of log-probabilities (.., V): (..)."""
    return -(p.exp() * p).sum(-1)


class StateExit(NamedTuple):
    """|s - before| / |s| < threshold (Huginn's latent-diff, arXiv 2502.05171, section 6)."""

    threshold: float

    def start(self, s):
        return (s,)

    def done(self, carry, s, logits):
        return state_change(carry[0], s) < self.threshold, (s,)


class KLExit(NamedTuple):
    """KL(before || now) of the next token < threshold, in nats; uniform at first."""

    threshold: float

    def start(self, s):
        return (s.new_zeros(*s.shape[:2], 1),)

    def done(self, carry, s, logits):
        now = logits().float().log_softmax(-1)
        before = carry[0].expand_as(now).log_softmax(-1)
        return kl(before, now) < self.threshold, (now,)


class EntropyExit(NamedTuple):
    """|H(before) - H(now)| of the next token < threshold, in nats; infinite at first."""

    threshold: float

    def start(self, s):
        return (s.new_full(s.shape[:2], torch.inf, dtype=torch.float),)

    def done(self, carry, s, logits):
        now = entropy(logits().float().log_softmax(-1))
        return (now - carry[0]).abs() < self.threshold, (now,)


class ArgmaxExit(NamedTuple):
    """The likeliest token is the same after threshold loops as after the one before them."""

    threshold: float

    def start(self, s):
        none = s.new_full(s.shape[:2], -1, dtype=torch.long)
        return none, torch.zeros_like(none)

    def done(self, carry, s, logits):
        now = logits().argmax(-1)
        count = (carry[1] + 1) * (now == carry[0])
        return count >= self.threshold, (now, count)


class GateExit(NamedTuple):
    """The model's gate would have stopped by now with a probability >= threshold (Ouro, arXiv 2510.25741)."""

    threshold: float
    gate: torch.nn.Module

    def start(self, s):
        return (s.new_ones(s.shape[:2], dtype=torch.float),)

    def done(self, carry, s, logits):
        going = carry[0] * torch.sigmoid(-self.gate(s).squeeze(-1).float())
        return 1 - going >= self.threshold, (going,)


EXITS = {
    "state": StateExit,
    "kl": KLExit,
    "entropy": EntropyExit,
    "argmax": ArgmaxExit,
    "gate": GateExit,
}


def make_exit(model, rule, threshold):
    """An exit rule for generate(), None at threshold 0, which is off; ValueError for what the model cannot do."""
    if rule not in EXITS:
        raise ValueError(f"exit_rule={rule!r}: must be one of {', '.join(EXITS)}")
    most = 1.0 if rule == "gate" else torch.inf
    if not (0 <= threshold <= most and threshold < torch.inf):
        raise ValueError(
            f"automatic_loop_exit_threshold={threshold}: must be from 0 to {most} for exit_rule={rule}"
        )
    if not model.config.groups:
        raise ValueError("automatic_loop_exit: nothing is looped in this model")
    if rule == "gate" and model.config.exit_gate == "none":
        raise ValueError("exit_rule=gate: needs a model with a gate, exit_gate=state or mean_state")
    return (
        EXITS[rule](threshold, *([model.exit_gate] if rule == "gate" else []))
        if threshold
        else None
    )


# -----------------------------------------------------------------------------
# evaluation with exit


class StandIn:
    """In place of a cache in a full forward: tokens that are done keep the keys and values of their last loop."""

    def __init__(self):
        self.kept, self.turn, self.done = {}, 0, None

    def extend(self, *new):
        if self.turn in self.kept:
            done = self.done[:, None, :, None]
            new = [torch.where(done, old, part) for old, part in zip(self.kept[self.turn], new)]
        self.kept[self.turn], self.turn = new, self.turn + 1
        return new


@torch.no_grad()
def exit_evaluation(model, idx, targets, exit_rule, n_loop=None, min_loops=1):
    """(loss, loops): mean cross-entropy of targets (B, T), -1 ignored, and mean loops of the last group, with exit.

    Each token stops by the rule (make_exit; None: never) as it would in decoding one by one, where deeper loops of
    later tokens read its deepest keys and values: the same numbers, in n_loop steps for all tokens. With rules that
    read logits and blocks behind the loop it is close to that, not the same: such a block then sees the tokens before
    as they are after as many loops, in decoding as they are in the end.
    """
    (x, where), T = model.embed(idx), idx.size(1)
    before, loop, n, after = around_the_loop(model, n_loop)

    def readout(s):
        return model.transformer.ln_f(pass_through(after, loop.exit(s), where))

    e, kept = loop.entry(pass_through(before, x, where)), StandIn()
    s = loop.init_state(e, where)
    carry, used = exit_rule and exit_rule.start(s), torch.full(e.shape[:2], n, device=e.device)
    for i in range(n):
        kept.turn, kept.done = 0, used <= i
        s = torch.where(kept.done.unsqueeze(-1), s, loop.step(s, e, i, where._replace(cache=kept)))
        if exit_rule:
            done, carry = exit_rule.done(carry, s, lambda s=s: model.logits(readout(s)))
            used = torch.where(done & (used > i + 1) & (i + 1 >= min_loops), i + 1, used)
    real, logits = targets >= 0, model.logits(readout(s)[:, -T:])
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
    return loss.item(), used[:, -T:][real].float().mean().item()
