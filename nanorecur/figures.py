"""
What analyze.py measures of a model, and how it draws that. What is measured is a dict of arrays, and a picture is a
function of such dicts, one for each run it shows, so that what is drawn is also what is stored:

    data = {"out-quickstart": depth_sweep(model, x, y, [1, 2, 4], 1.0)}
    draw_sweep(data).savefig("sweep.png")

Shapes: n loops, T tokens, C channels, H heads, P passes through a block (each loop of each block is one).
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from model import sample_loops, spectral_clip
from nanorecur.exit_rules import after_each_loop, entropy, exit_distribution, kl, state_change

BATCH = 2**23  # logits computed at a time

# -----------------------------------------------------------------------------
# loss against loops


def batches(model, x, y):
    """x, y (N, T) a few rows at a time."""
    rows = max(1, BATCH // (x.size(1) * model.config.vocab_size))
    return zip(x.split(rows), y.split(rows))


@torch.no_grad()
def depth_sweep(model, x, y, loops, tokens_per_byte):
    """Loss (nats per token), bits per byte and accuracy of windows x, y (N, T) at each of loops, and as configured."""
    sums = torch.zeros(1 + len(loops), 3, dtype=torch.float64)  # losses, right guesses, tokens
    for row, n in zip(sums, (None, *loops)):
        for xs, ys in batches(model, x, y):
            logits, loss = model(xs, ys, n_loop=n)
            counted = (ys >= 0).sum().item()
            right = (logits.argmax(-1) == ys).sum().item()
            row += torch.tensor(
                [loss.item() * counted if counted else 0.0, right, counted], dtype=torch.float64
            )
    loss, accuracy = (sums[:, :2] / sums[:, 2:]).T.numpy()
    bits = loss / math.log(2) * tokens_per_byte
    measured = {"loss": loss, "bits_per_byte": bits, "accuracy": accuracy}
    each = {name: values[1:] for name, values in measured.items()}
    return {
        "loops": np.array(loops),
        "trained": trained_range(model.config),
        "configured": model.config.counts(),
        **each,
        **{f"configured_{name}": values[0] for name, values in measured.items()},
    }


def trained_range(config):
    """Between which numbers of loops nine in ten draws of training lie, for each group, (groups, 2)."""
    generator = torch.Generator().manual_seed(0)
    draws = np.array([sample_loops(config, generator) for _ in range(1000)])
    return np.quantile(draws, (0.05, 0.95), axis=0).astype(int).T


def loops_to_try(most, count=16):
    """At most count numbers of loops from 1 to most, denser where they are few."""
    steps = np.geomspace(1, most, count).round()
    return sorted({*range(1, min(most, count // 2) + 1), *steps.astype(int).tolist()})


# -----------------------------------------------------------------------------
# states over loops


@torch.no_grad()
def readouts(model, idx, group, n):
    """Yields the state (B, T, C) after each of n loops of a group and the logits (B, T, V) read out after it.

    Every token stops there at once: the stages that follow, other groups as often as configured, see these states.
    """
    counts = list(model.config.counts())
    counts[group] = n
    for state, x in after_each_loop(model, idx, tuple(counts), group=group):
        yield state, model.logits(x)


def look(model, idx, group, n, top=5):
    """Of one text (1, T): states (n, T, C), likeliest tokens after each loop and their probabilities (n, T, top)."""
    states, tokens, probabilities = [], [], []
    for state, logits in readouts(model, idx, group, n):
        likeliest = logits[0].float().softmax(-1).topk(min(top, logits.size(-1)))
        states.append(state[0].float())
        probabilities.append(likeliest.values)
        tokens.append(likeliest.indices)
    return (
        torch.stack(states),
        torch.stack(tokens).cpu().numpy(),
        torch.stack(probabilities).cpu().numpy(),
    )


def pca(points):
    """points (.., C) along their two directions of largest variance, (.., 2), and the share of variance of each."""
    centred = points.flatten(0, -2).double().cpu()
    centred = centred - centred.mean(0)
    _, size, directions = torch.linalg.svd(centred, full_matrices=False)
    share = size.square() / size.square().sum().clamp_min(1e-30)
    return (centred @ directions[:2].T).unflatten(0, points.shape[:-1]).numpy(), share[:2].numpy()


def trajectories(states, chosen):
    """The states (n, T, C) of chosen tokens in two dimensions, those in which they differ most."""
    points, share = pca(states[:, chosen])
    return {"points": points, "share": share, "tokens": np.array(chosen)}


def state_measures(states):
    """Of states (n, T, C) after each loop, in shares of the norm: change by the loop, distance to the last; the norm
    itself; the mean cosine between tokens. Of the first three a mean and the range of 80 % of the tokens, (3, n)."""
    norm = states.norm(dim=-1)  # (n, T)
    change = states.diff(dim=0).norm(dim=-1) / norm[1:]
    distance = (states[:-1] - states[-1]).norm(dim=-1) / norm[-1]
    T, mean = (
        states.size(1),
        F.normalize(states, dim=-1).mean(1),
    )  # of directions: 1 long where all tokens agree
    correlation = (T * mean.square().sum(-1) - 1) / (T - 1)
    return {
        "change": band(change),
        "distance": band(distance),
        "norm": band(norm),
        "correlation": correlation.cpu().numpy(),
    }


def band(values):
    """Mean, 10 % and 90 % quantile over the tokens of values (n, T): (3, n)."""
    values = values.double().cpu().numpy()
    return np.stack((values.mean(1), *np.quantile(values, (0.1, 0.9), axis=1)))


@torch.no_grad()
def residual_stream(model, idx, chosen):
    """Chosen tokens of a text (1, T) as embedded and behind every pass, in two dimensions: points (1 + P, tokens, 2)."""
    stream, T = [model.embed(idx)[0]], idx.size(1)
    hooks = [
        block.register_forward_hook(lambda block, x, y: stream.append(y))
        for block in model.transformer.h
    ]
    model(idx)
    for hook in hooks:
        hook.remove()
    points, share = pca(torch.cat(stream)[:, -T:][:, chosen].float())
    return {
        "points": points,
        "share": share,
        "tokens": np.array(chosen),
        "passes": np.array(passes(model.config)),
    }


def passes(config):
    """Names of a forward pass's passes through a block: its number, or block/loop, the loop from 1, where looped."""
    counts, names = iter(config.counts()), []
    for blocks, looped in config.stages:
        for i in range(next(counts) if looped else 1):
            names += [f"{block}/{i + 1}" if looped else f"{block}" for block in blocks]
    return names


