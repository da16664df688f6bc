"""
Pictures of a model, each with its numbers beside it, and one page that holds them all (index.html):

    python analyze.py --out_dir=out-quickstart
    python analyze.py --out_dir=out-quickstart --start="def loop(self" --n_loop=16 --tokens=0,4,-1 --maps=0,7
    python analyze.py --compare out-mha out-mla --to=out-compared
    python analyze.py --out_dir=gpt2 --start="The loop goes round and round" --to=out-gpt2

Of whatever sample.py opens. What needs a log, a validation set or a loop is left out where there is none, and the page
says so.
"""

import base64
import csv
import importlib.util
import io
import json
import shlex
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import pretrained
from configurator import check_ranges, clear_errors, configure
from model import GPT
from nanorecur import checkpoint, figures
from nanorecur.dataset import Split, load_meta, make_tokenizer, open_split, write_atomically
from nanorecur.hardware import pick_device

# -----------------------------------------------------------------------------
out_dir = "out"  # folder of a run, a checkpoint file, an exported folder, gpt2, or hf:<name>
compare = ""  # several of them in one picture, in place of out_dir: --compare out_a out_b, or --compare=out_a,out_b
to = ""  # the folder to write; "": analysis in the (first) run's folder
dataset = ""  # whose validation set is measured: a folder under data/, or a path; "": the one the run was trained on
windows = 32  # of validation, spread evenly, in which losses are measured
start = ""  # the text that is looked at, or FILE:prompt.txt; "": the beginning of validation
length = 64  # tokens of validation to look at where there is no start
repeats = 1  # the text so often in a row
tokens = ()  # which of its tokens to follow, such as 0,5,-1; (): six in the trajectories, all in the residual stream
n_loop = 0  # loops of every group in states, exits and lens; 0: as many as training goes up to
exit_rule = "KL"  # of the text coloured by exits: state, KL, entropy, argmax, gate
exit_threshold = 0.01  # of exit_rule
maps = ()  # attention maps of these passes through a block, counted from 0 in the order of the forward pass
spectral_clip_beta = 1.0  # where spectra are clipped, to show what that would do
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is


def joined(argv):
    """--compare a b as --compare=a,b."""
    words = []
    for word in argv:
        if words and words[-1].partition("=")[0] == "--compare" and not word.startswith("--"):
            words[-1] += ("," if "=" in words[-1] else "=") + word
        else:
            words.append(word)
    return words


configure(globals(), argv=joined(sys.argv[1:]))


# -----------------------------------------------------------------------------
# what is looked at
class Run(NamedTuple):
    name: str
    model: GPT
    log: list  # entries of log.jsonl
    steps: int | None  # of training
    earlier: tuple | None  # model and steps of ckpt_prev.pt
    split: Split | None  # validation
    why: str  # there is none
    idx: torch.Tensor  # (1, T), the text
    texts: list  # its tokens, each as text
    decode: object  # id -> text
    n_ids: int  # that the tokenizer knows


class Part(NamedTuple):
    run: Run
    group: int  # a looped one
    loops: int
    states: torch.Tensor  # (n, T, C)
    likeliest: np.ndarray  # (n, T, ranks)
    probabilities: np.ndarray


def open_run(source, name):
    """ValueError that names what is wrong with it."""
    saved = checkpoint.exists(source) or Path(source).is_file()
    ckpt = checkpoint.load(source) if saved else {}
    model = (pretrained.build(ckpt).eval() if saved else pretrained.load(source)).to(device)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{source}: the weights are not all finite numbers")
    named = ckpt.get("tokenizer") or pretrained.tokenizer_of(source)
    split, meta, why = validation(
        dataset or ckpt.get("config", {}).get("dataset"), named, model.config
    )
    if (
        not (named or meta) and not 50257 <= model.config.vocab_size <= 50304
    ):  # else GPT-2's, maybe padded
        raise ValueError(
            f"{source}: names no tokenizer, and {model.config.vocab_size} ids are not GPT-2's 50,257"
        )
    tokenizer = make_tokenizer(named or meta or {"tokenizer": "gpt2"})
    if not start and split is None:
        raise ValueError(f"{source}: {why}; give --start some text to look at")
    ids = (
        tokenizer.encode(text_of(start))
        if start
        else split.tokens[: min(length, model.block_size)].tolist()
    )
    ids = check_text(ids * repeats, model)
    earlier = previous(Path(source), ckpt)

    def shown(i):  # what is beyond the tokenizer is padding
        return visible(tokenizer.decode([i])) if i < tokenizer.vocab_size else ""

    return Run(
        name,
        model,
        read_log(Path(source)),
        ckpt.get("iter_num"),
        earlier,
        split,
        why,
        torch.tensor([ids], device=device),
        [shown(i) for i in ids],
        shown,
        min(tokenizer.vocab_size, model.config.vocab_size),
    )


