"""
Many runs:

    python runs.py sweep config/quickstart.py --seed=1 --seed=2 --n_loop=2 --n_loop=4 --jobs=2
    python runs.py table out-quickstart out-other --format=csv --to=runs.csv
    python runs.py match config/a.py config/b.py --by=n_layer
    python runs.py compare config/a.py config/b.py --max_iters=400 --start="def "
    python runs.py curve out-a out-b --to=curve.jsonl
    python runs.py table out-x --against=curve.jsonl

sweep    trains every combination of the options that are repeated, each in a folder of its own in
         out_dir, and prints the table. Its other arguments are train.py's.
table    a row for each run: what differs, cost, loss at each depth; means over seeds. A folder that
         is no run stands for the runs in it. --against: how far a run is from a curve.
match    prints the max_iters or the n_layer at which b spends the training FLOPs of a.
compare  trains both and prints them side by side, with a sample of each.
curve    mean and half the range of several runs' validation losses, step by step.

The same sweep or compare, run again after any death, goes on; finished runs stay as they are. What
a run prints is in train.txt in its folder. SIGINT and SIGTERM are passed on, so that the runs under
way save themselves. After SIGKILL these go on alone, and the next call waits for them.
"""

import difflib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch

import pretrained
from configurator import check_ranges, clear_errors, configure, read_knobs, require
from decode import Cache, generate
from model import GPT
from nanorecur import checkpoint, run_table
from nanorecur.dataset import load_meta, window_of
from nanorecur.files import sha256, write_atomically
from nanorecur.hardware import pick_device
from nanorecur.options import pad_vocab
from nanorecur.tokenizer import make_tokenizer

# -----------------------------------------------------------------------------
# sweep, compare
jobs = 1  # sweep: runs at a time
threads = 0  # CPU threads of each run; 0: torch's choice, with several jobs the cores divided
start = "\n"  # compare: the prompt
max_new_tokens = 200  # compare: tokens of each sample
# the table
format = "markdown"  # markdown, csv, json
to = ""  # file that the table or curve is written to; "": it is printed
against = ""  # table: a file that curve wrote
# match
by = "max_iters"  # what is changed in b: max_iters, or n_layer where nothing is looped
command, arguments = "-h", sys.argv[1:]
if arguments:
    command = arguments.pop(0)
given_options = configure(
    globals(),
    ("train.py", ""),
    ("model.py", "GPTConfig"),
    argv=[word for word in [command, *arguments] if word.startswith("-")],
)[1]

ROOT = Path(__file__).parent
KNOBS = read_knobs(ROOT / "train.py") | read_knobs(ROOT / "model.py", "GPTConfig")
OWN_OPTIONS = {  # sweep, match and compare take train.py's options too
    "sweep": {"jobs", "threads", "format", "to"},
    "table": {"format", "to", "against"},
    "match": {"by"},
    "compare": {"threads", "start", "max_new_tokens"},
    "curve": {"to"},
}
TRAINING = ("sweep", "match", "compare")  # commands that take train.py's options
LOG = "train.txt"
POLL = 0.1  # seconds between looks at the runs under way
ENDING = (signal.SIGINT, signal.SIGTERM)
sources = [word for word in arguments if not word.startswith("-")]
training_arguments = []
for word in arguments:
    if not word.startswith("-") or run_table.option_name(word) in KNOBS:
        training_arguments.append(word)
training_options = [word for word in training_arguments if word.startswith("-")]


def check_arguments() -> None:
    """Raise ValueError where the command is unknown, or an option is not one of its own."""
    allowed = ", ".join(OWN_OPTIONS)
    for near in difflib.get_close_matches(command, OWN_OPTIONS, 1):
        allowed += f"; did you mean {near}?"
    require("command", command, command in OWN_OPTIONS, allowed)
    known = OWN_OPTIONS[command]
    for name in given_options:
        legal = name in known or (command in TRAINING and name in KNOBS)
        if not legal:
            raise ValueError(f"--{name}: {command} takes only " + ", ".join(sorted(known)))
    check_ranges(globals(), {"jobs": (1, inf), "threads": (0, inf), "max_new_tokens": (1, inf)})
    formats = ", ".join(run_table.FORMATS)
    require("format", format, format in run_table.FORMATS, formats)
    require("by", by, by in ("max_iters", "n_layer"), "max_iters, n_layer")


