"""
What training minimises, from the model's public pieces. With CE_t the next-token loss read out after loop t of n:

    next         CE_n, and where the model has several heads the losses of those further ahead (arXiv 2404.19737)
    deep         sum_t w_t CE_t: deep supervision
    distill      CE_n + distill_weight * mean_{t<n} KL(p_n || p_t): the last loop teaches those before it
    exit         sum_t p_t CE_t - entropy_weight * H(p), p from the exit gate (Ouro, arXiv 2510.25741, stage I)
    exit_gate    the gate alone learns to go on while loops gain (Ouro, stage II)
    confidence   CE_n, and the gate learns whether loop t already predicts what the last will (CALM, arXiv 2207.07061)

Losses after several loops or of several heads are computed in chunks of tokens, and their logits anew in the backward
pass, so that they never exist together. Shapes: N = B * T tokens, n loops.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from model import shift_labels
from nanorecur.exit_rules import after_each_loop, around_the_loop, exit_distribution, kl, rows_of


class Objective(nn.Module):
    """A model and what is minimised, one module for DDP. ValueError where the model cannot be trained so."""

    def __init__(
        self,
        model,
        name="next",
        chunk=0,
        weighting="uniform",
        entropy_weight=0.1,
        distill_weight=0.5,
        ahead_weight=0.3,
    ):
        super().__init__()
        check(model.config, name)
        self.model, self.chunk = model, chunk
        self.score, self.exit_passes = OBJECTIVE[name]
        self.weighting, self.entropy_weight = weighting, entropy_weight
        self.distill_weight, self.ahead_weight = distill_weight, ahead_weight

    def forward(self, idx, targets, n_loop=None, shift=1):
        """The sum over targets (B, T) of what is minimised, and what to log: {name: tensor (sum, count)}."""
        return self.score(self, idx, shift_labels(targets, shift), n_loop, shift)

    def flops_per_token(self, n_loop=None):
        """As the model's, with the heads and exits that are read out besides; what is computed anew is not counted."""
        model, count = self.model, self.model.forward_flops
        total = model.flops_per_token(n_loop) + 3 * (
            count(model.ahead) + len(model.ahead) * count(model.lm_head)
        )
        if self.exit_passes:
            _, loop, n, after = around_the_loop(model, n_loop)
            stages = [loop.exit, *(stage for stage, _ in after), model.lm_head]
            total += self.exit_passes * (n - 1) * sum(map(count, stages))
        return total

    def in_chunks(self, function, *tensors):
        """function of tokens (N, ..) -> (N,), a chunk at a time, each computed anew in the backward pass."""
        tensors = [tensor.flatten(0, 1) for tensor in tensors]
        parts = zip(*(tensor.split(self.chunk or len(tensor)) for tensor in tensors))
        return torch.cat([recomputed(function, *part, use_reentrant=False) for part in parts])

    def loss_sum(self, x, targets):
        """Of hidden states (B, T, C) and targets (B, T). torch's chunked loss has its gradients ready before the
        backward pass and computes nothing twice; it has no soft cap, and torch before 2.13 has none at all."""
        if not self.chunk:
            return self.cross_entropy(x, targets).sum()
        if self.model.config.logit_softcap or "linear_cross_entropy" not in dir(F):
            return self.in_chunks(self.cross_entropy, x, targets).sum()
        kind, W = x.device.type, self.model.lm_head.weight
        if torch.is_autocast_enabled(kind):  # which does not know this loss
            x, W = (part.to(torch.get_autocast_dtype(kind)) for part in (x, W))
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk, chunking_method=None)
        return F.linear_cross_entropy(
            x.flatten(0, 1), W, targets.flatten(), reduction="sum", ignore_index=-1, options=options
        )

    def cross_entropy(self, x, targets):
        """Of hidden states (.., C) and targets (..): (N,), 0 where there is no target."""
        logits = self.model.logits(x).flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")

    def agree(self, x, last):
        """Whether hidden states (N, C) have the same likeliest token as the last ones: (N,)."""
        return (self.model.logits(x).argmax(-1) == self.model.logits(last).argmax(-1)).float()

    def divergence(self, x, last):
        """KL(p of the last hidden states || p of x), both (N, C): (N,)."""
        p, q = (self.model.logits(part).float().log_softmax(-1) for part in (last, x))
        return kl(p.detach(), q)

    def exits(self, idx, n_loop, shift):
        """States and last hidden states after each loop: two lists of n tensors (B, T, C)."""
        return zip(*after_each_loop(self.model, idx, n_loop, shift))

    def gates(self, states):
        """(N, n) logits of stopping after each loop."""
        return torch.cat([self.model.exit_gate(s) for s in states], dim=-1).float().flatten(0, 1)

    def exit_losses(self, xs, targets):
        """(N, n) next-token losses."""
        return torch.stack([self.in_chunks(self.cross_entropy, x, targets) for x in xs], dim=-1)


