"""
Measurements of a model for analyze.py, as dicts of arrays, which plots.py draws:

    data = {"out-quickstart": depth_sweep(model, x, y, [1, 2, 4], 1.0)}
    draw_sweep(data).savefig("sweep.png")

Shapes: B batch, T time (tokens), C channels, H heads, V vocabulary, n loops, P passes, where a pass
is one application of one block: a block that is looped n times makes n passes.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig, sample_loops, spectral_clip
from nanorecur.dataset import Split
from nanorecur.evaluation import score_batch, token_correlation
from nanorecur.exit_rules import EXITS, ExitRule, after_each_loop, exit_logits, make_exit

Arrays = dict[str, np.ndarray]

LOGITS_AT_ONCE = 2**23  # bound of rows * T * V in one forward pass

# -----------------------------------------------------------------------------
# training


def training_curves(entries: list[dict]) -> Arrays:
    """Return the curves of training and of validation at the run's own depth, those with points.

    entries: of log.jsonl. Raises KeyError, TypeError or StopIteration for those that are not.
    """
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval" in entry]
    own = [next(row for row in entry["eval"] if row["split"] == "val") for entry in evaluations]
    curves = {
        "iter": [entry["iter"] for entry in steps],
        "eval iter": [entry["iter"] for entry in evaluations],
    }
    for name in ("loss", "lr", "loops", "tokens_per_second"):
        curves[name] = [entry[name] for entry in steps]
    for name in ("loss", "bits_per_byte"):
        curves[f"val {name}"] = [row[name] for row in own if name in row]
    if not any(curves["loops"]):  # nothing is looped
        del curves["loops"]
    return {name: np.array(values, dtype=float) for name, values in curves.items() if values}


def level_curves(entries: list[dict]) -> dict[str, np.ndarray]:
    """Return the accuracy of each level of a task at each number of loops, as last evaluated.

    entries: of log.jsonl. accuracy: (levels, loops), NaN where it was not measured; own: the loops
    of each level; beyond: which levels (levels,) were not in training. {} where none was logged.
    """
    logged = [entry["levels"] for entry in entries if entry.get("levels")]
    if not logged:
        return {}
    last = logged[-1]
    levels = sorted({row["level"] for row in last})
    loops = sorted({row["loops"] for row in last})
    accuracy = np.full((len(levels), len(loops)), np.nan)
    own, beyond = np.zeros(len(levels), dtype=int), np.zeros(len(levels), dtype=bool)
    for row in last:
        i = levels.index(row["level"])
        accuracy[i, loops.index(row["loops"])] = row["accuracy"]
        beyond[i] = row["split"] == "hard"
        if row["own"]:
            own[i] = row["loops"]
    return {
        "levels": np.array(levels),
        "loops": np.array(loops),
        "accuracy": accuracy,
        "own": own,
        "beyond": beyond,
    }


# -----------------------------------------------------------------------------
# loss against loops


def evaluated_windows(split: Split, settings: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, n_scored) of the windows that train.py evaluates with these settings.

    settings: eval_iters, batch_size and eval_stride, as in a run's config. n_scored: how many last
    targets of each window count.
    """
    if settings["eval_stride"]:
        return split.sliding(settings["eval_stride"])
    return spread_windows(split, settings["eval_iters"] * settings["batch_size"])


