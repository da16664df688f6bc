"""
Speed and memory of a training step, at each of several loop counts, on random tokens:

    python bench.py config/quickstart.py --loops=1,2,4,8
    python bench.py config/train_gpt2_looped.py --device=cuda --batch_size=16

a whole step of training beside others' of the same shape:

    python bench.py train --peer=../nanoGPT --n_layer=4 --n_embd=128 --n_head=4 --block_size=64 --vocab_size=65
    python bench.py train --peer=../nanoLOOP --norm=rmsnorm --n_prelude=1 --n_block=2 --n_coda=1 --n_loop=4 --bias=False

what a run will take of memory and time on other devices:

    python bench.py plan config/train_gpt2_looped.py --gpu=h100 --n=8

and of decoding, of GPT-2's shape against others' and of a trained looped model with exit and speculation:

    python bench.py decode --peer=../nanoGPT --looped=out-shakespeare-char-cpu-looped --dataset=shakespeare_char \
        --loops=6,8,12 --write=BENCHMARKS.md

Takes every option of train.py and of GPTConfig. The counts take turns, round after round, and medians are printed, so
that a busy machine disturbs them alike. On a GPU memory is what tensors took; on a CPU it is what a fresh process
that does one step at this count took at its peak, the interpreter and torch included.
"""

import contextlib
import copy
import functools
import math
import multiprocessing
import os
import platform
import runpy
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import pretrained
from configurator import clear_errors, configure
from decode import SLOTS, Cache, generate
from model import GPT, GPTConfig, sample_loops, spectral_clip
from nanorecur import estimate
from nanorecur.dataset import load_meta, open_split
from nanorecur.estimate import training_step
from nanorecur.exit_rules import exit_evaluation, make_exit
from nanorecur.hardware import (
    autocast,
    compile_works,
    pack,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
    synchronize,
)

# -----------------------------------------------------------------------------
loops = ()  # loop counts to time, such as 1,2,4,8; (): the config's own
rounds = 5  # turns of each count
steps = 5  # training steps in a turn
threads = 0  # of the CPU; 0: torch's choice
# of a plan
gpu = "h100"  # or another one of hardware.py, or cpu
n = 1  # processes, a GPU each
efficiency = 0.4  # share of the peak that is reached; of a CPU it is measured
link = 0.0  # GB/s that a GPU sends to the others; 0: by the data sheet in a node of 8, by network beyond
network = 50.0  # GB/s
# of decoding
batches = 1, 16  # rows
prompt = 128  # tokens of each row
new = 128  # and how many are added
peaks = False  # of train with a peer: also the memory of each, in processes of their own
peer = ""  # folder of nanoGPT, to time its generate(); of train: one of nanoGPT or nanoLOOP, or several with commas
looped = (
    ""  # folder of a trained model, at whose --loops exit and speculation are measured on --dataset
)
exit_thresholds = 0.05, 0.1, 0.15  # of the relative change of the state
drafts = (2, 3), (3, 4), (4, 6)  # pairs of draft loops and draft tokens
write = ""  # a file whose section about this machine is replaced
command, *argv = (
    sys.argv[1:] if sys.argv[1:2] in (["train"], ["decode"], ["plan"]) else ("train", *sys.argv[1:])
)
config, given = configure(globals(), ("train.py", ""), ("model.py", "GPTConfig"), argv=argv)


# -----------------------------------------------------------------------------
def peak_alone(*what):
    """Peak bytes of peak_of, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(peak_of, *what).result()


def peak_of(device, dtype, changed, n_loop=None, folder=""):
    """Peak bytes of this process after two steps of ours, options changed, or of the peer in a folder."""
    ours = not folder and training_step(config | changed, device, dtype)[1]
    step = (
        functools.partial(ours, n_loop)
        if ours
        else their_step(theirs(folder, device), device, False)
    )
    step(), step()
    return peak_memory(device)


def in_turns(field, device):
    """{name: seconds of a step in each round} of {name: step()}, so that a busy machine disturbs all alike."""
    seconds = {name: [] for name in field}
    for _ in range(rounds):
        for name, step in field.items():
            seconds[name].append(clock(step, device, steps) / steps)
    return seconds


def clock(work, device, times=1):
    """Seconds that work() takes so many times."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return time.perf_counter() - start


