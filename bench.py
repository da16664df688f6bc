"""
Speed and memory of a training step at each of several loop counts, on random tokens:

    python bench.py config/quickstart.py --loops=1,2,4,8
    python bench.py config/train_gpt2_looped.py --device=cuda --batch_size=16

a training step beside those of nanoGPT and nanoLOOP in the same shape:

    python bench.py train --peer=../nanoGPT --n_layer=4 --n_embd=128 --n_head=4 --vocab_size=65
    python bench.py train --peer=../nanoLOOP --norm=rmsnorm --n_prelude=1 --n_block=2 --n_coda=1

decoding in GPT-2's shape beside others', and of a trained looped model with exit and speculation:

    python bench.py decode --peer=../nanoGPT --write_to=BENCHMARKS.md
    python bench.py decode --looped=out-quickstart --dataset=pycode --loops=4,8

a whole training run on a CPU beside nanoGPT's, seconds and loss, both on tiny Shakespeare:

    python bench.py race config/train_shakespeare_char_fast.py --peer=../nanoGPT

what a run will take of memory and time on GPUs that are not here:

    python bench.py plan config/train_gpt2_looped.py --gpu=h100 --n_gpus=8

Every option of train.py and of GPTConfig is one here too. What is compared takes turns, round after
round, and medians are printed, so that a busy machine disturbs all alike. Memory is on a GPU what
tensors took; on a CPU what a fresh process that makes two steps took at its peak, with Python and
torch in it.
"""

import contextlib
import copy
import gc
import math
import multiprocessing
import os
import platform
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import pretrained
from configurator import check_ranges, clear_errors, configure, require
from decode import SLOTS, Cache, generate
from model import GPT, GPTConfig, sample_loops
from nanorecur import estimate, hardware, optim
from nanorecur.dataset import load_meta, open_split
from nanorecur.exit_rules import exit_evaluation, make_exit
from nanorecur.hardware import (
    DTYPES,
    Gpu,
    autocast,
    cast_linear_weights,
    compile_works,
    lay_out,
    pick_device,
    pick_dtype,
)
from nanorecur.objectives import Objective
from nanorecur.options import check_options, pad_vocab
from nanorecur.parallel import Processes
from nanorecur.race import NANOGPT, race, score_run
from nanorecur.training_step import TrainingStep, make_objective

# -----------------------------------------------------------------------------
# train and decode
loops = ()  # loop counts to time, such as 1,2,4,8; (): the config's own, or those of looped
peer = ""  # folder of a nanoGPT checkout to compare with; train: or nanoLOOP, or several, a,b
write_to = ""  # Markdown file whose section on this machine is replaced, such as BENCHMARKS.md
rounds = 5  # rounds in which all that is compared takes turns
threads = 0  # CPU threads; 0: torch's choice
dtypes = "float32,bfloat16"  # number types to time, of ours and of transformers' decoding
# train
steps = 5  # training steps in a turn
peak_memory = False  # with peer: measure the memory of a step too, in a process for each
# decode
looped = ""  # folder of a trained looped model, to measure exit and speculation with --dataset
batch_sizes = 1, 16  # rows that are continued at once
prompt_tokens = 128  # tokens of each prompt
new_tokens = 128  # tokens by which each prompt is continued
cpu_weights = "auto"  # their order on a CPU: packed, plain, transposed; auto: the fastest here
exit_thresholds = 0.05, 0.1, 0.15  # relative changes of the state at which a token stops looping
drafts = (2, 3), (3, 4), (4, 6)  # speculation: pairs of draft_loops and draft_tokens
# plan
gpu = "h100"  # a GPU whose data sheet is known, such as a100 or rtx-4090, or cpu: this machine
n_gpus = 1  # processes of the run, a GPU each
efficiency = 0.4  # share of the GPU's peak FLOP/s that a step reaches; with gpu=cpu it is measured
link_gbps = 0.0  # GB/s that a GPU sends to others; 0: by its data sheet, or as network_gbps
network_gbps = 50.0  # GB/s that each of more than 8 GPUs sends to others
command, arguments = "train", sys.argv[1:]
if arguments[:1] in (["train"], ["decode"], ["race"], ["plan"]):
    command = arguments.pop(0)
config, given = configure(globals(), ("train.py", ""), ("model.py", "GPTConfig"), argv=arguments)
# which of the options above a command reads; what is given in vain is refused
TRAIN = {"rounds", "threads", "steps"}
READ = {
    "train": TRAIN | {"loops"},
    "train --peer": TRAIN | {"peer", "peak_memory", "write_to", "dtypes"},
    "decode": {"rounds", "threads", "peer", "write_to", "dtypes", "batch_sizes", "prompt_tokens"}
    | {"new_tokens", "cpu_weights"},
    "race": {"rounds", "threads", "peer", "write_to"},
    "plan": {"gpu", "n_gpus", "efficiency", "link_gbps", "network_gbps", "threads"},
}
READ["decode --looped"] = READ["decode"] | {"looped", "loops", "exit_thresholds", "drafts"}
OWN = set().union(*READ.values())
mode = command
if command == "train" and peer:
    mode = "train --peer"
if command == "decode" and looped:
    mode = "decode --looped"
progress = hardware.Progress()

