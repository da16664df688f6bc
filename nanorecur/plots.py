"""
Pictures of what measure.py returns. Each function draws {name of a run: its arrays}, so that what
is drawn is also what analyze.py stores:

    data = {"out-quickstart": depth_sweep(model, x, y, [1, 2, 4], 1.0)}
    draw_sweep(data).savefig("sweep.png")

Lines differ in color, dashes and markers; the colors are Okabe and Ito's, which the color-blind
tell apart, without the yellow that print loses. Maps are in cividis.
"""

from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Arrays = dict[str, np.ndarray]
Runs = dict[str, Arrays]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP*X"


# -----------------------------------------------------------------------------
# axes


def color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def line_style(i: int, **changes) -> dict:
    """Return how to draw line number i of a picture."""
    style = {"color": color(i), "linestyle": DASHES[i % len(DASHES)], "markersize": 4}
    return style | {"marker": MARKERS[i % len(MARKERS)]} | changes


def escape(text: str) -> str:
    """Return a text that matplotlib shows as it is: a $ begins no formula, a _ hides no label."""
    indent = " " if text.startswith("_") else ""
    return indent + text.replace("$", r"\$")


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure and its panels (rows, columns), each width by height inches."""
    size = max(4.5, columns * width), rows * height
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and count panels, columns of them in a row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = grid(rows, columns, width, height)
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, list(axes.flat[:count])


def add_legend(figure: Figure, panel: Axes, title: str = "", most: int = 4) -> None:
    """Put one legend of at most so many columns under the figure, of the lines in one panel."""
    handles, names = panel.get_legend_handles_labels()
    columns = min(most, max(1, len(names)))
    place = dict(loc="outside lower center", ncols=columns, fontsize="small")
    figure.legend(handles, names, title=title or None, title_fontsize="small", **place)


def title_of(run: str, runs: Runs, title: str = "") -> str:
    """Return a panel's title, with the name of its run where there are several."""
    if len(runs) == 1:
        return title
    return f"{run}: {title}" if title else run


def name_axes(panel: Axes, x: str, y: str, title: str = "") -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_title(escape(title), fontsize="medium")
    panel.grid(alpha=0.3)