# -----------------------------------------------------------------------------
# what is to be trained
class Task(NamedTuple):
    """A run that is wanted."""

    folder: Path
    arguments: list[str]  # of train.py
    config: dict  # train.py's options as they will be


def read_config(words: list[str]) -> tuple[dict, set]:
    """Return (config, given) as train.py reads them from its arguments."""
    scope = {"__file__": str(ROOT / "train.py")}
    return configure(scope, ("model.py", "GPTConfig"), argv=words)


def make_task(folder: Path, words: list[str]) -> Task:
    config, _ = read_config(words)
    require("eval_only", True, not config["eval_only"], "False: it leaves no run")
    return Task(folder, words, config)


def sweep_tasks() -> list[Task]:
    """Return a task for each point of the grid, in folders inside out_dir."""
    fixed, grid = run_table.split_grid(training_arguments, KNOBS)
    require("out_dir", ", ".join(grid.get("out_dir", ())), "out_dir" not in grid, "given once")
    out_dir = Path(read_config(fixed)[0]["out_dir"])
    if not grid:
        return [make_task(out_dir, fixed)]
    tasks = []
    for name, point in run_table.grid_points(grid):
        tasks.append(make_task(out_dir / name, [*fixed, *point]))
    return tasks


def compare_tasks() -> list[Task]:
    """Return a task for each of two configs, in its own out_dir or inside the one that is given."""
    check_pair()
    tasks = []
    for path in sources:
        words = [path, *training_options]
        folder = Path(read_config(words)[0]["out_dir"])
        if "out_dir" in given_options:
            folder /= Path(path).stem
        tasks.append(make_task(folder, words))
    a, b = tasks
    allowed = "two folders: give an --out_dir, in which each config has one of its name"
    require("out_dir", str(a.folder), a.folder != b.folder, allowed)
    return tasks


def check_pair() -> None:
    """Raise ValueError unless there are two configs, and each option has one value for both."""
    if len(sources) != 2:
        raise ValueError(f"{command} takes two config files, not {len(sources)}")
    _, grid = run_table.split_grid(training_options, KNOBS)
    for name, values in grid.items():
        require(name, ", ".join(values), False, "given once; sweep takes several")


def is_done(task: Task) -> bool:
    """Return True where the run is finished and its last checkpoint is whole.

    Raises ValueError where the folder holds a run with other options.
    """
    if not checkpoint.exists(task.folder):
        return False
    run = run_table.read_run(task.folder)
    changed = run_table.changed_options(run.config, task.config)
    if changed:
        what = f"{task.folder}: holds a run with other values of {', '.join(changed)}"
        raise ValueError(f"{what}; choose another --out_dir")
    return run_table.is_finished(run) and is_saved(task, list(run_table.losses(run).values()))


def is_saved(task: Task, losses: list[float]) -> bool:
    """Return True if what a finished run saves after its last step is there."""
    best_only = not task.config["always_save_checkpoint"]
    if best_only and losses[-1] >= min(losses[:-1], default=inf):
        return True  # the last step was not worth a checkpoint
    newest = task.folder / checkpoint.NEWEST
    digests = []
    for entry in checkpoint.read_manifest(task.folder):
        if entry["iter_num"] >= task.config["max_iters"]:
            digests.append(entry["sha256"])
    return newest.exists() and sha256(newest) in digests


