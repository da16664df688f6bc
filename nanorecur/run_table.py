"""
Many runs: the grid that repeated options span, and runs as the rows of a table.

A row is a flat dict, so that Markdown, CSV and JSON show the same. It comes from config.json and
log.jsonl alone; FLOPs and parameters are counted on a model without contents.
"""

import csv
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import Knob, freeze, read_argument, require, show
from model import GPTConfig
from nanorecur import options
from nanorecur.estimate import depths_of
from nanorecur.objectives import Objective
from nanorecur.resuming import OF_THE_MACHINE
from nanorecur.training_step import make_objective

NAMES_ONLY = {"out_dir", "init_from", "wandb_run_name"}  # no part of an experiment
NEUTRAL = OF_THE_MACHINE | NAMES_ONLY | {"log_interval", "save_interval", "keep_last", "keep_every"}
NEUTRAL |= {"recompute", "tensorboard"}  # may change between calls
NEUTRAL |= {"wandb_log", "wandb_mode", "wandb_project"}
RESUMABLE = ("scratch", "resume", "auto")  # values of init_from that name no other weights
SCORES = ("loss", "bits_per_byte", "exact")  # what an evaluation says of a split, where it has it
NOT_AVERAGED = ("run", "state", "steps", "loops")


class Run(NamedTuple):
    """A run's folder, read."""

    name: str
    config: dict
    log: list[dict]


# -----------------------------------------------------------------------------
# the grid


def split_grid(arguments: list[str], knobs: dict[str, Knob]) -> tuple[list[str], dict]:
    """Return (arguments of all runs, {option: {value in words: argument}} of repeated options).

    An option that is repeated with one value is an argument of all runs.
    """
    values = {}
    for argument in arguments:
        if argument.startswith("--"):
            ((name, value),) = read_argument(argument, knobs).items()
            values.setdefault(name, {})[show(value)] = argument
    grid = {name: by_value for name, by_value in values.items() if len(by_value) > 1}
    fixed = []
    for argument in arguments:
        if not argument.startswith("--") or option_name(argument) not in grid:
            fixed.append(argument)
    return fixed, grid


def option_name(argument: str) -> str:
    """Return the name of an argument --name=value or --name."""
    return argument[2:].partition("=")[0]


def grid_points(grid: dict) -> Iterator[tuple[str, list[str]]]:
    """Yield (name of a folder, arguments) of each point of a grid, the last option fastest.

    Raises ValueError where two points would share a folder.
    """
    names = set()
    for point in itertools.product(*(by_value.items() for by_value in grid.values())):
        words = [f"{name}={value}" for name, (value, _) in zip(grid, point)]
        folder = re.sub(r"[^\w.,=+-]", "_", "+".join(words))
        if folder in names:
            raise ValueError(f"{folder}: two runs would have this folder")
        names.add(folder)
        yield folder, [argument for _, argument in point]


# -----------------------------------------------------------------------------
# reading runs


def read_run(folder: str | Path) -> Run:
    """Return the run in a folder. Raises ValueError where its files are not those of train.py."""
    path = Path(folder, "config.json")
    try:
        stored = json.loads(path.read_text())
        config = vars(GPTConfig()) | {name: freeze(value) for name, value in stored.items()}
        tokens_per_step(config), config["max_iters"] + 0
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: missing, or not one that train.py writes") from None
    config = options.defaults() | config  # a run of older code has fewer options
    return Run(str(folder), config, read_log(Path(folder, "log.jsonl")))