# -----------------------------------------------------------------------------
# when to stop: how unsettled a token is after each loop; it stops once that is below a threshold, at 0 never

THRESHOLDS = {
    "state": (0.0, *np.geomspace(1e-3, 1, 13)),  # |s - previous s| / |s|
    "KL": (
        0.0,
        *np.geomspace(1e-5, 1, 16),
    ),  # of the previous prediction from this one, nats (Huginn)
    "entropy": (0.0, *np.geomspace(1e-4, 1, 13)),  # how far that of the prediction has moved, nats
    "argmax": (0.0, *(1 / np.arange(8, 0, -1))),  # 1/k: the likeliest token has stayed for k loops
    "gate": tuple(
        np.linspace(0, 1, 11)
    ),  # probability that the trained gate has not stopped yet (Ouro)
}


@torch.no_grad()
def exit_course(model, x, y, group, n):
    """Losses (n, tokens) of windows x, y (N, T) read out after each loop, and by criterion how unsettled, (n, tokens)."""
    parts = [course_of_batch(model, *part, group, n) for part in batches(model, x, y)]
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def course_of_batch(model, x, y, group, n):
    counted, states, before, course = y >= 0, [], None, []
    for state, logits in readouts(model, x, group, n):
        states.append(state)
        now = (state[counted].float(), logits[counted].float().log_softmax(-1))
        losses = F.nll_loss(now[1], y[counted], reduction="none")
        course.append({"loss": losses, **unsettled(before or now, now)})
        before = now
    course = {name: torch.stack([row[name] for row in course]).cpu().numpy() for name in course[0]}
    for name in ("state", "KL", "entropy"):
        course[name][0] = np.inf  # nothing to compare the first loop with
    course["argmax"] = 1 / (0.5 + steps_alike(course["argmax"]))
    if model.config.exit_gate != "none":
        stopped = exit_distribution(model, states)[counted].cumsum(-1).T  # (n, tokens)
        course["gate"] = (1 - stopped).clamp_min(0).cpu().numpy()
    return course


