"""
Train a looped GPT, on one device or on many:

    python train.py config/quickstart.py                                  one process: CUDA, Apple MPS or CPU
    python train.py config/quickstart.py --learning_rate=1e-3 --n_loop=6  any knob below, any field of GPTConfig
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_looped.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=... --master_port=... train.py config/...

The same command with --init_from=auto goes on where the run in out_dir stopped, bit for bit. Everything random in a
step follows from (seed, iteration, rank), and the order of the data from (seed, position), on any number of processes.
SIGTERM and SIGINT end a run after the step it is in, saved, with exit code 128 + signal; SIGUSR1 saves and goes on.
"""

import copy
import functools
import gc
import json
import math
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import pretrained
from configurator import clear_errors, configure
from model import GPT, GPTConfig, sample_loops, shift_labels, spectral_clip
from nanorecur import checkpoint
from nanorecur.corpus import Stream, open_stream
from nanorecur.dataset import Split, load_meta, open_split, random_key
from nanorecur.exit_rules import exit_evaluation, make_exit
from nanorecur.hardware import DTYPES, autocast, compile_works, peak_flops, pick_device, pick_dtype
from nanorecur.objectives import (
    ANEW,
    GATED,
    Objective,
    compute_anew,
    parameter_groups,
    sample_shifts,
)

# -----------------------------------------------------------------------------
# knobs, by default those of GPT-2 (124M) on OpenWebText
out_dir = "out"
init_from = "scratch"  # or resume (the run in out_dir), auto (resume if there is one), a checkpoint, gpt2, hf:<name>
seed = 1337
# evaluation and logging
eval_interval = 2000  # steps between evaluations, each followed by a checkpoint
save_interval = 0  # steps between further checkpoints; 0: none
keep_last = 2  # checkpoints kept
eval_iters = 200  # batches per split and evaluation, always the same windows
eval_stride = 0  # score all of validation in windows so many tokens apart, most context for each; 0: eval_iters batches
eval_loops = ()  # loop counts to evaluate besides the model's own, such as 1,4,16
eval_only = False  # evaluate once and stop
automatic_loop_exit = False  # evaluate with exit too: each token stops looping by itself
automatic_loop_exit_threshold = 0.03  # of exit_rule; 0: never
exit_rule = "state"  # state, kl, entropy, argmax, gate; see exit_rules.py
always_save_checkpoint = (
    True  # False: only after evaluations, when the validation loss is the best so far
)
log_interval = 1
wandb_log = False
wandb_mode = "online"  # or offline
wandb_project = "nanorecur"
wandb_run_name = "run"
# data
dataset = "openwebtext"  # a folder under data/, or the path of a prepared folder
stream = False  # read the corpus of the folder's prepare.py while training, and store nothing
input_files = ""  # of stream: local .parquet, .jsonl or .txt files in place of the hub
batch_size = 12  # windows of block_size in one micro-step of one process
gradient_accumulation_steps = 40  # micro-steps in one step, divided among the processes
# objective
objective = "next"  # or at every loop: deep, distill, exit, exit_gate (alone), confidence; see objectives.py
loss_weighting = "uniform"  # of deep's losses; or linear, by the number of the loop
entropy_weight = 0.1  # of exit: keeps the gate from deciding too early (Ouro's beta)
distill_weight = 0.5  # of distill: the last loop teaches the others
ahead_weight = 0.3  # of the losses of n_ahead's further heads, together
loss_chunk = 0  # tokens whose logits exist at once, computed anew in the backward pass; 0: all
# optimizer
optimizer = "adamw"  # or muon: Muon on the matrices of the blocks, AdamW on the rest
learning_rate = 6e-4  # of AdamW
muon_learning_rate = 0.02  # of Muon, on the same schedule
max_iters = 600000
weight_decay = 0.1  # of the matrices
weight_decay_all = False  # also of norms, biases and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: off
spike_factor = (
    0.0  # skip steps whose gradient is so many times longer than the median of the last 100; 0: off
)
max_skips = 10  # steps skipped in a row, for that or for NaN or Inf, after which the run stops
spectral_clip_beta = (
    0.0  # largest singular value of the matrices of looped blocks, after each step; 0: off
)
spectral_clip_interval = 1  # steps between clips
spectral_clip_all = False  # of every block, looped or not
ema_decay = (
    0.0  # evaluate and save the exponential moving average of the weights, such as 0.999; 0: off
)
# schedule
decay_lr = True  # False: the full rate in every step
lr_schedule = "cosine"  # from the full rate to min_lr, after the warm-up: cosine, linear, wsd, or constant at the full
warmup_iters = 2000
hold_iters = 400000  # wsd: the full rate up to here, then linear
lr_decay_iters = 600000  # when min_lr is reached
min_lr = 6e-5
loop_warmup_iters = 0  # steps over which the number of loops rises to its value; 0: off
loops_per_row = (
    False  # sampled depth: another number of loops for each window, in place of one for each step
)
loop_warmup = "linear"  # or sqrt: 1 - sqrt(1 - t), slower at first (arXiv 2511.07384)
# system
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype = "auto"  # float32, or bfloat16 for matrix products; auto: bfloat16 on a GPU that has it
param_dtype = "float32"  # or bfloat16: the model computes with such weights, the optimizer keeps them in float32
shard = False  # FSDP2: parameters, gradients and moments divided among the processes, where one GPU has no room for all
compile = True  # compile each block; one compilation serves every number of loops
recompute = "none"  # in the backward pass, to save memory: cheap (all but products and attention), block, or loop
backend = "auto"  # of torchrun's processes: nccl or gloo; auto: nccl on CUDA
patience = 600  # seconds that processes wait for one that does not answer, be it because it saves
config, given = configure(globals(), ("model.py", "GPTConfig"))