# -----------------------------------------------------------------------------
# check what was asked for; a process that measures memory runs this file up to main too
with clear_errors():
    hardware.check_versions()
    for name in sorted(given & OWN - READ[mode]):
        readers = " or ".join(other for other in READ if name in READ[other])
        require(name, config[name], False, f"left out of {mode}: it belongs to {readers}")
    positive = ("rounds", "steps", "prompt_tokens")
    check_ranges(config, {name: (1, math.inf) for name in positive})
    check_ranges(config, {"threads": (0, math.inf), "new_tokens": (2, math.inf)})
    for name in ("loops", "batch_sizes"):
        counts = all(type(n) is int and n >= 1 for n in config[name])
        require(name, config[name], counts, "whole numbers of at least 1, such as 1,4")
    require("batch_sizes", batch_sizes, len(batch_sizes) > 0, "not empty")
    for dtype_name in dtypes.split(","):
        require("dtypes", dtypes, dtype_name in DTYPES, "of " + ",".join(DTYPES))
    if write_to:
        require("write_to", write_to, Path(write_to).parent.is_dir(), "in a folder that exists")
    for peer_folder in filter(None, peer.split(",")):
        found = (Path(peer_folder) / "model.py").is_file()
        require("peer", peer_folder, found, "a folder with a model.py")
    if command == "race":
        require("peer", peer, peer, "a checkout of nanoGPT")
        on_shakespeare = config["dataset"] == "shakespeare_char"
        require("dataset", config["dataset"], on_shakespeare, "shakespeare_char, as nanoGPT's")
    if command == "train":
        check_options(config, Processes())
    if threads:
        torch.set_num_threads(threads)
    device = pick_device("cpu" if command == "plan" else config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else clocks would wait for the first one
        torch.set_float32_matmul_precision("high")  # TF32, as in train.py
    data_dir = Path(__file__).parent / "data" / config["dataset"]
    prepared = (data_dir / "meta.json").exists()
    if command != "decode" and prepared and "vocab_size" not in given:
        config["vocab_size"] = pad_vocab(load_meta(data_dir)["vocab_size"])
    dtype = pick_dtype(config["dtype"], device) if command == "train" else torch.float32
tokens_per_step = config["batch_size"] * config["block_size"]


# -----------------------------------------------------------------------------
# clocks and tables
def clock(work: Callable, times: int = 1) -> float:
    """Return the seconds that so many calls of work() take."""
    hardware.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    hardware.synchronize(device)
    return time.perf_counter() - start


def in_turns(works: dict[Hashable, Callable], times: int = 1) -> dict[Hashable, list[float]]:
    """Return the seconds of a call of each of works, by round."""
    seconds = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            progress.now(f"round {len(seconds[name]) + 1} of {rounds}: {in_line(name)}")
            seconds[name].append(clock(work, times) / times)
    return seconds


def in_line(name: Hashable) -> str:
    """Return what is timed as a line on stderr names it: a name, loop counts, or a setting."""
    if isinstance(name, str):
        return name
    if all(type(part) is int for part in name):
        return f"{','.join(map(str, name)) or 'no'} loops"
    return f"generate with {name[0]}, {name[1]} row(s)"


def median_ratio(seconds: list[float], others: list[float]) -> str:
    """Return how many times as fast as others it is, as the median of the rounds' ratios."""
    return f"{statistics.median(b / a for a, b in zip(seconds, others)):.2f}"


def pace(seconds: float, flops_per_token: int, peak: float | None, unknown: str) -> list[str]:
    """Return cells of ms, tokens/s, GFLOP/s and MFU of a training step."""
    tokens_per_second = tokens_per_step / seconds
    rate = flops_per_token * tokens_per_second
    mfu = f"{rate / peak:.1%}" if peak else unknown
    return [f"{1e3 * seconds:.1f}", f"{tokens_per_second:,.0f}", f"{rate / 1e9:,.1f}", mfu]


def aligned(cells: list, widths: tuple[int, ...]) -> str:
    """Return one line of a table for the screen, cells to the right of their columns."""
    return "".join(str(cell).rjust(width) for cell, width in zip(cells, widths))


def table(head: list, rows: list[list]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def section(title: str, load_before: float, *parts: str) -> str:
    """Return a section of BENCHMARKS.md. load_before: the load average when it began."""
    load = f"Load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
    when = f"{time.strftime('%Y-%m-%d')}. {load}; medians of {rounds} rounds in turn."
    lines = [f"## {title}", f"`python bench.py {' '.join(sys.argv[1:])}`", when, *parts]
    return "\n\n".join(lines) + "\n"


def put_section(path: Path, text: str) -> None:
    """Replace the section with the same heading in a Markdown file, or add it."""
    empty = "# Benchmarks\n\nWritten by bench.py, a section for each machine and shape.\n\n"
    old = path.read_text("utf-8") if path.exists() else empty
    head, *sections = old.split("\n## ")
    new = text.removeprefix("## ")
    heading = new.split("\n")[0]
    others = [part for part in sections if part.split("\n")[0] != heading]
    path.write_text("\n## ".join([head, *others, new]), "utf-8")


def machine() -> str:
    """Return the machine's name in a heading."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} thread(s) of a CPU ({platform.machine()})"


# -----------------------------------------------------------------------------
# memory
def peak_of(make_step: Callable, *arguments) -> int:
    """Return the peak bytes of two steps, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(peak_here, make_step, *arguments).result()


def peak_here(make_step: Callable, *arguments) -> int:
    """Return the peak bytes of this process after two steps of make_step(*arguments)."""
    warm_up(make_step(*arguments))
    return hardware.peak_memory(device)


def warm_up(step: Callable) -> None:
    """Make two steps: what is compiled is ready then, and the optimizer has its moments."""
    for _ in range(2):
        step()


def own_step(changed: dict, dtype: torch.dtype, n_loop: tuple | None = None) -> Callable:
    """Return an eager training step of this config with some options changed."""
    return partial(TrainingStep(config | changed, device, dtype), n_loop)


# -----------------------------------------------------------------------------
# train: a step at each loop count
UNCLIPPED = {"spectral_clip_beta": 0.0}  # spectral clips are in few steps, and timed by themselves


def print_depths() -> None:
    """Print a table of training steps at each of the loop counts."""
    compiled = config["compile"] and compile_works(device)
    step = TrainingStep(config | UNCLIPPED, device, dtype, compiled)
    model, peak = step.model, hardware.peak_flops(device, dtype)
    allowed = "left out: nothing is looped in this model"
    require("loops", loops, not loops or model.config.groups, allowed)
    depths = [model.config.counts(n) for n in loops or [None]]
    print(
        f"{model.get_num_params() / 1e6:.2f}M parameters, vocabulary {config['vocab_size']}, "
        f"{config['batch_size']} x {model.config.block_size} tokens a step, {device} in {dtype}, "
        f"{'compiled' if compiled else 'eager'}, torch {torch.__version__}"
    )
    peaks = {depth: warm_depth(step, depth) for depth in depths}
    works = {depth: partial(step, depth) for depth in depths}
    seconds = in_turns(works, steps)
    widths = (8, 10, 12, 13, 11, 8, 10)
    head = ["loops", "ms", "tokens/s", "MFLOP/token", "GFLOP/s", "MFU", "peak MiB"]
    print(aligned(head, widths))
    for depth in depths:
        median = statistics.median(seconds[depth])
        flops = step.objective.flops_per_token(depth)
        ms, rate, gflops, mfu = pace(median, flops, peak, unknown="n/a")
        memory = f"{peaks[depth] / 2**20:,.0f}"
        name = ",".join(map(str, depth)) or "-"
        print(aligned([name, ms, rate, f"{flops / 1e6:.2f}", gflops, mfu, memory], widths))
    if compiled and model.config.groups and model.config.loop_sampling != "fixed":
        print(f"\nSampled depth, compiled:\n\n{sampled_depth(step)}")
    if config["spectral_clip_beta"]:
        print(clip_cost(model, median))


def warm_depth(step: TrainingStep, depth: tuple) -> int:
    """Warm a step up at a depth and return the peak bytes of such steps."""
    progress.now(f"memory and first steps at {in_line(depth)}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warm_up(partial(step, depth))
    if device.type == "cpu":
        return peak_of(own_step, UNCLIPPED, dtype, depth)
    return hardware.peak_memory(device)


def clip_cost(model: GPT, seconds_per_step: float) -> str:
    """Return a line on what spectral clipping of every block costs, the median of three times."""
    micro_steps, interval = config["gradient_accumulation_steps"], config["spectral_clip_interval"]
    clip = optim.SpectralClip(model, config["spectral_clip_beta"], every=1, all_blocks=True)
    clip_all = partial(clip, 0)
    clip_all()  # warms up
    seconds = statistics.median(clock(clip_all) for _ in range(3))
    share = seconds / interval / micro_steps / seconds_per_step
    return (
        f"spectral clipping of every block: {1e3 * seconds:.1f} ms; {share:.1%} of a training step "
        f"of {micro_steps} micro-steps, every {interval} steps"
    )


# -----------------------------------------------------------------------------
# train --peer: a step beside others'
NOT_COMPARED = ("loop_sampling", "max_loops", "n_layer")  # a step of fixed depth reads none of them
LIKE_PEERS = UNCLIPPED | {  # the options with which a step is a peer's
    "optimizer": "adamw",
    "objective": "next",
    "param_dtype": "float32",
    "ema_decay": 0.0,
    "loss_chunk": 0,
    "recompute": "none",
}
SAVING = {  # options that save memory: row of the table, what is changed
    "ours": {},
    "ours, loss_chunk=256": {"loss_chunk": 256},
    "ours, and recompute=cheap": {"loss_chunk": 256, "recompute": "cheap"},
    "ours, or recompute=block": {"loss_chunk": 256, "recompute": "block"},
    "ours, and optimizer=muon": {"loss_chunk": 256, "recompute": "block", "optimizer": "muon"},
}
MALLOC = "MALLOC_MMAP_THRESHOLD_"  # with it glibc gives back at once what larger tensors leave
MALLOC_BYTES = 2**22
peer_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # whatever their options


class Trainer(NamedTuple):
    """A contestant in training."""

    step: Callable[[], None]
    dtype: torch.dtype | None  # of our matrix products, for the MFU; None: a peer


def load_peer(folder: str) -> nn.Module:
    """Return the model of a nanoGPT or nanoLOOP checkout in the shape of the config.

    ValueError where it has no such shape, or not as many parameters as ours.
    """
    names = runpy.run_path(str(Path(folder) / "model.py"))
    fields = names["GPTConfig"].__dataclass_fields__
    check_peer_shape(folder, fields)
    options = {name: config[name] for name in fields}
    if "n_loop" in fields:  # nanoLOOP's
        options["bptt_k"] = config["bptt_k"] or None
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        model = names["GPT"](names["GPTConfig"](**options))
    with torch.device("meta"):
        count = n_parameters(make_objective(config | LIKE_PEERS).model)
    allowed = f"one whose model has {count:,} parameters as ours, not {n_parameters(model):,}"
    require("peer", folder, n_parameters(model) == count, allowed)
    return model.to(device).train()


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_peer_shape(folder: str, fields: dict) -> None:
    """Raise ValueError where an option that a peer does not have is not as the peer is."""
    is_looped = "n_loop" in fields
    usual = {name: field.default for name, field in GPTConfig.__dataclass_fields__.items()}
    usual["norm"] = "rmsnorm" if is_looped else "layernorm"
    for name, value in usual.items():
        if name not in fields and name not in NOT_COMPARED:
            allowed = f"{value!r}, all that {folder} has"
            require(name, config[name], config[name] == value, allowed)
    if is_looped:
        n_block, injection = config["n_block"], config["input_injection"]
        require("n_block", n_block, n_block >= 1, f"at least 1, all that {folder} has")
        allowed = f"'inject' or 'passthrough', all that {folder} has"
        require("input_injection", injection, injection in ("inject", "passthrough"), allowed)


def peer_step(folder: str, compiled: bool = False) -> Callable:
    """Return a training step as a peer's train.py makes it, on random tokens."""
    model = load_peer(folder)
    rates = config["weight_decay"], config["learning_rate"], (config["beta1"], config["beta2"])
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = model.configure_optimizers(*rates, device.type)
    run = torch.compile(model) if compiled else model
    shape = (config["batch_size"], config["block_size"])
    x = torch.randint(config["vocab_size"], shape, device=device)
    y = torch.randint(config["vocab_size"], shape, device=device)

    def step():
        with autocast(device, peer_dtype):
            loss = run(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"] or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trainers(modes: dict[str, bool]) -> dict[str, Trainer]:
    """Return {name: trainer} of ours and the peers'.

    modes: endings of names, to whether torch.compile is used.
    """
    contestants = {}
    for dtype_name in dtypes.split(","):
        number_type = DTYPES[dtype_name]
        for ending, compiled in modes.items():
            step = TrainingStep(config | LIKE_PEERS, device, number_type, compiled)
            contestants[f"ours, {dtype_name}{ending}"] = Trainer(step, number_type)
    for folder in peer.split(","):
        for ending, compiled in modes.items():
            name = Path(folder).resolve().name + ending
            contestants[name] = Trainer(peer_step(folder, compiled), None)
    return contestants


def drop_failing(contestants: dict[str, Trainer]) -> dict[str, Trainer]:
    """Warm all trainers up and return those that run, with a line on stderr for each other."""
    running = {}
    for name, trainer in contestants.items():
        progress.now(f"first steps: {name}")
        try:
            warm_up(trainer.step)
            running[name] = trainer
        except Exception as error:  # torch.compile refuses models of others in many ways
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            print(f"{name} does not run: {reason}", file=sys.stderr)
    return running


def fastest_ways(names: list[str], seconds: dict[str, list[float]]) -> dict[str, str]:
    """Return {peer: the name of its faster way, eager or compiled}."""
    fastest = {}
    for name in names:
        folder = name.removesuffix(", compiled")
        names = [name, fastest.get(folder, name)]
        fastest[folder] = min(names, key=lambda name: statistics.median(seconds[name]))
    return fastest


def train_section() -> str:
    """Return a section on our training step beside the peers', and on sampled depth."""
    load_before = os.getloadavg()[0]
    names = [Path(folder).resolve().name for folder in peer.split(",")]
    require("peer", peer, len(set(names)) == len(names), "folders of different names")
    compiled = config["compile"] and compile_works(device)
    with torch.device("meta"):
        objective = make_objective(config | LIKE_PEERS)
    model, flops = objective.model, objective.flops_per_token()
    what = (
        f"{n_parameters(model):,} parameters each, {flops / 1e6:,.2f} MFLOP/token. A step: "
        f"forward, backward, clip at {config['grad_clip']}, AdamW."
    )
    modes = {"": False, ", compiled": True} if compiled else {"": False}
    parts = [what, speed_table(drop_failing(trainers(modes)), flops)]
    if model.config.groups and compiled:
        step = TrainingStep(config | UNCLIPPED, device, dtype, compiled)
        parts += ["### Sampled depth, compiled", sampled_depth(step)]
        del step
    if peak_memory:
        parts += ["### Memory, eager, in a process of its own for each", memory_beside()]
    shape = f"Training {in_words(model.config)} beside {' and '.join(names)}"
    title = f"{shape}, {machine()}, torch {torch.__version__}"
    return section(title, load_before, *parts)


def speed_table(contestants: dict[str, Trainer], flops_per_token: int) -> str:
    """Return a table of the trainers' speed, also to each peer's in its faster way."""
    seconds = in_turns({name: trainer.step for name, trainer in contestants.items()}, steps)
    peers = [name for name, trainer in contestants.items() if trainer.dtype is None]
    fastest = fastest_ways(peers, seconds)
    rows = []
    for name, trainer in contestants.items():
        peak = hardware.peak_flops(device, trainer.dtype) if trainer.dtype else None
        cells = pace(statistics.median(seconds[name]), flops_per_token, peak, unknown="")
        ratios = [median_ratio(seconds[name], seconds[other]) for other in fastest.values()]
        rows.append([name, *cells, *ratios])
    head = ["model", "ms a step", "tokens/s", "GFLOP/s", "MFU"]
    return table(head + [f"speed to {name} at its best" for name in fastest], rows)


def blocks_in_words(shape: GPTConfig) -> str:
    """Return the number of blocks, in the order of a pass, such as 2 + 4x8 + 2 blocks."""
    counts, parts, n_before = iter(shape.counts()), [], 0  # blocks that were not named yet
    for blocks, is_looped in (*shape.layout, ((), True)):
        if not is_looped:
            n_before += len(blocks)
            continue
        if n_before:
            parts.append(str(n_before))
        if blocks:
            parts.append(f"{len(blocks)}x{next(counts)}")
        n_before = 0
    return f"{' + '.join(parts)} block" + ("" if parts == ["1"] else "s")


def in_words(shape: GPTConfig) -> str:
    """Return a shape as a heading names it."""
    truncated = f", bptt_k {shape.bptt_k}" if shape.bptt_k else ""
    return (
        f"{blocks_in_words(shape)} of width {shape.n_embd}, {shape.vocab_size:,} ids, "
        f"{config['batch_size']} x {shape.block_size} tokens{truncated}"
    )


def sampled_depth(step: TrainingStep) -> str:
    """Return a table of what a FLOP costs at fixed depth and at depths drawn for each step.

    They are drawn as the config says, or where its depth is fixed by poisson.
    """
    progress.now("steps at fixed and at sampled depth")
    shape, flops_per_token = step.model.config, step.objective.flops_per_token
    if shape.loop_sampling == "fixed":
        shape = replace(shape, loop_sampling="poisson")
    for n in (1, 2, min(shape.bptt_k + 2, shape.max_loops)):  # loops with and without gradient
        warm_up(partial(step, n))
    graphs = torch._dynamo.utils.counters["stats"]
    n_graphs, generator = graphs["unique_graphs"], torch.Generator().manual_seed(config["seed"])
    turns = {"fixed": [], shape.loop_sampling: []}  # (ms, GFLOP, ms per GFLOP) of a step, by round
    for _ in range(rounds):
        drawn = [sample_loops(shape, generator) for _ in range(steps)]
        depths_of = {"fixed": [shape.counts()] * steps, shape.loop_sampling: drawn}
        for name, depths in depths_of.items():
            ms = 1e3 * clock(partial(make_steps, step, depths)) / steps
            gflops = sum(map(flops_per_token, depths)) * tokens_per_step / steps / 1e9
            turns[name].append((ms, gflops, ms / gflops))
    rows = []
    for name, turn in turns.items():
        ratios = [mine[2] / fixed[2] for mine, fixed in zip(turn, turns["fixed"])]
        columns = [*zip(*turn), ratios]
        rows.append([name, *(f"{statistics.median(column):.3f}" for column in columns)])
    head = ["depth", "ms a step", "GFLOP a step", "ms per GFLOP", "to fixed"]
    compiled = f"Graphs compiled after warm-up: {graphs['unique_graphs'] - n_graphs}."
    return f"{table(head, rows)}\n\n{compiled}"


def make_steps(step: TrainingStep, depths: list[tuple]) -> None:
    for depth in depths:
        step(depth)


def memory_beside() -> str:
    """Return a table of the peak memory of the peers' steps and of ours, with options that save."""
    free_memory()
    progress.now("the memory of a step, in a process of its own for each")
    makers = {Path(folder).name: partial(peer_step, folder) for folder in peer.split(",")}
    makers |= {name: partial(own_step, changed, peer_dtype) for name, changed in SAVING.items()}
    columns = {"MiB": [peak_of(make_step) for make_step in makers.values()]}
    if device.type == "cpu":
        os.environ[MALLOC] = str(MALLOC_BYTES)
        name = f"{MALLOC}={MALLOC_BYTES}"
        columns[name] = [peak_of(make_step) for make_step in makers.values()]
        del os.environ[MALLOC]
    head, rows, first = ["model"], [[name] for name in makers], columns["MiB"][0]
    for title, peaks in columns.items():
        head += [title, "to the first"]
        for row, peak in zip(rows, peaks):
            row += [f"{peak / 2**20:,.0f}", f"{peak / first:.2f}"]
    return table(head, rows)


def free_memory() -> None:
    """Give a GPU's memory that nothing uses any more to other processes."""
    torch._dynamo.reset()  # compiled steps hold their models
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# decode: GPT-2's shape, random weights
class TimedDecoder(NamedTuple):
    """A contestant in decoding."""

    run: Callable[[Tensor, int], object]  # continue idx (B, T) by so many tokens, greedily
    weight_bytes: int | None = None  # that a token reads; None: of others
    has_cache: bool = True


def decoded_shapes() -> dict[str, GPTConfig]:
    """Return the two shapes that are timed: that of the options, GPT-2's by default, and a loop."""
    options = {name: config[name] for name in GPTConfig.__dataclass_fields__}
    shape = GPTConfig(**options)
    core = {"n_prelude": 2, "n_block": 4, "n_coda": 2, "n_loop": 4}
    core |= {"loop_groups": (), "loop_counts": ()}
    return {
        blocks_in_words(shape): shape,
        "2 + 4x4 + 2": GPTConfig(**options | core),
    }


def greedy(model: GPT, dtype: torch.dtype, static: bool, idx: Tensor, count: int) -> None:
    """Continue idx (B, T) by count tokens; on a GPU under autocast to dtype."""
    with autocast(device, dtype if device.type != "cpu" else torch.float32):
        generate(model, idx, count, temperature=0, static=static)


def lay_out_weights(model: GPT, number_type: torch.dtype) -> None:
    """Prepare a model's weights to decode batch_sizes[0] rows; on a CPU say on stderr how."""
    if device.type == "cpu":
        layout = lay_out(model, number_type, cpu_weights, batch_sizes[0])
        print(f"  {layout} weights in {number_type}", file=sys.stderr)
    elif number_type != torch.float32:
        cast_linear_weights(model, number_type)


def own_decoders() -> dict[str, TimedDecoder]:
    """Return our decoders of both shapes, in both number types, compiled."""
    on_cpu, found = device.type == "cpu", {}
    torch.manual_seed(0)
    for shape_name, shape in decoded_shapes().items():
        fresh = GPT(shape).to(device).eval()
        n_read = weights_read(fresh)
        for dtype_name in dtypes.split(","):
            ready, number_type = copy.deepcopy(fresh), DTYPES[dtype_name]
            lay_out_weights(ready, number_type)
            name = f"{shape_name}, {dtype_name}"
            n_bytes = n_read * number_type.itemsize
            found[name] = TimedDecoder(partial(greedy, ready, number_type, False), n_bytes)
            usual = torch.float32 if on_cpu else torch.bfloat16
            if config["compile"] and number_type == usual:
                compilable = fresh if on_cpu else ready  # weights laid out for a CPU are not
                compiled = partial(greedy, compilable, number_type, True)
                found[f"{name}, compiled"] = TimedDecoder(compiled, n_bytes)
        if on_cpu and not shape.groups and "float32" in dtypes.split(","):
            run = partial(greedy, fresh, torch.float32, False)
            found[f"{shape_name}, float32, plain weights"] = TimedDecoder(run, 4 * n_read)
    return found


def other_decoders() -> dict[str, TimedDecoder]:
    """Return those of others that are here: transformers', and nanoGPT's of a peer."""
    found = {}
    try:
        for dtype_name in dtypes.split(","):
            decoder = transformers_decoder(DTYPES[dtype_name])
            found[f"transformers' GPT-2, {dtype_name}"] = decoder
    except ImportError:
        print("transformers is not installed: not timed")
    if peer:
        names = runpy.run_path(str(Path(peer) / "model.py"))
        fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        shape = names["GPTConfig"](**{name: config[name] for name in fields}, dropout=0.0)
        run = partial(names["GPT"](shape).to(device).eval().generate, top_k=1)
        found["nanoGPT's generate, float32"] = TimedDecoder(run, has_cache=False)
    return found


def transformers_decoder(number_type: torch.dtype) -> TimedDecoder:
    import transformers

    fields = ("vocab_size", "n_layer", "n_head", "n_embd")
    shape = transformers.GPT2Config(
        **{name: config[name] for name in fields},
        n_positions=config["block_size"],
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(shape).to(device, number_type).eval()

    def run(idx: Tensor, count: int) -> None:
        mask = torch.ones_like(idx)
        model.generate(idx, attention_mask=mask, do_sample=False, max_new_tokens=count)

    return TimedDecoder(run)


def weights_read(model: GPT) -> int:
    """Return how many weights multiply a token: those of Linear layers, once for each loop."""

    def linear(part: nn.Module) -> int:
        return sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))

    total = linear(model.lm_head)
    for loop, n, _ in model.schedule():
        total += n * sum(map(linear, (loop.inject, *loop.blocks)))
    return total


@torch.no_grad()
def decoding_seconds(decoder: TimedDecoder, idx: Tensor) -> tuple[float, float]:
    """Return the seconds to continue idx by new_tokens, and by one token.

    Without a cache the first is new_tokens times the mean of three of them, as it takes minutes.
    """
    one = clock(partial(decoder.run, idx, 1))
    if decoder.has_cache:
        return clock(partial(decoder.run, idx, new_tokens)), one
    longer = idx.repeat(1, 2 + new_tokens // prompt_tokens)
    lengths = [prompt_tokens + n for n in (0, new_tokens // 2, new_tokens - 1)]
    times = [clock(partial(decoder.run, longer[:, :length], 1)) for length in lengths]
    return new_tokens * statistics.mean(times), one


def decoding_table() -> str:
    """Return a table of tokens per second and bandwidth of all decoders, at each batch size."""
    contestants = own_decoders() | other_decoders()
    others = [name for name in contestants if contestants[name].weight_bytes is None]
    rows = []
    for batch_size in batch_sizes:
        idx = torch.randint(config["vocab_size"], (batch_size, prompt_tokens), device=device)
        times = time_decoders(contestants, idx)
        totals = {name: [pair[0] for pair in pairs] for name, pairs in times.items()}
        first = {name: [pair[1] for pair in pairs] for name, pairs in times.items()}
        for name, decoder in contestants.items():
            total = statistics.median(totals[name])
            step = (total - statistics.median(first[name])) / (new_tokens - 1)
            rate = f"{decoder.weight_bytes / step / 1e9:.1f}" if decoder.weight_bytes else ""
            cells = [f"{batch_size * new_tokens / total:.1f}", f"{1e3 * step:.1f}", rate]
            ratios = [median_ratio(totals[name], totals[other]) for other in others]
            rows.append([batch_size, name, *cells, *ratios])
    head = ["rows", "model", "tokens/s", "ms a step", "GB/s of weights"]
    return table(head + [f"speed to {name}" for name in others], rows)


def time_decoders(
    contestants: dict[str, TimedDecoder], idx: Tensor
) -> dict[str, list[tuple[float, float]]]:
    """Return decoding_seconds of each decoder in each round; of those without a cache, of one."""
    times = {name: [] for name in contestants}
    for name, decoder in contestants.items():
        progress.now(f"warming up: {name}, {len(idx)} row(s)")
        decoder.run(idx, 2)
    for number in range(rounds):
        for name, decoder in contestants.items():
            progress.now(f"round {number + 1} of {rounds}: {name}, {len(idx)} row(s)")
            if decoder.has_cache or number == 0:
                latest = decoding_seconds(decoder, idx)
            else:
                latest = times[name][0]
            times[name].append(latest)
            line = f"  {len(idx)} {name}: {latest[0]:.2f} s, load {os.getloadavg()[0]:.1f}"
            print(line, file=sys.stderr, flush=True)
    return times


def bandwidth() -> str:
    """Return a line on the GB/s of reading and of copying 256 MiB."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    read, copied = [], []
    for _ in range(5):
        read.append(clock(source.sum))
        copied.append(clock(partial(target.copy_, source)))
    read = source.nbytes / statistics.median(read) / 1e9
    copied = 2 * source.nbytes / statistics.median(copied) / 1e9
    return f"Memory: {read:.1f} GB/s read, {copied:.1f} GB/s read and written in a copy."


def cache_table() -> str:
    """Return a table of the cache's bytes per token, by slots and kind of attention."""
    kinds = {"multi-head": {}}
    if config["n_head"] % 4 == 0:
        kinds["4 heads of keys and values"] = {"n_kv_head": 4}
    latent = {"attention": "mla", "n_latent": config["n_embd"] // 4, "position": "rope"}
    kinds["latent of n_embd/4"] = latent
    shape, models = vars(decoded_shapes()["2 + 4x4 + 2"]), []
    with torch.device("meta"):  # tensors without contents
        for changed in kinds.values():
            models.append(GPT(GPTConfig(**shape | changed)))
    rows = []
    for slots in SLOTS:
        caches = [Cache(model, slots=slots, n_slot=2, size=1) for model in models]
        name = f"{slots} (2 slots)" if slots in ("last", "mod") else slots
        rows.append([name, *(f"{cache.bytes_per_token():,}" for cache in caches)])
    return table(["slots of 2 + 4x4 + 2, float32", *kinds], rows)


# -----------------------------------------------------------------------------
# decode --looped: exit and speculation of a trained model, greedy
class LoopedRun(NamedTuple):
    """A trained looped model and windows of validation to measure it on."""

    model: GPT
    depths: list[int | None]  # loop counts, as GPT.forward takes n_loop
    x: Tensor  # (N, T)
    y: Tensor  # (N, T)


def open_looped() -> LoopedRun:
    """Return the model of --looped. ValueError where an option does not go with it."""
    model = pretrained.load(looped).to(device)
    require("looped", looped, bool(model.config.groups), "a model in which something is looped")
    positive = all(0 < threshold < math.inf for threshold in exit_thresholds)
    require("exit_thresholds", exit_thresholds, positive, "positive numbers")
    for pair in drafts:
        legal = isinstance(pair, tuple) and len(pair) == 2 and min(pair) >= 1
        legal = legal and all(type(n) is int for n in pair)
        require("drafts", drafts, legal, "pairs of counts such as [[2,3],[4,6]]")
    split = open_split(
        data_dir, "val", load_meta(data_dir), model.block_size, model.config.vocab_size
    )
    x, y = split.windows(split.spread(max(256, *batch_sizes)))
    return LoopedRun(
        model, list(loops) or [None], torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    )


def looped_tables(run: LoopedRun) -> tuple[str, str]:
    """Return a table on early exit and one on speculation, at each of the loop counts."""
    model, _, x, y = run
    lay_out_weights(model, torch.float32)
    exits, drafted = [], []
    for n in run.depths:
        exits += exit_rows(n, model, x, y)
        drafted += draft_rows(n, model, x)
    speeds = [f"speed, {batch_size} rows" for batch_size in batch_sizes]
    exit_head = ["loops", "threshold", "loss", "change", "loops used", "saved", *speeds]
    draft_head = ["loops", "draft loops", "draft tokens", "accepted", "same tokens", *speeds]
    return table(exit_head, exits), table(draft_head, drafted)


def time_generate(
    model: GPT, n_loop: int | None, x: Tensor, settings: dict[Hashable, dict]
) -> tuple[dict, dict]:
    """Return {(name, batch size): median seconds} and {..: what generate returned}.

    The first half of windows x (B, T) is continued by as many tokens. settings: names to options of
    generate.
    """
    half, works = model.block_size // 2, {}
    for name, options in settings.items():
        for batch_size in batch_sizes:
            prompts, greedily = x[:batch_size, :half], {"n_loop": n_loop, "temperature": 0}
            works[name, batch_size] = partial(generate, model, prompts, half, **greedily, **options)
    results = {key: work() for key, work in works.items()}  # warms up
    return {key: statistics.median(times) for key, times in in_turns(works).items()}, results


def exit_rows(n_loop: int | None, model: GPT, x: Tensor, y: Tensor) -> Iterator[list]:
    """Yield a row for each exit threshold: loss and loops used on windows x, y, and the speed."""
    rules = {0.0: None}
    for threshold in exit_thresholds:
        rules[threshold] = make_exit(model, "state", threshold)
    settings = {threshold: {"exit_rule": rule} for threshold, rule in rules.items()}
    seconds, _ = time_generate(model, n_loop, x, settings)
    full_loss, _ = exit_evaluation(model, x, y, None, n_loop)
    for threshold, rule in rules.items():
        loss, used = exit_evaluation(model, x, y, rule, n_loop)
        cells = [f"{threshold:g}", f"{loss:.4f}", f"{loss / full_loss - 1:+.2%}"]
        cells += [f"{used:.2f}", f"{1 - used / sum(model.config.counts(n_loop)):.0%}"]
        for batch_size in batch_sizes:
            ratio = seconds[0.0, batch_size] / seconds[threshold, batch_size]
            cells.append(f"{ratio:.2f}")
        yield [loops_in_words(model, n_loop), *cells]


def loops_in_words(model: GPT, n_loop: int | None) -> str:
    return ",".join(map(str, model.config.counts(n_loop)))


def draft_rows(n_loop: int | None, model: GPT, x: Tensor) -> Iterator[list]:
    """Yield a row for each pair of drafts: drafts accepted, tokens as without, and the speed."""
    plain, settings = (0, 0), {(0, 0): {}}
    for draft_loops, draft_tokens in drafts:
        if draft_loops < model.config.counts(n_loop)[-1]:
            options = {"draft_loops": draft_loops, "draft_tokens": draft_tokens}
            settings[draft_loops, draft_tokens] = options
    seconds, results = time_generate(model, n_loop, x, settings)
    for pair in settings:
        if pair == plain:
            continue
        accepted, equal, speeds = [], [], []
        for batch_size in batch_sizes:
            tokens, stats = results[pair, batch_size]
            plain_tokens, _ = results[plain, batch_size]
            accepted.append(f"{stats['accepted'] / stats['drafted']:.0%}")
            equal.append(f"{(tokens == plain_tokens).float().mean():.1%}")
            speeds.append(f"{seconds[plain, batch_size] / seconds[pair, batch_size]:.2f}")
        yield [loops_in_words(model, n_loop), *pair, ", ".join(accepted), ", ".join(equal), *speeds]


def decode_section() -> str:
    """Return a section on decoding."""
    load_before = os.getloadavg()[0]
    what = (
        f"Width {config['n_embd']}, {config['vocab_size']:,} ids, block_size "
        f"{config['block_size']}; prompts of {prompt_tokens}, {new_tokens} new tokens. Tokens/s "
        "with the prompt, a step without it; weights are counted as often as they are applied."
    )
    # these refuse what cannot be, before minutes of timing
    fits = prompt_tokens + new_tokens <= config["block_size"]
    require("new_tokens", new_tokens, fits, "what block_size holds, behind prompt_tokens")
    run = open_looped() if looped else None
    caches = cache_table()
    parts = []
    if device.type != "cuda":
        missing = "bfloat16 there, the share of its copy bandwidth, compiled steps"
        parts.append(f"Not measured on a GPU: {missing}.")
    parts += ["### Random weights", what, decoding_table(), bandwidth()]
    parts += ["### Cache, bytes per token", caches]
    if run:
        exits, drafted = looped_tables(run)
        parts += [f"### Exit by the change of the state: {Path(looped).name}", exits]
        parts += ["### Self-speculation, the same model", drafted]
    rows = " and ".join(map(str, batch_sizes))
    sizes = f"{rows} row(s), {prompt_tokens} + {new_tokens} tokens"
    return section(f"{machine()}, torch {torch.__version__}, {sizes}", load_before, *parts)


# -----------------------------------------------------------------------------
# plan: memory and time on other machines
USABLE = 0.95  # share of a GPU's memory; drivers, libraries and gaps between tensors take the rest
MIB, GIB = 2**20, 2**30


def print_plan() -> None:
    """Print the memory of each process at each depth, the time of a step, and what limits."""
    estimate.check(config)
    sheet, on_gpu = hardware.find_gpu(gpu), gpu != "cpu"
    number_type = planned_dtype(sheet)
    peak = getattr(sheet, number_type)
    if not on_gpu:
        config["efficiency"] = measured_efficiency(DTYPES[number_type], peak)
    with torch.device("meta"):
        objective = make_objective(config)
    shape = objective.model.config
    progress.now("counting the bytes of steps")
    depths = [shape.counts()]
    if shape.loop_sampling != "fixed":
        depths.append(shape.counts(shape.max_loops))
    last = (DTYPES[number_type], on_gpu)  # the last arguments of estimate's functions
    memory = {depth: estimate.memory(config, depth, *last) for depth in depths}
    seconds = estimate.seconds(config, objective, sheet, peak)
    print_title(objective.model, number_type)
    print_memory(memory)
    print_time(objective, seconds, sheet, peak)
    room = USABLE * sheet.memory  # GiB
    needed = max(sum(parts.values()) for parts in memory.values()) / GIB
    if needed <= room:
        limit = "the link" if seconds["link"] > seconds["arithmetic"] else "arithmetic"
        largest = estimate.largest_batch(config, depths[-1], *last, room * GIB)
        fits = f"It fits into the {room:.1f} GiB that can be used"
        print(f"{fits}, and so does --batch_size={largest}. What limits is {limit}.")
    else:
        over = f"{needed - room:.2f} GiB more than the {room:.1f} that can be used"
        print(f"What limits is memory: {over}. In all with")
        print_remedies(estimate.remedies(config, depths[-1], *last), room)


def planned_dtype(sheet: Gpu) -> str:
    """Return the name of the number type of matrix products. ValueError where a GPU has none."""
    name = config["dtype"]
    if name == "auto":
        name = "bfloat16" if gpu != "cpu" and sheet.bfloat16 else "float32"
    require("dtype", name, name in DTYPES, "auto, " + " or ".join(DTYPES))
    require("dtype", name, getattr(sheet, name) > 0, f"one that the data sheet of {gpu} has")
    return name


def measured_efficiency(number_type: torch.dtype, peak: float) -> float:
    """Return the share of the peak that the fastest of up to three steps reaches on this CPU."""
    step, times = TrainingStep(config, device, number_type), []
    while len(times) < 4 and sum(times) < 20:  # the first one warms up
        times.append(clock(step))
    return step.objective.flops_per_token() * tokens_per_step / (min(times) * peak)


def print_title(model: GPT, dtype_name: str) -> None:
    micro_steps = config["gradient_accumulation_steps"] // n_gpus
    print(
        f"{model.get_num_params() / 1e6:.2f}M parameters, vocabulary {config['vocab_size']}; "
        f"{micro_steps} x {config['batch_size']} x {config['block_size']} tokens a step "
        f"on each of {n_gpus} x {gpu} in {dtype_name}"
    )


def print_memory(memory: dict[tuple, dict[str, float]]) -> None:
    """Print MiB by part; memory: a column for each depth."""
    columns = [parts | {"in all": sum(parts.values())} for parts in memory.values()]
    lines = {"MiB with loops": [",".join(map(str, depth)) or "-" for depth in memory]}
    for name in columns[0]:
        lines[name] = [f"{parts[name] / MIB:,.0f}" for parts in columns]
    for name, cells in lines.items():
        print(name.ljust(16) + aligned(cells, (10,) * len(cells)))


def print_time(objective: Objective, took: dict[str, float], sheet: Gpu, peak: float) -> None:
    """Print FLOPs, the time of a step, by what takes it, and that of the run."""
    seconds, n_steps = sum(took.values()), config["max_iters"]
    tokens = config["gradient_accumulation_steps"] * tokens_per_step
    depths = estimate.depths_of(config, objective.model).items()
    flops = sum(share * objective.flops_per_token(depth) for depth, share in depths)
    source = "measured here" if gpu == "cpu" else "assumed: measured on none"
    print(
        f"{flops / 1e6:,.1f} MFLOP/token at {config['efficiency']:.0%} ({source}) "
        f"of {peak / 1e12:,.3g} TFLOP/s"
    )
    print(
        f"a step: {1e3 * took['arithmetic']:,.1f} ms of arithmetic, {1e3 * took['link']:,.1f} ms "
        f"of waiting for the link of {estimate.link_of(config, sheet) / 1e9:,.0f} GB/s"
    )
    print(
        f"{tokens / seconds:,.0f} tokens/s; {n_steps:,} steps of {tokens:,} tokens take "
        f"{n_steps * seconds / 3600:,.2f} hours, evaluations not counted"
    )


def print_remedies(sizes: dict[str, float], room: float) -> None:
    """Print the memory in all with each option. room: GiB that can be used."""
    for option, size in sizes.items():
        verdict = "fits" if size / GIB <= room else "too much"
        print(f"  {option:<20}{size / MIB:>10,.0f} MiB, {verdict}")


# -----------------------------------------------------------------------------
# race
def race_section() -> str:
    """Return the section of BENCHMARKS.md on whole runs, ours and nanoGPT's."""
    load = os.getloadavg()[0]
    passed_on = []  # what is train.py's
    for part in arguments:
        if part.removeprefix("--").split("=")[0] not in READ["race"]:
            passed_on.append(part)
    runs = {"nanoGPT": [], "ours": []}
    for number in range(1, rounds + 1):
        progress.now(f"round {number} of {rounds}: nanoGPT's run, then ours")
        with tempfile.TemporaryDirectory() as folder:
            for name, (ended, checkpoint) in race(peer, passed_on, Path(folder), threads).items():
                model = pretrained.load(checkpoint)
                runs[name].append((ended, score_run(model), model.get_num_params()))
    rows = []
    for name, ends in runs.items():
        seconds, losses, sizes = map(statistics.median, zip(*ends))
        rows.append([name, f"{sizes / 1e6:.2f}M", f"{seconds:.1f}", f"{losses:.4f}"])
    pairs = zip(runs["nanoGPT"], runs["ours"])
    ratio = statistics.median(ours / theirs for (theirs, *_), (ours, *_) in pairs)
    words = f"Ours takes {ratio:.3f} of nanoGPT's time (nanoGPT: `train.py {NANOGPT}`)."
    head = ["run", "parameters", "seconds, whole process", "loss, whole validation split"]
    title = f"Whole runs on tiny Shakespeare, {machine()}"
    return section(title, load, table(head, rows), words)


# -----------------------------------------------------------------------------
def main() -> None:
    if command == "plan":
        print_plan()
    elif command == "train" and not peer:
        print_depths()
    else:
        sections = {"decode": decode_section, "race": race_section, "train": train_section}
        text = sections[command]()
        print(text)
        if write_to:
            put_section(Path(write_to), text)


if __name__ == "__main__":
    with clear_errors(), progress:
        main()