def unsettled(before, now):
    """By how much (state, log-probabilities) of tokens has changed; under argmax the likeliest token itself."""
    (s, p), (s_new, p_new) = before, now
    more = (entropy(p_new) - entropy(p)).abs()
    return {
        "state": state_change(s, s_new),
        "KL": kl(p, p_new),
        "entropy": more,
        "argmax": p_new.argmax(-1),
    }


def steps_alike(values):
    """For how many steps each of values (n, tokens) has not changed."""
    alike = np.zeros(values.shape)
    for i in range(1, len(values)):
        alike[i] = (alike[i - 1] + 1) * (values[i] == values[i - 1])
    return alike


def exit_depths(values, threshold):
    """The loop, from 1, after which each token stops: the first with values (n, tokens) below the threshold."""
    below = values < threshold
    below[-1] = True
    return below.argmax(0) + 1


def exits(course):
    """What an exit_course gives: by criterion and threshold the mean loops, the loss, the share of tokens by loops."""
    losses = course["loss"]
    data = {"fixed loss": losses.mean(1)}
    for name in course.keys() - {"loss"}:
        depths = np.stack([exit_depths(course[name], threshold) for threshold in THRESHOLDS[name]])
        data[f"{name} threshold"] = np.array(THRESHOLDS[name])
        data[f"{name} loops"] = depths.mean(1)
        data[f"{name} loss"] = np.stack([losses[d - 1, np.arange(len(d))].mean() for d in depths])
        data[f"{name} share"] = np.stack(
            [np.bincount(d, minlength=len(losses) + 1)[1:] / len(d) for d in depths]
        )
    return data


# -----------------------------------------------------------------------------
# attention


class Recorded(TorchFunctionMode):
    """Keeps summary(weights) of every attention computed inside, weights (B, H, T, S), in the order of the calls."""

    def __init__(self, summary):
        super().__init__()
        self.summary, self.kept = summary, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.kept.append(self.summary(attention_weights(*args, **kwargs)))
        return func(*args, **(kwargs or {}))