# -----------------------------------------------------------------------------
# everything that was asked for is checked before anything is written
rank, local_rank, world_size = (
    int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
)
ddp = world_size > 0  # under torchrun
world_size = max(1, world_size)
master = rank == 0  # this process prints, logs and saves


def require(name, ok, allowed):
    if not ok:
        raise ValueError(f"{name}={config[name]!r}: must be {allowed}")


with clear_errors():
    for name in (
        "eval_interval",
        "eval_iters",
        "log_interval",
        "batch_size",
        "gradient_accumulation_steps",
    ):
        require(name, config[name] >= 1, "at least 1")
    for name in ("learning_rate", "muon_learning_rate"):
        require(name, config[name] > 0, "positive")
    for name in (
        "max_iters",
        "weight_decay",
        "grad_clip",
        "warmup_iters",
        "min_lr",
        "loop_warmup_iters",
        "loss_chunk",
        "save_interval",
        "spike_factor",
        "max_skips",
        "entropy_weight",
        "distill_weight",
        "ahead_weight",
    ):
        require(name, config[name] >= 0, "at least 0")
    require(
        "keep_last", keep_last >= 2, "at least 2, so that one is whole while the other is written"
    )
    require("patience", patience >= 1, "at least 1")
    require(
        "lr_decay_iters",
        lr_decay_iters > warmup_iters or not decay_lr,
        f"more than warmup_iters={warmup_iters}",
    )
    require(
        "eval_loops",
        all(type(n) is int and n >= 1 for n in eval_loops),
        "loop counts such as 1,4,16",
    )
    require(
        "hold_iters",
        lr_schedule != "wsd" or warmup_iters <= hold_iters < lr_decay_iters,
        f"from warmup_iters={warmup_iters} to less than lr_decay_iters={lr_decay_iters}",
    )
    require(
        "lr_schedule",
        lr_schedule in ("cosine", "linear", "wsd", "constant"),
        "cosine, linear, wsd or constant",
    )
    require("recompute", recompute in ANEW, ", ".join(ANEW))
    require("ema_decay", 0 <= ema_decay < 1, "at least 0 and less than 1")
    require("spectral_clip_beta", spectral_clip_beta >= 0, "at least 0")
    require("spectral_clip_interval", spectral_clip_interval >= 1, "at least 1")
    require("optimizer", optimizer in ("adamw", "muon"), "adamw or muon")
    require("loss_weighting", loss_weighting in ("uniform", "linear"), "uniform or linear")
    require(
        "loops_per_row",
        not loops_per_row or objective == "next",
        "False where every loop of a step has its loss",
    )
    require("param_dtype", param_dtype in ("float32", "bfloat16"), "float32 or bfloat16")
    require("loop_warmup", loop_warmup in ("linear", "sqrt"), "linear or sqrt")
    require("backend", backend in ("auto", "nccl", "gloo"), "auto, nccl or gloo")
    shared = gradient_accumulation_steps % world_size == 0
    require("gradient_accumulation_steps", shared, f"a multiple of the {world_size} processes")
    require(
        "shard",
        not shard or world_size > 1,
        "False in one process: torchrun starts those that divide the model",
    )
    require(
        "spectral_clip_beta",
        not (shard and spectral_clip_beta),
        "0 with shard: no process has a whole matrix",
    )
    require(
        "loops_per_row",
        not (shard and loops_per_row),
        "False with shard: all processes gather a block together",
    )
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)

    found = checkpoint.exists(out_dir)
    fresh = init_from == "scratch" or (init_from == "auto" and not found)
    resume = not fresh and init_from in ("auto", "resume")
    require(
        "out_dir",
        resume or eval_only or not found,
        "free of other runs; --init_from=auto goes on with this one",
    )
    data_dir = Path(__file__).parent / "data" / dataset
    if stream:
        enough = eval_iters * batch_size * config["block_size"] + 1
        corpus, meta, held_out = open_stream(data_dir, input_files, enough)
    else:
        meta = load_meta(data_dir)
    tokenizer = {name: meta[name] for name in ("tokenizer", "chars") if name in meta}

    # the model's options: all of them for a fresh one, else those of the checkpoint and what was set on top
    torch.manual_seed(seed)
    model_args = {
        name: config[name] for name in GPTConfig.__dataclass_fields__ if fresh or name in given
    }
    if fresh:
        if (
            "vocab_size" not in given
        ):  # the corpus's, a large one padded to the multiples of 64 that GPUs are fast at
            known = meta["vocab_size"]
            model_args["vocab_size"] = known if known < 1024 else -(-known // 64) * 64
        if "row" in meta and "block_size" not in given:
            model_args["block_size"] = meta["row"]["length"] - 1
        try:
            ckpt, raw_model = {}, GPT(GPTConfig(**model_args))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"there is no memory for a model of these sizes ({str(error)[:99]})"
            ) from None
    else:
        saved = resume or checkpoint.exists(init_from) or Path(init_from).is_file()
        ckpt = checkpoint.load(out_dir if resume else init_from) if saved else {}
        averaged = ckpt.get("model")
        if (
            resume and "training_model" in ckpt
        ):  # with an average in "model", this is what was trained
            ckpt["model"] = ckpt["training_model"]
        raw_model = (
            pretrained.build(ckpt, **model_args)
            if saved
            else pretrained.load(init_from, **model_args)
        )
        require(
            "dataset",
            ckpt.get("tokenizer", tokenizer) == tokenizer,
            "one with the tokenizer of the checkpoint",
        )
        whole = {"iter_num", "best_val_loss", "optimizer"} <= set(ckpt)
        require(
            "init_from",
            whole or not resume,
            "what fine-tunes: the checkpoint in out_dir lacks the run's state",
        )
        require(
            "optimizer",
            not resume or optimizer in ckpt["optimizer"],
            "the one that the run was trained with",
        )
    settings = (loss_chunk, loss_weighting, entropy_weight, distill_weight, ahead_weight)
    scored = Objective(raw_model, objective, *settings)
    if automatic_loop_exit:
        make_exit(raw_model, exit_rule, automatic_loop_exit_threshold)  # whether it can be
    model_args = asdict(raw_model.config)
    config.update(model_args)
    block_size, known_ids = (
        raw_model.config.block_size,
        min(meta["vocab_size"], raw_model.config.vocab_size),
    )
    require("eval_stride", 0 <= eval_stride <= block_size, f"from 0 to block_size={block_size}")
    if stream:
        splits = {
            "val": Split("val", held_out, meta["splits"]["val"]["bytes"], block_size, known_ids)
        }
        lanes, states = gradient_accumulation_steps, ckpt.get("stream", {}) if resume else {}
        require(
            "gradient_accumulation_steps",
            len(states) in (0, lanes),
            f"{len(states)}, as the run began",
        )
        streamed = Stream(
            corpus, meta, lanes, range(rank, lanes, world_size), (batch_size, block_size), states
        )
    else:
        names = [name for name in ("train", "val", "hard") if name in meta["splits"]]
        splits = {name: open_split(data_dir, name, meta, block_size, known_ids) for name in names}
    if master and not eval_only:
        os.makedirs(out_dir, exist_ok=True)
        claim = checkpoint.lock(out_dir)
        require(
            "out_dir",
            checkpoint.exists(out_dir) == found,
            "free of other runs; one has begun just now",
        )
        checkpoint.write_whole(Path(out_dir, "config.json"), json.dumps(config, indent=1).encode())

