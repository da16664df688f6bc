"""
Memory and time that a run of train.py will take, before there is a GPU:

    python bench.py plan config/train_gpt2_looped.py --gpu=h100 --n_gpus=8

Memory: the step of train.py runs on tensors without contents, whose bytes are counted while they
live. So it is what PyTorch asks for in eager mode, to the byte; compiled it asks for less. Time:
FLOPs and a share of the data sheet's peak, which a model too small to fill the device does not
reach. Loops drawn for each row are counted as if all rows had as many.
"""

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from math import inf
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import check_ranges, require
from model import GPT, sample_loops
from nanorecur.curriculum import steps_of_one_loop
from nanorecur.hardware import Gpu
from nanorecur.objectives import Objective
from nanorecur.options import check_options
from nanorecur.parallel import Processes
from nanorecur.training_step import TrainingStep

Loops = int | tuple | None  # as GPT.forward takes n_loop
CPU = torch.device("cpu")
GPUS_PER_NODE = 8  # GPUs that are joined by their own link; more of them by the network


# -----------------------------------------------------------------------------
# memory
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it, as long as they live."""

    def __init__(self):
        super().__init__()
        self.storages = set()  # id of each that lives
        self.now = 0  # bytes that live
        self.peak = 0  # the most that lived at once

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # the same object as long as the bytes live
        if key not in self.storages:
            self.storages.add(key)
            self.now += size
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.now -= size


class FakeTensors(FakeTensorMode):
    """Tensors without contents; a deep copy of one stays in this mode."""

    def __deepcopy__(self, memo):
        return self


def cuda_autocast() -> contextlib.AbstractContextManager:
    """Return a context in which autocast on a CPU uses CUDA's number types."""
    functions = {"scaled_dot_product_attention": attention_in_bfloat16}
    functions |= {"layer_norm": in_float32, "cross_entropy": in_float32}
    replaced = {name: partial(new, getattr(F, name)) for name, new in functions.items()}
    return mock.patch.multiple(F, **replaced)


def in_float32(function: Callable, x: Tensor, *others, **options) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return function(x.float(), *others, **options)


