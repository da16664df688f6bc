"""
One page about a model (index.html): findings in words, a sample, and pictures with their numbers:

    python analyze.py out-quickstart
    python analyze.py out-quickstart --watch=30                    again at each new checkpoint
    python analyze.py out-quickstart --start="def loop(self" --n_loop=16 --maps=0,7
    python analyze.py out-mha out-mla --to=out-compared            several runs in one picture
    python analyze.py gpt2 --start="The loop goes round and round" --to=out-gpt2

A picture that needs a log, a validation split or a loop is left out where there is none, and the
page says so.
"""

import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import pretrained
from configurator import check_ranges, clear_errors, configure, require
from decode import generate
from model import GPT, GPTConfig
from nanorecur import checkpoint, findings, measure, run_table, watching
from nanorecur.curriculum import loops_at
from nanorecur.dataset import Split, load_meta, open_split
from nanorecur.exit_rules import ExitRule, make_exit
from nanorecur.files import runs_here
from nanorecur.hardware import DTYPES, Progress, autocast, pick_device, pick_dtype
from nanorecur.tokenizer import Tokenizer, make_tokenizer, same_tokenizer

# -----------------------------------------------------------------------------
# what is analyzed, and where the page goes
out_dir = "out"  # the folder of a run
source = ""  # or a checkpoint file, an exported folder, gpt2, hf:<name>; the first bare argument
compare = ""  # several of these, or a folder of runs, in one picture: --compare a b, or a b alone
to = ""  # folder to write; "": analysis in the (first) run's folder, or analysis-<name> here
watch = 0  # seconds between looks for a new checkpoint, until the run has ended, on the CPU; 0: off
refresh = 0  # seconds after which a browser loads the page again; 0: never
# losses on validation
windows = 0  # windows to score; 0: those that train.py evaluates, 32 where that is unknown
dataset = ""  # prepared folder whose validation split is scored; "": the one of the training
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
# the text that is run through the model for states, attention maps and predictions
start = ""  # the text, or FILE:prompt.txt; "": from the validation split, see length
length = 64  # tokens from the beginning of the validation split, or of its last row for a task
new_tokens = 200  # tokens that the model writes behind the text, or behind its first 32; 0: none
repeats = 1  # how often the text stands in a row
tokens = ()  # positions in the text to draw, such as 0,5,-1; (): six, in the residual stream 16
# the loops
n_loop = 0  # loops in states, early exit and predictions; 0: as many as training goes up to
exit_rule = "kl"  # colors the text by each token's loops: state, kl, entropy, argmax, gate
automatic_loop_exit_threshold = 0.01  # threshold of exit_rule, as in sample.py; 0: never
# rarely
maps = ()  # passes whose attention maps are drawn, counted from 0 in the order of a forward pass
spectral_clip_beta = 1.0  # bound of the singular values in the picture of clipped spectra


def join_compared(argv: list[str]) -> list[str]:
    """Return the arguments with several bare ones a b, or --compare a b, as one --compare=a,b."""
    bare = [word for word in argv if not word.startswith("-")]
    options = [word for word in argv if word.startswith("-") and (word != "--compare" or not bare)]
    if len(bare) < 2:
        return options + bare
    return [*options, f"--compare={','.join(bare)}"]


configure(globals(), argv=join_compared(sys.argv[1:]), positional="source")
began = time.perf_counter()


def write_page(is_live: bool) -> bool:
    """Run this script for one page of a run that is watched; return whether it wrote one."""
    words = [word for word in sys.argv[1:] if not word.startswith(("--watch", "--refresh"))]
    words += ["--device=cpu"] if device == "auto" else []
    words += [f"--refresh={watch}"] if is_live else []
    return watching.run_behind([sys.executable, __file__, *words])


if watch:
    with clear_errors():
        check_ranges(globals(), {"watch": (1, math.inf)})
        watched = Path(source or out_dir)
        legal = not compare and (watched / "config.json").is_file()
        require("watch", watch, legal, "0, or with the folder of one run, which has begun")
        watching.watch(watched, watch, write_page)
    sys.exit()
with clear_errors():
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures need matplotlib; run: pip install matplotlib")

from nanorecur import plots  # noqa: E402 (it imports matplotlib, and -h needs none)
from nanorecur.page import Page, colors  # noqa: E402


# -----------------------------------------------------------------------------
# opening a run: model, log, validation split, text
class Run(NamedTuple):
    """A model and what is known about it."""

    name: str
    source: str  # as pretrained.load takes it
    model: GPT
    config: dict  # train.py's options; {}: unknown
    steps: int | None  # of training; None: unknown
    log: list  # entries of log.jsonl
    sessions: list  # entries of sessions.jsonl, one for each start of the run
    previous: tuple | None  # the checkpoint before the newest: (model, steps)
    validation: Split | None
    no_validation: str  # why there is no validation split
    tokenizer: Tokenizer
    idx: Tensor  # (1, T), the text


class LoopedGroup(NamedTuple):
    """A looped group of a run, and its text after each of n loops of this group."""

    run: Run
    index: int  # among the looped groups of the model
    n: int
    rule: ExitRule | None  # --exit_rule; None: never
    text: measure.TextStates