def spread_windows(split: Split, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, n_scored) of evenly spaced windows of a split, at most so many."""
    starts = split.spread(min(most, split.n_windows))
    return starts, np.full(len(starts), split.block_size)


def batches(model: GPT, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows x, y (N, T) a few rows at a time, so that their logits fit into memory."""
    rows = max(1, LOGITS_AT_ONCE // (x.size(1) * model.config.vocab_size))
    return zip(x.split(rows), y.split(rows))


@torch.no_grad()
def score(model: GPT, x: Tensor, y: Tensor, loops: list[int | None]) -> np.ndarray:
    """Return loss (nats per token) and accuracy of windows x, y (N, T) at each loop count: (.., 2).

    loops: counts as GPT.forward takes n_loop. The model must be in eval mode.
    """
    depths = [model.config.counts(n) for n in loops]
    sums = torch.zeros(len(loops), 3, dtype=torch.float64)  # nats, right guesses, tokens
    for inputs, targets in batches(model, x, y):
        sums += score_batch(model, inputs, targets, depths)[0].cpu()
    return (sums[:, :2] / sums[:, 2:]).numpy()


def depth_sweep(
    model: GPT, x: Tensor, y: Tensor, loops: list[int], tokens_per_byte: float
) -> Arrays:
    """Return loss, bits per byte and accuracy of windows x, y (N, T) at each of the loop counts.

    configured_loss and so on: the same at the config's own loops. trained: see trained_range.
    Where nothing is looped, loops is empty and only the configured ones are measured.
    """
    data = {
        "loops": np.array(loops, dtype=int),
        "trained": trained_range(model.config),
        "configured": np.array(model.config.counts(), dtype=int),
    }
    loss, accuracy = score(model, x, y, [None, *loops]).T
    bits_per_byte = loss / math.log(2) * tokens_per_byte
    measured = {"loss": loss, "bits_per_byte": bits_per_byte, "accuracy": accuracy}
    for name, values in measured.items():
        data[f"configured_{name}"], data[name] = values[0], values[1:]
    return data


def trained_range(config: GPTConfig) -> np.ndarray:
    """Return between which loop counts nine in ten draws of training lie: (groups, 2)."""
    generator = torch.Generator().manual_seed(0)
    draws = np.array([sample_loops(config, generator) for _ in range(1000)])
    return np.quantile(draws, (0.05, 0.95), axis=0).astype(int).T


def loops_to_try(most: int, count: int = 16) -> list[int]:
    """Return at most 1.5 count loop counts from 1 to most, denser where they are few."""
    steps = np.geomspace(1, most, count).round()
    return sorted({*range(1, min(most, count // 2) + 1), *steps.astype(int).tolist()})


# -----------------------------------------------------------------------------
# states over loops


def counts_with(model: GPT, group: int, n: int) -> tuple[int, ...]:
    """Return the loops of all groups: n of one group, as many as configured of the others."""
    counts = list(model.config.counts())
    counts[group] = n
    return tuple(counts)


@torch.no_grad()
def readouts(model: GPT, idx: Tensor, group: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the state (B, T, C) after each of n loops of a group, and the logits (B, T, V) there.

    All tokens stop there at once: the stages behind the group see these states.
    """
    for state, x in after_each_loop(model, idx, counts_with(model, group, n), group=group):
        yield state, model.logits(x)


class TextStates(NamedTuple):
    """A text after each of n loops of a group: its states and the likeliest next tokens."""

    states: Tensor  # (n, T, C)
    likeliest: np.ndarray  # (n, T, ranks), token ids
    probabilities: np.ndarray  # (n, T, ranks)


def text_states(model: GPT, idx: Tensor, group: int, n: int, ranks: int = 5) -> TextStates:
    """Return the states and the likeliest tokens of one text idx (1, T) after each loop."""
    states, likeliest, probabilities = [], [], []
    for state, logits in readouts(model, idx, group, n):
        top = logits[0].float().softmax(-1).topk(min(ranks, logits.size(-1)))
        states.append(state[0].float())
        likeliest.append(top.indices)
        probabilities.append(top.values)
    likeliest, probabilities = torch.stack(likeliest), torch.stack(probabilities)
    return TextStates(torch.stack(states), likeliest.cpu().numpy(), probabilities.cpu().numpy())


def pca(points: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return points (.., C) in their two directions of largest variance, (.., 2), and its shares.

    shares (2,): of the variance, along each of the two directions.
    """
    centred = points.flatten(0, -2).double().cpu()
    centred = centred - centred.mean(0)
    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)
    share = lengths.square() / lengths.square().sum().clamp_min(1e-30)
    return (centred @ directions[:2].T).unflatten(0, points.shape[:-1]).numpy(), share[:2].numpy()


def trajectories(states: Tensor, chosen: list[int]) -> Arrays:
    """Return states (n, T, C) of the chosen tokens in two dimensions: points (n, tokens, 2)."""
    points, share = pca(states[:, chosen])
    return {"points": points, "share": share, "tokens": np.array(chosen)}


def state_measures(states: Tensor) -> Arrays:
    """Return how states (n, T, C) behave over the loops.

    change by each loop but the first, distance to the last state, both as shares of the norm, and
    norm: see band. correlation (n,): mean cosine between different tokens.
    """
    norm = states.norm(dim=-1)  # (n, T)
    change = states.diff(dim=0).norm(dim=-1) / norm[1:]
    distance = (states[:-1] - states[-1]).norm(dim=-1) / norm[-1]
    return {
        "change": band(change),
        "distance": band(distance),
        "norm": band(norm),
        "correlation": token_correlation(states).cpu().numpy(),
    }


def band(values: Tensor) -> np.ndarray:
    """Return mean, 10 % and 90 % quantile over the tokens of values (n, T), as (3, n)."""
    values = values.double().cpu().numpy()
    return np.stack((values.mean(1), *np.quantile(values, (0.1, 0.9), axis=1)))


@torch.no_grad()
def residual_stream(model: GPT, idx: Tensor, chosen: list[int]) -> Arrays:
    """Return chosen tokens of a text idx (1, T) as embedded and after each pass, in two dimensions.

    points: (1 + P, tokens, 2).
    """
    stream = [model.embed(idx)[0]]

    def record(block: nn.Module, inputs: tuple, output: Tensor) -> None:
        stream.append(output)

    hooks = [block.register_forward_hook(record) for block in model.transformer.h]
    model(idx)
    for hook in hooks:
        hook.remove()
    stream = torch.cat(stream)[:, -idx.size(1) :]  # (1 + P, T, C), without predict_ahead's token
    points, share = pca(stream[:, chosen].float())
    passes = np.array(pass_names(model.config))
    return {"points": points, "share": share, "tokens": np.array(chosen), "passes": passes}


def pass_names(config: GPTConfig) -> list[str]:
    """Return a name for each pass of a forward pass: block, or where looped block/loop, from 1."""
    counts, names = iter(config.counts()), []
    for blocks, looped in config.layout:
        if not looped:
            names += [str(block) for block in blocks]
            continue
        for loop in range(1, next(counts) + 1):
            names += [f"{block}/{loop}" for block in blocks]
    return names


# -----------------------------------------------------------------------------
# early exit

THRESHOLDS = {  # of each rule: from 0, which is never, to the one that stops soonest
    "state": [0.0, *np.geomspace(1e-3, 1, 13).tolist()],
    "kl": [0.0, *np.geomspace(1e-5, 1, 16).tolist()],
    "entropy": [0.0, *np.geomspace(1e-4, 1, 13).tolist()],
    "argmax": [0.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
    "gate": [0.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
}


def exit_loops(model: GPT, idx: Tensor, rule: ExitRule | None, group: int, n: int) -> np.ndarray:
    """Return the loops (T,) after which decoding would stop each token of a text idx (1, T)."""
    _, loops = exit_logits(model, idx, rule, counts_with(model, group, n), group=group)
    return loops[0].cpu().numpy()


def rules_of(model: GPT) -> list[str]:
    """Return the names of the exit rules that a model can have."""
    return [name for name in EXITS if name != "gate" or model.config.exit_gate != "none"]


@torch.no_grad()
def first_state(model: GPT, idx: Tensor, group: int, n: int) -> Tensor:
    """Return the state (B, T, C) before the first of n loops of a group."""
    before, (loop, n, _), _ = model.around_group(counts_with(model, group, n), group)
    x, ctx = model.embed(idx)
    for stage in before:
        x = stage(x, ctx)
    _, s = loop.begin(x, ctx, n)
    return s[:, -idx.size(1) :]


def exit_measures(model: GPT, x: Tensor, y: Tensor, group: int, n: int) -> Arrays:
    """Return what each rule measures after each of n loops of windows x, y (N, T): (n, tokens).

    loss: nats of each token, read out there. One full forward pass: what a rule measures after a
    loop is computed as if no token had stopped before. Tokens with target -1 are left out.
    """
    parts = [batch_measures(model, *batch, group, n) for batch in batches(model, x, y)]
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


@torch.no_grad()
def batch_measures(model: GPT, x: Tensor, y: Tensor, group: int, n: int) -> Arrays:
    """Return exit_measures of one batch of windows."""
    rules = {name: make_exit(model, name, THRESHOLDS[name][-1]) for name in rules_of(model)}
    first = first_state(model, x, group, n)
    carries = {name: rule.start(first) for name, rule in rules.items()}
    counted = y >= 0
    measured = {name: [] for name in ("loss", *rules)}
    for state, logits in readouts(model, x, group, n):
        losses = F.cross_entropy(logits[counted].float(), y[counted], reduction="none")
        measured["loss"].append(losses)
        for name, rule in rules.items():
            values, carries[name] = rule.measure(carries[name], state, logits.float)
            measured[name].append(values[counted])
    return {name: torch.stack(rows).cpu().numpy() for name, rows in measured.items()}


def loops_until_exit(rule: ExitRule | None, values: np.ndarray) -> np.ndarray:
    """Return the loops (tokens,) at which a rule stops tokens of which it measured values.

    values: (n, tokens). rule None: never.
    """
    n, n_tokens = values.shape
    if rule is None:
        return np.full(n_tokens, n)
    stops = rule.reached(values)
    stops[-1] = True
    return stops.argmax(0) + 1


def exit_curves(model: GPT, measured: Arrays) -> Arrays:
    """Return, by rule and threshold, mean loops, loss, and share of tokens by loops.

    measured: from exit_measures. fixed loss (n,): with the same loops for all tokens.
    """
    losses = measured["loss"]  # (n, tokens)
    n, n_tokens = losses.shape
    curves = {"fixed loss": losses.mean(1)}
    for name in rules_of(model):
        rules = [make_exit(model, name, threshold) for threshold in THRESHOLDS[name]]
        loops = [loops_until_exit(rule, measured[name]) for rule in rules]
        exit_losses = [losses[used - 1, np.arange(n_tokens)].mean() for used in loops]
        shares = [np.bincount(used, minlength=n + 1)[1:] / n_tokens for used in loops]
        curves[f"{name} threshold"] = np.array(THRESHOLDS[name])
        curves[f"{name} loops"] = np.mean(loops, axis=1)
        curves[f"{name} loss"] = np.array(exit_losses)
        curves[f"{name} share"] = np.array(shares)
    return curves


# -----------------------------------------------------------------------------
# attention


class AttentionRecorder(TorchFunctionMode):
    """Records summary(weights) of every attention inside, in order; weights: (B, H, T, S)."""

    def __init__(self, summary: Callable[[Tensor], object]):
        super().__init__()
        self.summary, self.recorded = summary, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.recorded.append(self.summary(attention_weights(*args, **kwargs)))
        return func(*args, **kwargs)


def attention_weights(
    q, k, v, mask=None, dropout=0.0, causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """Return softmax(q k^T) (B, H, T, S); takes what scaled_dot_product_attention takes."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def attention_summary(weights: Tensor) -> dict[str, Tensor]:
    """Return how attention weights (B, H, T, T) are spread, for each head.

    mean distance in tokens, entropy in bits, weight on the first token from those behind it: (H,).
    by distance (H, bins): share of the weight at distance 0, 1, 2 to 3, 4 to 7, ...
    """
    T = weights.size(-1)
    position = torch.arange(T, device=weights.device)
    distance = (position[:, None] - position).clamp_min(0)  # (T, T)
    shares = []
    for i in range(1 + (T - 1).bit_length()):
        in_bin = (distance >= 2**i // 2) & (distance < 2**i)
        shares.append((weights * in_bin).sum(-1).mean((0, 2)))
    return {
        "mean distance": (weights * distance).sum(-1).mean((0, 2)),
        "entropy": -(weights * weights.clamp_min(1e-30).log2()).sum(-1).mean((0, 2)),
        "on the first token": weights[:, :, 1:, 0].mean((0, 2)),
        "by distance": torch.stack(shares, dim=-1),
    }


def induction_score(weights: Tensor) -> Tensor:
    """Return how much each head attends from a repeated token to what followed it before: (H,).

    weights: (B, H, 2 L, 2 L), of texts of L tokens twice in a row.
    """
    length = weights.size(-1) // 2
    return weights.diagonal(1 - length, -2, -1)[..., -length:].mean((0, 2))


@torch.no_grad()
def attention(model: GPT, x: Tensor, known_ids: int, length: int) -> Arrays:
    """Return attention_summary over windows x (N, T) and the induction score, by pass: (P, H).

    The score is measured on eight random texts of so many of the known ids, each twice in a row.
    """
    with AttentionRecorder(attention_summary) as summaries:
        model(x)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(known_ids, (8, length), generator=generator).to(x.device)
    with AttentionRecorder(induction_score) as scores:
        model(texts.repeat(1, 2))
    data = {}
    for name in summaries.recorded[0]:
        data[name] = torch.stack([summary[name] for summary in summaries.recorded]).cpu().numpy()
    data["induction"] = torch.stack(scores.recorded).cpu().numpy()
    data["passes"] = np.array(pass_names(model.config))
    return data


@torch.no_grad()
def attention_maps(model: GPT, idx: Tensor) -> list[np.ndarray]:
    """Return the attention weights (H, T, T) of each pass over one text idx (1, T)."""
    with AttentionRecorder(lambda weights: weights[0].cpu().numpy()) as maps:
        model(idx)
    return maps.recorded


# -----------------------------------------------------------------------------
# spectra


def looped_matrices(model: GPT) -> dict[tuple[str, int], Tensor]:
    """Return {(kind, block): matrix} of the Linear layers inside the loops.

    kind: the layer's name in its block, or inject, whose number is its group's instead.
    """
    parts = {}  # name of a module to its number
    for g, group in enumerate(model.config.groups):
        parts |= {f"transformer.h.{block}": block for block in group}
        parts[f"transformer.loops.{g}.inject"] = g
    matrices = {}
    for name, module in model.named_modules():
        for part, number in parts.items():
            if isinstance(module, nn.Linear) and f"{name}.".startswith(f"{part}."):
                kind = name.removeprefix(part)[1:] or "inject"
                matrices[kind, number] = module.weight.detach()
    return matrices


def singular_values(matrix: Tensor) -> np.ndarray:
    """Return the singular values of a matrix, largest first."""
    return torch.linalg.svdvals(matrix).cpu().numpy()


def spectra(model: GPT, earlier: GPT | None, beta: float) -> Arrays:
    """Return the singular values of the looped matrices, as kind:block:when.

    when: now; clipped by spectral_clip at beta; before, in an earlier model, if there is one.
    """
    earlier_matrices = looped_matrices(earlier) if earlier else {}
    data = {"beta": np.array(beta)}
    for (kind, block), matrix in looped_matrices(model).items():
        data[f"{kind}:{block}:now"] = singular_values(matrix)
        data[f"{kind}:{block}:clipped"] = singular_values(spectral_clip(matrix, beta))
        if (kind, block) in earlier_matrices:
            before = earlier_matrices[kind, block]
            data[f"{kind}:{block}:before"] = singular_values(before)
    return data