# -----------------------------------------------------------------------------
# processes, device, optimizers
if device.type == "cuda":
    device = torch.device("cuda", local_rank) if ddp else device
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32
if ddp:
    gpu = backend == "nccl" or (
        backend == "auto" and device.type == "cuda"
    )  # gloo besides: it waits for no GPU
    # after a restart by torchrun its store still has the addresses of the dead, for which the living would wait
    store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=patience)))
    store = dist.PrefixStore("restart" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        timeout=timedelta(seconds=patience),
        world_size=world_size,
        rank=rank,
        store=store,
    )
if shard:
    from nanorecur import parallel
signals, ENDING = checkpoint.listen(), {signal.SIGTERM, signal.SIGINT}

for (
    name,
    p,
) in (
    raw_model.named_parameters()
):  # with exit_gate the gate is all that is trained, with others perhaps not
    p.requires_grad_(
        objective in GATED if name.startswith("exit_gate.") else objective != "exit_gate"
    )
health = {"norms": [], "skipped": 0, "in_a_row": 0} | (
    ckpt.get("health", {}) if resume else {}
)  # of the gradients
ema = AveragedModel(raw_model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay else None
if ema and resume:
    ema.module.load_state_dict(averaged)
    ema.n_averaged.fill_(ckpt["iter_num"] - health["skipped"])  # 0 would start the average anew
for each in (raw_model, ema.module) if ema else (raw_model,):
    if shard:
        parallel.divide(each, device, DTYPES[param_dtype])
    else:
        each.to(device)
groups = {
    kind: [p for p in some if p.requires_grad] for kind, some in parameter_groups(raw_model).items()
}
rest = {
    "params": groups["embeddings"] + groups["vectors"],
    "weight_decay": weight_decay_all * weight_decay,
}
matrices = {"params": groups["matrices"], "weight_decay": weight_decay}
adamw = functools.partial(torch.optim.AdamW, lr=learning_rate, betas=(beta1, beta2), fused=True)
if optimizer == "adamw":
    optimizers, top_lr = {"adamw": adamw([rest, matrices])}, {"adamw": learning_rate}
else:
    optimizers = {
        "muon": torch.optim.Muon([matrices], lr=muon_learning_rate),
        "adamw": adamw([rest]),
    }
    top_lr = {"muon": muon_learning_rate, "adamw": learning_rate}
if resume:
    with clear_errors():
        for name, opt in optimizers.items():
            if shard:
                opt.register_load_state_dict_pre_hook(parallel.divided)
            checkpoint.restore(opt, ckpt["optimizer"][name])
to_clip = {}  # matrices by shape, which are clipped in one batch
for block in raw_model.transformer.h if spectral_clip_beta else ():
    if spectral_clip_all or any(block in loop.blocks for loop in raw_model.transformer.loops):
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                to_clip.setdefault(module.weight.shape, []).append(module.weight.detach())

if (
    param_dtype == "bfloat16" and not shard
):  # raw_model keeps the weights in float32, a copy of it computes
    scored = copy.deepcopy(scored)
    for p in scored.parameters():
        p.data = p.data.bfloat16()
worker = scored.model
for each in {raw_model, worker} if compile and compile_works(device) else ():
    for block in each.transformer.h:
        block.compile()  # in place: the loops around the blocks stay Python, so their number never recompiles
compute_anew(worker, recompute)
places = [device.index] if device.type == "cuda" else None
if shard:
    model, sync_gradients = (
        functools.partial(raw_model.run, scored),
        raw_model.set_requires_gradient_sync,
    )
else:
    model = (
        DDP(scored, places, forward_sync_buffers=False, gradient_as_bucket_view=True)
        if ddp
        else scored
    )
    sync_gradients = functools.partial(setattr, model, "require_backward_grad_sync")
iter_num, best_val_loss = (ckpt["iter_num"], ckpt["best_val_loss"]) if resume else (0, math.inf)
saved_iter, ckpt, averaged = iter_num, None, None  # free their memory


# -----------------------------------------------------------------------------
# what a step needs, each a pure function of the iteration
def get_lr(it):
    """Share of the full learning rate in step it."""
    if not decay_lr:
        return 1.0
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    start = hold_iters if lr_schedule == "wsd" else warmup_iters
    progress = min(1.0, max(0.0, (it - start) / (lr_decay_iters - start)))
    floor = min_lr / learning_rate
    fall = {"cosine": 0.5 * (1 - math.cos(math.pi * progress)), "constant": 0.0}.get(
        lr_schedule, progress
    )
    return 1 - (1 - floor) * fall


def get_loops(it):
    """Loops of step it, one int per group, the same on every process; with loops_per_row such a tuple for each row."""
    rising = min(1.0, (it + 1) / loop_warmup_iters) if loop_warmup_iters else 1.0
    if loop_warmup == "sqrt":
        rising = 1 - math.sqrt(1 - rising)
    means = [max(1, math.ceil(rising * n)) for n in raw_model.config.counts()]
    draw = functools.partial(sample_loops, raw_model.config, generator_of("loops", it), means)
    return [draw() for _ in range(rows_per_iter)] if loops_per_row else draw()


def generator_of(*key):
    return torch.Generator().manual_seed(random_key(seed, *key))


def get_step(it):
    """What the micro-steps of this process need in step it: [(x, y, loops, shift), ...], and the loops of all rows."""
    loops, shifts = (
        get_loops(it),
        sample_shifts(raw_model.config, generator_of("shift", it), rows_per_iter),
    )
    step = []
    for micro_step in range(micro_steps):
        first = (micro_step * world_size + rank) * batch_size
        rows = slice(first, first + batch_size)
        depth = tuple(torch.tensor(loops[rows]).unbind(1)) if loops_per_row else loops
        shift = shifts[rows].to(device) if raw_model.config.predict_ahead else 1
        step.append((*get_batch(it, micro_step), depth, shift))
    return step, loops if loops_per_row else [loops]


def get_batch(it, micro_step):
    """This process's share of the global batch of step it: x, y (batch_size, block_size)."""
    if stream:
        return to_device(streamed.next(micro_step * world_size + rank))
    place = it * gradient_accumulation_steps + micro_step * world_size + rank
    positions = place * batch_size + np.arange(batch_size)
    return to_device(splits["train"].windows(splits["train"].shuffled(positions, seed)))


def usable(norm):
    """Whether to make a step with a gradient of this norm, the same on all processes; kept count of in health."""
    norms = health["norms"]
    limit = (
        spike_factor * statistics.median(norms) if spike_factor and len(norms) == 100 else math.inf
    )
    good = math.isfinite(norm) and norm <= limit
    health["norms"] = [*norms, norm][-100:] if good else norms
    health["in_a_row"] = 0 if good else health["in_a_row"] + 1
    health["skipped"] += not good
    return good


def agreed(number):
    """The largest of the processes' numbers."""
    largest = torch.tensor(number)
    if ddp:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def gather(mine):
    """The dicts of all processes as one."""
    parts = [mine] * world_size
    if ddp:
        dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def within(model, function, *arguments):
    """function(*arguments), which uses parts of model: where they are divided, they are gathered for it."""
    return model.run(function, *arguments) if shard else function(*arguments)


def to_masters():
    """The gradients of the copy that computes, added to those of the weights in float32."""
    for master, p in zip(raw_model.parameters(), worker.parameters(), strict=True):
        if p.grad is not None:
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None


def to_device(arrays):
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":  # pinned memory travels while the GPU computes
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


# -----------------------------------------------------------------------------
# evaluation: every process takes its share of the same windows
def windows_to_score(split):
    """Where they start, and how many targets each adds at its end."""
    if eval_stride and split.split != "train":
        return split.sliding(eval_stride)
    starts = split.spread(min(eval_iters * batch_size, split.n_windows))
    return starts, np.full(len(starts), block_size)


def batches(split):
    """This process's windows to score: where they start, x and y, filled up with some that do not count."""
    starts, fresh = windows_to_score(split)
    missing = -len(starts) % (
        batch_size * world_size
    )  # one shape to compile, one number of batches for all processes
    starts, fresh = np.pad(starts, (0, missing), mode="wrap"), np.pad(fresh, (0, missing))
    for first in range(rank * batch_size, len(starts), world_size * batch_size):
        if agreed(
            bool(signals & ENDING)
        ):  # an evaluation can be longer than what a scheduler waits
            raise KeyboardInterrupt
        part = slice(first, first + batch_size)
        yield starts[part], *to_device(split.windows(starts[part], fresh[part]))


@torch.no_grad()
def evaluate(split, n_loop=None, shift=1):
    """Loss (nats per token), bits per token and per byte, and accuracy of a split at n_loop, shift tokens ahead.

    For a task also the share of rows whose whole answer is right ("exact"), in all and by level.
    """
    evaluated = ema.module if ema else raw_model
    evaluated.eval()
    starts = windows_to_score(split)[0]
    levels, rows_of = np.unique(split.levels(starts), return_counts=True)
    sums = torch.zeros(
        3 + len(levels), dtype=torch.float64
    )  # losses, right guesses, tokens; right rows of each level
    for starts, x, y in batches(split):
        with autocast(device, dtype):
            logits, loss = evaluated(x, y, n_loop=n_loop, shift=shift)
        y = shift_labels(y, shift)
        counted, right = y >= 0, logits.argmax(-1) == y
        tokens = counted.sum().item()
        nats = loss.item() * tokens if tokens else 0.0  # a batch may be nothing but filling
        sums[:3] += torch.tensor([nats, right.sum().item(), tokens], dtype=torch.float64)
        exact = (right | ~counted).all(1) & counted.any(1)
        sums[3:].index_add_(
            0, torch.from_numpy(np.searchsorted(levels, split.levels(starts))), exact.double().cpu()
        )
    if ddp:
        sums = sums.to(device)
        dist.all_reduce(sums)
    evaluated.train()
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    bits, tokens_per_byte = loss / math.log(2), split.n_tokens / split.n_bytes
    row = {
        "loss": loss,
        "bits_per_token": bits,
        "bits_per_byte": bits * tokens_per_byte,
        "accuracy": accuracy,
    }
    if split.row:
        exact = sums[3:].cpu().numpy()
        by_level = dict(zip(levels.tolist(), (exact / rows_of).tolist()))
        row |= {"exact": exact.sum() / rows_of.sum(), "by_level": by_level}
    return row


@torch.no_grad()
def evaluate_details():
    """What the objective logs, and the loss and mean loops with exit, on validation at the model's own loops."""
    evaluated, total = ema.module if ema else raw_model, {}
    scored.eval()
    evaluated.eval()
    for _, x, y in batches(splits["val"]) if detailed else ():
        with autocast(device, dtype):
            add(total, within(raw_model, scored, x, y)[1])
    for _, x, y in batches(splits["val"]) if automatic_loop_exit else ():
        rule, count = (
            make_exit(evaluated, exit_rule, automatic_loop_exit_threshold),
            (y >= 0).sum().item(),
        )
        with autocast(device, dtype):
            means = within(evaluated, exit_evaluation, evaluated, x, y, rule)
        each = zip(
            ("loss with exit", "loops with exit"), means if count else (0.0, 0.0)
        )  # else nothing but filling
        add(
            total, {name: torch.tensor([mean * count, count], device=device) for name, mean in each}
        )
    scored.train()
    evaluated.train()
    return means_of(total) if total else {}


def evaluate_all():
    """The rows of an evaluation: training at the model's own loops, the others at the counts of eval_loops too, and
    where the model has learned to predict further ahead, at each shift. KeyboardInterrupt if a signal ends the run."""
    own = raw_model.config.counts()
    counts = [own] + [(n,) * len(own) for n in eval_loops if own and (n,) * len(own) != own]
    asked = [
        (name, loops, 1) for name in splits for loops in (counts if name != "train" else [own])
    ]
    if raw_model.config.predict_ahead:
        asked += [("val", own, shift) for shift in range(2, raw_model.config.max_shift + 1)]
    return [
        {"split": name, "loops": loops, "shift": shift, **evaluate(splits[name], loops, shift)}
        for name, loops, shift in asked
    ]


def add(total, parts):
    """Sums and counts {name: (sum, count)} to others."""
    for name, part in parts.items():
        total[name] = total.get(name, 0) + part


def means_of(total):
    """{name: mean over the targets of all processes}."""
    sums = torch.stack(list(total.values()))
    if ddp:
        dist.all_reduce(sums)
    return {name: part / count for name, (part, count) in zip(total, sums.tolist())}


@torch.no_grad()
def watch():
    """Of each group on a batch of validation: norm of the state after each loop, how far each loop moves it (as a
    share of the norm), mean correlation between tokens at the end; and what all loops gain on one, in nats.

    Two published runs died of these: correlation going to 1, the state ignored (Huginn, arXiv 2502.05171, section 4.3).
    """
    split, evaluated = splits["val"], ema.module if ema else raw_model
    starts = np.resize(
        split.spread(min(batch_size, split.n_windows)), batch_size
    )  # no new shape to compile
    x, y = to_device(split.windows(starts))
    evaluated.eval()
    with autocast(device, dtype):
        groups = within(evaluated, evaluated.loops_representation, x)
        gain = (evaluated(x, y, n_loop=1)[1] - evaluated(x, y)[1]).item()
    evaluated.train()
    report = []
    for states in groups:
        s = torch.stack(states).float()  # (n, B, T, C)
        norm, move = s.norm(dim=-1).mean((1, 2)), s.diff(dim=0).norm(dim=-1).mean((1, 2))
        T, mean = (
            s.size(2),
            F.normalize(s[-1], dim=-1).mean(dim=1),
        )  # of directions: 1 long where all tokens agree
        alike = ((T * mean.square().sum(-1) - 1) / (T - 1)).mean().item()
        report.append(
            {
                "norm": norm.tolist(),
                "change": (move / norm[1:]).tolist(),
                "token_correlation": alike,
            }
        )
    return {"groups": report, "gain": gain}


def warnings_of(report):
    """What is wrong with a run, in words."""
    alike = max((group["token_correlation"] for group in report["groups"]), default=0.0)
    if alike > 0.999:
        yield f"the states of all tokens are nearly the same (correlation {alike:.3f})"
    if max(raw_model.config.counts(), default=1) > 1 and abs(report["gain"]) < 1e-4:
        yield f"the state is not used: one loop gives the same loss within {abs(report['gain']):.0e}"


def table(rows):
    task = "exact" in rows[0]
    shifts = {row["shift"] for row in rows} != {1}
    lines = [
        f"{'split':<6}{'loops':>8}{'loss':>9}{'bits/token':>12}{'bits/byte':>11}{'accuracy':>10}"
        + f"{'exact':>9}  by level" * task
        + "  tokens ahead" * shifts
    ]
    for row in rows:
        loops = ",".join(map(str, row["loops"])) or "-"
        own = "*" if row["loops"] == rows[0]["loops"] else " "
        line = (
            f"{row['split']:<6}{own + loops:>8}{row['loss']:>9.4f}{row['bits_per_token']:>12.4f}"
            f"{row['bits_per_byte']:>11.4f}{row['accuracy']:>10.2%}"
        )
        if task:
            line += f"{row['exact']:>9.2%}  " + " ".join(
                f"{n}:{share:.0%}" for n, share in row["by_level"].items()
            )
        lines.append(line + f"{row['shift']:>14}" * shifts)
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# logging: the terminal, out_dir/log.jsonl, wandb
def log(entry, text):
    if not master:
        return
    bar.write(text) if bar else print(text, flush=True)
    if not eval_only:
        with clear_errors(), open(log_path, "a") as file:
            file.write(json.dumps(entry) + "\n")
    if wandb:
        wandb.log(entry, step=entry["iter"])


def log_evaluation(rows, parts):
    report, as_json = watch(), json.dumps(rows) if eval_only else ""
    if not master:
        return
    warnings = (
        [f"warning: {words}\n" for words in warnings_of(report)] if iter_num else []
    )  # before training all agree
    details = f"besides, on val: {in_words(parts)}\n" if parts else ""
    text = f"\nstep {iter_num}\n{table(rows)}\n{details}{''.join(warnings)}{as_json}"
    log({"iter": iter_num, "eval": rows, "objective": parts, "watch": report}, text)


def in_words(means):
    return ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())