def time_clip(model, device):
    """Seconds that spectral clipping of every matrix of the blocks takes, the median of three times."""
    matrices, times = {}, []
    for module in model.transformer.h.modules():
        if isinstance(module, torch.nn.Linear):
            matrices.setdefault(module.weight.shape, []).append(module.weight.detach())

    def clip_all():
        for same in matrices.values():
            spectral_clip(torch.stack(same), config["spectral_clip_beta"])

    times = [clock(clip_all, device) for _ in range(4)]  # the first one warms up
    return statistics.median(times[1:])


# -----------------------------------------------------------------------------
# training beside others
def theirs(folder, device):
    """The model of a nanoGPT or nanoLOOP checkout in the shape of ours. ValueError where it has none such."""
    file = runpy.run_path(str(Path(folder) / "model.py"))
    fields = file["GPTConfig"].__dataclass_fields__
    usual = {name: field.default for name, field in GPTConfig.__dataclass_fields__.items()}
    looped = "n_loop" in fields  # nanoLOOP's
    usual["norm"] = "rmsnorm" if looped else "layernorm"
    allowed = {
        name: [value]
        for name, value in usual.items()
        if name not in fields and name not in NOT_COMPARED
    }
    if looped:
        allowed |= {"n_block": range(1, 1000), "input_injection": ["inject", "passthrough"]}
    for name, values in allowed.items():
        if config[name] not in values:
            one = f"at least {values[0]}" if len(values) > 2 else " or ".join(map(repr, values))
            raise ValueError(f"{name}={config[name]!r}: must be {one}, all that {folder} has")
    own = {name: config[name] for name in fields}
    own |= {"bptt_k": config["bptt_k"] or None} if looped else {}
    with contextlib.redirect_stdout(sys.stderr):  # it speaks
        return file["GPT"](file["GPTConfig"](**own)).to(device).train()


NOT_COMPARED = (
    "loop_sampling",
    "max_loops",
    "n_layer",
)  # what a step of fixed depth, or a looped model, does not read