def open_run(source: str, name: str) -> Run:
    """Return the run of a source. ValueError names what is wrong with it."""
    is_checkpoint = checkpoint.exists(source) or Path(source).is_file()
    ckpt = checkpoint.load(source) if is_checkpoint else {}
    model = pretrained.build(ckpt).eval() if is_checkpoint else pretrained.load(source)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{source}: the weights are not all finite numbers")
    known = ckpt.get("tokenizer") or pretrained.tokenizer_of(source)
    config = ckpt.get("config", {})
    validation, meta, no_validation = find_validation(config.get("dataset"), known, model)
    if not start and not validation:
        raise ValueError(f"{source}: {no_validation}; give --start some text to look at")
    tokenizer = find_tokenizer(source, known or meta, model)
    ids = find_text(tokenizer, validation, model)
    return Run(
        name=name,
        source=source,
        model=model.to(device),
        config=config,
        steps=ckpt.get("iter_num"),
        log=read_lines(Path(source, "log.jsonl"), measure.training_curves),
        sessions=read_lines(Path(source, "sessions.jsonl"), commands_of),
        previous=read_previous(source, ckpt),
        validation=validation,
        no_validation=no_validation,
        tokenizer=tokenizer,
        idx=torch.tensor([ids], device=device),
    )


def find_tokenizer(source: str, known: dict | None, model: GPT) -> Tokenizer:
    """Return the known tokenizer, else GPT-2's. ValueError where the ids are not GPT-2's."""
    if not known and not 50257 <= model.config.vocab_size <= 50304:  # 50,257 and maybe padding
        ids = f"{model.config.vocab_size} ids are not GPT-2's 50,257"
        raise ValueError(f"{source}: names no tokenizer, and {ids}")
    return make_tokenizer(known or {"tokenizer": "gpt2"})


def find_validation(trained_on: str | None, known: dict | None, model: GPT) -> tuple:
    """Return (split, meta, ""), or (None, None, why there is no validation split).

    known: the tokenizer of the checkpoint, None where it names none. ValueError for a --dataset
    that cannot be used.
    """
    name = dataset or trained_on
    if not name:
        return None, None, "no validation split is known; --dataset= takes one"
    folder = Path(__file__).parent / "data" / name
    try:
        meta = load_meta(folder)
        fits = not known or same_tokenizer(known, meta)
        require("dataset", name, fits, "one with the tokenizer of the checkpoint")
        known_ids = min(meta["vocab_size"], model.config.vocab_size)
        return open_split(folder, "val", meta, model.block_size, known_ids), meta, ""
    except ValueError as error:
        if dataset:
            raise
        return None, None, str(error)


def find_text(tokenizer: Tokenizer, validation: Split | None, model: GPT) -> list[int]:
    """Return the tokens of --start, or of validation. ValueError if too many.

    Of a task the last row, which has the highest level, up to its last target.
    """
    ids = []
    if start:
        ids = tokenizer.encode(read_text(start))
    elif validation.row:
        x, _ = validation.windows(validation.spread(validation.n_windows)[-1:])
        ids = x[0, :length].tolist()
    if not start and len(ids) < 4:  # no row, or a very short one
        ids = validation.tokens[: min(length, model.block_size)].tolist()
    check_text(ids * repeats, model)
    return ids * repeats


def check_text(ids: list[int], model: GPT) -> None:
    """Raise ValueError where the text is too short or too long, or --tokens or --maps beyond it."""
    T = len(ids)
    if T < 4:
        needed = "the pictures need at least 4, give --start more"
        raise ValueError(f"the text has {T} tokens: {needed}")
    if T > model.block_size:
        raise ValueError(f"the text has {T} tokens, more than block_size={model.block_size}")
    legal = all(type(i) is int and -T <= i < T for i in tokens)
    require("tokens", tokens, legal, f"from {-T} to {T - 1}, positions in the text")
    n_passes = len(measure.pass_names(model.config))
    legal = all(type(i) is int and 0 <= i < n_passes for i in maps)
    require("maps", maps, legal, f"from 0 to {n_passes - 1}, passes through a block")


def read_text(text: str) -> str:
    """Return the text, or that of the file in FILE:name."""
    if not text.startswith("FILE:"):
        return text
    return Path(text.removeprefix("FILE:")).read_text("utf-8", "surrogateescape")


def read_previous(source: str, ckpt: dict) -> tuple[GPT, int] | None:
    """Return (model, steps) of the checkpoint before the newest, if there is an undamaged one."""
    try:
        previous = checkpoint.read(Path(source, checkpoint.PREVIOUS))
    except ValueError:
        return None
    if previous["iter_num"] == ckpt["iter_num"]:
        return None
    return pretrained.build(previous).to(device), previous["iter_num"]