def validation(name, named, config):
    """(split, its meta, "") of a prepared folder, or (None, None, why there is none)."""
    if not name:
        return None, None, "no validation set is known; --dataset= takes one"
    folder = Path(__file__).parent / "data" / name
    try:
        meta = load_meta(folder)
        if named and any(named.get(key) != meta.get(key) for key in ("tokenizer", "chars")):
            raise ValueError(f"dataset={name}: must be one with the tokenizer of the checkpoint")
        known = min(meta["vocab_size"], config.vocab_size)
        return open_split(folder, "val", meta, config.block_size, known), meta, ""
    except ValueError as error:
        if dataset:  # asked for
            raise
        return None, None, str(error)


def text_of(text):
    """The text, or with FILE: in front of it that of a file."""
    if not text.startswith("FILE:"):
        return text
    return Path(text.removeprefix("FILE:")).read_text("utf-8", "surrogateescape")


def check_text(ids, model):
    if len(ids) < 4:
        raise ValueError(
            f"the text has {len(ids)} tokens: the pictures need at least 4, give --start more"
        )
    if len(ids) > model.block_size:
        raise ValueError(f"the text has {len(ids)} tokens, more than block_size={model.block_size}")
    if not all(type(i) is int and -len(ids) <= i < len(ids) for i in tokens):
        raise ValueError(
            f"tokens={tokens}: must be from {-len(ids)} to {len(ids) - 1}, places in the text"
        )
    n_passes = len(figures.passes(model.config))
    if not all(type(i) is int and 0 <= i < n_passes for i in maps):
        raise ValueError(f"maps={maps}: must be from 0 to {n_passes - 1}, passes through a block")
    return ids


def previous(source, ckpt):
    """(model, steps) of the checkpoint before the newest, None where it is not there, or not whole."""
    try:
        before = checkpoint.read(source / checkpoint.PREVIOUS)
    except ValueError:
        return None
    return (
        (pretrained.build(before), before["iter_num"])
        if before["iter_num"] != ckpt["iter_num"]
        else None
    )


def read_log(folder):
    """The entries of a run's log.jsonl, [] where there is none."""
    path, entries = folder / "log.jsonl", []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        try:
            entries.append(json.loads(line))
            figures.curves(entries[-1:])
        except (ValueError, KeyError, TypeError, StopIteration):
            raise ValueError(f"{path}: line {number} is not one that train.py writes") from None
    return entries


def visible(text):
    """A token's text with signs for what cannot be seen."""
    signs = {" ": "\u2423", "\n": "\u21b5", "\t": "\u2192"}
    return "".join(signs.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


with clear_errors():
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures need matplotlib; run: pip install matplotlib")
    check_ranges(
        globals(),
        {
            "windows": range(1, 10**6),
            "length": range(4, 10**6),
            "repeats": range(1, 10**3),
            "n_loop": range(10**4),
        },
    )
    if exit_rule not in figures.THRESHOLDS:
        raise ValueError(f"exit_rule={exit_rule!r}: must be one of {', '.join(figures.THRESHOLDS)}")
    if exit_threshold < 0:
        raise ValueError(f"exit_threshold={exit_threshold}: must be at least 0")
    if spectral_clip_beta <= 0:
        raise ValueError(f"spectral_clip_beta={spectral_clip_beta}: must be positive")
    device, began = pick_device(device), time.perf_counter()
    sources = list(dict.fromkeys(filter(None, compare.split(",")))) or [out_dir]
    if not to and not Path(sources[0]).is_dir():
        raise ValueError(f"--to needs a value, the folder to write: {sources[0]} is none")
    names = [Path(source).name for source in sources]
    short = len({*names}) == len(names)  # else the whole path tells them apart
    runs = [open_run(source, name if short else source) for source, name in zip(sources, names)]
    folder = Path(to or Path(sources[0], "analysis"))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}  # the looped groups of all runs by name
    for run in runs:
        for group, (_, most) in enumerate(trained := figures.trained_range(run.model.config)):
            name, n = run.name + f", group {group}" * (len(trained) > 1), n_loop or int(most)
            parts[name] = Part(run, group, n, *figures.look(run.model, run.idx, group, n))
            if not parts[name].states.isfinite().all():
                raise ValueError(
                    f"{name}: the states of {n} loops are not finite, try a smaller --n_loop"
                )
    if exit_rule == "gate" and any(
        part.run.model.config.exit_gate == "none" for part in parts.values()
    ):
        raise ValueError("exit_rule=gate: must be another one for a model without exit_gate")