def attention_in_bfloat16(function: Callable, q, k, v, mask, dropout, *others, **options) -> Tensor:
    """Attend without dropout, for which a CPU has another kernel, one that keeps the scores."""
    q, k, v = (part.bfloat16() for part in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return function(q, k, v, mask, 0.0, *others, **options)


def memory(config: dict, n_loop: Loops, dtype: torch.dtype, on_gpu: bool = True) -> dict[str, int]:
    """Return the bytes of each part at the peak of a process's second step, the first with all.

    config: train.py's options and bench.py's. on_gpu: with the number types of CUDA's autocast.
    """
    n = config["n_gpus"]
    micro_steps = min(2, config["gradient_accumulation_steps"] // n)  # a third adds nothing
    number_types = contextlib.nullcontext()
    if on_gpu and dtype == torch.bfloat16:
        number_types = cuda_autocast()
    counted = LiveBytes()
    with warnings.catch_warnings(), number_types, FakeTensors(), counted:
        warnings.simplefilter("ignore")  # torch's, that a copy asks for the address of no contents
        step = TrainingStep(config, CPU, dtype, micro_steps=micro_steps, fake=True)
        weights = counted.now
        step(n_loop)
        lasting = counted.now
        step(n_loop)
    trained = [p for p in step.model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    parts = {"weights": weights, "optimizer": lasting - weights, "gradients": gradients}
    parts["activations"] = counted.peak - lasting - gradients
    if n > 1 and config["shard"]:
        if step.computed.is_copy:  # FSDP2 casts what it gathers and keeps no copy
            parts["weights"] -= sum(p.nbytes for p in step.computed.objective.parameters())
        return parts | sharded(parts, step.model, n, micro_steps, bytes_sent(config))
    if n > 1 and (micro_steps == 1 or config["param_dtype"] == "bfloat16"):
        # DDP's buckets are the gradients: so these live in the forward pass too
        parts["all-reduce"] = sum(p.numel() for p in trained) * bytes_sent(config)
    return parts


def sharded(
    parts: dict[str, int], model: GPT, n: int, micro_steps: int, number_bytes: int
) -> dict[str, float]:
    """Return the parts that differ where n processes share weights, moments and gradients (FSDP2).

    Two blocks and all that is outside blocks are gathered at a time, with their gradients, in
    numbers of so many bytes. Gradients are whole, in float32, while those of several micro-steps
    are added up.
    """
    total = number_bytes * numel(model)
    blocks = [number_bytes * numel(block) for block in model.transformer.h]
    shards = {name: parts[name] / n for name in ("weights", "optimizer")}
    shards["gradients"] = parts["gradients"] / (n if micro_steps == 1 else 1)
    shards["gathered"] = 2 * (total - sum(blocks) + 2 * max(blocks))
    return shards


def numel(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def bytes_sent(config: dict) -> int:
    """Return the bytes of a number that processes send: of DDP's gradients, of FSDP2's weights."""
    return 2 if config["param_dtype"] == "bfloat16" else 4


# -----------------------------------------------------------------------------
# time
def depths_of(config: dict, model: GPT) -> dict[tuple[int, ...], float]:
    """Return {loop counts: share of the steps}.

    Counts that are sampled are 1,000 draws of them. The first steps, by loop_start, loop once.
    """
    once = steps_of_one_loop(config) / max(1, config["max_iters"])
    generator = torch.Generator().manual_seed(config["seed"])
    draws = 1 if model.config.loop_sampling == "fixed" else 1000
    counts = Counter(sample_loops(model.config, generator) for _ in range(draws))
    shares = Counter({(1,) * len(model.config.counts()): once})
    for depth, count in counts.items():
        shares[depth] += (1 - once) * count / draws
    return {depth: share for depth, share in shares.items() if share}


def recomputed_flops(model: GPT, recompute: str, n_loop: Loops) -> int:
    """Return the FLOPs per token that the backward pass computes again.

    That is the most it can be: it stops where it has all it needs.
    """
    total = 0
    for loop, n, looped in model.schedule(n_loop):
        parts = []
        if recompute == "block":
            parts = loop.blocks
        elif recompute == "loop" and looped:
            parts = [loop.inject, *loop.blocks]
        total += min(n, loop.bptt_k) * sum(map(model.forward_flops, parts))
    return total


def traffic(model: GPT, n_loop: Loops) -> tuple[int, int]:
    """Return (parameters that FSDP2 gathers in a micro-step, parameters whose gradients it sends).

    Blocks are gathered at each call, forward and backward.
    """
    forward = backward = numel(model) - numel(model.transformer.h)
    for loop, n, _ in model.schedule(n_loop):
        blocks = sum(map(numel, loop.blocks))
        forward += n * blocks
        backward += min(n, loop.bptt_k) * blocks
    return forward + backward, backward


def seconds(config: dict, objective: Objective, gpu: Gpu, peak: float) -> dict[str, float]:
    """Return the seconds of a step: arithmetic, and what it waits for the link besides."""
    n, model = config["n_gpus"], objective.model
    micro_steps = config["gradient_accumulation_steps"] // n
    depths = depths_of(config, model)
    flops = gathered = sent = 0  # means over depths
    for depth, share in depths.items():
        flops += share * objective.flops_per_token(depth)
        flops += share * recomputed_flops(model, config["recompute"], depth)
        gathered += share * traffic(model, depth)[0]
        sent += share * traffic(model, depth)[1]
    tokens = config["batch_size"] * config["block_size"]
    compute = flops * tokens / (peak * config["efficiency"])  # seconds of a micro-step
    per_byte = (n - 1) / n / link_of(config, gpu)  # seconds
    if config["shard"]:  # weights come in each micro-step; gradients go in the last, in float32
        come, go = gathered * bytes_sent(config) * per_byte, sent * 4 * per_byte
        waits = (micro_steps - 1) * max(0.0, come - compute) + max(0.0, come + go - compute)
    else:  # an all-reduce sends gradients twice, while the backward pass goes on
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sending = 2 * trained * bytes_sent(config) * per_byte
        times = micro_steps if config["param_dtype"] == "bfloat16" else 1
        waits = times * max(0.0, sending - 2 / 3 * compute)
    return {"arithmetic": micro_steps * compute, "link": waits}


def link_of(config: dict, gpu: Gpu) -> float:
    """Return the bytes/s that a GPU sends: as given, by its data sheet, or over the network."""
    if config["link_gbps"]:
        return 1e9 * config["link_gbps"]
    return gpu.link if config["n_gpus"] <= GPUS_PER_NODE else 1e9 * config["network_gbps"]


# -----------------------------------------------------------------------------
# options
def check(config: dict) -> None:
    """Raise ValueError that names the first option which is wrong."""
    check_ranges(config, {"n_gpus": (1, inf), "efficiency": (0, 1), "link_gbps": (0, inf)})
    for name in ("efficiency", "network_gbps"):
        require(name, config[name], config[name] > 0, "more than 0")
    processes = Processes()
    processes.world_size = config["n_gpus"]
    check_options(config, processes)
    pair = config["loops_of_level"]
    require("loops_of_level", pair, not pair, "(): a plan does not know the levels of the steps")


def largest_batch(
    config: dict, n_loop: Loops, dtype: torch.dtype, on_gpu: bool, room: float
) -> int:
    """Return the largest batch_size whose memory is at most room, in bytes; 0 if one row has more.

    Newton's method: each guess continues at the slope of the last one.
    """

    @cache
    def size(rows: int) -> int:
        return sum(memory(config | {"batch_size": rows}, n_loop, dtype, on_gpu).values())

    fits, too_many = 0, inf
    rows = config["batch_size"]
    while too_many - fits > 1:
        slope = size(rows + 1) - size(rows)
        for tried in (rows, rows + 1):
            if size(tried) <= room:
                fits = max(fits, tried)
            else:
                too_many = min(too_many, tried)
        # without a slope the optimizer's step, which has no rows, takes most
        guess = rows + (room - size(rows)) // slope if slope > 0 else 2 * rows
        rows = int(min(max(guess, fits + 1), too_many - 1))
    return fits


def remedies(config: dict, n_loop: Loops, dtype: torch.dtype, on_gpu: bool) -> dict[str, float]:
    """Return {"--option=value": bytes in all with it} of options that save memory, least first."""
    changes = [("recompute", "cheap"), ("recompute", "block"), ("loss_chunk", 2048)]
    changes.append(("batch_size", config["batch_size"] // 2 or 1))
    if config["n_block"] or config["loop_groups"]:
        changes.append(("recompute", "loop"))
    if config["n_gpus"] > 1:
        changes.append(("shard", True))
    sizes = {}
    for name, value in changes:
        if config[name] != value:
            parts = memory(config | {name: value}, n_loop, dtype, on_gpu)
            sizes[f"--{name}={value}"] = sum(parts.values())
    return dict(sorted(sizes.items(), key=lambda size: size[1]))