def read_lines(path: Path, check: Callable) -> list[dict]:
    """Return the entries of a file of JSON lines, none where there is no such file.

    check: called with a list of one entry; raises where that is not one of train.py's. A last line
    without its end, which a run may be about to write, is left out where it is none.
    """
    entries = []
    lines = path.read_text(errors="replace").splitlines(True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            check([entry])
            entries.append(entry)
        except (ValueError, KeyError, TypeError, StopIteration):
            if line.endswith("\n"):
                message = f"{path}: line {number} is not one that train.py writes"
                raise ValueError(message) from None
    return entries


def commands_of(sessions: list[dict]) -> list[str]:
    """Return the commands that started a run."""
    return [session["command"] + "" for session in sessions]


def looped_groups(run: Run) -> dict[str, LoopedGroup]:
    """Return the looped groups of a run by their names on the page."""
    groups = {}
    ranges = measure.trained_range(run.model.config)
    for index, (_, most) in enumerate(ranges):
        name = f"{run.name}, group {index}" if len(ranges) > 1 else run.name
        n = n_loop or int(most)
        rule = make_exit(run.model, exit_rule, automatic_loop_exit_threshold)
        text = measure.text_states(run.model, run.idx, index, n)
        if not text.states.isfinite().all():
            advice = "try a smaller --n_loop"
            raise ValueError(f"{name}: the states of {n} loops are not finite, {advice}")
        groups[name] = LoopedGroup(run, index, n, rule, text)
    return groups


def token_text(run: Run, token: int) -> str:
    """Return the text of a token with signs for what cannot be seen; "" for padding ids."""
    if token >= run.tokenizer.vocab_size:
        return ""
    signs = {" ": "\u2423", "\n": "\u21b5", "\t": "\u2192"}
    text = ""
    for c in run.tokenizer.decode([token]):
        text += signs.get(c, c if c.isprintable() else f"\\x{ord(c):02x}")
    return text


def texts_of(run: Run) -> list[str]:
    """Return the text of each token of the run's text."""
    return [token_text(run, token) for token in run.idx[0].tolist()]


def spread_tokens(run: Run, most: int) -> list[int]:
    """Return evenly spaced positions in the run's text, from the first to the last."""
    T = run.idx.size(1)
    return np.linspace(0, T - 1, min(most, T)).astype(int).tolist()


def chosen_tokens(run: Run, default: list[int]) -> tuple[list[int], list[str]]:
    """Return the positions of --tokens, or the default ones, and a name for each."""
    texts = texts_of(run)
    chosen = sorted({i % len(texts) for i in tokens}) or default
    return chosen, [f"{i} {texts[i]}" for i in chosen]


# -----------------------------------------------------------------------------
# which windows of validation are scored
EXPORTED = {"eval_iters": 1, "batch_size": 32, "eval_stride": 0}  # settings where none are known


def own_windows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, n_scored) of the windows of validation that train.py evaluates."""
    settings = {name: run.config.get(name, value) for name, value in EXPORTED.items()}
    return measure.evaluated_windows(run.validation, settings)


def scored(run: Run) -> tuple[Tensor, Tensor]:
    """Return the windows (x, y), each (N, T), of validation in which losses are measured."""
    chosen = measure.spread_windows(run.validation, windows) if windows else own_windows(run)
    x, y = run.validation.windows(*chosen)
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def scoring_dtype(run: Run) -> torch.dtype:
    """Return what the run's evaluations compute in on this device; float32 where it is unknown."""
    name = run.config.get("dtype")
    return pick_dtype(name if name in ("auto", *DTYPES) else "float32", device)


def text_of(run: Run) -> str:
    """Return the name of the run's validation split: that of its folder and of its file."""
    path = Path(run.validation.path)
    return f"{path.parent.name}/{path.name}"


def windows_in_words(run: Run) -> str:
    """Return a sentence on the windows of validation in which losses are measured."""
    n, n_own = len(scored(run)[1]), len(own_windows(run)[0])
    text = f"{run.name}: losses are measured on {n:,} windows of {text_of(run)}"
    if "eval_iters" not in run.config:
        return f"{text}."
    if run.config.get("stream"):
        return f"{text}; train.py evaluates others, held out of its stream."
    if dataset:
        return f"{text}; train.py evaluates {n_own:,} of {run.config['dataset']}."
    if n != n_own:
        return f"{text}; train.py evaluates {n_own:,}, so that its losses differ a little."
    return f"{text}, those that train.py evaluates."


def runs_of(name: str) -> list[str]:
    """Return the runs in the folder of a sweep, or what else has been named, alone."""
    if checkpoint.exists(name) or Path(name, "config.json").exists():
        return [name]
    return list(map(str, run_table.runs_inside(Path(name)))) or [name]


def find_sources() -> list[str]:
    """Return what is analyzed. ValueError where there is no run in out_dir."""
    if compare:
        require("source", source, not source, "left out, or one of those in compare")
        compared = []
        for name in filter(None, compare.split(",")):
            compared += runs_of(name)
        return list(dict.fromkeys(compared))
    if source:
        return runs_of(source)
    if not checkpoint.exists(out_dir):
        found = ", ".join(runs_here()) or "none"
        raise ValueError(f"{out_dir}: no such checkpoint; runs here: {found}")
    return [out_dir]


def folder_to_write() -> Path:
    """Return the folder of the page."""
    if to:
        return Path(to)
    first = Path(sources[0])
    if first.is_dir():
        return first / "analysis"
    return Path(f"analysis-{first.name.removeprefix('hf:')}")