# -----------------------------------------------------------------------------
# the page: elements, so that every text in it is escaped
html = ET.Element("html", lang="en")
head, body = ET.SubElement(html, "head"), ET.SubElement(html, "body")
ET.SubElement(head, "meta", charset="utf-8")
ET.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
n_pictures = 0


def add(parent, tag, text="", **attributes):
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def picture(name, caption, figure, data):
    """Write name.png and name.npz, whose arrays are called "run:array", and put the picture on the page."""
    global n_pictures
    n_pictures += 1
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    (folder / f"{name}.png").write_bytes(buffer.getvalue())
    np.savez(
        folder / f"{name}.npz",
        **{f"{run}:{key}": array for run, d in data.items() for key, array in d.items()},
    )
    block = add(body, "figure")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    add(block, "img", src=f"data:image/png;base64,{encoded}", alt=caption)
    add(block, "figcaption", f"{caption} Numbers: {name}.npz")


def table(names, rows, shares=None):
    """Rows of texts; shares (0 to 1) of the same shape colour the cells."""
    inside = add(add(body, "div", **{"class": "wide"}), "table")
    top = add(inside, "tr")
    for name in names:
        add(top, "th", name)
    for i, row in enumerate(rows):
        line = add(inside, "tr")
        for j, text in enumerate(row):
            share = None if shares is None else shares[i][j]
            add(line, "td", text, **({} if share is None else {"style": colours(share)}))


def colours(share):
    background, ink = figures.shade(share)
    return f"background: {background}; color: {ink}"


def left_out(what, whose, why):
    add(body, "p", f"Left out for {whose}: {what}, because {why}.", **{"class": "left-out"})


def places(run, default):
    """The tokens to follow, as places in the text, and what they are called."""
    T = len(run.texts)
    chosen = sorted({i % T for i in tokens}) or default
    return chosen, [f"{i} {run.texts[i]}" for i in chosen]


title = "Analysis of " + ", ".join(run.name for run in runs)
add(head, "title", title)
add(head, "style", (Path(__file__).parent / "assets" / "page.css").read_text("utf-8"))
add(body, "h1", title)
rows = []
for run in runs:
    config = run.model.config
    groups = "; ".join(
        f"{', '.join(map(str, blocks))} x {n}" for blocks, n in zip(config.groups, config.counts())
    )
    rows.append(
        (
            run.name,
            f"{run.model.get_num_params() / 1e6:.2f}M",
            str(config.n_physical),
            groups or "none",
            str(config.n_effective),
            config.attention,
            "unknown" if run.steps is None else f"{run.steps:,}",
        )
    )
table(
    (
        "run",
        "parameters",
        "blocks",
        "looped blocks x loops",
        "passes",
        "attention",
        "training steps",
    ),
    rows,
)
for run in runs:
    if not run.model.config.groups:
        left_out(
            "the depth sweep, states over loops, exits, spectra and lens",
            run.name,
            "nothing in it is looped",
        )

# -----------------------------------------------------------------------------
# training curves
add(body, "h2", "Training")
logs = {run.name: figures.curves(run.log) for run in runs if run.log}
if logs:
    caption = "Loss, bits per byte, learning rate, loops and speed over training; validation at the run's own depth."
    picture("curves", caption, figures.draw_curves(logs), logs)
for run in runs:
    if not run.log:
        left_out("training curves", run.name, "there is no log.jsonl")

# -----------------------------------------------------------------------------
# loss against loops, on the windows that train.py evaluates when it is given as many
if parts:
    add(body, "h2", "Depth")
