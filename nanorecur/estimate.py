"""
What a run of train.py will take of memory and time, before there is a GPU:

    python bench.py plan config/train_gpt2_looped.py --gpu=h100 --n=8

and the step of train.py as a function, which bench.py train times. Here it is run on tensors without contents, of the
right shapes and types, whose bytes are counted while they live; so the memory is what PyTorch would ask for, to the
byte, in eager mode; compiled it asks for less. Time follows from FLOPs and a share of the data sheet's peak, which a
model too small to fill the device does not reach. Loops by row are counted as if all rows had as many.
"""

import contextlib
import functools
import math
import os
import time
import warnings
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model import GPT, GPTConfig, sample_loops
from nanorecur.hardware import GPUS, Gpu, attend_in_float32, autocast, measured_flops, pick_dtype
from nanorecur.objectives import ANEW, GATED, Objective, compute_anew, parameter_groups

CPU = torch.device("cpu")
MIB, GIB = 2**20, 2**30
USABLE = (
    0.95  # of a GPU's memory: the rest is the driver's, the libraries' and gaps between tensors
)
IN_A_NODE = 8  # GPUs that are joined by link, more of them by the network
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "recompute": ANEW,
    "param_dtype": ("float32", "bfloat16"),
}


# -----------------------------------------------------------------------------
# a step of train.py
def build(config, device):
    """The objective, and the model in it, that train.py makes of its options, in training mode. ValueError as there."""
    for name, values in CHOICES.items():
        if config[name] not in values:
            raise ValueError(f"{name}={config[name]!r}: must be {' or '.join(values)}")
    model = GPT(GPTConfig(**{name: config[name] for name in GPTConfig.__dataclass_fields__}))
    details = ("loss_chunk", "loss_weighting", "entropy_weight", "distill_weight", "ahead_weight")
    scored = Objective(model, config["objective"], *(config[name] for name in details)).train()
    for name, p in model.named_parameters():
        gate = name.startswith("exit_gate.")
        p.requires_grad_(
            config["objective"] in GATED if gate else config["objective"] != "exit_gate"
        )
    return (
        scored if device.type == "cpu" else scored.to(device)
    )  # what has no contents cannot be moved


def make_optimizers(config, model):
    groups = {
        kind: [p for p in some if p.requires_grad] for kind, some in parameter_groups(model).items()
    }
    matrices = {"params": groups["matrices"], "weight_decay": config["weight_decay"]}
    rest = {"params": groups["embeddings"] + groups["vectors"], "weight_decay": 0.0}
    if config["optimizer"] == "muon":
        return [torch.optim.Muon([matrices]), torch.optim.AdamW([rest], fused=True)]
    return [torch.optim.AdamW([rest, matrices], fused=True)]


def make_worker(config, scored, device, compiled):
    """What computes: the objective itself, or with param_dtype=bfloat16 one with such weights."""
    worker = scored
    if config["param_dtype"] == "bfloat16":
        worker = build(config, device)
        for p in worker.parameters():
            p.data = p.data.bfloat16()
    for block in worker.model.transformer.h if compiled else ():
        block.compile()
    compute_anew(worker.model, config["recompute"])
    return worker