# -----------------------------------------------------------------------------
# training
class Runner:
    """Runs tasks as processes of train.py, as many at a time as jobs says."""

    def __init__(self, tasks: list[Task]):
        self.waiting = [task for task in tasks if not is_done(task)]
        self.running = {}  # folder: process
        self.failed = {}  # folder: why
        self.waited_for = set()  # folders in which a run of an earlier call is at work
        self.ended_by = 0  # a signal

    def run(self) -> None:
        """Train what waits; after a signal, wait for the runs under way to end."""
        handlers = {number: signal.getsignal(number) for number in ENDING}
        signals = checkpoint.listen()
        try:
            while self.waiting or self.running:
                self.pass_on(signals)
                self.start_waiting()
                time.sleep(POLL)
                self.collect()
        finally:
            self.send(signal.SIGTERM)
            for process in self.running.values():
                process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def pass_on(self, signals: set[int]) -> None:
        """Pass a signal on, at which the runs under way save and end, and start no more."""
        for number in signals & set(ENDING):
            signals.discard(number)
            self.ended_by = number
            self.waiting.clear()
            self.send(number)

    def send(self, number: int) -> None:
        for process in self.running.values():
            process.send_signal(number)

    def start_waiting(self) -> None:
        """Start tasks while there is room; a folder where another run is at work waits."""
        for task in list(self.waiting):
            if len(self.running) == jobs:
                return
            if is_locked(task.folder):
                self.report_wait(task.folder)
                continue
            self.waiting.remove(task)
            if not is_done(task):
                self.start(task)

    def report_wait(self, folder: Path) -> None:
        if folder not in self.waited_for:
            self.waited_for.add(folder)
            print(f"{folder}: waiting for the run that is at work there", flush=True)

    def start(self, task: Task) -> None:
        """Start a task in a session of its own, so that Ctrl-C reaches it once, from here."""
        task.folder.mkdir(parents=True, exist_ok=True)
        with open(task.folder / LOG, "ab") as output:
            self.running[task.folder] = subprocess.Popen(
                train_command(task),
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        print(f"{task.folder}: started", flush=True)

    def collect(self) -> None:
        """Take note of the runs that have ended."""
        for folder, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[folder]
            state = "finished"
            if code:
                state = "ended" if self.ended_by else "failed"
                self.failed[folder] = why_ended(folder, code)
            print(f"{folder}: {state}", flush=True)


def train_command(task: Task) -> list[str]:
    init_from = task.config["init_from"]
    if init_from in run_table.RESUMABLE or checkpoint.exists(task.folder):
        init_from = "auto"
    script = [sys.executable, str(ROOT / "train.py")]
    return [*script, *task.arguments, f"--out_dir={task.folder}", f"--init_from={init_from}"]


def environment() -> dict[str, str]:
    n = threads
    if not n and jobs > 1:
        n = max(1, (os.cpu_count() or 1) // jobs)
    return {**os.environ, "OMP_NUM_THREADS": str(n)} if n else dict(os.environ)


def is_locked(folder: Path) -> bool:
    """Return True where a run is at work."""
    if not (folder / checkpoint.LOCK).exists():
        return False
    try:
        checkpoint.lock(folder).close()
    except ValueError:
        return True
    return False


def why_ended(folder: Path, code: int) -> str:
    """Return the exit code or signal of a run and the last line that it printed."""
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    lines = (folder / LOG).read_text(errors="replace").split("\n")
    return f"{how}: " + next((line.strip() for line in reversed(lines) if line.strip()), "")


def train_all(tasks: list[Task]) -> int:
    """Train what is not finished, name what failed, and return how many runs did.

    Exits with code 128 + signal where one came.
    """
    runner = Runner(tasks)
    if runner.waiting:
        print(
            f"runs to train: {len(runner.waiting)}; each writes what it says to {LOG}", flush=True
        )
    runner.run()
    if runner.ended_by:
        name = signal.Signals(runner.ended_by).name
        print(f"{name}: the same command goes on", file=sys.stderr)
        sys.exit(128 + runner.ended_by)
    for folder, why in runner.failed.items():
        print(f"{folder}: {why}", file=sys.stderr)
    return len(runner.failed)


# -----------------------------------------------------------------------------
# commands
def sweep() -> None:
    """Train the grid and print its table; exit with code 1 where a run failed."""
    tasks = sweep_tasks()
    n_failed = train_all(tasks)
    folders = [task.folder for task in tasks if (task.folder / "config.json").exists()]
    if folders:
        runs = [run_table.read_run(folder) for folder in folders]
        put(run_table.FORMATS[format](run_table.table_rows(runs)))
    if n_failed:
        sys.exit(1)
    if len(folders) > 1:
        where = folders[0].parent
        words = shlex.join([str(where), f"--to={where / 'compared'}"])
        print(f"pictures of these runs: python analyze.py {words}", file=sys.stderr)


def table() -> None:
    curve = run_table.read_curve(against) if against else None
    put(run_table.FORMATS[format](run_table.table_rows(read_runs(1), curve)))


def write_curve() -> None:
    points = run_table.mean_curve(read_runs(2))
    if not points:
        raise ValueError("the runs have no step in common at which all were evaluated")
    put("\n".join(map(json.dumps, points)))


def read_runs(least: int) -> list[run_table.Run]:
    """Return the runs that were named. ValueError where they are fewer."""
    runs = [run_table.read_run(folder) for folder in run_table.run_folders(sources)]
    if len(runs) < least:
        raise ValueError(f"{command} takes {least} or more folders of runs, not {len(runs)}")
    return runs


def put(text: str) -> None:
    """Print a text or write it to the file that --to names."""
    if to:
        write_atomically(to, f"{text}\n".encode())
    else:
        print(text)


# -----------------------------------------------------------------------------
# match
def match() -> None:
    """Print at what max_iters or n_layer the second config spends the FLOPs of the first."""
    check_pair()
    a, b = map(planned_config, sources)
    target = run_table.training_flops(a)
    value = matching_layers(b, target) if by == "n_layer" else matching_steps(b, target)
    changes = {by: value}
    if by == "max_iters" and b["lr_decay_iters"] == b["max_iters"]:
        changes["lr_decay_iters"] = value  # the rate still falls until the end
    matched = run_table.training_flops(b | changes)
    print(f"{sources[0]}: {target:.4g} FLOPs")
    print(f"{sources[1]}: {matched:.4g} FLOPs at {by}={value}, {matched / target:.4f} of these")
    words = ["python", "train.py", sources[1], *training_options]
    words += [f"--{name}={value}" for name, value in changes.items()]
    print(shlex.join([*words, f"--out_dir={b['out_dir']}-matched"]))


def planned_config(path: str) -> dict:
    """Return the config that train.py would train, with what the data decides."""
    config, given = read_config([path, *training_options])
    warmup = config["loop_warmup_iters"]
    require("loop_warmup_iters", warmup, warmup == 0, "0: every step is counted at full depth")
    pair = config["loops_of_level"]
    require("loops_of_level", pair, not pair, "(): the levels of the steps are not known yet")
    require("max_iters", config["max_iters"], config["max_iters"] > 0, "at least 1")
    if "vocab_size" in given or config["stream"]:
        return config
    meta = load_meta(ROOT / "data" / config["dataset"])
    config["vocab_size"] = pad_vocab(meta["vocab_size"])
    if "row" in meta and "block_size" not in given:
        config["block_size"] = window_of(meta["row"])
    return config


def matching_steps(config: dict, target: float) -> int:
    of_a_step = run_table.training_flops(config) / config["max_iters"]
    return max(1, round(target / of_a_step))


def matching_layers(config: dict, target: float) -> int:
    """Return the n_layer of a plain model that spends the FLOPs, which are linear in it."""
    plain = not config["n_block"] and not config["loop_groups"]
    require("by", by, plain, f"max_iters where a model is looped, as in {sources[1]}")
    one, two = (run_table.training_flops(config | {"n_layer": n}) for n in (1, 2))
    return max(1, round(1 + (target - one) / (two - one)))


# -----------------------------------------------------------------------------
# compare
def compare() -> None:
    """Train two configs and print what they cost, what they lose, and a sample of each."""
    tasks = compare_tasks()
    if train_all(tasks):
        sys.exit(1)
    runs = [run_table.read_run(task.folder) for task in tasks]
    rows, samples = run_table.table_rows(runs)[:2], []
    for task, row in zip(tasks, rows):
        model = pretrained.load(task.folder)
        row["cache_bytes_per_token"] = Cache(model, size=1).bytes_per_token()
        samples.append(sample(model, task))
    print(run_table.side_by_side(rows))
    for task, text in zip(tasks, samples):
        print(f"\n{task.folder}:\n{text}")


def sample(model: GPT, task: Task) -> str:
    """Return the prompt as a model continues it, drawn by the seed of its run."""
    device = pick_device(task.config["device"])
    tokenizer = make_tokenizer(pretrained.tokenizer_of(task.folder))
    idx = torch.tensor([tokenizer.encode(start)], device=device)
    tokens, _ = generate(
        model.to(device),
        idx,
        max_new_tokens,
        temperature=0.8,
        top_k=200,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(task.config["seed"]),
    )
    return tokenizer.decode(tokens[0].tolist())


# -----------------------------------------------------------------------------
COMMANDS = {
    "sweep": sweep,
    "table": table,
    "match": match,
    "compare": compare,
    "curve": write_curve,
}

if __name__ == "__main__":
    try:
        with clear_errors():
            check_arguments()
            COMMANDS[command]()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