with clear_errors():
    limits = {"length": (4, math.inf), "repeats": (1, 999), "n_loop": (0, 9999)}
    limits |= dict.fromkeys(("windows", "new_tokens", "refresh"), (0, math.inf))
    check_ranges(globals(), limits)
    require("spectral_clip_beta", spectral_clip_beta, spectral_clip_beta > 0, "positive")
    device = pick_device(device)
    sources = find_sources()
    names = [Path(source).name for source in sources]
    if len(set(names)) < len(names):
        names = sources
    runs = [open_run(source, name) for source, name in zip(sources, names)]
    groups = {}
    for run in runs:
        groups |= looped_groups(run)
    folder = folder_to_write()
    folder.mkdir(parents=True, exist_ok=True)


# -----------------------------------------------------------------------------
# sections of the page, in order
def add_facts(page: Page, runs: list[Run]) -> None:
    """Add a table of what is known of the runs, without what is known of none."""
    page.append("h2", "The run" if len(runs) == 1 else "The runs")
    facts = {
        run.name: findings.facts_of(run.model, run.config, run.steps, run.log, run.sessions)
        for run in runs
    }
    known = [name for name in facts[runs[0].name] if any(of_run[name] for of_run in facts.values())]
    rows = [[name, *(of_run[name] for of_run in facts.values())] for name in known]
    page.table(["", *facts], rows, kind="facts")
    for run in runs:
        if not run.model.config.groups:
            pictures = "states over loops, early exit, spectra and predictions"
            left_out(page, pictures, run, "nothing in it is looped")


def add_losses(page: Page, run: Run) -> None:
    """Add a table of the losses that train.py logged last at this checkpoint or before it."""
    last_step = math.inf if run.steps is None else run.steps
    entries = [entry for entry in run_table.evaluations(run.log) if entry["iter"] <= last_step]
    if not entries:
        return
    page.append("h3", f"{run.name}: losses that train.py logged at step {entries[-1]['iter']:,}")
    names = {"loss": "{:.4f}", "bits_per_byte": "{:.4f}", "accuracy": "{:.2%}", "exact": "{:.2%}"}
    last, rows = entries[-1]["eval"], []
    names = {name: form for name, form in names.items() if name in last[0]}
    for row in last:
        own = "*" if row["loops"] == last[0]["loops"] else ""
        loops = f"{run_table.in_words(row['loops'])}{own}"
        cells = [names[name].format(row[name]) if name in row else "" for name in names]
        rows.append([row["split"], loops, *cells])
    heads = {"loss": "loss (nats/token)", "bits_per_byte": "bits/byte", "exact": "rows all right"}
    page.table(["split", "loops (*: own)", *(heads.get(name, name) for name in names)], rows)


# -----------------------------------------------------------------------------
# what the model writes
SHOWN_PROMPT = 32  # tokens of a text from validation that the sample continues
TEMPERATURE, TOP_K, SEED = 0.8, 200, 1337  # of the sample, as in sample.py


def add_sample(page: Page, run: Run) -> None:
    """Add what the model writes behind the text, or behind the beginning of one from validation."""
    prompt = run.idx if start else run.idx[:, :SHOWN_PROMPT]
    config, tokenizer = run.model.config, run.tokenizer
    ids, _ = generate(
        run.model,
        prompt,
        new_tokens,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        vocab_size=min(tokenizer.vocab_size, config.vocab_size),
        generator=torch.Generator(device).manual_seed(SEED),
    )
    page.append("h3", f"{run.name}: {new_tokens} tokens behind a prompt (bold)")
    line = page.append("p", kind="text sample")
    page.add(line, "b", printable(tokenizer.decode(prompt[0].tolist())))
    line[-1].tail = printable(tokenizer.decode(ids[0, prompt.size(1) :].tolist()))
    loops = f"{run_table.in_words(config.counts())} loops, " if config.groups else ""
    how = f"Drawn with {loops}temperature={TEMPERATURE}, top_k={TOP_K}, seed={SEED}."
    page.append("p", how, "note")