def next_token(self, idx, targets, n_loop, shift):
    each_row = type(n_loop) is tuple and any(isinstance(n, torch.Tensor) for n in n_loop)
    x = (
        hidden_by_row(self.model, idx, n_loop, shift)
        if each_row
        else self.model.hidden(idx, n_loop, shift=shift)
    )
    heads = self.model.ahead
    total = self.loss_sum(x, targets)
    log = {"loss": torch.stack((total.detach(), (targets >= 0).sum()))}
    for number, head in enumerate(heads, 2):
        further = shift_labels(targets, number)
        loss = self.in_chunks(self.cross_entropy, head(x), further).sum()
        total = total + self.ahead_weight / len(heads) * loss
        log[f"head{number}"] = torch.stack((loss.detach(), (further >= 0).sum()))
    return total, log


def deep(self, idx, targets, n_loop, shift):
    _, xs = self.exits(idx, n_loop, shift)
    losses = self.exit_losses(xs, targets)
    weights = WEIGHTING[self.weighting](torch.arange(1, len(xs) + 1, device=losses.device))
    return (losses @ weights.to(losses) / weights.sum()).sum(), each_exit(losses, targets)


def distill(self, idx, targets, n_loop, shift):
    _, xs = self.exits(idx, n_loop, shift)
    losses, counted = self.in_chunks(self.cross_entropy, xs[-1], targets), targets.flatten() >= 0
    apart = [self.in_chunks(self.divergence, x, xs[-1].detach()) for x in xs[:-1]] or [
        torch.zeros_like(losses)
    ]
    apart = torch.stack(apart).mean(0) * counted
    total = losses.sum() + self.distill_weight * apart.sum()
    return total, {"loss": summed(losses, targets), "divergence": summed(apart, targets)}


def exit_loss(self, idx, targets, n_loop, shift):
    states, xs = self.exits(idx, n_loop, shift)
    losses, counted = self.exit_losses(xs, targets), targets.flatten() >= 0
    p = exit_distribution(self.model, states).float().flatten(0, 1)  # (N, n)
    entropy = torch.special.entr(p).sum(-1) * counted
    expected = (p * losses).sum(-1)
    loops = (p @ torch.arange(1.0, p.size(-1) + 1, device=p.device)) * counted
    log = {
        "expected": summed(expected, targets),
        "entropy": summed(entropy, targets),
        "loops": summed(loops, targets),
    }
    return (expected - self.entropy_weight * entropy).sum(), {**each_exit(losses, targets), **log}


def gate_only(self, idx, targets, n_loop, shift):
    with torch.no_grad():
        states, xs = self.exits(idx, n_loop, shift)
        losses = self.exit_losses(xs, targets)
    gained = (losses[:, :-1] - losses[:, 1:]).clamp(min=0)
    go_on = torch.sigmoid(50 * (gained - 0.005))  # (N, n - 1): the paper's slope and least gain
    wrong = F.binary_cross_entropy_with_logits(
        -self.gates(states)[:, 1:], go_on, reduction="none"
    ).sum(-1)
    wrong = wrong / len(states) * (targets.flatten() >= 0)
    return wrong.sum(), {**each_exit(losses, targets), "gate": summed(wrong, targets)}


def confidence(self, idx, targets, n_loop, shift):
    states, xs = self.exits(idx, n_loop, shift)
    losses, counted = self.in_chunks(self.cross_entropy, xs[-1], targets), targets.flatten() >= 0
    with torch.no_grad():
        same = torch.stack([self.in_chunks(self.agree, x, xs[-1]) for x in xs], dim=-1)[
            :, :-1
        ]  # (N, n - 1)
    stop = self.gates([s.detach() for s in states])[:, :-1]
    wrong = (
        F.binary_cross_entropy_with_logits(stop, same, reduction="none").sum(-1)
        / max(1, len(xs) - 1)
        * counted
    )
    return losses.sum() + wrong.sum(), {
        "loss": summed(losses, targets),
        "gate": summed(wrong, targets),
    }


# -----------------------------------------------------------------------------
# loops, shifts, activations and parameters of a training step