def their_step(model, device, compiled):
    """A step as their train.py makes it: in bfloat16 on CUDA, in float32 elsewhere."""
    rates = config["weight_decay"], config["learning_rate"], (config["beta1"], config["beta2"])
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = model.configure_optimizers(*rates, device.type)
    run, dtype = (
        torch.compile(model) if compiled else model,
        THEIR_DTYPE.get(device.type, torch.float32),
    )
    x, y = torch.randint(
        config["vocab_size"], (2, config["batch_size"], config["block_size"]), device=device
    )

    def step():
        with autocast(device, dtype):
            loss = run(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"] or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


THEIR_DTYPE = {"cuda": torch.bfloat16}


def trainers(device):
    """{name: (step(), its dtype where it is ours)}, eager and compiled, and our objective. ValueError where a peer's
    model has not as many parameters."""
    like = {
        **config,
        "optimizer": "adamw",
        "objective": "next",
        "param_dtype": "float32",
        "ema_decay": 0.0,
    }
    like |= {"loss_chunk": 0, "recompute": "none"}
    field, ways = (
        {},
        {"": False} | ({", compiled": True} if config["compile"] and compile_works(device) else {}),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for way, compiled in ways.items():
            scored, step = training_step(like, device, dtype, compiled)
            field[f"ours, {str(dtype).removeprefix('torch.')}{way}"] = step, dtype
    count = sum(p.numel() for p in scored.parameters())
    folders = peer.split(",")
    if len({Path(folder).resolve().name for folder in folders}) < len(folders):
        raise ValueError(f"peer={peer}: must be folders of different names")
    for folder in folders:
        for way, compiled in ways.items():
            model = theirs(folder, device)
            if count != (other := sum(p.numel() for p in model.parameters())):
                raise ValueError(
                    f"peer={folder}: its model has {other:,} parameters and ours {count:,}"
                )
            field[Path(folder).resolve().name + way] = their_step(model, device, compiled), None
    return field, scored


def warmed(field):
    """Those that run, after two steps; a line about each that does not."""
    ready = {}
    for name, (step, dtype) in field.items():
        try:
            step(), step()
            ready[name] = step, dtype
        except (
            Exception
        ) as error:  # a model of others that torch.compile does not take, in many ways
            print(
                f"{name} does not run: {type(error).__name__}: {str(error).splitlines()[0][:100]}",
                file=sys.stderr,
            )
    return ready


def side_by_side(device):
    """Tables of ours and the peers' training steps, and of sampled depth where ours is looped, in one section."""
    before, (field, scored) = os.getloadavg()[0], trainers(device)
    field, shape = warmed(field), scored.model.config
    seconds = in_turns({name: step for name, (step, _) in field.items()}, device)
    best = best_ways({name: took for name, took in seconds.items() if field[name][1] is None})
    rows = [pace(name, seconds, field[name][1], best.values(), scored, device) for name in field]
    head = [
        "model",
        "ms a step",
        "tokens/s",
        "GFLOP/s",
        "MFU",
        *(f"speed to {name} at its best" for name in best),
    ]
    what = (
        f"{sum(p.numel() for p in scored.parameters()):,} parameters each, "
        f"{scored.flops_per_token() / 1e6:,.2f} MFLOP/token. A step: forward, backward, clip at "
        f"{config['grad_clip']}, AdamW."
    )
    depth = (
        ["### Sampled depth, compiled", sampled_depth(device)]
        if shape.groups and config["compile"]
        else []
    )
    title = f"## Training {in_words(shape)} beside {' and '.join(best)}, {machine(device)}, torch {torch.__version__}"
    memory = (
        ["### Memory, eager, in a process of its own for each", memory_beside(device)]
        if peaks
        else []
    )
    return (
        "\n\n".join([title, *circumstances(before), what, table(head, rows), *depth, *memory])
        + "\n"
    )


SAVING = {
    "": {},
    "loss_chunk=256": {"loss_chunk": 256},
    "and recompute=cheap": {"loss_chunk": 256, "recompute": "cheap"},
    "or recompute=block": {"loss_chunk": 256, "recompute": "block"},
    "and optimizer=muon": {"loss_chunk": 256, "recompute": "block", "optimizer": "muon"},
}
MALLOC = "MALLOC_MMAP_THRESHOLD_"  # glibc then gives back at once what tensors of this size leave


def memory_beside(device):
    """A table of the peak memory of a peer's steps and of ours, float32 on a CPU, with options that save some."""
    dtype = THEIR_DTYPE.get(device.type, torch.float32)
    field = {folder: (device, dtype, {}, None, folder) for folder in peer.split(",")}
    field |= {
        f"ours, {name}".strip(", "): (device, dtype, changed) for name, changed in SAVING.items()
    }
    found = {name: [peak_alone(*what)] for name, what in field.items()}
    if device.type == "cpu":
        os.environ[MALLOC] = str(2**22)
        found = {name: [*found[name], peak_alone(*what)] for name, what in field.items()}
        del os.environ[MALLOC]
    first, head = next(iter(found.values()))[0], ["MiB", f"{MALLOC}={2**22}"]
    head = [
        part
        for title in head[: len(next(iter(found.values())))]
        for part in (title, "to the first")
    ]
    return table(
        ["model", *head],
        [
            [
                Path(name).name,
                *(
                    part
                    for peak in each
                    for part in (f"{peak / 2**20:,.0f}", f"{peak / first:.2f}")
                ),
            ]
            for name, each in found.items()
        ],
    )


def best_ways(seconds):
    """{peer: the name of its faster way, eager or compiled}."""
    ways = {}
    for name in seconds:
        ways.setdefault(name.removesuffix(", compiled"), []).append(name)
    return {
        name: min(each, key=lambda way: statistics.median(seconds[way]))
        for name, each in ways.items()
    }


def pace(name, seconds, dtype, others, scored, device):
    """A row on one contestant; the ratios are medians of those of each round. dtype: of ours, for its MFU, else None"""
    median, tokens = statistics.median(seconds[name]), tokens_of(config)
    peak, rate = (
        peak_flops(device, dtype) if dtype else None,
        scored.flops_per_token() * tokens / median,
    )
    ratios = [
        statistics.median(b / a for a, b in zip(seconds[name], seconds[other])) for other in others
    ]
    mfu = f"{rate / peak:.1%}" if peak else ""
    return [
        name,
        f"{1e3 * median:.1f}",
        f"{tokens / median:,.0f}",
        f"{rate / 1e9:,.1f}",
        mfu,
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def tokens_of(config):
    return config["batch_size"] * config["block_size"]


def in_words(shape):
    """A shape as it stands in a heading."""
    core = (
        f"{shape.n_prelude} + {shape.n_block}x{shape.n_loop} + {shape.n_coda}"
        if shape.n_block
        else shape.n_layer
    )
    truncated = f", bptt_k {shape.bptt_k}" if shape.bptt_k else ""
    return (
        f"{core} blocks of width {shape.n_embd}, {shape.vocab_size:,} ids, {config['batch_size']} x "
        f"{shape.block_size} tokens{truncated}"
    )


def sampled_depth(device):
    """A table of what a FLOP costs at fixed depth and at depths drawn anew for each step, in turns."""
    dtype = pick_dtype(config["dtype"], device)
    scored, step = training_step(
        config | {"loop_sampling": "poisson"}, device, dtype, compiled=True
    )
    shape, generator = scored.model.config, torch.Generator().manual_seed(config["seed"])
    for n in (1, 2, min(shape.bptt_k + 2, shape.max_loops)):  # loops with and without gradient
        step(n), step(n)
    graphs, turns = torch._dynamo.utils.counters["stats"], {"fixed": [], "poisson": []}
    before = graphs["unique_graphs"]
    for _ in range(rounds):
        drawn = [sample_loops(shape, generator) for _ in range(steps)]
        for name, depths in {"fixed": [shape.counts()] * steps, "poisson": drawn}.items():
            took = sum(clock(functools.partial(step, depth), device) for depth in depths) / steps
            work = sum(map(scored.flops_per_token, depths)) * tokens_of(config) / steps
            turns[name].append((1e3 * took, work / 1e9, 1e3 * took / (work / 1e9)))
    rows = []
    for name, each in turns.items():
        ratio = statistics.median(b[2] / a[2] for a, b in zip(turns["fixed"], each))
        rows.append(
            [name, *(f"{statistics.median(part):.3f}" for part in zip(*each)), f"{ratio:.3f}"]
        )
    head = ["depth", "ms a step", "GFLOP a step", "ms per GFLOP", "to fixed"]
    return (
        f"{table(head, rows)}\n\nGraphs compiled after warm-up: {graphs['unique_graphs'] - before}."
    )


# -----------------------------------------------------------------------------
# decoding


def shapes():
    """The two that are timed, GPT-2's unless an option says otherwise."""
    given = {name: config[name] for name in GPTConfig.__dataclass_fields__}
    return {
        "12 blocks": GPTConfig(**given),
        "2 + 4x4 + 2": GPTConfig(
            **{**given, "n_prelude": 2, "n_block": 4, "n_coda": 2, "n_loop": 4}
        ),
    }


def ours(model, dtype, **options):
    """A way to continue idx (B, T) by count tokens, as all contestants are."""

    def run(idx, count):
        with autocast(idx.device, dtype if idx.device.type != "cpu" else torch.float32):
            return generate(model, idx, count, temperature=0, **options)[0]

    return run


def contestants(device):
    """{name: (run(idx, count), bytes of weights that a token reads, or None)} of GPT-2's shape, random weights."""
    torch.manual_seed(0)
    found = {}
    for name, shape in shapes().items():
        fresh = GPT(shape).to(device).eval()
        for dtype in (torch.float32, torch.bfloat16):
            ready, short = copy.deepcopy(fresh), str(dtype).removeprefix("torch.")
            if device.type == "cpu":
                pack(ready, dtype)
            read = weights_read(ready) * dtype.itemsize
            found[f"{name}, {short}"] = ours(ready, dtype), read
            if config["compile"] and dtype == (
                torch.float32 if device.type == "cpu" else torch.bfloat16
            ):
                found[f"{name}, {short}, compiled"] = ours(fresh, dtype, static=True), read
        if device.type == "cpu" and not shape.groups:
            found[f"{name}, float32, weights not packed"] = (
                ours(fresh, torch.float32),
                weights_read(fresh) * 4,
            )
    try:
        import transformers

        same = {name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        shape = transformers.GPT2Config(
            **same, n_positions=config["block_size"], bos_token_id=None, eos_token_id=None
        )
        theirs = transformers.GPT2LMHeadModel(shape).to(device).eval()
        found["transformers' GPT-2, float32"] = (
            lambda idx, count: theirs.generate(
                idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=count
            ),
            None,
        )
    except ImportError:
        print("transformers is not installed: not timed")
    if peer:
        file = runpy.run_path(str(Path(peer) / "model.py"))
        shape = {
            name: config[name]
            for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        }
        nano = file["GPT"](file["GPTConfig"](**shape, dropout=0.0)).to(device).eval()
        found["nanoGPT's generate, float32"] = (
            lambda idx, count: nano.generate(idx, count, top_k=1),
            None,
        )
    return found


def weights_read(model):
    """Parameters that multiply a token: of Linear layers, as often as they are applied."""

    def linear(part):
        return sum(m.weight.numel() for m in part.modules() if isinstance(m, torch.nn.Linear))

    loops = sum(
        sum(count) * sum(map(linear, (stage.inject, *stage.blocks))) if count else linear(stage)
        for stage, count in model.schedule()
    )
    return loops + model.lm_head.weight.numel()


@torch.no_grad()
def seconds_of(run, idx, slow):
    """Seconds to continue idx by new tokens, and for a prompt and one token. slow: from three of the tokens."""

    def clock(text, count):
        synchronize(idx.device)
        start = time.perf_counter()
        run(text, count)
        synchronize(idx.device)
        return time.perf_counter() - start

    if not slow:
        return clock(idx, new), clock(idx, 1)
    longer = idx.repeat(1, 2 + new // idx.size(1))
    places = (idx.size(1), idx.size(1) + new // 2, idx.size(1) + new - 1)
    return new * statistics.mean(clock(longer[:, :place], 1) for place in places), clock(idx, 1)


def speed(device):
    """A table of tokens per second and bandwidth, at each batch size, in turns."""
    field, rows = contestants(device), []
    for batch in batches:
        idx = torch.randint(config["vocab_size"], (batch, prompt), device=device)
        times = {name: [] for name in field}
        for run, _ in field.values():
            run(idx, 2)  # warms up
        for turn in range(rounds):
            for name, (run, _) in field.items():
                slow = name.startswith("nanoGPT")  # and therefore only once
                times[name].append(
                    seconds_of(run, idx, slow) if not (slow and turn) else times[name][0]
                )
                load = os.getloadavg()[0]
                print(
                    f"  {batch} {name}: {times[name][-1][0]:.2f} s, load {load:.1f}",
                    file=sys.stderr,
                    flush=True,
                )
        medians = {
            name: [statistics.median(part) for part in zip(*took)] for name, took in times.items()
        }
        others = [name for name in field if field[name][1] is None]
        for name, (whole, first) in medians.items():
            read, step = field[name][1], (whole - first) / (new - 1)
            rate = f"{read / step / 1e9:.1f}" if read else ""
            ratios = [
                [b[0] / a[0] for a, b in zip(times[name], times[other])] for other in others
            ]  # of each round
            times_as_fast = [f"{statistics.median(part):.2f}" for part in ratios]
            rows.append(
                [
                    batch,
                    name,
                    f"{batch * new / whole:.1f}",
                    f"{1e3 * step:.1f}",
                    rate,
                    *times_as_fast,
                ]
            )
    head = [
        "rows",
        "model",
        "tokens/s",
        "ms a step",
        "GB/s of weights",
        *(f"speed to {name}" for name in others),
    ]
    return table(head, rows)


def bandwidth(device):
    """GB/s of reading and of copying 256 MiB."""
    block = torch.zeros(2**26, device=device)
    other, took = torch.empty_like(block), {"read": [], "copied": []}
    for _ in range(5):
        for name, work in {"read": block.sum, "copied": lambda: other.copy_(block)}.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            took[name].append(time.perf_counter() - start)
    read, copied = (statistics.median(times) for times in took.values())
    read, copied = block.nbytes / read / 1e9, 2 * block.nbytes / copied / 1e9
    return f"Memory: {read:.1f} GB/s read, {copied:.1f} GB/s read and written in a copy."


def cache_sizes():
    """A table of bytes per token for every slot policy and kind of attention, without filling anything."""
    kinds = {
        "multi-head": {},
        "4 heads of keys and values": {"n_kv_head": 4},
        "latent of n_embd/4": {
            "attention": "mla",
            "n_latent": config["n_embd"] // 4,
            "position": "rope",
        },
    }
    rows = []
    for slots in SLOTS:
        sizes = []
        for kind in kinds.values():
            with torch.device("meta"):
                shape = GPT(GPTConfig(**{**vars(shapes()["2 + 4x4 + 2"]), **kind}))
            sizes.append(Cache(shape, slots=slots, n_slot=2, size=1).bytes_per_token())
        rows.append(
            [slots + " (2 slots)" * (slots in ("last", "mod")), *(f"{size:,}" for size in sizes)]
        )
    return table(["slots of 2 + 4x4 + 2, float32", *kinds], rows)


def looped_measures(device):
    """Tables of exit and of speculation on a trained model, at each of the loop counts, greedy."""
    trained, folder = pretrained.load(looped).to(device), Path(config["dataset"])
    folder = folder if folder.is_dir() else Path(__file__).parent / "data" / folder
    split = open_split(
        folder, "val", load_meta(folder), trained.block_size, trained.config.vocab_size
    )
    windows = [torch.from_numpy(part).to(device) for part in split.windows(split.spread(256))]
    if device.type == "cpu":
        pack(trained)
    exits, drafted = [], []
    for n in loops or trained.config.counts()[-1:]:
        exits += exits_at(n, trained, *windows)
        drafted += drafts_at(n, trained, windows[0])
    rows = [f"speed, {batch} rows" for batch in batches]
    return [
        table(["loops", "threshold", "loss", "change", "loops used", "saved", *rows], exits),
        table(["loops", "draft loops", "draft tokens", "accepted", "same tokens", *rows], drafted),
    ]


def turns(trained, n, idx, ways):
    """{(way, rows): (median seconds, result)} of continuing half windows of idx (B, T), in turns."""
    half, took, results = trained.block_size // 2, {}, {}
    for _ in range(rounds + 1):
        for name, options in ways.items():
            for batch in batches:
                start = time.perf_counter()
                results[name, batch] = generate(
                    trained, idx[:batch, :half], half, n_loop=n, temperature=0, **options
                )
                took.setdefault((name, batch), []).append(time.perf_counter() - start)
    return {name: (statistics.median(times[1:]), results[name]) for name, times in took.items()}


def exits_at(n, trained, x, y):
    """Rows about exit from n loops: on windows x, y the loss and loops used, continuing them the speed."""
    rules = {0.0: None} | {
        threshold: make_exit(trained, "state", threshold) for threshold in exit_thresholds
    }
    took = turns(trained, n, x, {name: dict(exit_rule=rule) for name, rule in rules.items()})
    deep = exit_evaluation(trained, x, y, None, n)[0]
    for name, rule in rules.items():
        loss, used = exit_evaluation(trained, x, y, rule, n)
        speeds = [f"{took[0.0, batch][0] / took[name, batch][0]:.2f}" for batch in batches]
        yield [
            n,
            f"{name:g}",
            f"{loss:.4f}",
            f"{loss / deep - 1:+.2%}",
            f"{used:.2f}",
            f"{1 - used / n:.0%}",
            *speeds,
        ]


def drafts_at(n, trained, x):
    """Rows about drafts for n loops: how many stand, how many tokens are those of plain decoding, the speed."""
    pairs = [pair for pair in drafts if pair[0] < n]
    plain = {(0, 0): {}}
    took = turns(
        trained,
        n,
        x,
        plain | {pair: dict(draft_loops=pair[0], draft_tokens=pair[1]) for pair in pairs},
    )
    for pair in pairs:
        both = [(took[(0, 0), batch], took[pair, batch]) for batch in batches]
        same = [f"{(slow[1][0] == fast[1][0]).float().mean():.1%}" for slow, fast in both]
        stand = [f"{fast[1][1]['accepted'] / fast[1][1]['drafted']:.0%}" for _, fast in both]
        yield [
            n,
            *pair,
            ", ".join(stand),
            ", ".join(same),
            *(f"{slow[0] / fast[0]:.2f}" for slow, fast in both),
        ]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def decoding(device):
    """What bench.py decode prints, as Markdown: one section."""
    what = (
        f"Width {config['n_embd']}, {config['vocab_size']:,} ids, block_size {config['block_size']}; prompts of "
        f"{prompt}, {new} new tokens. Tokens/s with the prompt, a step without it; weights are counted as often as "
        "they are applied."
    )
    before, body = (
        os.getloadavg()[0],
        [
            "### GPT-2's shape, random weights",
            what,
            speed(device),
            bandwidth(device),
            "### Cache, bytes per token",
            cache_sizes(),
        ],
    )
    if looped:
        exits, drafted = looped_measures(device)
        body += [
            f"### Exit by the change of the state: {Path(looped).name}",
            exits,
            "### Self-speculation, the same model",
            drafted,
        ]
    rows = " and ".join(map(str, batches))
    title = (
        f"## {machine(device)}, torch {torch.__version__}, {rows} row(s), {prompt} + {new} tokens"
    )
    head = [title, *circumstances(before)]
    gpu = "Not measured on a GPU: bfloat16 there, the share of its copy bandwidth, compiled steps."
    return "\n\n".join([*head, *([] if device.type == "cuda" else [gpu]), *body]) + "\n"


def machine(device):
    """Its name in a heading."""
    cpu = f"{torch.get_num_threads()} thread(s) of a CPU ({platform.machine()})"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def circumstances(before):
    """The command, and when and under what load it ran. before: the load average at its start."""
    load = f"Load average {before:.1f} before, {os.getloadavg()[0]:.1f} after; medians of {rounds} rounds in turn."
    return f"`python bench.py {' '.join(sys.argv[1:])}`", f"{time.strftime('%Y-%m-%d')}. {load}"


def put_section(path, section):
    """Replace the section of a Markdown file with the same heading, or add it."""
    empty = "# Benchmarks\n\nWritten by bench.py, a section for each machine and shape.\n\n"
    text = path.read_text("utf-8") if path.exists() else empty
    head, *sections = text.split("\n## ")
    sections = [part for part in sections if part.split("\n")[0] != section[3:].split("\n")[0]]
    path.write_text("\n## ".join([head, *sections, section[3:]]), "utf-8")


def measure(device):
    """A table of training steps at each of the loop counts, printed line by line."""
    dtype, compiled = (
        pick_dtype(config["dtype"], device),
        config["compile"] and compile_works(device),
    )
    scored, step = training_step(config, device, dtype, compiled)
    model, tokens, peak = scored.model, tokens_of(config), peak_flops(device, dtype)
    counts = [model.config.counts(n) for n in loops] or [model.config.counts()]
    print(
        f"{model.get_num_params() / 1e6:.2f}M parameters, vocabulary {config['vocab_size']}, "
        f"{config['batch_size']} x {model.config.block_size} tokens a step, {device} in {dtype}, "
        f"{'compiled' if compiled else 'eager'}, torch {torch.__version__}"
    )
    memory = {count: warm_up(step, count, device, dtype) for count in counts}
    seconds = in_turns({count: functools.partial(step, count) for count in counts}, device)
    print(
        f"{'loops':>8}{'ms':>10}{'tokens/s':>12}{'MFLOP/token':>13}{'GFLOP/s':>11}{'MFU':>8}{'peak MiB':>10}"
    )
    for count in counts:
        median, flops = statistics.median(seconds[count]), scored.flops_per_token(count)
        rate = flops * tokens / median
        print(
            f"{','.join(map(str, count)) or '-':>8}{1e3 * median:>10.1f}{tokens / median:>12,.0f}{flops / 1e6:>13.2f}"
            f"{rate / 1e9:>11,.1f}{f'{rate / peak:.1%}' if peak else 'n/a':>8}{memory[count] / 2**20:>10,.0f}"
        )
    if config["spectral_clip_beta"]:
        seconds = time_clip(model, device)
        share = (
            seconds
            / config["spectral_clip_interval"]
            / config["gradient_accumulation_steps"]
            / median
        )
        print(
            f"spectral clipping of every block: {1e3 * seconds:.1f} ms; {share:.1%} of a training step of "
            f"{config['gradient_accumulation_steps']} micro-steps, every {config['spectral_clip_interval']} steps"
        )


def warm_up(step, count, device, dtype):
    """Two steps, with which compilation is over; the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step(count), step(count)
    return peak_alone(device, dtype, {}, count) if device.type == "cpu" else peak_memory(device)


def prepare():
    """The device, everything that was asked for checked."""
    for name, least in {"rounds": 1, "steps": 1, "threads": 0, "batch_size": 1}.items():
        if config[name] < least:
            raise ValueError(f"{name}={config[name]}: must be at least {least}")
    meta = Path(__file__).parent / "data" / config["dataset"]
    if command != "decode" and "vocab_size" not in given and (meta / "meta.json").exists():
        known = load_meta(meta)["vocab_size"]
        config["vocab_size"] = known if known < 1024 else -(-known // 64) * 64  # as train.py has it
    if threads:
        torch.set_num_threads(threads)
    device = pick_device(config["device"])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in train.py
    return device


if __name__ == "__main__":
    with clear_errors():
        device = prepare()
        if command == "plan":
            print(estimate.report(config))
        elif command == "train" and not peer:
            measure(device)
        else:
            section = {"train": side_by_side, "decode": decoding}[command](device)
            print(section)
            if write:
                put_section(Path(write), section)