def log_step(parts, norm, loops, seconds, n_steps, flops):
    """One line on this step, its objective, gradient and loops; its pace is of the last n_steps."""
    seconds_per_step = seconds / n_steps
    tokens_per_second = tokens_per_iter / seconds_per_step
    mfu = flops / seconds / (peak * world_size) if peak else None
    left = time.strftime("%H:%M:%S", time.gmtime((max_iters - iter_num - 1) * seconds_per_step))
    entry = {
        "iter": iter_num,
        **parts,
        "lr": learning_rate * get_lr(iter_num),
        "ms": 1e3 * seconds_per_step,
    }
    entry |= {"tokens_per_second": tokens_per_second, "mfu": mfu, "loops": loops, "grad_norm": norm}
    log(
        entry,
        f"iter {iter_num}: {in_words(parts)}, {entry['ms']:.1f} ms, {tokens_per_second:,.0f} tokens/s, "
        f"mfu {f'{mfu:.1%}' if mfu else 'n/a'}, loops {entry['loops']:.1f}, left {left}",
    )


def log_skip(norm):
    """A line on a step that is not made; after too many in a row the run stops, and the last checkpoint stays."""
    entry = {"iter": iter_num, "skipped": health["skipped"], "grad_norm": norm}
    log(
        entry,
        f"iter {iter_num}: skipped, the norm of its gradient is {norm:.3g} ({health['skipped']} in all)",
    )
    if health["in_a_row"] > max_skips:
        words = f"train.py: max_skips={max_skips} steps in a row were skipped; {out_dir} keeps the last good checkpoint"
        sys.exit(words if master else 1)