def attention_weights(q, k, v, mask=None, dropout=0.0, causal=False, scale=None, enable_gqa=False):
    """softmax(q k^T) (B, H, T, S) of a call of scaled_dot_product_attention."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


def attention_summary(weights):
    """Of each head, weights (B, H, T, T): mean distance in tokens, entropy in bits, share on the first token of those
    behind it, share by distance: 0, 1, 2 to 3, 4 to 7, ..."""
    T = weights.size(-1)
    back = torch.arange(T, device=weights.device)
    distance = (back[:, None] - back).clamp_min(0)
    bins = [(distance >= 2**i // 2) & (distance < 2**i) for i in range(1 + (T - 1).bit_length())]
    return {
        "mean distance": (weights * distance).sum(-1).mean((0, 2)),
        "entropy": -(weights * weights.clamp_min(1e-30).log2()).sum(-1).mean((0, 2)),
        "on the first token": weights[:, :, 1:, 0].mean((0, 2)),
        "by distance": torch.stack(
            [(weights * part).sum(-1).mean((0, 2)) for part in bins], dim=-1
        ),
    }


def induction_score(weights):
    """Of each head, how much it looks from a repeated token, weights (B, H, 2L, 2L), at what followed it before."""
    length = weights.size(-1) // 2
    return weights.diagonal(1 - length, -2, -1)[..., -length:].mean((0, 2))


@torch.no_grad()
def attention(model, x, known_ids, length):
    """By pass and head (P, H): attention_summary over windows x (N, T), and the induction score over eight random
    texts of that length, each twice in a row."""
    with Recorded(attention_summary) as summaries:
        model(x)
    draw = torch.randint(known_ids, (8, length), generator=torch.Generator().manual_seed(0)).to(
        x.device
    )
    with Recorded(induction_score) as scores:
        model(draw.repeat(1, 2))
    data = {name: torch.stack([row[name] for row in summaries.kept]) for name in summaries.kept[0]}
    data["induction"] = torch.stack(scores.kept)
    return {
        **{name: values.cpu().numpy() for name, values in data.items()},
        "passes": np.array(passes(model.config)),
    }


@torch.no_grad()
def attention_maps(model, idx, chosen):
    """{name of the pass: weights (H, T, T)} on one text (1, T), of chosen passes by number."""
    with Recorded(lambda weights: weights[0].cpu().numpy()) as recorded:
        model(idx)
    return {passes(model.config)[i]: recorded.kept[i] for i in chosen}


# -----------------------------------------------------------------------------
# spectra


def looped_matrices(model):
    """{(kind, block): matrix} of the Linear layers inside the loops; an injection counts by its group."""
    blocks = {
        f"transformer.h.{number}": number for group in model.config.groups for number in group
    }
    injections = {f"transformer.loops.{g}.inject": g for g in range(len(model.config.groups))}
    found = {}
    for name, module in model.named_modules():
        for place, number in (blocks | injections).items():
            if isinstance(module, nn.Linear) and f"{name}.".startswith(f"{place}."):
                kind = name.removeprefix(place)[1:] or "inject"
                found[kind, number] = module.weight.detach()
    return found


def spectra(model, earlier, beta):
    """Singular values of the looped matrices, also after spectral_clip at beta, and of an earlier model or None."""
    then = looped_matrices(earlier) if earlier else {}
    data = {"beta": np.array(beta)}
    for (kind, block), matrix in looped_matrices(model).items():
        data[f"{kind}:{block}:now"] = torch.linalg.svdvals(matrix).cpu().numpy()
        data[f"{kind}:{block}:clipped"] = (
            torch.linalg.svdvals(spectral_clip(matrix, beta)).cpu().numpy()
        )
        if (kind, block) in then:
            data[f"{kind}:{block}:before"] = torch.linalg.svdvals(then[kind, block]).cpu().numpy()
    return data


# -----------------------------------------------------------------------------
# drawing. Colours are Okabe and Ito's, which the colour-blind tell apart, without the yellow that print loses; lines
# differ in dashes and markers too. Maps are in cividis.

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP*X"


def style(i):
    return {
        "color": COLOURS[i % 7],
        "linestyle": DASHES[i % 5],
        "marker": MARKERS[i % 8],
        "markersize": 4,
    }


def label(text):
    """text as matplotlib shows it as it is: no formulas between dollars, no label that _ hides."""
    return " " * text.startswith("_") + text.replace("$", r"\$")


def grid(rows, columns, width, height):
    """A figure and its axes (rows, columns), each width by height inches."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(4.5, columns * width), rows * height), layout="constrained", dpi=110
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels(count, columns, width, height):
    """A figure and count axes, so many in a row."""
    columns = min(columns, count)
    figure, axes = grid(-(-count // columns), columns, width, height)
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, list(axes.flat[:count])


def legend(figure, axes):
    """One for the whole figure, under it."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(4, max(1, len(names))),
        fontsize="small",
    )


def of(run, runs, what=""):
    """The title of a panel: what it shows, and of which run where there are several."""
    return ": ".join(filter(None, (run if len(runs) > 1 else "", what)))


def name_axes(axes, x, y, title=""):
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(label(title), fontsize="medium")
    axes.grid(alpha=0.3)


def whole_numbers(axis):
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def powers_of_two(axes):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")


def heat(figure, axes, values, x, y, title, unit, **limits):
    """values (rows, columns) as a map."""
    image = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest", **limits)
    name_axes(axes, x, y, title)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=unit, pad=0.02)


def name_ticks(axis, names, most=16):
    """Names of the rows or columns of a map, as many as can be read."""
    every = -(-len(names) // most)
    axis.set_ticks(
        range(0, len(names), every), [label(name) for name in names[::every]], fontsize="small"
    )


def curves(entries):
    """The arrays of a log.jsonl: of training, of evaluation at the run's own depth, and what its loops gain on one."""
    steps = [entry for entry in entries if "loss" in entry]
    evaluated = [entry for entry in entries if "eval" in entry]
    data = {
        "iter": [entry["iter"] for entry in steps],
        "eval iter": [entry["iter"] for entry in evaluated],
    }
    data |= {
        name: [entry[name] for entry in steps]
        for name in ("loss", "lr", "loops", "tokens_per_second")
    }
    own = [next(row for row in entry["eval"] if row["split"] == "val") for entry in evaluated]
    data |= {
        "val loss": [row["loss"] for row in own],
        "val bits_per_byte": [row["bits_per_byte"] for row in own],
    }
    return {name: np.array(values, dtype=float) for name, values in data.items()}


CURVES = (
    ("loss", "loss (nats/token)"),
    ("bits_per_byte", "validation (bits/byte)"),
    ("lr", "learning rate"),
    ("loops", "loops (mean of a step)"),
    ("tokens_per_second", "tokens/s"),
)


def draw_curves(runs):
    """runs: {name: curves}. Training as a line, validation at the run's own depth with markers."""
    figure, axes = grid(2, 3, 3.2, 2.6)
    for panel, (name, unit) in zip(axes.flat, CURVES):
        for i, (run, data) in enumerate(runs.items()):
            look = style(i)
            if name in data:
                panel.plot(
                    data["iter"],
                    data[name],
                    **look | {"marker": ""},
                    alpha=0.5 if name == "loss" else 1,
                )
            if f"val {name}" in data:
                panel.plot(data["eval iter"], data[f"val {name}"], **look, label=label(run))
        name_axes(panel, "step", unit)
    axes[1, 2].set_axis_off()
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[1, 2].legend(
        handles, names, loc="center", title="pale: training\nmarkers: validation", fontsize="small"
    )
    return figure


SWEEP = (
    ("loss", "loss (nats/token)"),
    ("bits_per_byte", "bits/byte"),
    ("accuracy", "accuracy (share of tokens)"),
)


def draw_sweep(runs):
    """runs: {name: depth_sweep}. Wide and pale: where training's loops were. Star: as configured."""
    figure, axes = grid(1, 3, 3.2, 3)
    for panel, (name, unit) in zip(axes.flat, SWEEP):
        for i, (run, data) in enumerate(runs.items()):
            seen = np.geomspace(
                data["trained"].min() / 1.05, data["trained"].max() * 1.05, 50
            )  # one depth shows too
            drawn = np.interp(np.log(seen), np.log(data["loops"]), data[name])
            panel.plot(
                seen, drawn, color=COLOURS[i % 7], linewidth=9, alpha=0.3, solid_capstyle="round"
            )
            panel.plot(data["loops"], data[name], **style(i), label=label(run))
            place = np.mean(data["configured"]), data[f"configured_{name}"]
            panel.plot(*place, "*", color=COLOURS[i % 7], markersize=13, markeredgecolor="white")
        powers_of_two(panel)
        name_axes(panel, "loops", unit)
    legend(figure, axes[0, 0])
    return figure


def draw_trajectories(runs, texts):
    """runs: {name: trajectories}; texts: {name: what to call each chosen token}. A dot a loop, the last one large."""
    figure, axes = panels(len(runs), 2, 5, 4)
    for panel, (run, data) in zip(axes, runs.items()):
        for i, text in enumerate(texts[run]):
            path = data["points"][:, i]
            panel.plot(*path.T, **style(i), linewidth=1, label=label(text))
            panel.plot(
                *path[-1],
                marker=MARKERS[i % 8],
                color=COLOURS[i % 7],
                markersize=9,
                markeredgecolor="black",
            )
        name_axes(panel, *component_names(data["share"]), of(run, runs))
        panel.legend(fontsize="x-small")
    return figure


def component_names(share):
    return [f"component {i + 1} ({part:.0%} of variance)" for i, part in enumerate(share)]


STATES = (
    ("change", "change by the loop", "share of the norm"),
    ("distance", "distance to the last", "share of the norm"),
    ("norm", "norm", "norm"),
    ("correlation", "tokens alike", "mean cosine"),
)


def draw_states(runs):
    """runs: {name: state_measures}. Bands: eight in ten tokens."""
    figure, axes = grid(2, 2, 4.5, 2.6)
    for panel, (name, title, unit) in zip(axes.flat, STATES):
        for i, (run, data) in enumerate(runs.items()):
            values = np.atleast_2d(data[name])
            loops = np.arange(values.shape[1]) + (2 if name == "change" else 1)
            panel.plot(loops, values[0], **style(i), label=label(run))
            if len(values) > 1:
                panel.fill_between(
                    loops, *values[1:], color=COLOURS[i % 7], alpha=0.15, linewidth=0
                )
        name_axes(panel, "loop", unit, title)
        moved = name in ("change", "distance") and any(
            (data[name] > 0).any() for data in runs.values()
        )
        panel.set_yscale("log" if moved else "linear")
        whole_numbers(panel.xaxis)
    legend(figure, axes[0, 0])
    return figure


def draw_residual(runs, texts):
    """runs: {name: residual_stream}; texts: {name: what to call each token}. A line a token, coloured by its depth."""
    figure, axes = panels(len(runs), 2, 6, 4.5)
    for panel, (run, data) in zip(axes, runs.items()):
        depth = np.arange(len(data["points"]))
        for path, text in zip(data["points"].transpose(1, 0, 2), texts[run]):
            panel.plot(*path.T, color="0.75", linewidth=0.6, zorder=1)
            dots = panel.scatter(*path.T, c=depth, cmap="cividis", s=12, zorder=2)
            if len(texts[run]) <= 24:
                panel.annotate(
                    label(text),
                    path[-1],
                    fontsize="xx-small",
                    xytext=(3, 2),
                    textcoords="offset points",
                )
        bar = figure.colorbar(dots, ax=panel, label="embedding, then behind block/loop")
        name_ticks(bar.ax.yaxis, ["embedding", *data["passes"]])
        name_axes(panel, *component_names(data["share"]), of(run, runs))
    return figure


UNITS = {
    "state": "change of the state (share of norm)",
    "KL": "KL (nats)",
    "entropy": "change of entropy (nats)",
    "argmax": "1 / loops without change",
    "gate": "gate: not stopped yet",
}


def draw_exits(runs):
    """runs: {name: exits}. Share of tokens by their loops (columns) at each threshold (rows), a map by criterion."""
    shown = [(run, name) for run, data in runs.items() for name in UNITS if f"{name} share" in data]
    figure, axes = panels(len(shown), 2, 4.5, 2.7)
    for panel, (run, name) in zip(axes, shown):
        share, thresholds = runs[run][f"{name} share"], runs[run][f"{name} threshold"]
        heat(
            figure,
            panel,
            share,
            "loops",
            "threshold",
            of(run, runs, UNITS[name]),
            "share of tokens",
            vmin=0,
        )
        name_ticks(panel.yaxis, [f"{threshold:.2g}" for threshold in thresholds], 9)
        name_ticks(panel.xaxis, [str(i + 1) for i in range(share.shape[1])])
    return figure


def draw_pareto(runs):
    """runs: {name: exits}. Loss against mean loops: one number for all tokens, and each criterion over thresholds."""
    figure, axes = panels(len(runs), 2, 5, 3.8)
    for panel, (run, data) in zip(axes, runs.items()):
        fixed = data["fixed loss"]
        panel.plot(
            np.arange(len(fixed)) + 1,
            fixed,
            **style(6) | {"marker": "."},
            label="same loops for all",
        )
        for i, name in enumerate(name for name in UNITS if f"{name} loss" in data):
            panel.plot(data[f"{name} loops"], data[f"{name} loss"], **style(i), label=name)
        losses = np.concatenate([data[f"{name} loss"] for name in UNITS if f"{name} loss" in data])
        low, high = min(losses.min(), fixed.min()), losses.max()
        panel.set_ylim(
            low - 0.05 * (high - low), high + 0.1 * (high - low) + 1e-6
        )  # one loop alone is far above
        name_axes(panel, "mean loops of a token", "loss (nats/token)", of(run, runs))
        powers_of_two(panel)
        panel.legend(fontsize="small")
    return figure


ATTENTION = (
    ("mean distance", "tokens"),
    ("entropy", "bits"),
    ("on the first token", "share"),
    ("induction", "share"),
)


def draw_attention(runs):
    """runs: {name: attention}. A column a run, a row a measure, on one scale; in each map a row a head."""
    figure, axes = grid(len(ATTENTION), len(runs), max(2.8, min(7, 10 / len(runs))), 2)
    for row, (name, unit) in zip(axes, ATTENTION):
        top = max(
            0.1, *(data[name].max() for data in runs.values())
        )  # less than a tenth is nothing
        for panel, (run, data) in zip(row, runs.items()):
            heat(
                figure,
                panel,
                data[name].T,
                "block/loop",
                "head",
                of(run, runs, name),
                unit,
                vmin=0,
                vmax=top,
            )
            name_ticks(panel.xaxis, data["passes"])
            whole_numbers(panel.yaxis)
    return figure


def draw_distances(runs):
    """runs: {name: attention}. Share of attention by distance (columns), a row a head of a pass."""
    rows = max(
        data["by distance"].shape[0] * data["by distance"].shape[1] for data in runs.values()
    )
    figure, axes = panels(len(runs), 2, 6, min(12, max(3.2, 0.14 * rows)))
    for panel, (run, data) in zip(axes, runs.items()):
        shares = data["by distance"]  # (P, H, bins)
        heat(
            figure,
            panel,
            shares.reshape(-1, shares.shape[2]),
            "distance (tokens)",
            "block/loop, a row a head",
            of(run, runs),
            "share of attention",
            vmin=0,
        )
        ranges = ["0", "1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, shares.shape[2] - 1))]
        name_ticks(panel.xaxis, ranges)
        every, heads = -(-len(shares) // 24), shares.shape[1]
        panel.set_yticks(
            np.arange(0, len(shares), every) * heads - 0.5,
            data["passes"][::every],
            fontsize="small",
        )
    return figure


def draw_maps(weights, texts):
    """weights (H, T, T) of one pass: a map a head, from the token of the row to that of the column."""
    from matplotlib.colors import PowerNorm

    texts = ["shift"] * (
        weights.shape[-1] - len(texts)
    ) + texts  # the token that predict_ahead puts before them
    figure, axes = panels(len(weights), 2 if len(weights) < 5 else 3, 3.8, 3.5)
    for head, (panel, map_) in enumerate(zip(axes, weights)):
        scale = PowerNorm(0.5, 0, weights.max())
        heat(
            figure,
            panel,
            map_,
            "to token",
            "from token",
            f"head {head}",
            "share of attention",
            norm=scale,
        )
        if len(texts) <= 24:
            name_ticks(panel.xaxis, texts, 24)
            name_ticks(panel.yaxis, texts, 24)
            panel.tick_params(axis="x", rotation=90)
    return figure


WHEN = {
    "before": dict(linestyle=":", alpha=0.8),
    "now": dict(linestyle="-"),
    "clipped": dict(linestyle="--"),
}


def draw_spectra(runs):
    """runs: {name: spectra}. A panel a kind of matrix, a colour a block; dotted before, dashed clipped."""
    shown = list(
        dict.fromkeys(
            (run, key.split(":")[0]) for run, data in runs.items() for key in data if ":" in key
        )
    )
    figure, axes = panels(len(shown), 3, 3.2, 2.6)
    for panel, (run, kind) in zip(axes, shown):
        keys = [key for key in runs[run] if key.startswith(f"{kind}:")]
        blocks = list(dict.fromkeys(key.split(":")[1] for key in keys))
        for key in keys:
            _, block, when = key.split(":")
            name = f"{'group' if kind == 'inject' else 'block'} {block}" if when == "now" else None
            colour = COLOURS[blocks.index(block) % 7]
            panel.plot(runs[run][key], color=colour, **WHEN[when], linewidth=1.3, label=name)
        panel.axhline(runs[run]["beta"], color="0.5", linewidth=0.8)
        name_axes(panel, "number", "singular value", of(run, runs, kind))
        panel.legend(fontsize="x-small")
    return figure


def shade(share):
    """A background of cividis for a share from 0 to 1 and the colour of text readable on it, as #rrggbb."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["cividis"](share)), "#000000" if share > 0.5 else "#ffffff"