def name_ticks(axis: Axis, names: list[str], most: int = 16) -> None:
    """Name the rows or columns of a map, at most so many of them."""
    every = -(-len(names) // most)
    places = range(0, len(names), every)
    axis.set_ticks(places, [escape(name) for name in names[::every]], fontsize="small")


def whole_numbers(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def powers_of_two(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")


def draw_map(figure: Figure, panel: Axes, values: np.ndarray, unit: str, **scale) -> None:
    """Draw values (rows, columns) as colors. scale: how imshow turns values into colors."""
    image = panel.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest", **scale)
    figure.colorbar(image, ax=panel, label=unit, pad=0.02)


def name_map(panel: Axes, x: str, y: str, title: str = "") -> None:
    name_axes(panel, x, y, title)
    panel.grid(False)


def shade(share: float) -> tuple[str, str]:
    """Return a background of cividis and a readable color of text for a share, as #rrggbb."""
    return to_hex(colormaps["cividis"](share)), "#000000" if share > 0.5 else "#ffffff"


# -----------------------------------------------------------------------------
# training, loss against loops

CURVES = (
    ("loss", "loss (nats/token)"),
    ("bits_per_byte", "validation (bits/byte)"),
    ("lr", "learning rate"),
    ("loops", "loops (mean of a step)"),
    ("tokens_per_second", "tokens/s"),
)
FEW = 10  # points of a training curve that are drawn as dots too: a line through one is invisible


def draw_curves(runs: Runs) -> Figure:
    """Draw training_curves: training as a line, validation with markers.

    What no run has is left out, and bits per byte where they are on the axis of the loss.
    """
    same_unit = all(
        is_loss_in_bits(data, "val loss", "val bits_per_byte") for data in runs.values()
    )
    shown = []
    for name, unit in CURVES:
        has_data = any(name in data or f"val {name}" in data for data in runs.values())
        if has_data and not (name == "bits_per_byte" and same_unit):
            shown.append((name, unit))
    last = max(max(data.get(name, [0])) for data in runs.values() for name in ("iter", "eval iter"))
    figure, axes = panels(len(shown), 2 if len(shown) == 4 else 3, 3.2, 2.6)
    for panel, (name, unit) in zip(axes, shown):
        for i, (run, data) in enumerate(runs.items()):
            draw_curve(panel, data, name, i, escape(run))
        name_axes(panel, "step", unit)
        whole_numbers(panel.xaxis)
        panel.set_xlim(-0.05 * last - 0.5, 1.05 * last + 0.5)
        if name == "loss" and same_unit:
            add_bits_axis(panel)
    add_legend(figure, axes[0], "pale: training; markers: validation")
    return figure


def draw_curve(panel: Axes, data: Arrays, name: str, number: int, label: str) -> None:
    """Draw one quantity of run number so many, in training and on validation."""
    has_validation = f"val {name}" in data
    if name in data:
        marker = "." if len(data[name]) < FEW else ""
        style = line_style(number, marker=marker, alpha=0.5 if has_validation else 1)
        panel.plot(data["iter"], data[name], label=None if has_validation else label, **style)
    if has_validation:
        panel.plot(data["eval iter"], data[f"val {name}"], **line_style(number, label=label))


def is_loss_in_bits(data: Arrays, loss: str, bits: str) -> bool:
    """Return whether bits per byte are nats per token in other units: a token is a byte."""
    return loss in data and np.allclose(data[bits], data[loss] / np.log(2), rtol=1e-9, atol=0)


def add_bits_axis(panel: Axes) -> None:
    """Add an axis of bits per byte to the right of a panel of losses whose tokens are bytes."""
    axis = panel.secondary_yaxis("right", functions=(nats_to_bits, bits_to_nats))
    axis.set_ylabel("bits/byte")


def nats_to_bits(nats: np.ndarray) -> np.ndarray:
    return nats / np.log(2)


def bits_to_nats(bits: np.ndarray) -> np.ndarray:
    return bits * np.log(2)


COSTS = (("flops", "training FLOPs"), ("seconds", "seconds of training"))


def draw_costs(curves: Runs) -> Figure:
    """Draw cost_curves of run_table.py: losses against what training had cost, in a panel each.

    A pale band: the range over seeds. Where nothing is looped, a horizontal line at the last loss,
    with a dot at its cost.
    """
    known = [row for row in COSTS if not any(np.isnan(c[row[0]]).any() for c in curves.values())]
    figure, axes = panels(len(known), 2, 4.2, 3.2)
    for panel, (name, unit) in zip(axes, known):
        for i, (run, data) in enumerate(curves.items()):
            draw_cost(panel, data, name, i, escape(run))
        panel.set_xscale("log")
        name_axes(panel, unit, "validation loss (nats/token)")
    add_legend(figure, axes[0])
    return figure


def draw_cost(panel: Axes, data: Arrays, name: str, number: int, label: str) -> None:
    """Draw the losses of set number so many against one cost, and their range over seeds."""
    cost, shade = data[name], dict(color=color(number), alpha=0.2, linewidth=0)
    if data["looped"]:
        panel.fill_between(cost, data["least"], data["largest"], **shade)
        panel.plot(cost, data["loss"], **line_style(number, label=label))
        return
    panel.axhspan(data["least"][-1], data["largest"][-1], **shade)
    panel.axhline(data["loss"][-1], **line_style(number, marker="", label=label))
    panel.plot(cost[-1], data["loss"][-1], **line_style(number, linestyle=""))


SWEEP = (
    ("loss", "loss (nats/token)"),
    ("bits_per_byte", "bits/byte"),
    ("accuracy", "accuracy (share of tokens)"),
)


def draw_sweep(runs: Runs) -> Figure:
    """Draw depth_sweep. A pale band: loops in training. A star: loops as configured.

    A run in which nothing is looped is a horizontal line.
    """
    same_unit = all(
        is_loss_in_bits(data, "configured_loss", "configured_bits_per_byte")
        for data in runs.values()
    )
    shown = [row for row in SWEEP if not (row[0] == "bits_per_byte" and same_unit)]
    figure, axes = panels(len(shown), 3, 3.4, 3)
    for panel, (name, unit) in zip(axes, shown):
        for i, (run, data) in enumerate(runs.items()):
            draw_depths(panel, data, name, i, escape(run))
        powers_of_two(panel)
        name_axes(panel, "loops", unit)
        if name == "loss" and same_unit:
            add_bits_axis(panel)
    add_legend(figure, axes[0])
    return figure


def draw_depths(panel: Axes, data: Arrays, name: str, number: int, label: str) -> None:
    """Draw one quantity of run number so many against loops, or at the same height for all."""
    if len(data["loops"]) == 0:
        style = line_style(number, marker="", label=label)
        panel.axhline(data[f"configured_{name}"], **style)
        return
    draw_trained_range(panel, data, name, color(number))
    panel.plot(data["loops"], data[name], **line_style(number, label=label))
    star = dict(color=color(number), markersize=13, markeredgecolor="white")
    panel.plot(np.mean(data["configured"]), data[f"configured_{name}"], "*", **star)


def draw_levels(run: str, data: Arrays) -> Figure:
    """Draw what level_curves returns: accuracy against loops, a line for each of a few levels.

    A star: the loops of the level. Dashed: levels beyond training.
    """
    figure, axes = panels(1, 1, 5.2, 3.6)
    panel = axes[0]
    trained, beyond = np.flatnonzero(~data["beyond"]), np.flatnonzero(data["beyond"])
    shown = [*evenly(trained, 4), *evenly(beyond, 5)]
    for place, i in enumerate(shown):
        shade = to_hex(colormaps["viridis"](0.9 * place / max(1, len(shown) - 1)))
        known = ~np.isnan(data["accuracy"][i])
        x, y = data["loops"][known], data["accuracy"][i][known]
        dashes = "--" if data["beyond"][i] else "-"
        label = f"level {data['levels'][i]}" + (", not trained" if data["beyond"][i] else "")
        panel.plot(x, y, color=shade, linestyle=dashes, marker="o", markersize=3, label=label)
        own = x == data["own"][i]
        panel.plot(x[own], y[own], "*", color=shade, markersize=13, markeredgecolor="white")
    powers_of_two(panel)
    panel.set_ylim(-0.02, 1.02)
    name_axes(panel, "loops", "accuracy", escape(run))
    add_legend(figure, panel, most=3)
    return figure


def evenly(numbers: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of ascending numbers (N,), evenly spaced, with the first and last."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, most).round().astype(int)]


def draw_trained_range(panel: Axes, data: Arrays, name: str, color: str) -> None:
    """Draw a wide pale line behind a curve of the sweep where training's loops lie."""
    least, most = data["trained"].min(), data["trained"].max()
    loops = np.geomspace(least / 1.05, most * 1.05, 50)  # wider, so that one depth shows too
    values = np.interp(np.log(loops), np.log(data["loops"]), data[name])
    band = dict(color=color, linewidth=9, alpha=0.3, solid_capstyle="round")
    panel.plot(loops, values, **band)


# -----------------------------------------------------------------------------
# states over loops, the residual stream

STATES = (
    ("change", "change by the loop", "share of the norm"),
    ("distance", "distance to the last state", "share of the norm"),
    ("norm", "norm", "norm"),
    ("correlation", "how alike tokens are", "mean cosine"),
)


def draw_states(runs: Runs) -> Figure:
    """Draw state_measures: means over tokens as lines, eight in ten tokens as bands."""
    figure, axes = grid(2, 2, 4.5, 2.6)
    for panel, (name, title, unit) in zip(axes.flat, STATES):
        for i, (run, data) in enumerate(runs.items()):
            values = np.atleast_2d(data[name])  # mean, or mean, low and high
            first = 2 if name == "change" else 1
            loops = np.arange(values.shape[1]) + first
            panel.plot(loops, values[0], **line_style(i, label=escape(run)))
            if len(values) > 1:
                panel.fill_between(loops, *values[1:], color=color(i), alpha=0.15, linewidth=0)
        name_axes(panel, "loop", unit, title)
        falls = name in ("change", "distance")
        if falls and any((data[name] > 0).any() for data in runs.values()):
            panel.set_yscale("log")
        whole_numbers(panel.xaxis)
    add_legend(figure, axes[0, 0])
    return figure


def draw_trajectories(runs: Runs, texts: dict[str, list[str]]) -> Figure:
    """Draw trajectories, a dot for each loop, the last one large; texts: of a run's tokens."""
    figure, axes = panels(len(runs), 2, 5, 4)
    for panel, (run, data) in zip(axes, runs.items()):
        for i, text in enumerate(texts[run]):
            path = data["points"][:, i]  # (n, 2)
            panel.plot(*path.T, **line_style(i, linewidth=1, label=escape(text)))
            end = line_style(i, markersize=9, markeredgecolor="black")
            panel.plot(*path[-1], **end)
        name_axes(panel, *component_names(data["share"]), title_of(run, runs))
        panel.legend(fontsize="x-small")
    return figure


def component_names(shares: np.ndarray) -> list[str]:
    return [f"component {i} ({share:.0%} of variance)" for i, share in enumerate(shares, 1)]


def draw_residual(runs: Runs, texts: dict[str, list[str]]) -> Figure:
    """Draw residual_stream, a line for each token, colored by depth; texts: of a run's tokens."""
    figure, axes = panels(len(runs), 2, 6, 4.5)
    for panel, (run, data) in zip(axes, runs.items()):
        depth = np.arange(len(data["points"]))
        for path, text in zip(data["points"].transpose(1, 0, 2), texts[run]):
            panel.plot(*path.T, color="0.75", linewidth=0.6, zorder=1)
            dots = panel.scatter(*path.T, c=depth, cmap="cividis", s=12, zorder=2)
            if len(texts[run]) <= 24:
                beside = dict(xytext=(3, 2), textcoords="offset points", fontsize="xx-small")
                panel.annotate(escape(text), path[-1], **beside)
        bar = figure.colorbar(dots, ax=panel, label="embedding, then after block/loop")
        name_ticks(bar.ax.yaxis, ["embedding", *data["passes"]])
        name_axes(panel, *component_names(data["share"]), title_of(run, runs))
    return figure


# -----------------------------------------------------------------------------
# early exit

EXIT_RULES = (  # name, what it measures, unit of its threshold
    ("state", "change of the state", "share of the norm"),
    ("kl", "KL from the prediction before", "nats"),
    ("entropy", "change of the entropy", "nats"),
    ("argmax", "likeliest token stays the same", "loops"),
    ("gate", "has stopped by then", "probability"),
)


def draw_exits(runs: Runs) -> Figure:
    """Draw exit_curves as maps: share of tokens by their loops (columns) at thresholds (rows)."""
    shown = []
    for run, data in runs.items():
        shown += [(run, *rule) for rule in EXIT_RULES if f"{rule[0]} share" in data]
    figure, axes = panels(len(shown), 2, 4.5, 2.7)
    for panel, (run, rule, title, unit) in zip(axes, shown):
        share = runs[run][f"{rule} share"]  # (thresholds, n)
        draw_map(figure, panel, share, "share of tokens", vmin=0)
        title = title_of(run, runs, f"{rule}: {title}")
        name_map(panel, "loops", f"threshold ({unit})", title)
        thresholds = [f"{threshold:.3g}" for threshold in runs[run][f"{rule} threshold"]]
        name_ticks(panel.yaxis, ["never", *thresholds[1:]], 9)
        name_ticks(panel.xaxis, [str(i + 1) for i in range(share.shape[1])])
    return figure


def draw_pareto(runs: Runs) -> Figure:
    """Draw exit_curves as loss against mean loops, beside the same loops for all tokens."""
    figure, axes = panels(len(runs), 2, 5, 3.8)
    for panel, (run, data) in zip(axes, runs.items()):
        fixed = data["fixed loss"]
        style = line_style(6, marker=".", label="same loops for all")
        panel.plot(np.arange(len(fixed)) + 1, fixed, **style)
        rules = [rule for rule, _, _ in EXIT_RULES if f"{rule} loss" in data]
        for i, rule in enumerate(rules):
            panel.plot(data[f"{rule} loops"], data[f"{rule} loss"], **line_style(i, label=rule))
        panel.set_ylim(*loss_limits(data, rules))
        name_axes(panel, "mean loops of a token", "loss (nats/token)", title_of(run, runs))
        powers_of_two(panel)
        panel.legend(fontsize="small")
    return figure


def loss_limits(data: Arrays, rules: list[str]) -> tuple[float, float]:
    """Return the least and the largest loss to show; after one loop it may be far above."""
    n = len(data["fixed loss"])
    losses = [data[f"{rule} loss"][data[f"{rule} loops"] >= min(2, n)] for rule in rules]
    losses = np.concatenate(losses)
    least, most = min(losses.min(), data["fixed loss"].min()), losses.max()
    height = most - least
    return least - 0.05 * height, most + 0.1 * height + 1e-6


# -----------------------------------------------------------------------------
# attention

ATTENTION = (
    ("mean distance", "tokens"),
    ("entropy", "bits"),
    ("on the first token", "share"),
    ("induction", "share"),
)


def draw_attention(runs: Runs) -> Figure:
    """Draw attention: a row for each measure, on one scale; a column for each run."""
    width = max(2.8, min(7, 10 / len(runs)))
    figure, axes = grid(len(ATTENTION), len(runs), width, 2)
    for row, (name, unit) in zip(axes, ATTENTION):
        most = max(0.1, *(data[name].max() for data in runs.values()))  # less than 0.1 looks dark
        for panel, (run, data) in zip(row, runs.items()):
            draw_map(figure, panel, data[name].T, unit, vmin=0, vmax=most)
            name_map(panel, "block/loop", "head", title_of(run, runs, name))
            name_ticks(panel.xaxis, data["passes"])
            whole_numbers(panel.yaxis)
    return figure


def draw_distances(runs: Runs) -> Figure:
    """Draw the share of attention by distance (columns); each row is a head of a pass."""
    counts = [data["by distance"][..., 0].size for data in runs.values()]  # P * H
    height = min(12, max(3.2, 0.14 * max(counts)))
    figure, axes = panels(len(runs), 2, 6, height)
    for panel, (run, data) in zip(axes, runs.items()):
        n_passes, n_heads, n_bins = data["by distance"].shape
        shares = data["by distance"].reshape(-1, n_bins)
        draw_map(figure, panel, shares, "share of attention", vmin=0)
        name_map(panel, "distance (tokens)", "block/loop, a row for each head", title_of(run, runs))
        name_ticks(panel.xaxis, distance_names(n_bins))
        every = -(-n_passes // 24)
        top = np.arange(0, n_passes, every) * n_heads - 0.5  # of the first head of a pass
        panel.set_yticks(top, data["passes"][::every], fontsize="small")
    return figure


def distance_names(n_bins: int) -> list[str]:
    """Return the names of the bins of attention_summary: 0, 1, 2-3, 4-7, ..."""
    return ["0", "1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, n_bins - 1))]


def draw_maps(weights: np.ndarray, texts: list[str]) -> Figure:
    """Draw attention weights (H, T, T) of a pass, a map for each head; texts: of the tokens."""
    n_before = weights.shape[-1] - len(texts)  # predict_ahead puts a token before the text
    texts = ["shift"] * n_before + texts
    figure, axes = panels(len(weights), 2 if len(weights) < 5 else 3, 3.8, 3.5)
    for head, (panel, of_head) in enumerate(zip(axes, weights)):
        scale = PowerNorm(0.5, 0, weights.max())
        draw_map(figure, panel, of_head, "share of attention", norm=scale)
        name_map(panel, "to token", "from token", f"head {head}")
        if len(texts) <= 24:
            name_ticks(panel.xaxis, texts, 24)
            name_ticks(panel.yaxis, texts, 24)
            panel.tick_params(axis="x", rotation=90)
    return figure


# -----------------------------------------------------------------------------
# spectra

WHEN = {
    "before": dict(linestyle=":", alpha=0.8),
    "now": dict(linestyle="-"),
    "clipped": dict(linestyle="--"),
}


def draw_spectra(runs: Runs) -> Figure:
    """Draw spectra, a panel for each kind of matrix; dotted: before, dashed: clipped."""
    shown = {}  # (run, kind) to the keys of its spectra
    for run, data in runs.items():
        for key in data:
            if key != "beta":
                kind, _, _ = key.split(":")
                shown.setdefault((run, kind), []).append(key)
    figure, axes = panels(len(shown), 3, 3.2, 2.6)
    for panel, ((run, kind), keys) in zip(axes, shown.items()):
        draw_kind(panel, kind, {key: runs[run][key] for key in keys})
        panel.axhline(runs[run]["beta"], color="0.5", linewidth=0.8)
        name_axes(panel, "number", "singular value", title_of(run, runs, kind))
        panel.legend(fontsize="x-small")
    return figure


def draw_kind(panel: Axes, kind: str, spectra: Arrays) -> None:
    """Draw the spectra of one kind of matrix, a color for each block."""
    whose = "group" if kind == "inject" else "block"
    blocks = []
    for key, values in spectra.items():
        _, block, when = key.split(":")
        if block not in blocks:
            blocks.append(block)
        label = f"{whose} {block}" if when == "now" else None
        style = dict(color=color(blocks.index(block)), linewidth=1.3, label=label)
        panel.plot(values, **style, **WHEN[when])


# -----------------------------------------------------------------------------
# what is said under each picture


class Caption(NamedTuple):
    """The two texts under a picture: what it shows, and what it shows for a healthy model."""

    drawn: str
    healthy: str


CAPTIONS = {
    "curves": Caption(
        "Loss, learning rate, loops and speed in training. Validation is measured at the run's own "
        "loops.",
        "the losses fall without lasting spikes and end close together; validation that rises "
        "while training falls says that the model memorizes.",
    ),
    "costs": Caption(
        "Validation loss against the FLOPs and seconds that training had taken. A pale band: the "
        "range over seeds. A horizontal line: nothing is looped; its dot is where that run ended.",
        "the line of a looped run passes below and to the left of the dot of the plain one, for "
        "then it is better at less cost.",
    ),
    "sweep": Caption(
        "Losses on validation from 1 loop to 4 times the loops of the config (star). The wide pale "
        "line covers the loops in training: nine in ten draws, where they are drawn.",
        "the loss falls over the first loops, is lowest within or behind the pale line, and stays "
        "level to its right.",
    ),
    "levels": Caption(
        "The staircase: accuracy against loops, a line for each level of the task. Dashed: levels "
        "that no row in training had. A star: the loops that the level gets.",
        "each line, dashed ones too, has reached 1 at its star and stays there behind it.",
    ),
    "states": Caption(
        "How far a loop moves the state of a token, how far the state is from the last one, its "
        "norm, and how alike the states of different tokens are. Lines are means over the tokens "
        "of the text, bands hold eight in ten tokens.",
        "change and distance fall from loop to loop, the norm becomes level, and the cosine stays "
        "well below 1, where all tokens would be the same.",
    ),
    "trajectories": Caption(
        "The states of some tokens from loop to loop, in the two directions in which they differ "
        "most. The last state is large.",
        "steps become shorter, as each token runs to a place of its own or circles around one.",
    ),
    "residual": Caption(
        "The residual stream of some tokens from the embedding (dark) to the last pass through a "
        "block (light), in the two directions in which it differs most.",
        "lines of different tokens spread out with depth and end apart from one another.",
    ),
    "exits": Caption(
        "Share of the tokens of validation by the loop where they stop.",
        "bright cells move to the left from row to row, as looser thresholds stop tokens sooner, "
        "and a row has several, as tokens differ.",
    ),
    "pareto": Caption(
        "Loss against mean loops, over the thresholds of each rule, and with the same loops for "
        "all tokens.",
        "the line of a rule lies below the black one: it loops where that helps.",
    ),
    "attention": Caption(
        "Each head in each pass through a block: how far back it attends, how spread out, how much "
        "to the first token, and how much to what followed the same token before (induction, on "
        "random tokens twice in a row).",
        "heads differ: some look near and some far, and in a trained text model some do induction.",
    ),
    "distances": Caption(
        "Share of attention by distance.",
        "rows differ, and few of them have all their weight in one column.",
    ),
    "map": Caption(
        "Attention from the token of the row to the token of the column, for each head.",
        "maps show diagonals, columns or blocks, and heads differ.",
    ),
    "spectra": Caption(
        "Singular values, largest first, of the matrices inside the loops.",
        "values fall evenly, and the first neither towers over the others nor still grows.",
    ),
}