def training_step(config, device, dtype, compiled=False, precision=autocast, micro_steps=1):
    """(objective, step): step(n_loop) is one optimizer step on the same random tokens in each micro-step."""
    torch.manual_seed(config["seed"])
    scored = build(config, device)
    optimizers, worker = (
        make_optimizers(config, scored.model),
        make_worker(config, scored, device, compiled),
    )
    masters, copies = list(scored.parameters()), list(worker.parameters())
    average = [p.detach().clone() for p in masters] if config["ema_decay"] else []
    rows, length = config["batch_size"], config["block_size"]
    tokens = torch.randint(config["vocab_size"], (rows, length + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(n_loop=None):
        for _ in range(micro_steps):
            with precision(device, dtype):
                loss, _ = worker(x, y, n_loop)
            (loss / (micro_steps * rows * length)).backward()
            if worker is not scored:
                to_masters(masters, copies)
        torch.nn.utils.clip_grad_norm_(masters, config["grad_clip"] or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            if worker is not scored:
                torch._foreach_copy_(copies, masters)
            if average:
                torch._foreach_lerp_(average, masters, 1 - config["ema_decay"])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    return scored, step


def to_masters(masters, copies):
    """The gradients of the copies that compute, added to those of the weights in float32."""
    for master, p in zip(masters, copies, strict=True):
        if p.grad is not None:
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None


# -----------------------------------------------------------------------------
# memory
class Bytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, as long as they live: now, and the most so far (peak)."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.now += size

    def drop(self, key, size):
        del self.alive[key]
        self.now -= size


@contextlib.contextmanager
def as_on_cuda():
    """Lets autocast on a CPU choose the number types and kernels of CUDA, also where a checkpoint computes anew."""
    try:
        with (
            torch.library._scoped_library("aten", "IMPL", "AutocastCPU") as kernels,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of torch: that its own are replaced
            for op in (
                torch.ops.aten.cross_entropy_loss.default,
                torch.ops.aten.layer_norm.default,
            ):
                kernels.impl(op, functools.partial(in_float32, op))
            kernels.impl("scaled_dot_product_attention", flash_attention)
            yield
    finally:  # under a dispatch mode torch 2.13 would go on with the kernel that was registered last
        attend_in_float32.cache_clear()
        attend_in_float32()


def in_float32(op, x, *others, **options):
    with torch.autocast("cpu", enabled=False):
        return op(x.float(), *others, **options)


def flash_attention(q, k, v, mask=None, dropout=0.0, causal=False, *, scale=None, enable_gqa=False):
    """Without dropout, for which a CPU has another kernel that keeps the scores."""
    q, k, v = (part.to(torch.get_autocast_dtype("cpu")) for part in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=enable_gqa
        )


def cuda_autocast(device, dtype):
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def memory(config, n_loop, dtype, gpu=True):
    """{what: bytes} of a process in its second step, the first that has all: sizes at its peak. gpu: as on CUDA."""
    micro_steps = min(
        2, config["gradient_accumulation_steps"] // config["n"]
    )  # a third would add nothing
    as_there, precision = (
        (as_on_cuda(), cuda_autocast) if gpu else (contextlib.nullcontext(), autocast)
    )
    with FakeTensorMode(), as_there, Bytes() as counted:
        scored, step = training_step(
            config, CPU, dtype, precision=precision, micro_steps=micro_steps
        )
        weights = counted.now
        step(n_loop)
        counted.peak = lasting = counted.now
        step(n_loop)
    trained = [p for p in scored.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    parts = {
        "weights": weights,
        "optimizer": lasting - weights,
        "gradients": gradients,
        "activations": counted.peak - lasting - gradients,
    }
    if config["shard"] and config["n"] > 1:
        return parts | shares(parts, scored, config["n"], micro_steps)
    if config["n"] > 1 and (micro_steps == 1 or config["param_dtype"] == "bfloat16"):
        # DDP's buckets are the gradients, which therefore live in the forward pass too, as with a second micro-step
        parts["all-reduce"] = sum(p.numel() for p in trained) * bytes_sent(config)
    return parts


def shares(parts, scored, n, micro_steps):
    """Of each of n GPUs that share what lasts; of two blocks at a time, and of all around them, each has the whole, and
    of the gradients where it sums up those of several micro-steps."""
    whole = sum(p.nbytes for p in scored.parameters())
    blocks = [sum(p.nbytes for p in block.parameters()) for block in scored.model.transformer.h]
    held = {name: parts[name] / n for name in ("weights", "optimizer")}
    held["gradients"] = parts["gradients"] / (n if micro_steps == 1 else 1)
    return held | {"gathered": 2 * (whole - sum(blocks) + 2 * max(blocks))}


def bytes_sent(config):
    """Of a gradient between processes."""
    return 2 if config["param_dtype"] == "bfloat16" else 4


# -----------------------------------------------------------------------------
# time
def depths_of(config, shape):
    """Loop counts to average over: the one there is, or 1,000 draws."""
    generator = torch.Generator().manual_seed(config["seed"])
    return [
        sample_loops(shape, generator) for _ in range(1 if shape.loop_sampling == "fixed" else 1000)
    ]


def anew(model, recompute, n_loop):
    """FLOPs per token of what the backward pass computes anew, blocks alone or whole loops: at most, as it stops where
    it has all it needs."""
    total = 0
    for stage, count in model.schedule(n_loop):
        n = min(sum(count) or 1, model.config.bptt_k or math.inf) if count else 1
        blocks = stage.blocks if count else (stage,)
        parts = {"block": blocks, "loop": (stage.inject, *blocks) if count else ()}.get(
            recompute, ()
        )
        total += n * sum(map(model.forward_flops, parts))
    return total


def seconds(config, scored, gpu, peak):
    """{what: seconds} of an optimizer step: arithmetic, and what it waits for the link besides."""
    n, model, depths = config["n"], scored.model, depths_of(config, scored.model.config)
    flops = [
        scored.flops_per_token(depth) + anew(model, config["recompute"], depth) for depth in depths
    ]
    micro_steps, tokens = (
        config["gradient_accumulation_steps"] // n,
        config["batch_size"] * config["block_size"],
    )
    speed = link_of(config, gpu)
    one = sum(flops) / len(flops) * tokens / (peak * config["efficiency"])
    sent = (
        2
        * (n - 1)
        / n
        * sum(p.numel() for p in scored.parameters() if p.requires_grad)
        * bytes_sent(config)
    )
    times, hidden = (
        1 if config["param_dtype"] == "float32" else micro_steps,
        2 / 3 * one,
    )  # behind the backward pass
    waits = times * max(0.0, sent / speed - hidden)
    if config[
        "shard"
    ]:  # weights come in every micro-step, and gradients go, in float32, in the last
        come, go = (
            (n - 1) / n * sum(each) / len(flops) / speed
            for each in zip(*(traffic(model, d) for d in depths))
        )
        come *= bytes_sent(config)
        waits = (micro_steps - 1) * max(0.0, come - one) + max(0.0, come + 4 * go - one)
    return {"arithmetic": micro_steps * one, "link": waits}


def traffic(model, n_loop):
    """Parameters that a divided model gathers in one pass forward and backward, and those whose gradients it sends: of
    a block at each call."""

    def size(part):
        return sum(p.numel() for p in part.parameters())

    forward = backward = size(model) - size(model.transformer.h)
    for stage, count in model.schedule(n_loop):
        n, blocks = sum(count) or 1, sum(map(size, stage.blocks if count else (stage,)))
        forward, backward = (
            forward + n * blocks,
            backward + min(n, model.config.bptt_k or n) * blocks,
        )
    return forward + backward, backward


def link_of(config, gpu):
    """Bytes/s that a GPU sends: as was said, or by the data sheet in a node, or by the network."""
    return 1e9 * config["link"] or (
        gpu.link if config["n"] <= IN_A_NODE else 1e9 * config["network"]
    )


# -----------------------------------------------------------------------------
# what is planned for
def find_gpu(name):
    """The Gpu of a short name, such as h100 or rtx-4090, or this computer's CPU. ValueError with the known names."""
    known = {part.lower().replace(" ", "-"): gpu for part, gpu in GPUS.items()}
    if name == "cpu":
        peaks = (
            measured_flops(dtype, torch.get_num_threads())
            for dtype in (torch.bfloat16, torch.float32)
        )
        return Gpu(*peaks, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 10e9)
    if name not in known:
        raise ValueError(f"gpu={name!r}: must be cpu or one of {', '.join(known)}")
    return known[name]


def measured_efficiency(config, dtype, peak):
    """Share of the peak that a step reaches on this CPU, in the fastest of up to three."""
    scored, step = training_step(config, CPU, dtype)
    times = []
    while len(times) < 4 and sum(times) < 20:  # the first one warms up
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    tokens = config["batch_size"] * config["block_size"]
    return scored.flops_per_token() * tokens / (min(times) * peak)


def check(config):
    for name, fits, allowed in (
        ("n", config["n"] >= 1, "at least 1"),
        (
            "gradient_accumulation_steps",
            config["gradient_accumulation_steps"] % max(1, config["n"]) == 0,
            f"a multiple of the n={config['n']} processes",
        ),
        ("efficiency", 0 < config["efficiency"] <= 1, "more than 0 and at most 1"),
        ("link", config["link"] >= 0, "at least 0"),
        ("network", config["network"] > 0, "more than 0"),
    ):
        if not fits:
            raise ValueError(f"{name}={config[name]}: must be {allowed}")


def helps(config, n_loop, dtype, on_gpu):
    """{option: bytes in all with it} of what could be set otherwise, the least first."""
    other = [("recompute", "cheap"), ("recompute", "block"), ("loss_chunk", 2048)]
    other += [("batch_size", config["batch_size"] // 2 or 1)]
    other += [("recompute", "loop")] if config["n_block"] or config["loop_groups"] else []
    other += [("shard", True)] if config["n"] > 1 and not config["shard"] else []
    sizes = {
        f"--{name}={value}": sum(memory(config | {name: value}, n_loop, dtype, on_gpu).values())
        for name, value in other
        if config[name] != value
    }
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


# -----------------------------------------------------------------------------
# the report
def report(config):
    """What bench.py plan prints, as text. ValueError where an option is wrong."""
    check(config)
    gpu, on_gpu = find_gpu(config["gpu"]), config["gpu"] != "cpu"
    name = (
        config["dtype"]
        if config["dtype"] != "auto"
        else "bfloat16"
        if on_gpu and gpu.bfloat16
        else "float32"
    )
    dtype = pick_dtype(name, CPU)
    if not (peak := getattr(gpu, name)):
        raise ValueError(f"dtype={name}: the data sheet of {config['gpu']} has no such products")
    if not on_gpu:
        config = config | {"efficiency": measured_efficiency(config, dtype, peak)}
    with torch.device("meta"):
        scored = build(config, CPU)
    shape = scored.model.config
    depths = [
        shape.counts(),
        *([shape.counts(shape.max_loops)] if shape.loop_sampling != "fixed" else []),
    ]
    tables = {depth: memory(config, depth, dtype, on_gpu) for depth in depths}
    took = seconds(config, scored, gpu, peak)
    lines = [
        in_words(config, scored.model, name),
        *memory_lines(tables),
        *time_lines(config, scored, took, gpu, peak),
    ]
    room, needed = USABLE * gpu.memory, max(sum(parts.values()) for parts in tables.values()) / GIB
    if needed <= room:
        limit = "the link" if took["link"] > took["arithmetic"] else "arithmetic"
        return "\n".join(
            [*lines, f"It fits into the {room:.1f} GiB that can be used. What limits is {limit}."]
        )
    would = [
        f"  {option:<20}{size / MIB:>10,.0f} MiB, {'fits' if size / GIB <= room else 'too much'}"
        for option, size in helps(config, depths[-1], dtype, on_gpu).items()
    ]
    limit = f"What limits is memory: {needed - room:.2f} GiB more than the {room:.1f} that can be used. In all with"
    return "\n".join([*lines, limit, *would])


def in_words(config, model, name):
    micro_steps = config["gradient_accumulation_steps"] // config["n"]
    return (
        f"{model.get_num_params() / 1e6:.2f}M parameters, vocabulary {config['vocab_size']}; {micro_steps} x "
        f"{config['batch_size']} x {config['block_size']} tokens a step on each of {config['n']} x {config['gpu']} "
        f"in {name}"
    )


def memory_lines(tables):
    """MiB of each GPU at each depth."""
    yield f"{'MiB with loops':<16}" + "".join(
        f"{','.join(map(str, depth)) or '-':>10}" for depth in tables
    )
    for name in next(iter(tables.values())):
        yield f"{name:<16}" + "".join(f"{parts[name] / MIB:>10,.0f}" for parts in tables.values())
    yield f"{'in all':<16}" + "".join(
        f"{sum(parts.values()) / MIB:>10,.0f}" for parts in tables.values()
    )


def time_lines(config, scored, took, gpu, peak):
    whole, depths = sum(took.values()), depths_of(config, scored.model.config)
    tokens = config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"]
    flops = sum(map(scored.flops_per_token, depths)) / len(depths)
    known = "measured here" if config["gpu"] == "cpu" else "assumed: measured on none"
    yield f"{flops / 1e6:,.1f} MFLOP/token at {config['efficiency']:.0%} ({known}) of {peak / 1e12:,.3g} TFLOP/s"
    yield (
        f"a step: {1e3 * took['arithmetic']:,.1f} ms of arithmetic, {1e3 * took['link']:,.1f} ms of waiting for the "
        f"link of {link_of(config, gpu) / 1e9:,.0f} GB/s"
    )
    yield (
        f"{tokens / whole:,.0f} tokens/s; {config['max_iters']:,} steps of {tokens:,} tokens take "
        f"{config['max_iters'] * whole / 3600:,.2f} hours, evaluations not counted"
    )
