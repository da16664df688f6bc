"""
Training objectives, from the model's public pieces. CE_t is the next-token loss after loop t of n.

    next         CE_n, and with several heads the losses of those further ahead (arXiv 2404.19737)
    deep         sum_t w_t CE_t: deep supervision
    distill      CE_n + distill_weight * mean_{t<n} KL(p_n || p_t): the last loop teaches the others
    exit         sum_t p_t CE_t - entropy_weight * H(p), p from the exit gate (Ouro 2510.25741, I)
    exit_gate    the gate alone learns to go on while loops gain (Ouro, stage II)
    confidence   CE_n, and the gate learns whether loop t predicts what the last will (2207.07061)

Losses after several loops, or of several heads, are computed in chunks of tokens, and their logits
again in the backward pass, so that they never exist together. Shapes: N = B * T tokens, n loops.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recomputed

from model import GPT, Context, GPTConfig, Loop, shift_labels
from nanorecur.exit_rules import after_each_loop, exit_distribution, kl


class Objective(nn.Module):
    """A model and what is minimised: one module, for DDP. ValueError where it cannot be trained."""

    def __init__(
        self,
        model: GPT,
        name: str = "next",
        chunk: int = 0,
        weighting: str = "uniform",
        entropy_weight: float = 0.1,
        distill_weight: float = 0.5,
        ahead_weight: float = 0.3,
    ):
        """name: a key of OBJECTIVES. chunk: tokens whose logits exist at once, 0: all of them.

        weighting: of deep's losses after loops t = 1..n: uniform, or linear in t. ahead_weight: of
        the losses of all heads further ahead together.
        """
        super().__init__()
        check_objective(model.config, name)
        self.model, self.name, self.chunk = model, name, chunk
        self.weighting, self.entropy_weight = weighting, entropy_weight
        self.distill_weight, self.ahead_weight = distill_weight, ahead_weight

    def forward(
        self, idx: Tensor, targets: Tensor, n_loop=None, shift: int | Tensor = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (sum over targets of what is minimised, {name: tensor (sum, count)} to log).

        idx, targets, n_loop, shift: as in GPT.forward; n_loop may have tensors (B,) in it, loops of
        each row.
        """
        targets = shift_labels(targets, shift)
        return OBJECTIVES[self.name](self, idx, targets, n_loop, shift)

    def flops_per_token(self, n_loop=None) -> int:
        """Return the FLOPs of a step per token, with heads and further read-outs.

        Not counted: recomputation, the gate, the token that predict_ahead puts before a window.
        """
        model = self.model
        flops = model.forward_flops
        heads = flops(model.ahead) + len(model.ahead) * flops(model.lm_head)
        total = model.flops_per_token(n_loop) + 3 * heads
        if self.name == "exit_gate":  # the model only runs forward
            total = flops(model.lm_head)
            for loop, n, _ in model.schedule(n_loop):
                one_loop = sum(map(flops, (loop.inject, *loop.blocks)))
                total += n * one_loop + flops(loop.exit)
        passes = EXIT_PASSES[self.name]
        if passes:
            _, (loop, n, _), after = model.around_group(n_loop)
            read_out = flops(loop.exit) + flops(model.lm_head)
            for other, times, _ in after:
                one_loop = sum(map(flops, (other.inject, *other.blocks)))
                read_out += times * one_loop + flops(other.exit)
            total += passes * (n - 1) * read_out
        return total

    # -------------------------------------------------------------------------
    # losses of hidden states

    def in_chunks(self, function: Callable, *tensors: Tensor) -> Tensor:
        """Return function of tokens (N, ..), shape (N,), computed chunk by chunk.

        Each chunk is computed again in the backward pass.
        """
        tensors = [tensor.flatten(0, 1) for tensor in tensors]
        chunks = zip(*(tensor.split(self.chunk or len(tensor)) for tensor in tensors))
        return torch.cat([recomputed(function, *chunk, use_reentrant=False) for chunk in chunks])

    def loss_sum(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy of hidden states x (B, T, C) and targets (B, T)."""
        if not self.chunk:
            return self.cross_entropy(x, targets).sum()
        kind, W = x.device.type, self.model.lm_head.weight
        if torch.is_autocast_enabled(kind):  # autocast does not know this loss
            dtype = torch.get_autocast_dtype(kind)
            x, W = x.to(dtype), W.to(dtype)
        cap = self.model.config.logit_softcap
        rows, targets = x.flatten(0, 1), targets.flatten()
        with_gradients = torch.is_grad_enabled()
        return ChunkedCrossEntropy.apply(rows, W, targets, cap, self.chunk, with_gradients)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return losses (N,) of hidden states (.., C) and targets (..), 0 where there is none."""
        logits = self.model.logits(x).flatten(0, -2).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")

    def agreement(self, x: Tensor, last: Tensor) -> Tensor:
        """Return 1.0 where hidden states (N, C) have the likeliest token of the last ones, (N,)."""
        return (self.model.logits(x).argmax(-1) == self.model.logits(last).argmax(-1)).float()

    def divergence(self, x: Tensor, last: Tensor) -> Tensor:
        """Return KL(p of the last hidden states || p of x), both (N, C), shape (N,)."""
        p = self.model.logits(last).float().log_softmax(-1).detach()
        return kl(p, self.model.logits(x).float().log_softmax(-1))

    # -------------------------------------------------------------------------
    # after every loop

    def exits(self, idx: Tensor, n_loop, shift) -> tuple[list[Tensor], list[Tensor]]:
        """Return states and last hidden states after each loop: two lists of n (B, T, C)."""
        states, hiddens = [], []
        for s, x in after_each_loop(self.model, idx, n_loop, shift):
            states.append(s)
            hiddens.append(x)
        return states, hiddens

    def exit_losses(self, hiddens: list[Tensor], targets: Tensor) -> Tensor:
        """Return the next-token losses (N, n) after each loop."""
        losses = [self.in_chunks(self.cross_entropy, x, targets) for x in hiddens]
        return torch.stack(losses, dim=-1)

    def gate_logits(self, states: list[Tensor]) -> Tensor:
        """Return the gate's logits (N, n) of stopping after each loop."""
        return torch.cat([self.model.exit_gate(s) for s in states], dim=-1).float().flatten(0, 1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss of hidden states, of which only a chunk has logits at any time.

    Products are in the dtype of x and W, losses and sums in float32. Gradients are made in the
    forward pass, while a chunk's logits exist, so that nothing is computed twice (as in Liger,
    arXiv 2410.10989, 3.2); the backward pass scales them, and can run once.
    """

    @staticmethod
    def forward(ctx, x, W, targets, softcap: float, chunk: int, with_gradients: bool) -> Tensor:
        """Return the sum over targets (N,), -1 ignored, of x (N, C) and the head W (V, C)."""
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_W = torch.zeros_like(W, dtype=torch.float32) if with_gradients else None
        for begin in range(0, len(x), chunk):
            rows = slice(begin, begin + chunk)
            logits = (x[rows] @ W.T).float()
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            y = targets[rows]
            total += F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")
            if not with_gradients:
                continue
            counted = (y >= 0).unsqueeze(1)
            grad = logits.softmax(-1) * counted
            grad.scatter_add_(1, y.clamp(min=0).unsqueeze(1), -counted.to(grad.dtype))
            if softcap:
                grad *= 1 - (logits / softcap).square()
            grad = grad.to(x.dtype)
            grad_x[rows] = grad @ W
            grad_W += grad.T @ x[rows]
        ctx.gradients, ctx.head_dtype = (grad_x, grad_W), W.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_of_sum: Tensor) -> tuple:
        (grad_x, grad_W), ctx.gradients = ctx.gradients, None
        grad_x = grad_x.mul_(grad_of_sum)
        grad_W = grad_W.mul_(grad_of_sum).to(ctx.head_dtype)
        return grad_x, grad_W, None, None, None, None


# -----------------------------------------------------------------------------
# the objectives: (objective, idx, shifted targets, n_loop, shift) -> what forward returns


def next_token(objective: Objective, idx, targets, n_loop, shift):
    model = objective.model
    if by_row(n_loop):
        x = hidden_by_row(model, idx, n_loop, shift)
    else:
        x = model.hidden(idx, n_loop, shift=shift)
    total = objective.loss_sum(x, targets)
    log = {"loss": sum_of(total, targets)}
    for number, head in enumerate(model.ahead, 2):
        further = shift_labels(targets, number)
        loss = objective.in_chunks(objective.cross_entropy, head(x), further).sum()
        total = total + objective.ahead_weight / len(model.ahead) * loss
        log[f"head{number}"] = sum_of(loss, further)
    return total, log


def deep(objective: Objective, idx, targets, n_loop, shift):
    _, hiddens = objective.exits(idx, n_loop, shift)
    losses = objective.exit_losses(hiddens, targets)
    weights = torch.arange(1, len(hiddens) + 1, device=losses.device)
    if objective.weighting == "uniform":
        weights = torch.ones_like(weights)
    total = (losses @ weights.to(losses) / weights.sum()).sum()
    return total, log_of_exits(losses, targets)


def distill(objective: Objective, idx, targets, n_loop, shift):
    _, (*others, last) = objective.exits(idx, n_loop, shift)
    losses = objective.in_chunks(objective.cross_entropy, last, targets)
    teacher = last.detach()
    divergences = [objective.in_chunks(objective.divergence, x, teacher) for x in others]
    if not others:
        divergences = [torch.zeros_like(losses)]
    divergence = torch.stack(divergences).mean(0) * (targets.flatten() >= 0)
    total = losses.sum() + objective.distill_weight * divergence.sum()
    return total, {"loss": sum_of(losses, targets), "divergence": sum_of(divergence, targets)}


def exit_loss(objective: Objective, idx, targets, n_loop, shift):
    states, hiddens = objective.exits(idx, n_loop, shift)
    losses, counted = objective.exit_losses(hiddens, targets), targets.flatten() >= 0
    p = exit_distribution(objective.model, states).float().flatten(0, 1)  # (N, n)
    entropy = torch.special.entr(p).sum(-1) * counted
    expected = (p * losses).sum(-1)
    loops = (p @ torch.arange(1.0, p.size(-1) + 1, device=p.device)) * counted
    log = {
        **log_of_exits(losses, targets),
        "expected": sum_of(expected, targets),
        "entropy": sum_of(entropy, targets),
        "expected_loops": sum_of(loops, targets),
    }
    return (expected - objective.entropy_weight * entropy).sum(), log


def gate_only(objective: Objective, idx, targets, n_loop, shift):
    with torch.no_grad():
        states, hiddens = objective.exits(idx, n_loop, shift)
        losses = objective.exit_losses(hiddens, targets)
    gained = (losses[:, :-1] - losses[:, 1:]).clamp(min=0)
    go_on = torch.sigmoid(50 * (gained - 0.005))  # (N, n - 1): the paper's slope and least gain
    logits = -objective.gate_logits(states)[:, 1:]
    gate_loss = F.binary_cross_entropy_with_logits(logits, go_on, reduction="none").sum(-1)
    gate_loss = gate_loss / len(states) * (targets.flatten() >= 0)
    return gate_loss.sum(), {**log_of_exits(losses, targets), "gate": sum_of(gate_loss, targets)}


def confidence(objective: Objective, idx, targets, n_loop, shift):
    states, hiddens = objective.exits(idx, n_loop, shift)
    last = hiddens[-1]
    losses = objective.in_chunks(objective.cross_entropy, last, targets)
    with torch.no_grad():
        agreement = [objective.in_chunks(objective.agreement, x, last) for x in hiddens]
        agreement = torch.stack(agreement, dim=-1)[:, :-1]  # (N, n - 1)
    logits = objective.gate_logits([s.detach() for s in states])[:, :-1]
    gate_loss = F.binary_cross_entropy_with_logits(logits, agreement, reduction="none").sum(-1)
    gate_loss = gate_loss / max(1, len(hiddens) - 1) * (targets.flatten() >= 0)
    log = {"loss": sum_of(losses, targets), "gate": sum_of(gate_loss, targets)}
    return losses.sum() + gate_loss.sum(), log


def sum_of(losses: Tensor, targets: Tensor) -> Tensor:
    """Return (sum, count), float32, of losses (N,), or their sum, and targets, -1 for none."""
    total, count = losses.detach().float().sum(), (targets >= 0).sum().float()
    return torch.stack((total, count))


def log_of_exits(losses: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return (sum, count) of losses (N, n): "loss" after the last loop, "exit1" and so on."""
    *others, last = losses.unbind(-1)
    log = {"loss": sum_of(last, targets)}
    for number, loss in enumerate(others, 1):
        log[f"exit{number}"] = sum_of(loss, targets)
    return log


OBJECTIVES = {
    "next": next_token,
    "deep": deep,
    "distill": distill,
    "exit": exit_loss,
    "exit_gate": gate_only,
    "confidence": confidence,
}
# forward passes that each read-out but the last costs: 1 forward alone, 3 with backward
EXIT_PASSES = {"next": 0, "deep": 3, "distill": 3, "exit": 3, "exit_gate": 1, "confidence": 1}
GATED = ("exit", "exit_gate", "confidence")  # objectives that train the exit gate


def check_objective(config: GPTConfig, name: str) -> None:
    """Raise ValueError where a model cannot be trained with an objective."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r}: must be one of {', '.join(OBJECTIVES)}")
    if name != "next" and not config.groups:
        raise ValueError(f"objective={name!r}: must be next where nothing is looped")
    if name in GATED and config.exit_gate == "none":
        raise ValueError(f"objective={name!r}: needs a gate, --exit_gate=state or mean_state")
    if name != "next" and config.n_ahead > 1:
        raise ValueError(f"n_ahead={config.n_ahead}: must be 1 with objective={name!r}")


def select_trained(model: GPT, objective: str) -> None:
    """Let gradients reach what an objective trains: the exit gate, all else, or both."""
    for name, p in model.named_parameters():
        if name.startswith("exit_gate."):
            p.requires_grad_(objective in GATED)
        else:
            p.requires_grad_(objective != "exit_gate")


# -----------------------------------------------------------------------------
# loops and shifts of each row


def by_row(n_loop) -> bool:
    """Return whether loop counts hold tensors (B,), a count for each row."""
    return type(n_loop) is tuple and any(isinstance(n, Tensor) for n in n_loop)


def hidden_by_row(model: GPT, idx: Tensor, counts: tuple, shift: int | Tensor = 1) -> Tensor:
    """Return the last hidden states (B, T, C) of idx (B, T), where rows loop differently often.

    counts: a tensor (B,) for each group.
    """
    x, ctx = model.embed(idx, shift=shift)
    counts = iter(counts)
    for stage in model.schedule():
        if stage.looped:
            x = stage.loop.exit(loop_by_row(stage.loop, x, ctx, next(counts)))
        else:
            x = stage(x, ctx)
    return model.transformer.ln_f(x[:, -idx.size(1) :])


def loop_by_row(loop: Loop, x: Tensor, ctx: Context, counts: Tensor) -> Tensor:
    """Return the state (B, T, C) after each row's own number of loops, counts (B,) on the CPU.

    Rows with more loops begin earlier, so that all end together and the last bptt_k loops of each
    carry a gradient. A loop computes only the rows that have begun, so that the batch costs the
    mean of the counts.
    """
    counts, order = counts.cpu().sort(descending=True)  # DDP moves them to its GPU
    ctx = ctx.rows(order)
    e, s = loop.begin(x[order], ctx, counts[:, None, None].to(x.device))
    for left in range(int(counts[0]), 0, -1):
        n_begun = int((counts >= left).sum())
        begun = slice(n_begun)
        i = (counts[begun, None] - left).to(x.device)  # each row's own loop
        with torch.set_grad_enabled(torch.is_grad_enabled() and left <= loop.bptt_k):
            moved = loop.step(s[begun], e[begun], i, ctx.rows(begun))
        s = torch.cat((moved, s[n_begun:]))
    return s[order.argsort()]


def sample_shifts(config: GPTConfig, generator: torch.Generator, count: int) -> Tensor:
    """Draw how far ahead each of count sequences predicts: int64 (count,) in [1, max_shift]."""
    p = min(config.label_shift_prob, 1 - 1e-9)
    shifts = torch.empty(count).geometric_(p, generator=generator)
    return shifts.clamp(max=config.max_shift).long()