sweeps, scored = {}, {}
for run in runs:
    if run.split is not None:
        starts = run.split.spread(min(windows, run.split.n_windows))
        scored[run.name] = x, y = [
            torch.from_numpy(array).to(device) for array in run.split.windows(starts)
        ]
    if run.model.config.groups and run.split is None:
        left_out("losses at each depth and of early exits", run.name, run.why)
    elif run.model.config.groups:
        tried = figures.loops_to_try(4 * max(run.model.config.counts()))
        per_byte = run.split.n_tokens / run.split.n_bytes
        sweeps[run.name] = figures.depth_sweep(run.model, x, y, tried, per_byte)
if sweeps:
    caption = (
        "Validation at one to four times the configured depth (star). Wide and pale: where nine in ten draws of "
        "training lie."
    )
    picture("sweep", caption, figures.draw_sweep(sweeps), sweeps)
    rows = [
        (
            name,
            str(n),
            f"{data['loss'][i]:.4f}",
            f"{data['bits_per_byte'][i]:.4f}",
            f"{data['accuracy'][i]:.2%}",
        )
        for name, data in sweeps.items()
        for i, n in enumerate(data["loops"])
    ]
    table(("run", "loops", "loss (nats/token)", "bits/byte", "accuracy"), rows)

# -----------------------------------------------------------------------------
# states over loops, and the residual stream
if parts:
    add(body, "h2", "States over loops")
    measured = {name: figures.state_measures(part.states) for name, part in parts.items()}
    caption = (
        "How far a loop moves the state of a token, how far that is from the last one, its norm, and how alike "
        "tokens are. Lines: mean over the tokens of the text; bands: eight in ten of them."
    )
    picture("states", caption, figures.draw_states(measured), measured)
    paths, texts = {}, {}
    for name, part in parts.items():
        T = len(part.run.texts)
        chosen, texts[name] = places(
            part.run, np.linspace(0, T - 1, min(6, T)).astype(int).tolist()
        )
        paths[name] = figures.trajectories(part.states, chosen)
    caption = (
        "The states of some tokens from loop to loop, in the two directions in which they differ most; the "
        "last is large."
    )
    picture("trajectories", caption, figures.draw_trajectories(paths, texts), paths)

add(body, "h2", "Residual stream")
paths, texts = {}, {}
for run in runs:
    chosen, texts[run.name] = places(run, list(range(len(run.texts))))
    paths[run.name] = figures.residual_stream(run.model, run.idx, chosen)
caption = (
    "The residual stream of each token from the embedding (dark) to the last pass of a block (light), in the "
    "two directions in which it differs most."
)
picture("residual", caption, figures.draw_residual(paths, texts), paths)

# -----------------------------------------------------------------------------
# how many loops a token needs
if parts:
    add(body, "h2", "Loops a token needs")
    add(
        body,
        "p",
        "A token stops after the first loop that changes little any more. This is measured on full forward "
        "passes: what is read out after a loop has seen all tokens stop there.",
    )
for number, (name, (run, group, n, *_)) in enumerate(parts.items()):
    course = figures.exit_course(run.model, run.idx, run.idx, group, n)
    depths = figures.exit_depths(course[exit_rule], exit_threshold)
    add(
        body,
        "h3",
        f"{name}: the text by the loops of each token, {exit_rule} below {exit_threshold:g}",
    )
    low, high = depths.min(), depths.max()
    key = [(f"{depth} loops", depth) for depth in range(low, high + 1)]
    for kind, spans in ("key", key), ("text", zip(run.texts, depths)):
        line = add(body, "p", **{"class": kind})
        for text, depth in spans:
            add(
                line,
                "span",
                text,
                style=colours((depth - low) / max(1, high - low)),
                title=f"{depth} loops",
            )
    with open(folder / f"exits_{number}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("token", "text", "loops"), *zip(range(len(depths)), run.texts, depths)]
        )
found = {
    name: figures.exits(figures.exit_course(run.model, *scored[run.name], group, n))
    for name, (run, group, n, *_) in parts.items()
    if run.name in scored
}
if found:
    caption = (
        "Share of validation's tokens that stop after so many loops, by criterion and threshold."
    )
    picture("exits", caption, figures.draw_exits(found), found)
    caption = (
        "What stopping early costs: loss against mean loops, over the thresholds of each criterion, and with "
        "the same loops for all tokens."
    )
    picture("pareto", caption, figures.draw_pareto(found), found)
    rows = [
        (
            name,
            rule,
            f"{t:.2g}",
            f"{loops:.2f}",
            f"{loss:.4f}",
            f"{loss - data['fixed loss'][-1]:+.4f}",
        )
        for name, data in found.items()
        for rule in figures.THRESHOLDS
        if f"{rule} loss" in data
        for t, loops, loss in zip(
            *(data[f"{rule} {what}"] for what in ("threshold", "loops", "loss"))
        )
    ]
    table(
        ("run", "criterion", "threshold", "mean loops", "loss (nats/token)", "against all loops"),
        rows,
    )

