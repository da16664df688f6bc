"""
Rules that stop looping early, in decoding and evaluation, and predictions after each loop.

A rule is asked after every loop. start(s) returns what it carries from the state before the first
loop; measure(carry, s, read_out) returns a number per token, and what to carry on, from the state
s after the loop or from read_out(), the logits at this loop; reached(measure) says which tokens
stop. A rule of every_group is asked in every looped group. The others are asked in the last alone,
where the gate is trained and no other loop stands before the head; other groups run in full.
Shapes: s (B, T, C), logits (B, T, V), measure (B, T), carry a tuple of (B, T, ..).
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Context, Stage


def after_each_loop(
    model: GPT,
    idx: Tensor,
    n_loop=None,
    shift: int | Tensor = 1,
    group: int = -1,
    only: Collection[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield state and last hidden states (B, T, C) after each loop, as if it were the last.

    idx: (B, T). group: which looped group, by default the last. The stages behind it, other groups
    as often as configured, see these states for all tokens. only: yield after these loops, counted
    from 1; None: after all.
    """
    before, (loop, n, _), after = model.around_group(n_loop, group)
    x, ctx = model.embed(idx, shift=shift)
    T = idx.size(1)
    for stage in before:
        x = stage(x, ctx)
    for i, s in enumerate(loop.states(x, ctx, n), 1):
        if only is not None and i not in only:
            continue
        x = loop.exit(s)
        for stage in after:
            x = stage(x, ctx)
        yield s[:, -T:], model.transformer.ln_f(x[:, -T:])


def hidden_at_depths(
    model: GPT, idx: Tensor, depths: list[tuple], shift: int | Tensor = 1
) -> Iterator[tuple[int, Tensor]]:
    """Yield (i, last hidden states (B, T, C)) of idx (B, T) at each depths[i], in any order.

    depths: loop counts, one int per group. With one looped group a single pass to the largest
    serves all: a state does not depend on how many loops follow. Else each depth has its own pass.
    """
    if len(model.config.groups) != 1:
        for i, depth in enumerate(depths):
            yield i, model.hidden(idx, depth, shift=shift)
        return
    counts = [n for (n,) in depths]
    wanted = sorted(set(counts))
    states = after_each_loop(model, idx, wanted[-1], shift, only=wanted)
    for n, (_, hidden) in zip(wanted, states):
        for i, count in enumerate(counts):
            if count == n:
                yield i, hidden


def exit_distribution(model: GPT, states: list[Tensor]) -> Tensor:
    """Return the probability (B, T, n) that the gate stops after each of n loops (Ouro, section 3).

    states: those after each loop, n of (B, T, C). What is left after the last loop stops there.
    """
    go_on = torch.sigmoid(-torch.cat([model.exit_gate(s) for s in states], dim=-1))  # (B, T, n)
    reached = F.pad(go_on[..., :-1], (1, 0), value=1.0).cumprod(-1)
    stops = reached[..., :-1] * (1 - go_on[..., :-1])
    return torch.cat((stops, reached[..., -1:]), dim=-1)


# -----------------------------------------------------------------------------
# rules