def printable(text: str) -> str:
    """Return a text with \\x07 and the like for what is neither printable nor white space."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def add_rows(page: Page, run: Run) -> None:
    """Add rows of a task, of its lowest, middle and highest level, with the model's answers."""
    split, levels = run.validation, run.validation.level_numbers()
    rows = []
    for level in dict.fromkeys((levels[0], levels[len(levels) // 2], levels[-1])):
        n_loop = loops_of(run, level)
        start_of_row = np.array([split.rows_of_level(level)[0] * split.step])
        x, y = (torch.from_numpy(part).to(device) for part in split.windows(start_of_row))
        found, right = answer(run, x, y, n_loop).tolist(), y[y >= 0].tolist()
        asked = x[0] if split.targets is not None else x[0, : split.row["prompt"]]
        texts = [printable(run.tokenizer.decode(ids)) for ids in (asked.tolist(), right, found)]
        n_right = sum(a == b for a, b in zip(found, right))
        loops = run_table.in_words(run.model.config.counts(n_loop))
        rows.append([str(level), loops, f"{n_right} of {len(right)}", *texts])
    page.append("h3", f"{run.name}: rows of {text_of(run)} and the model's answers")
    page.table(["level", "loops", "right", "row", "right answer", "the model's"], rows)


def loops_of(run: Run, level: int) -> int | None:
    """Return the loops of a level in training, None where it has none of its own."""
    pair = run.config.get("loops_of_level")
    return loops_at(pair, level) if pair and run.model.config.groups else None


@torch.no_grad()
def answer(run: Run, x: Tensor, y: Tensor, n_loop: int | None) -> Tensor:
    """Return the likeliest ids (n,) for the n targets of one row x, y (1, T).

    Targets that stand beside a row are predicted at once, others one after the other.
    """
    if run.validation.targets is not None:
        return run.model(x, y, n_loop)[0].argmax(-1)[y >= 0]
    prompt = x[:, : run.validation.row["prompt"]]
    count = int((y >= 0).sum())
    known = min(run.tokenizer.vocab_size, run.model.config.vocab_size)
    ids, _ = generate(run.model, prompt, count, n_loop=n_loop, temperature=0.0, vocab_size=known)
    return ids[0, prompt.size(1) :]


def left_out(page: Page, pictures: str, run: Run, reason: str) -> None:
    page.append("p", f"Left out for {run.name}: {pictures}, because {reason}.", "note")


def add_training(page: Page, runs: list[Run]) -> None:
    page.append("h2", "Training")
    curves = {run.name: measure.training_curves(run.log) for run in runs}
    curves = {name: data for name, data in curves.items() if data}
    if curves:
        page.picture("curves", plots.draw_curves(curves), curves)
    for run in runs:
        if not run.log:
            left_out(page, "training curves", run, "there is no log.jsonl")


def add_costs(page: Page, runs: list[Run]) -> None:
    """Add losses against what training had cost, where several runs have a log."""
    logged = [
        run_table.Run(run.name, vars(GPTConfig()) | run.config, run.log)
        for run in runs
        if run.config and run.log
    ]
    curves = run_table.cost_curves(logged) if len(logged) > 1 else {}
    if curves:
        page.picture("costs", plots.draw_costs(curves), curves)


def add_depth(page: Page, runs: list[Run]) -> dict[str, measure.Arrays]:
    """Add the loss at each number of loops, on the windows that train.py evaluates; return it."""
    page.append("h2", "Depth" if groups else "Loss on validation")
    sweeps = {}
    for run in runs:
        if not run.validation:
            left_out(page, "losses at each depth and with early exit", run, run.no_validation)
            continue
        progress.now(f"{run.name}: losses at each depth")
        sweeps[run.name] = sweep_of(run)
        page.append("p", windows_in_words(run), "note")
    if not sweeps:
        return {}
    if groups:
        more = ""
        if any(len(sweep["loops"]) == 0 for sweep in sweeps.values()):
            more = " A horizontal line: nothing is looped."
        page.picture("sweep", plots.draw_sweep(sweeps), sweeps, more)
    names = ["run", "loops", "loss (nats/token)", "bits/byte", "accuracy"]
    page.table(names, [row for name, sweep in sweeps.items() for row in sweep_rows(name, sweep)])
    return sweeps


def add_levels(page: Page, runs: list[Run]) -> None:
    """Add accuracy against loops for each level of a task, as the run's last evaluation found."""
    for number, run in enumerate(runs):
        data = measure.level_curves(run.log)
        if not data:
            continue
        figure = plots.draw_levels(run.name, data)
        page.picture(f"levels_{number}", figure, {run.name: data})


def sweep_of(run: Run) -> measure.Arrays:
    """Return the losses of a run at loop counts up to four times its own."""
    counts, loops = run.model.config.counts(), []
    if counts:
        loops = measure.loops_to_try(4 * max(counts))
    per_byte = run.validation.n_tokens / run.validation.n_bytes
    with autocast(device, scoring_dtype(run)):
        return measure.depth_sweep(run.model, *scored(run), loops, per_byte)


def sweep_rows(name: str, sweep: measure.Arrays) -> list[list[str]]:
    """Return a row for each loop count; the first, with a star, is at the config's own."""
    columns = ("loss", "bits_per_byte", "accuracy")
    own = ",".join(map(str, sweep["configured"]))
    rows = [
        [name, f"{own}*" if own else "-", *(sweep[f"configured_{column}"] for column in columns)]
    ]
    for i, n in enumerate(sweep["loops"]):
        if str(n) != own:
            rows.append([name, str(n), *(sweep[column][i] for column in columns)])
    return [[*cells, f"{loss:.4f}", f"{b:.4f}", f"{share:.2%}"] for *cells, loss, b, share in rows]


def add_states(page: Page, groups: dict[str, LoopedGroup]) -> dict[str, measure.Arrays]:
    """Add how the states behave over the loops, and return it."""
    page.append("h2", "States over loops")
    measures, paths, texts = {}, {}, {}
    for name, group in groups.items():
        states = group.text.states
        measures[name] = measure.state_measures(states)
        chosen, texts[name] = chosen_tokens(group.run, spread_tokens(group.run, 6))
        paths[name] = measure.trajectories(states, chosen)
    page.picture("states", plots.draw_states(measures), measures)
    page.picture("trajectories", plots.draw_trajectories(paths, texts), paths)
    return measures


def add_residual(page: Page, runs: list[Run]) -> None:
    page.append("h2", "Residual stream")
    paths, texts = {}, {}
    for run in runs:
        chosen, texts[run.name] = chosen_tokens(run, spread_tokens(run, 16))
        paths[run.name] = measure.residual_stream(run.model, run.idx, chosen)
    page.picture("residual", plots.draw_residual(paths, texts), paths)


# -----------------------------------------------------------------------------
# early exit
EXIT_WORDS = {  # of exit_rule: a token stops once ...
    "state": "a loop changes its state by less than {} of the norm",
    "kl": "the KL divergence of its predictions before and after a loop is below {} nats",
    "entropy": "a loop changes the entropy of its prediction by less than {} nats",
    "argmax": "its likeliest next token has stayed the same for {} loops",
    "gate": "the gate has stopped it with a probability of at least {}",
}


def add_exits(page: Page, groups: dict[str, LoopedGroup]) -> None:
    """Add each text colored by the loops of its tokens, as they are in decoding."""
    page.append("h2", "Early exit")
    when = EXIT_WORDS[exit_rule].format(f"{automatic_loop_exit_threshold:g}")
    text = f"A token stops looping once {when}. This is exit_rule={exit_rule}."
    if automatic_loop_exit_threshold == 0:
        text = "No token stops early, since automatic_loop_exit_threshold is 0."
    page.append("p", text)
    for number, (name, group) in enumerate(groups.items()):
        run, texts = group.run, texts_of(group.run)
        loops = measure.exit_loops(run.model, run.idx, group.rule, group.index, group.n)
        page.append("h3", f"{name}: the text, colored by the loops of each token")
        add_colored_text(page, texts, loops)
        note = exit_note(group)
        if note:
            page.append("p", note, "note")
        rows = zip(range(len(loops)), texts, loops)
        page.write_csv(f"exits_{number}.csv", [("token", "text", "loops"), *rows])


def add_colored_text(page: Page, texts: list[str], loops: np.ndarray) -> None:
    """Add a key of the colors, then the tokens of a text in the color of their loops."""
    fewest, most = loops.min(), loops.max()
    key = [(loops_in_words(n), n) for n in range(fewest, most + 1)]
    for kind, spans in {"key": key, "text": zip(texts, loops)}.items():
        line = page.append("p", kind=kind)
        for text, n in spans:
            style = colors((n - fewest) / max(1, most - fewest))
            page.add(line, "span", text, style=style, title=loops_in_words(n))


def loops_in_words(n: int) -> str:
    return f"{n} loop" if n == 1 else f"{n} loops"


def exit_note(group: LoopedGroup) -> str:
    """Return how these loops relate to decoding, with the command that decodes so."""
    counts, model = group.run.model.config.counts(), group.run.model
    if not group.rule:
        return ""
    if group.index < len(counts) - 1 and not group.rule.every_group:
        return (
            f"With exit_rule={exit_rule} decoding stops tokens in the last looped group alone. The "
            "rule would stop them so here."
        )
    note = "The loops are those of decoding, token by token"
    _, _, behind = model.around_group(None, group.index)
    if behind and exit_rule in ("kl", "entropy", "argmax"):
        note += (
            ", but for a few tokens: the rule reads predictions, and blocks stand behind the loop"
        )
    if len(counts) > 1 and group.n != counts[group.index]:  # sample.py has one n_loop for all
        return f"{note}."
    return f"{note}: {sample_command(group)}"


def sample_command(group: LoopedGroup) -> str:
    """Return the command that decodes with these exits."""
    words = ["python", "sample.py", f"--source={group.run.source}"]
    words += ["--automatic_loop_exit", f"--exit_rule={exit_rule}"]
    words.append(f"--automatic_loop_exit_threshold={automatic_loop_exit_threshold}")
    if group.n != group.run.model.config.counts()[-1]:
        words.append(f"--n_loop={group.n}")
    return shlex.join(words)


def exit_curves(groups: dict[str, LoopedGroup]) -> dict[str, measure.Arrays]:
    """Return what every exit rule does at every threshold, of the groups with validation."""
    curves = {}
    for name, group in groups.items():
        model = group.run.model
        if group.run.validation:
            progress.now(f"{name}: every exit rule at every threshold")
            measured = measure.exit_measures(model, *scored(group.run), group.index, group.n)
            curves[name] = measure.exit_curves(model, measured)
    return curves


FULL_PASSES = (
    "measured on full forward passes over validation: each loop is computed for all tokens, and a "
    "token counts by the prediction of the loop where its rule stops it. In decoding, later tokens "
    "read what stopped tokens left behind, which changes these numbers a little."
)


def add_exit_costs(page: Page, curves: dict[str, measure.Arrays]) -> None:
    page.append("h3", "What early exit costs")
    page.append("p", f"The next picture is {FULL_PASSES}", "note")
    page.picture("pareto", plots.draw_pareto(curves), curves)


def add_exit_shares(page: Page, curves: dict[str, measure.Arrays]) -> None:
    page.append("h2", "Every exit rule at every threshold")
    page.append("p", f"The next picture and the table are {FULL_PASSES}", "note")
    page.picture("exits", plots.draw_exits(curves), curves)
    names = ["run", "exit_rule", "threshold", "mean loops", "loss (nats/token)"]
    rows = [row for name, data in curves.items() for row in exit_rows(name, data)]
    page.table([*names, "against all loops"], rows)


def exit_rows(name: str, curves: measure.Arrays) -> list[list[str]]:
    rows = []
    for rule in measure.THRESHOLDS:
        for i, threshold in enumerate(curves.get(f"{rule} threshold", ())):
            loops, loss = curves[f"{rule} loops"][i], curves[f"{rule} loss"][i]
            numbers = [f"{threshold:.3g}", f"{loops:.2f}", f"{loss:.4f}"]
            rows.append([name, rule, *numbers, f"{loss - curves['fixed loss'][-1]:+.4f}"])
    return rows


# -----------------------------------------------------------------------------
# attention, spectra, predictions
def attention_of(run: Run) -> measure.Arrays:
    """Return what the heads of a run attend to, on validation or else on the text."""
    x = scored(run)[0][:8, :256] if run.validation else run.idx
    n_ids = min(run.tokenizer.vocab_size, run.model.config.vocab_size)
    return measure.attention(run.model, x, n_ids, min(64, run.model.block_size // 2))


def add_attention(page: Page, measured: dict[str, measure.Arrays]) -> None:
    page.append("h2", "Attention")
    page.picture("attention", plots.draw_attention(measured), measured)


def add_distances(page: Page, measured: dict[str, measure.Arrays]) -> None:
    page.append("h2", "Attention by distance")
    page.picture("distances", plots.draw_distances(measured), measured)


def add_attention_maps(page: Page, runs: list[Run]) -> None:
    for number, run in enumerate(runs):
        all_weights = measure.attention_maps(run.model, run.idx)
        names = measure.pass_names(run.model.config)
        for i in dict.fromkeys(maps):
            figure = plots.draw_maps(all_weights[i], texts_of(run))
            data = {run.name: {names[i]: all_weights[i]}}
            more = f" {run.name}, block/loop {names[i]}."
            page.picture(f"map_{number}_{i}", figure, data, more)


def add_spectra(page: Page, runs: list[Run]) -> None:
    page.append("h2", "Spectra of the looped matrices")
    spectra = {}
    for run in runs:
        if not run.model.config.groups:
            continue
        earlier, before = None, "there is no earlier checkpoint"
        if run.previous:
            earlier, steps = run.previous
            before = f"dotted: after {steps:,} steps"
        spectra[run.name] = measure.spectra(run.model, earlier, spectral_clip_beta)
        clipped = f"dashed: as spectral_clip_beta={spectral_clip_beta:g} would leave it"
        page.append("p", f"{run.name}: solid: as it is; {before}; {clipped}.")
    page.picture("spectra", plots.draw_spectra(spectra), spectra)


def add_predictions(page: Page, groups: dict[str, LoopedGroup]) -> None:
    page.append("h2", "Predictions after each loop")
    rows = [("run", "loop", "token", "text", "rank", "prediction", "probability")]
    for name, group in groups.items():
        words = prediction_words(group)
        n_shown = min(12, group.run.idx.size(1))
        page.append("h3", f"{name}: the likeliest tokens after the text (*: loops of the config)")
        add_last_prediction(page, group, words)
        page.append("h3", f"{name}: the likeliest token after each of the last {n_shown} tokens")
        add_prediction_course(page, group, words, n_shown)
        rows += lens_rows(name, group, words)
    page.write_csv("lens.csv", rows)


def prediction_words(group: LoopedGroup) -> np.ndarray:
    """Return the texts (n, T, ranks) of the likeliest tokens."""
    likeliest = group.text.likeliest
    words = {token: token_text(group.run, token) for token in np.unique(likeliest).tolist()}
    return np.vectorize(words.get, otypes=[object])(likeliest)


def shown_loops(group: LoopedGroup) -> dict[int, str]:
    """Return the loops that the tables show, counted from 0, and their names, from 1."""
    configured = group.run.model.config.counts()[group.index]
    loops = measure.loops_to_try(group.n, 12)
    return {n - 1: f"{n}*" if n == configured else str(n) for n in loops}


def add_last_prediction(page: Page, group: LoopedGroup, words: np.ndarray) -> None:
    """Add a table of the likeliest tokens after the text, a row for each loop."""
    rows, shares = [], []
    for i, loop in shown_loops(group).items():
        p = group.text.probabilities[i, -1]  # (ranks,)
        rows.append([loop, *(f"{word} {share:.0%}" for word, share in zip(words[i, -1], p))])
        shares.append([None, *p])
    ranks = range(1, words.shape[-1] + 1)
    page.table(["loop", *(f"rank {rank}" for rank in ranks)], rows, shares)


def add_prediction_course(page: Page, group: LoopedGroup, words: np.ndarray, n_shown: int) -> None:
    """Add a table of the likeliest token after each of the last tokens, a column for each loop."""
    texts, loops = texts_of(group.run), shown_loops(group)
    rows, shares = [], []
    for t in range(len(texts) - n_shown, len(texts)):
        p = group.text.probabilities[list(loops), t, 0]  # (loops,)
        best = words[list(loops), t, 0]
        cells = [f"{word} {share:.0%}" for word, share in zip(best, p)]
        rows.append([f"{t} {texts[t]}", *cells])
        shares.append([None, *p])
    page.table(["after token", *(f"loop {loop}" for loop in loops.values())], rows, shares)


def lens_rows(name: str, group: LoopedGroup, words: np.ndarray) -> list[tuple]:
    """Return the rows of lens.csv: a line for each loop, token and rank."""
    texts, rows = texts_of(group.run), []
    for i, t, rank in np.ndindex(words.shape):
        p = group.text.probabilities[i, t, rank]
        rows.append((name, i + 1, t, texts[t], rank + 1, words[i, t, rank], p))
    return rows


# -----------------------------------------------------------------------------
# findings: three sentences about each run, above everything else
def add_findings(page: Page, run: Run, found: list[str]) -> None:
    """Add the run in a sentence, and a list of findings."""
    spent = findings.spent_on(run.log)
    trained = {"dataset": run.config.get("dataset"), "max_iters": run.config.get("max_iters")}
    trained |= {"steps": run.steps, "tokens": spent.get("tokens"), "seconds": spent.get("elapsed")}
    model = run.model
    sentence = findings.run_sentence(run.name, model.config, model.get_num_params(), trained)
    page.append("p", sentence, "lead")
    items = page.append("ul", kind="findings")
    for text in found:
        page.add(items, "li", text)
    for name, group in groups.items():
        if group.run is run and not n_loop:
            page.append("p", findings.loops_measured(name, model.config, group.n), "note")


def findings_of(run: Run, sweep: dict, heads: dict, states: dict, exits: dict) -> list[str]:
    """Return the first three findings that there are, those about loops before others.

    sweep, heads: of the run; states, exits: by the names of its looped groups.
    """
    several = len(states) > 1
    found = [findings.levels_finding(measure.level_curves(run.log))]
    found += [findings.depth_finding(sweep)] if sweep else []
    if states:  # of several groups the last, whose loops are the likeliest to end early
        name = list(states)[-1]
        found.append(findings.settling_finding(states[name]["change"], name if several else ""))
    if exits:
        name = list(exits)[-1]
        found.append(findings.exit_finding(exits[name], name if several else ""))
    if sweep:
        found.append(findings.loss_finding(sweep, run.model.config.vocab_size))
    found.append(fit_of(run))
    found.append(findings.induction_finding(heads["induction"]))
    found.append(findings.first_token_finding(heads["on the first token"]))
    found.append(findings.reach_finding(heads["mean distance"]))
    return list(filter(None, found))[:3]


def fit_of(run: Run) -> str:
    """Return how the last logged losses of training and validation data compare, "" for none."""
    entries = run_table.evaluations(run.log)
    rows = entries[-1]["eval"] if entries else []
    train = [row["loss"] for row in rows if row["split"] == "train"]
    if not train:
        return ""
    losses = measure.training_curves(entries)["val loss"]
    return findings.fit_finding(train[0], losses[-1], losses.min())


# -----------------------------------------------------------------------------
title = f"Analysis of {len(runs)} runs" if len(runs) > 2 else f"Analysis of {' and '.join(names)}"
page = Page(folder, title, refresh)
with Progress() as progress:
    page.part = page.main
    progress.now("a sample")
    for run in runs:
        add_losses(page, run)
        if run.validation and run.validation.row:
            add_rows(page, run)
        elif new_tokens:
            add_sample(page, run)
    add_facts(page, runs)
    add_training(page, runs)
    add_costs(page, runs)
    sweeps = add_depth(page, runs)
    add_levels(page, runs)
    states = add_states(page, groups) if groups else {}
    curves = exit_curves(groups)
    if groups:
        add_exits(page, groups)
    if curves:
        add_exit_costs(page, curves)
    progress.now("attention")
    heads = {run.name: attention_of(run) for run in runs}
    add_attention(page, heads)
    if groups:
        progress.now("predictions, spectra of the looped matrices, the residual stream")
        add_predictions(page, groups)
    page.part = page.more
    if curves:
        add_exit_shares(page, curves)
    add_residual(page, runs)
    add_distances(page, heads)
    if maps:
        add_attention_maps(page, runs)
    if groups:
        add_spectra(page, runs)
page.part = page.top
for run in runs:
    of_run = [name for name, group in groups.items() if group.run is run]
    of_states = {name: states[name] for name in of_run}
    exits = {name: curves[name] for name in of_run if name in curves}
    sweep = sweeps.get(run.name, {})
    add_findings(page, run, findings_of(run, sweep, heads[run.name], of_states, exits))
page.part = page.footer
page.append("p", "Made by: python " + shlex.join(sys.argv), "note")
path = page.write()
print(f"{path}: {page.n_pictures} pictures in {time.perf_counter() - began:.0f} s")