# -----------------------------------------------------------------------------
# attention
add(body, "h2", "Attention")
attended = {}
for run in runs:
    x = scored[run.name][0][:8, :256] if run.name in scored else run.idx
    attended[run.name] = figures.attention(
        run.model, x, run.n_ids, min(64, run.model.block_size // 2)
    )
caption = (
    "Every head of every pass through a block: how far back it looks, how spread out, how much at the first "
    "token, and how much at what followed the same token before (induction, on random tokens twice in a row)."
)
picture("attention", caption, figures.draw_attention(attended), attended)
caption = "Share of attention by distance."
picture("distances", caption, figures.draw_distances(attended), attended)
for number, run in enumerate(runs):
    for i, (name, weights) in zip(maps, figures.attention_maps(run.model, run.idx, maps).items()):
        caption = f"Attention of {run.name}, block/loop {name}, from the text's token of the row to that of the column."
        picture(
            f"map_{number}_{i}",
            caption,
            figures.draw_maps(weights, run.texts),
            {run.name: {name: weights}},
        )

# -----------------------------------------------------------------------------
# spectra
if parts:
    add(body, "h2", "Spectra of the looped matrices")
    spectra = {}
    for run in (run for run in runs if run.model.config.groups):
        spectra[run.name] = figures.spectra(
            run.model, run.earlier and run.earlier[0], spectral_clip_beta
        )
        before = (
            f"dotted: as it was after {run.earlier[1]:,} steps"
            if run.earlier
            else "no earlier checkpoint"
        )
        add(
            body,
            "p",
            f"{run.name}: solid: as it is, {before}, dashed: what spectral_clip_beta={spectral_clip_beta:g} "
            "would leave.",
        )
    caption = "Singular values, largest first, of the matrices inside the loops."
    picture("spectra", caption, figures.draw_spectra(spectra), spectra)

# -----------------------------------------------------------------------------
# what would be predicted after every loop
if parts:
    add(body, "h2", "Predictions after every loop")
    lines = [("run", "loop", "token", "text", "rank", "prediction", "probability")]
for name, (run, group, n, _, likeliest, probabilities) in parts.items():
    words = np.vectorize(run.decode, otypes=[object])(likeliest)
    said = {
        place: f"{words[place]} {probabilities[place]:.0%}" for place in np.ndindex(words.shape)
    }
    shown, T = [i - 1 for i in figures.loops_to_try(n, 12)], len(run.texts)
    titles = [f"{i + 1}{'*' * (i + 1 == run.model.config.counts()[group])}" for i in shown]
    ranks, last = range(words.shape[2]), range(max(0, T - 12), T)
    add(body, "h3", f"{name}: the likeliest tokens after the text (*: loops as configured)")
    rows = [[title, *(said[i, T - 1, rank] for rank in ranks)] for i, title in zip(shown, titles)]
    table(
        ("loop", *(f"rank {rank + 1}" for rank in ranks)),
        rows,
        [[None, *probabilities[i, -1]] for i in shown],
    )
    add(body, "h3", f"{name}: the likeliest token after each of the last")
    rows = [[f"{t} {run.texts[t]}", *(said[i, t, 0] for i in shown)] for t in last]
    shares = [[None, *probabilities[shown, t, 0]] for t in last]
    table(("after token", *(f"loop {title}" for title in titles)), rows, shares)
    lines += [
        (name, i + 1, t, run.texts[t], rank + 1, words[i, t, rank], probabilities[i, t, rank])
        for i, t, rank in said
    ]
if parts:
    with open(folder / "lens.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)

# -----------------------------------------------------------------------------
add(body, "p", "Made by: python " + shlex.join(sys.argv), **{"class": "left-out"})
text = "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html")
write_atomically(folder / "index.html", text.encode("utf-8", "surrogateescape"))
print(f"{folder / 'index.html'}: {n_pictures} pictures in {time.perf_counter() - began:.0f} s")