ANEW = ("none", "cheap", "block", "loop")
aten = torch.ops.aten
DEAR = [  # to compute: matrix products and the kernels of attention
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def compute_anew(model, what):
    """Which activations of a GPT the backward pass computes anew, to save their memory: those of every block, of every
    loop, or the cheap ones, which are all but results of matrix products and attention."""
    torch.set_autocast_cache_enabled(
        what != "cheap"
    )  # both passes of what is kept need the same casts
    keep = (
        {"context_fn": partial(create_selective_checkpoint_contexts, DEAR)}
        if what == "cheap"
        else {}
    )
    for block in model.transformer.h if what in ("cheap", "block") else ():
        block.forward = partial(recomputed, block.forward, use_reentrant=False, **keep)
    for loop in model.transformer.loops if what == "loop" else ():
        loop.step = partial(recomputed, loop.step, use_reentrant=False)


def hidden_by_row(model, idx, counts, shift=1):
    """The last hidden states (B, T, C) of tokens idx (B, T), at counts (B,) loops of each row for each group."""
    (x, where), counts = model.embed(idx, shift=shift), iter(counts)
    for stage, looped in model.schedule():
        x = stage.exit(by_row(stage, x, where, next(counts))) if looped else stage(x, where)
    return model.transformer.ln_f(x[:, -idx.size(1) :])


def by_row(loop, e, where, counts):
    """The state (B, T, C) after each row's own number of loops, counts (B,) on the CPU.

    Rows with more loops begin earlier, so that all end together and the last bptt_k loops of each carry a gradient;
    a loop computes only those that have begun, so that the batch costs the mean of the counts.
    """
    counts, order = counts.sort(descending=True)
    e, where = loop.entry(e)[order], rows_of(where, order)
    s = loop.noise(loop.init_state(e, where), counts[:, None, None].to(e.device))
    for left in range(int(counts[0]), 0, -1):
        begun = slice(int((counts >= left).sum()))
        i = (counts[begun, None] - left).to(e.device)  # each row's own loop
        with torch.set_grad_enabled(torch.is_grad_enabled() and left <= loop.bptt_k):
            moved = loop.step(s[begun], e[begun], i, rows_of(where, begun))
        s = torch.cat((moved, s[begun.stop :]))
    return s[order.argsort()]


def sample_shifts(config, generator, count):
    """How far ahead each of count sequences predicts, int64 (count,) in [1, max_shift]: geometric, from generator."""
    drawn = torch.empty(count).geometric_(
        min(config.label_shift_prob, 1 - 1e-9), generator=generator
    )
    return drawn.clamp(max=config.max_shift).long()


def parameter_groups(model):
    """Parameters by kind: matrices of the Linear layers, embeddings (and the head, tied or not), vectors."""
    embeddings = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is model.lm_head
    }
    groups = {"matrices": [], "embeddings": [], "vectors": []}
    for p in model.parameters():
        groups[
            "embeddings"
            if id(p) in embeddings
            else "matrices"
            if len(p) > 1 < p.dim()
            else "vectors"
        ].append(p)
    return groups


# -----------------------------------------------------------------------------
# tables


def summed(losses, targets):
    """(sum, count) of what has a value for each target, 0 where there is none."""
    return torch.stack((losses.detach().sum(), (targets >= 0).sum()))


def each_exit(losses, targets):
    """That after the last loop first, then those before it."""
    log = {
        f"exit{number}": summed(loss, targets)
        for number, loss in enumerate(losses.unbind(-1)[:-1], 1)
    }
    return {"loss": summed(losses[:, -1], targets), **log}


WEIGHTING = {
    "uniform": torch.ones_like,
    "linear": lambda t: t,
}  # of the losses after loops t = 1 .. n
OBJECTIVE = {  # and how often each exit but the last is passed: forward alone, or backward too, which costs twice that
    "next": (next_token, 0),
    "deep": (deep, 3),
    "distill": (distill, 3),
    "exit": (exit_loss, 3),
    "exit_gate": (gate_only, 1),
    "confidence": (confidence, 1),
}
GATED = ("exit", "exit_gate", "confidence")  # those that train the exit gate


def check(config, name):
    if name not in OBJECTIVE:
        raise ValueError(f"objective={name!r}: must be one of {', '.join(OBJECTIVE)}")
    if name != "next" and not config.groups:
        raise ValueError(f"objective={name!r}: must be next where nothing is looped")
    if name in GATED and config.exit_gate == "none":
        raise ValueError(f"objective={name!r}: needs a gate, --exit_gate=state or mean_state")
    if name != "next" and config.n_ahead > 1:
        raise ValueError(f"n_ahead={config.n_ahead}: must be 1 with objective={name!r}")