rows_per_iter = gradient_accumulation_steps * batch_size
tokens_per_iter = rows_per_iter * block_size
flops_of = functools.cache(scored.flops_per_token)
peak = peak_flops(device, dtype)
log_path = Path(out_dir, "log.jsonl")
with clear_errors():
    require(
        "out_dir",
        agreed(iter_num) == iter_num,
        "one folder for all processes: another has a newer checkpoint",
    )
if master:
    if not eval_only:
        checkpoint.cut_log(log_path, iter_num)
    print(
        f"{raw_model.get_num_params() / 1e6:.2f}M parameters, {tokens_per_iter:,} tokens per step, "
        f"{'streamed' if stream else format(splits['train'].n_windows, ',')} windows of {block_size} tokens, "
        f"on {world_size} x {device} in {dtype}"
    )
bar = (
    tqdm(total=max_iters, initial=iter_num, unit="step")
    if master and sys.stderr.isatty() and not eval_only
    else None
)
wandb = None
if wandb_log and master:
    import wandb

    wandb.init(
        project=wandb_project, name=wandb_run_name, mode=wandb_mode, config=config, dir=out_dir
    )


# -----------------------------------------------------------------------------
# saving
def save():
    """The run as it is before step iter_num; all processes take part."""
    positions = gather(streamed.states) if stream else {}
    parts = {"model": raw_model.state_dict(keep_vars=shard)}  # by which fsdp knows tied weights
    if ema:
        parts = {"model": ema.module.state_dict(keep_vars=shard), "training_model": parts["model"]}
    parts |= {"optimizer": {name: opt.state_dict() for name, opt in optimizers.items()}}
    if shard:
        parts = parallel.gathered(parts, keep=master)
    if not master:
        return
    with clear_errors():
        checkpoint.save(
            out_dir,
            parts
            | {
                "format": 1,
                "model_args": model_args,
                "iter_num": iter_num,
                "health": health,
                "best_val_loss": best_val_loss,
                "config": config,
                "tokenizer": tokenizer,
                "stream": positions,
            },
            keep_last,
        )