def state_change(before: Tensor, s: Tensor) -> Tensor:
    """Return |s - before| / |s| of states (.., C), shape (..)."""
    return (s - before).norm(dim=-1) / s.norm(dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats of log-probabilities (.., V), shape (..)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy in nats of log-probabilities (.., V), shape (..)."""
    return -(log_p.exp() * log_p).sum(-1)


class StateExit(NamedTuple):
    """Stop when |s - before| / |s| < threshold (Huginn's latent-diff, arXiv 2502.05171, 6)."""

    threshold: float
    every_group = True

    def start(self, s: Tensor) -> tuple:
        return (s,)

    def measure(self, carry: tuple, s: Tensor, read_out: Callable) -> tuple[Tensor, tuple]:
        return state_change(carry[0], s), (s,)

    def reached(self, measure: Tensor) -> Tensor:
        return measure < self.threshold


class KLExit(NamedTuple):
    """Stop when KL(before || now) of the next token < threshold, in nats; uniform at first."""

    threshold: float
    every_group = False

    def start(self, s: Tensor) -> tuple:
        return (s.new_zeros(*s.shape[:2], 1),)

    def measure(self, carry: tuple, s: Tensor, read_out: Callable) -> tuple[Tensor, tuple]:
        now = read_out().float().log_softmax(-1)
        before = carry[0].expand_as(now).log_softmax(-1)
        return kl(before, now), (now,)

    def reached(self, measure: Tensor) -> Tensor:
        return measure < self.threshold


class EntropyExit(NamedTuple):
    """Stop when the next token's entropy moves by < threshold, in nats; infinite at first."""

    threshold: float
    every_group = False

    def start(self, s: Tensor) -> tuple:
        return (s.new_full(s.shape[:2], torch.inf, dtype=torch.float),)

    def measure(self, carry: tuple, s: Tensor, read_out: Callable) -> tuple[Tensor, tuple]:
        now = entropy(read_out().float().log_softmax(-1))
        return (now - carry[0]).abs(), (now,)

    def reached(self, measure: Tensor) -> Tensor:
        return measure < self.threshold


class ArgmaxExit(NamedTuple):
    """Stop when the likeliest token has stayed the same for threshold loops."""

    threshold: float
    every_group = False

    def start(self, s: Tensor) -> tuple:
        no_token = s.new_full(s.shape[:2], -1, dtype=torch.long)
        return no_token, torch.zeros_like(no_token)

    def measure(self, carry: tuple, s: Tensor, read_out: Callable) -> tuple[Tensor, tuple]:
        before, count = carry
        now = read_out().argmax(-1)
        count = (count + 1) * (now == before)
        return count, (now, count)

    def reached(self, measure: Tensor) -> Tensor:
        return measure >= self.threshold


class GateExit(NamedTuple):
    """Stop when the model's gate has stopped by now with probability >= threshold (Ouro)."""

    threshold: float
    gate: torch.nn.Module
    every_group = False

    def start(self, s: Tensor) -> tuple:
        return (s.new_ones(s.shape[:2], dtype=torch.float),)

    def measure(self, carry: tuple, s: Tensor, read_out: Callable) -> tuple[Tensor, tuple]:
        going = carry[0] * torch.sigmoid(-self.gate(s).squeeze(-1).float())
        return 1 - going, (going,)

    def reached(self, measure: Tensor) -> Tensor:
        return measure >= self.threshold


EXITS = {
    "state": StateExit,
    "kl": KLExit,
    "entropy": EntropyExit,
    "argmax": ArgmaxExit,
    "gate": GateExit,
}
ExitRule = StateExit | KLExit | EntropyExit | ArgmaxExit | GateExit


def make_exit(model: GPT, rule: str, threshold: float) -> ExitRule | None:
    """Return an exit rule, None at threshold 0, which is off. ValueError where it cannot be.

    In a model of several groups state ends the loops of each, other rules those of the last alone.
    """
    if rule not in EXITS:
        raise ValueError(f"exit_rule={rule!r}: must be one of {', '.join(EXITS)}")
    most = 1.0 if rule == "gate" else torch.inf
    if not (0 <= threshold <= most and threshold < torch.inf):
        allowed = f"from 0 to {most} for exit_rule={rule}"
        raise ValueError(f"automatic_loop_exit_threshold={threshold}: must be {allowed}")
    if not model.config.groups:
        raise ValueError("automatic_loop_exit: nothing is looped in this model")
    if rule == "gate" and model.config.exit_gate == "none":
        raise ValueError("exit_rule=gate: needs a model with a gate, exit_gate=state or mean_state")
    if threshold == 0:
        return None
    return GateExit(threshold, model.exit_gate) if rule == "gate" else EXITS[rule](threshold)


def exit_stages(exit_rule: ExitRule | None, stages: list[Stage]) -> list[int]:
    """Return the numbers of the stages in which a rule ends loops."""
    if exit_rule is None:
        return []
    looped = [number for number, stage in enumerate(stages) if stage.looped]
    return looped if exit_rule.every_group else looped[-1:]


# -----------------------------------------------------------------------------
# evaluation with exit


class FrozenCache:
    """A cache for exits in one forward pass over all tokens: those that stopped keep their keys.

    Each call of attention in a loop overwrites the keys and values of the loop before it, except
    those of tokens that have stopped: other tokens go on reading what these had last.
    """

    def __init__(self):
        self.stored = []  # a list of parts (B, heads, T, channels) for each call in a loop

    def begin_loop(self, stopped: Tensor) -> None:
        """Begin a loop; stopped (B, T) is True for tokens that have stopped before it."""
        self.stopped = stopped[:, None, :, None]
        self.call = 0

    def extend(self, *new: Tensor) -> list[Tensor]:
        if self.call == len(self.stored):
            self.stored.append(new)
        else:
            pairs = zip(self.stored[self.call], new)
            self.stored[self.call] = [torch.where(self.stopped, old, part) for old, part in pairs]
        self.call += 1
        return self.stored[self.call - 1]


def read_out(model: GPT, stages: list[Stage], ctx: Context, s: Tensor) -> Tensor:
    """Return the logits (B, T, V) of states s (B, T, C) in the first stage; the others follow."""
    x = stages[0].loop.exit(s)
    for stage in stages[1:]:
        x = stage(x, ctx)
    return model.logits(model.transformer.ln_f(x))


def loop_until_exit(
    stage: Stage,
    x: Tensor,
    ctx: Context,
    exit_rule: ExitRule | None,
    min_loops: int,
    logits_here: Callable,
    together: Tensor | None = None,
    all_loops: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the states (B, T, C) at which tokens x (B, T, C) stop, and their loops (B, T).

    logits_here(s): logits (B, T, V) of states s (B, T, C). together, all_loops: see exit_logits.
    """
    e, s = stage.loop.begin(x, ctx, stage.n)
    cache = FrozenCache()
    carry = exit_rule.start(s) if exit_rule else ()
    used = torch.full(e.shape[:2], stage.n, device=e.device)
    for i in range(stage.n):
        stopped = used <= i
        if not all_loops and stopped.all():
            break
        cache.begin_loop(stopped)
        new = stage.loop.step(s, e, i, ctx._replace(cache=cache))
        s = torch.where(stopped.unsqueeze(-1), s, new)
        if exit_rule:
            measure, carry = exit_rule.measure(carry, s, partial(logits_here, s))
            reached = exit_rule.reached(measure)
            if together is not None:
                reached = (reached | ~together).all(dim=1, keepdim=True)
            stops = reached & (used > i + 1) & (i + 1 >= min_loops)
            used = torch.where(stops, i + 1, used)
    return s, used


@torch.no_grad()
def exit_logits(
    model: GPT,
    idx: Tensor,
    exit_rule: ExitRule | None,
    n_loop=None,
    min_loops: int = 1,
    group: int | None = None,
    together: Tensor | None = None,
    all_loops: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return logits (B, T, V) of idx (B, T), and the loops that each token made, of all groups.

    group: the number of the one whose loops are returned; the rule (None: never) is asked there
    too, if it is another than those of exit_stages. together: (B, T), True at some tokens; a row
    then stops as one, after the loop in which the rule would stop all of these. all_loops: compute
    the loops in which no token goes on, too; False waits for the device in each loop, and processes
    that divide the weights would wait for each other forever.
    Tokens stop from min_loops on, as they do in decoding one by one, where deeper loops of later
    tokens read a stopped token's deepest keys and values: the same numbers, in n loops over all
    tokens at once. Rules that read logits are approximate here if blocks follow the loop: these
    blocks see the states of earlier tokens after the same number of loops, while in decoding they
    see their final states.
    """
    stages = model.schedule(n_loop)
    looped = [number for number, stage in enumerate(stages) if stage.looped]
    counted, asked = looped, exit_stages(exit_rule, stages)
    if group is not None:
        counted = [looped[group]]
        asked = [*asked, looped[group]]
    x, ctx = model.embed(idx)
    if together is not None:  # predict_ahead puts a token before the others
        together = F.pad(together, (x.size(1) - idx.size(1), 0))
    used = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    # The cache changes with each call: compiled, each call would be a graph of its own. As a
    # decorator this would load the compiler at once, and scripts would start half as fast.
    with torch.compiler.set_stance("force_eager"):
        for number, stage in enumerate(stages):
            if not stage.looped:
                x = stage(x, ctx)
                continue
            rule = exit_rule if number in asked else None
            logits_here = partial(read_out, model, stages[number:], ctx)
            s, loops = loop_until_exit(
                stage, x, ctx, rule, min_loops, logits_here, together, all_loops
            )
            x = stage.loop.exit(s)
            if number in counted:
                used = used + loops
    T = idx.size(1)
    return model.logits(model.transformer.ln_f(x)[:, -T:]), used[:, -T:]


def exit_evaluation(
    model: GPT,
    idx: Tensor,
    targets: Tensor,
    exit_rule: ExitRule | None,
    n_loop=None,
    min_loops: int = 1,
) -> tuple[float, float]:
    """Return (loss, loops) with exit: mean nats of targets (B, T), -1 ignored, and mean loops.

    The loops of a token are those of all groups together.
    """
    logits, used = exit_logits(model, idx, exit_rule, n_loop, min_loops)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
    return loss.item(), used[targets >= 0].float().mean().item()