def read_log(path: Path) -> list[dict]:
    """Return the entries of a log; a last line that a kill left incomplete is left out."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entries.append(entry | {"iter": entry["iter"] + 0})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                message = f"{path}: line {number} is not one that train.py writes"
                raise ValueError(message) from None
    return entries


def run_folders(sources: Iterable[str]) -> list[Path]:
    """Return the folders of runs among sources and, where one is no run, directly inside it."""
    folders = []
    for source in map(Path, sources):
        found = [source] if (source / "config.json").exists() else runs_inside(source)
        if not found:
            raise ValueError(f"{source}: holds no run, for it has no config.json")
        folders += found
    return folders


def runs_inside(folder: Path) -> list[Path]:
    """Return the folders of the runs directly inside a folder, such as that of a sweep."""
    return sorted(path.parent for path in folder.glob("*/config.json"))


def changed_options(config: dict, wanted: dict) -> list[str]:
    """Return the options in which a run differs from what is wanted of it now.

    Not compared are those that may change before a run goes on, and those that its data, or the
    weights that it began with, decide.
    """
    decided = {"vocab_size", "block_size"}
    if wanted["init_from"] not in RESUMABLE:
        decided |= set(GPTConfig.__dataclass_fields__)
    names = [name for name in wanted if name in config and name not in NEUTRAL | decided]
    return [name for name in names if config[name] != wanted[name]]


# -----------------------------------------------------------------------------
# what a log says


def evaluations(log: list[dict]) -> list[dict]:
    return [entry for entry in log if entry.get("eval")]


def steps_done(log: list[dict]) -> int:
    """Return the number of steps that a log tells of."""
    done = 0
    for entry in log:
        finished = 0 if "eval" in entry else 1  # an evaluation stands before the step it names
        done = max(done, entry["iter"] + finished)
    return done


def is_finished(run: Run) -> bool:
    """Return True where the evaluation after the last step is logged."""
    return any(entry["iter"] >= run.config["max_iters"] for entry in evaluations(run.log))


def validation_rows(entry: dict) -> list[dict]:
    """Return the rows of an evaluation that score next tokens of val, the model's own depth first.

    Raises ValueError where there is none.
    """
    rows = [row for row in entry["eval"] if row["split"] == "val" and row["shift"] == 1]
    if not rows:
        raise ValueError(f"the evaluation at step {entry['iter']} has no row of val")
    return rows


def losses(run: Run) -> dict[int, float]:
    """Return {step: validation loss at the model's own depth}."""
    entries = evaluations(run.log)
    return {entry["iter"]: validation_rows(entry)[0]["loss"] for entry in entries}


def in_words(loops: Iterable[int]) -> str:
    return ",".join(map(str, loops)) or "-"


def score_cells(run: Run) -> dict:
    """Return the last evaluation's scores: at the model's own depth, then at each depth."""
    entries = evaluations(run.log)
    if not entries:
        return {}
    own, *others = validation_rows(entries[-1])
    cells = {"loops": in_words(own["loops"])}
    cells |= {name: own[name] for name in SCORES if name in own}
    for row in (own, *others):
        depth = in_words(row["loops"])
        cells |= {f"{name}_at_{depth}": row[name] for name in SCORES if name in row}
    return cells


# -----------------------------------------------------------------------------
# what a run costs


def tokens_per_step(config: dict) -> int:
    return config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"]


def model_of(config: dict) -> Objective:
    """Return the objective of a config and in it the model, as tensors without contents."""
    with torch.device("meta"):
        return make_objective(config)


def mean_flops(config: dict, objective: Objective) -> float:
    """Return the training FLOPs per token, the mean over the depths that are drawn."""
    depths = depths_of(config, objective.model).items()
    return sum(share * objective.flops_per_token(depth) for depth, share in depths)


def training_flops(config: dict) -> float:
    """Return the FLOPs of all steps of a config, evaluations not counted."""
    flops_per_token = mean_flops(config, model_of(config))
    return flops_per_token * tokens_per_step(config) * config["max_iters"]


def cost_cells(run: Run) -> dict:
    """Return parameters, FLOPs, tokens and seconds.

    Tokens, FLOPs and seconds are those that the log adds up; of steps behind its last such line
    they are taken in proportion. A log without them leaves seconds empty, and the others to be
    computed. With loops_of_level FLOPs per token are the mean of the steps that were made.
    """
    objective = model_of(run.config)
    cells = {"parameters": objective.model.get_num_params()}
    cells["flops_per_token"] = mean_flops(run.config, objective)
    cells["tokens"] = steps_done(run.log) * tokens_per_step(run.config)
    cells["flops"] = cells["flops_per_token"] * cells["tokens"]
    cells["seconds"] = None
    totals = [entry for entry in run.log if entry.get("tokens") and "elapsed" in entry]
    if totals:
        last = totals[-1]
        share = steps_done(run.log) / (last["iter"] + 1)
        cells["tokens"] = round(share * last["tokens"])
        cells["flops"] = share * last["flops"]
        cells["seconds"] = share * last["elapsed"]
        if run.config.get("loops_of_level"):
            cells["flops_per_token"] = last["flops"] / last["tokens"]
    return cells


# -----------------------------------------------------------------------------
# losses against cost


def cost_curves(runs: list[Run]) -> dict[str, dict[str, np.ndarray]]:
    """Return validation losses against cost, a curve for each set of runs that differ in the seed.

    Arrays over the steps after 0 at which all runs of the set were evaluated: flops and seconds
    spent on steps so far, loss, its least and its largest over the seeds. looped: False where
    nothing is looped. seconds are nan where a log does not tell them.
    """
    curves = {}
    for members in seed_sets(runs):
        name = members[0].name
        if len(members) > 1:
            name += f", {len(members)} seeds"
        by_step = [losses(run) for run in members]
        steps = [step for step in by_step[0] if step and all(step in run for run in by_step)]
        if steps:
            spent = np.mean([spent_at(run, steps) for run in members], axis=0)
            values = np.array([[run[step] for step in steps] for run in by_step])
            curves[name] = {
                "flops": spent[0],
                "seconds": spent[1],
                "loss": values.mean(0),
                "least": values.min(0),
                "largest": values.max(0),
                "looped": np.array(bool(gpt_config(members[0].config).groups)),
            }
    return curves


def seed_sets(runs: list[Run]) -> list[list[Run]]:
    """Return runs in sets that differ in the seed alone; names and machines do not count."""
    different = differing_options([run.config for run in runs])
    sets = {}
    for run in runs:
        key = tuple(show(run.config.get(name, "")) for name in different if name != "seed")
        sets.setdefault(key, []).append(run)
    return list(sets.values())


def spent_at(run: Run, steps: list[int]) -> np.ndarray:
    """Return the FLOPs and seconds that a run had spent on training before these steps, (2, n)."""
    done, flops, seconds = [0], [0.0], [0.0]
    for entry in run.log:
        if "flops" in entry and "elapsed" in entry:
            done.append(entry["iter"] + 1)
            flops.append(entry["flops"])
            seconds.append(entry["elapsed"])
    if len(done) == 1:  # the log of an earlier version
        of_one = mean_flops(run.config, model_of(run.config)) * tokens_per_step(run.config)
        return np.stack((of_one * np.array(steps), np.full(len(steps), np.nan)))
    beyond = np.maximum(1, np.array(steps) / done[-1])  # behind the last such line, in proportion
    return np.stack([beyond * np.interp(steps, done, spent) for spent in (flops, seconds)])


def gpt_config(config: dict) -> GPTConfig:
    return GPTConfig(**{name: config[name] for name in GPTConfig.__dataclass_fields__})


# -----------------------------------------------------------------------------
# the table


def differing_options(configs: list[dict]) -> list[str]:
    """Return the options that do not have one value in all configs, without mere names."""
    names = dict.fromkeys(itertools.chain(*configs))
    different = []
    for name in names:
        values = {show(config.get(name, "")) for config in configs}
        if len(values) > 1 and name not in NAMES_ONLY:
            different.append(name)
    return different


def table_rows(runs: list[Run], curve: dict | None = None) -> list[dict]:
    """Return a row for each run, then a mean and a standard error for each set of seeds.

    curve: as from read_curve, adds how far each run is from it.
    """
    different = differing_options([run.config for run in runs])
    rows = []
    for run in runs:
        steps, last = steps_done(run.log), run.config["max_iters"]
        state = "finished" if is_finished(run) else f"step {steps:,} of {last:,}"
        row = {"run": run.name, "state": state}
        row |= {name: show(run.config.get(name, "")) for name in different}
        row |= cost_cells(run) | score_cells(run)
        if curve is not None:
            row |= distance_cells(run, curve)
        rows.append(row)
    return rows + seed_rows(runs, rows, different)


def seed_rows(runs: list[Run], rows: list[dict], different: list[str]) -> list[dict]:
    """Return a mean and a standard error of the finished runs that differ in the seed alone."""
    row_of = {id(run): row for run, row in zip(runs, rows)}
    added = []
    for members in seed_sets([run for run in runs if is_finished(run)]):
        by_seed = {run.config.get("seed"): row_of[id(run)] for run in members}
        if len(by_seed) > 1:
            added += mean_and_error(list(by_seed.values()), different)
    return added


def mean_and_error(rows: list[dict], different: list[str]) -> list[dict]:
    """Return two rows, the mean and its standard error, of the numbers that all rows have."""
    n = len(rows)
    options = {name: rows[0][name] for name in different if name != "seed"}
    mean = {"run": f"mean of {n} seeds", **options}
    error = {"run": "standard error", **options}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        is_number = all(isinstance(value, (int, float)) for value in values)
        if is_number and name not in NOT_AVERAGED:
            mean[name] = statistics.fmean(values)
            error[name] = statistics.stdev(values) / math.sqrt(n)
    return [mean, error]


# -----------------------------------------------------------------------------
# formats


def column_names(rows: list[dict]) -> list[str]:
    """Return the columns of rows, in their order, then the scores by depth."""
    return sorted(dict.fromkeys(itertools.chain(*rows)), key=place_of)


def place_of(name: str) -> tuple[int, list[int]]:
    """Return what columns are sorted by: of loss_at_4,2 the score and the loops, of others 0."""
    score, _, depth = name.partition("_at_")
    if not depth:
        return 0, []
    return 1 + SCORES.index(score), [int(n) for n in re.findall(r"\d+", depth)]


def as_markdown(rows: list[dict]) -> str:
    """Return rows as a Markdown table, without bits per byte at further depths."""
    names = [name for name in column_names(rows) if not name.startswith("bits_per_byte_at_")]
    cells = [[cell(name, row.get(name)) for name in names] for row in rows]
    return markdown([name.replace("_", " ") for name in names], cells)


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, column_names(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def as_json(rows: list[dict]) -> str:
    return json.dumps(rows, indent=1)


FORMATS = {"markdown": as_markdown, "csv": as_csv, "json": as_json}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns are aligned in the source too."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * max(3, width) for width in widths], *rows]
    padded = []
    for line in lines:
        cells = (text.ljust(max(3, width)) for text, width in zip(line, widths))
        padded.append("| " + " | ".join(cells) + " |")
    return "\n".join(padded)


def side_by_side(rows: list[dict]) -> str:
    """Return a Markdown table with a column for each row."""
    head, *names = column_names(rows)
    lines = []
    for name in names:
        lines.append([name.replace("_", " "), *(cell(name, row.get(name)) for row in rows)])
    return markdown(["", *(row[head] for row in rows)], lines)


def cell(name: str, value: object) -> str:
    """Return a value as the table for people shows it, "" for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if name.startswith("flops"):
        return f"{value:.4g}"
    if name.startswith(SCORES):
        return f"{value:.4f}"
    if isinstance(value, int) or name in ("parameters", "tokens"):
        return f"{value:,.0f}"
    return f"{value:,.1f}"


# -----------------------------------------------------------------------------
# reference curves: the mean loss of several runs, step by step, and half the range they span


def mean_curve(runs: list[Run]) -> list[dict]:
    """Return {"iter", "loss", "spread"} at every step that all runs were evaluated at."""
    curves = [losses(run) for run in runs]
    points = []
    for step in curves[0]:
        if all(step in curve for curve in curves):
            values = [curve[step] for curve in curves]
            spread = (max(values) - min(values)) / 2
            points.append({"iter": step, "loss": statistics.fmean(values), "spread": spread})
    return points


def read_curve(path: str | Path) -> dict[int, tuple[float, float]]:
    """Return {step: (loss, spread)} of a file that curve wrote. Raises ValueError."""
    curve = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            point = json.loads(line)
            curve[point["iter"]] = (float(point["loss"]), float(point["spread"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is not iter, loss and spread") from None
    return curve


def distance_cells(run: Run, curve: dict[int, tuple[float, float]]) -> dict:
    """Return the largest and the last distance from a curve, in its spreads, with their signs."""
    distances = []
    for step, loss in losses(run).items():
        if step in curve:
            mean, spread = curve[step]
            distances.append(in_spreads(loss - mean, spread))
    require("against", run.name, distances, "a run with an evaluation at a step of the curve")
    return {"largest_distance": max(distances, key=abs), "last_distance": distances[-1]}


def in_spreads(difference: float, spread: float) -> float:
    if spread == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / spread