# -----------------------------------------------------------------------------
# training
micro_steps = gradient_accumulation_steps // world_size
detailed = objective != "next" or raw_model.config.n_ahead > 1
scored.train()
clock, since, flops_done = time.perf_counter(), iter_num, 0
while True:
    asked = agreed(max(signals, default=0))  # a signal, whichever process it came to
    signals.discard(asked)
    due = (
        iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only
    ) and asked not in ENDING
    better, paused = False, time.perf_counter()
    if due:
        try:
            rows, parts = evaluate_all(), evaluate_details()
        except KeyboardInterrupt:
            continue
        log_evaluation(rows, parts)
        val_loss = next(row["loss"] for row in rows if row["split"] == "val")
        better = val_loss < best_val_loss
        best_val_loss = val_loss if better else best_val_loss
    timely = due or asked or (save_interval and iter_num % save_interval == 0)
    if (
        iter_num
        and not eval_only
        and (better or (always_save_checkpoint and timely and iter_num > saved_iter))
    ):
        save()
        saved_iter = iter_num
    clock += time.perf_counter() - paused  # evaluations are not training time
    if iter_num >= max_iters or eval_only or asked in ENDING:
        break

    # one step: the gradient of the global batch, in micro-steps
    torch.manual_seed(random_key(seed, iter_num, rank))
    step, loops = get_step(iter_num)
    targets = torch.stack([(shift_labels(y, shift) >= 0).sum() for _, y, _, shift in step]).sum()
    if ddp:
        dist.all_reduce(targets)
    parts = {}
    for micro_step, (x, y, depth, shift) in enumerate(step):
        # the processes' gradients are averaged once; bfloat16 ones are summed outside, in float32
        sync_gradients(micro_step == micro_steps - 1 or worker is not raw_model)
        with autocast(device, dtype):
            loss, logged = model(x, y, depth, shift)
        share = loss * world_size / targets
        share.backward(
            1 + 0 * share.detach()
        )  # NaN for a loss of NaN or Inf, whatever its gradient would be
        add(parts, logged)
        if worker is not raw_model:
            to_masters()
    # all processes have the same gradient. Its norm is all that a step waits for: the device is idle while few kernels
    # are launched, and one NaN in the weights would cost the run
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    norm = (norm.full_tensor() if shard else norm).item()
    if usable(norm):
        for name, opt in optimizers.items():
            for group in opt.param_groups:
                group["lr"] = top_lr[name] * get_lr(iter_num)
            opt.step()
        if iter_num % spectral_clip_interval == 0:
            for same in to_clip.values():
                torch._foreach_copy_(
                    same, list(spectral_clip(torch.stack(same), spectral_clip_beta))
                )
        if worker is not raw_model:
            with torch.no_grad():
                torch._foreach_copy_(list(worker.parameters()), list(raw_model.parameters()))
        if ema:
            ema.update_parameters(raw_model)
    else:
        log_skip(norm)
    for opt in optimizers.values():
        opt.zero_grad(set_to_none=True)

    flops_done += sum(map(flops_of, loops)) / len(loops) * tokens_per_iter
    if iter_num % log_interval == 0:
        means = means_of(parts)  # waits for the device, so the clock below is true
        now = time.perf_counter()
        per_group = sum(map(sum, loops)) / max(1, len(loops) * len(loops[0]))
        log_step(means, norm, per_group, now - clock, iter_num + 1 - since, flops_done)
        clock, since, flops_done = now, iter_num + 1, 0
    iter_num += 1
    if bar:
        bar.update()

if bar:
    bar.close()
if wandb:
    wandb.finish()
if ddp:
    del (
        model,
        store,
    )  # these hold the process group, and its threads must not outlive Python (pytorch issue 190489)
    gc.collect()
    dist.destroy_process_group()
if master and not eval_only:
    claim.close()
if asked in ENDING and master:
    print(f"{signal.Signals(asked).name}: {out_dir} holds the run as of step {saved_iter}")
code = 128 + asked if asked in ENDING else 0
if shard:  # torch keeps a divided model's process group in caches that nobody can empty, so Python must not end
    sys.stdout.flush()
    os._exit(code)
if code:
    sys.exit(code)
