"""
Train a looped GPT, on one device or on many:

    python train.py config/quickstart.py                                  CUDA, Apple MPS or CPU
    python train.py config/quickstart.py --learning_rate=1e-3 --n_loop=6  any option listed by -h
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_looped.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=... train.py config/...

The same command with --init_from=auto goes on where the run in out_dir stopped, bit for bit: all
that is random in a step follows from (seed, iteration, rank), and the order of the data from (seed,
position), on any number of processes. SIGTERM and SIGINT end a run after the step it is in, saved,
with exit code 128 + signal; SIGUSR1 saves and goes on.
"""

import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import pretrained
from configurator import clear_errors, configure, require
from model import GPTConfig, sample_loops, shift_labels
from nanorecur import checkpoint, evaluation, optim
from nanorecur.corpus import Stream, open_stream
from nanorecur.dataset import Split, load_meta, open_split, random_key
from nanorecur.exit_rules import make_exit
from nanorecur.files import write_atomically
from nanorecur.hardware import DTYPES, autocast, compile_works, peak_flops, pick_device, pick_dtype
from nanorecur.objectives import Objective, sample_shifts, select_trained
from nanorecur.options import check_options, pad_vocab
from nanorecur.parallel import Processes, ShardedProcesses
from nanorecur.recompute import recompute_activations
from nanorecur.run_log import RunLog

# -----------------------------------------------------------------------------
# the run; all defaults are those of GPT-2 (124M) on OpenWebText
out_dir = "out"  # folder of the run: checkpoints, log.jsonl, config.json
init_from = "scratch"  # scratch, resume, auto (resume if it can), a checkpoint, gpt2, hf:<name>
seed = 1337
# evaluation and saving
eval_interval = 2000  # steps between evaluations; each is followed by a checkpoint
eval_iters = 200  # batches per split in an evaluation, always the same ones
eval_loops = ()  # loop counts to evaluate besides the model's own, such as 1,4,16
eval_only = False  # evaluate once, print, and stop; nothing is written
always_save_checkpoint = True  # False: save only when the validation loss is the best so far
# logging
log_interval = 1  # steps between lines of the log
wandb_log = False  # log to Weights & Biases too
wandb_project = "nanorecur"
wandb_run_name = "run"
# data
dataset = "openwebtext"  # a folder in data/, or the path of a prepared folder
batch_size = 12  # windows of block_size tokens in one micro-step of one process
gradient_accumulation_steps = 40  # micro-steps in a step, divided among the processes
# optimizer
optimizer = "adamw"  # adamw, or muon: Muon on the matrices of Linear layers, AdamW on the rest
learning_rate = 6e-4  # largest rate of AdamW
muon_learning_rate = 0.02  # largest rate of Muon, on the same schedule
max_iters = 600000  # steps
weight_decay = 0.1  # of matrices; norms, biases and embeddings have none
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: no bound
# learning rate schedule
decay_lr = True  # False: the largest rate in every step
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters = 600000  # step at which the rate is min_lr
min_lr = 6e-5
# device
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype = "auto"  # float32, or bfloat16 for matrix products; auto: bfloat16 on a GPU that has it
compile = True  # compile the blocks, once for any number of loops
# rarely: objective
objective = "next"  # next; by every loop: deep, distill, exit, exit_gate, confidence (see README)
loss_weighting = "uniform"  # objective=deep: weight of the loss after loop t: uniform, linear in t
entropy_weight = 0.1  # objective=exit: reward for the gate's entropy (Ouro's beta)
distill_weight = 0.5  # objective=distill: weight of the divergence from the last loop
ahead_weight = 0.3  # weight of the losses of n_ahead's further heads, together
# rarely: loops
loops_per_row = False  # draw a loop count for each window instead of each step
loop_warmup_iters = 0  # steps over which loop counts rise to their value; 0: off
loop_warmup = "linear"  # how they rise: linear, or sqrt: 1 - sqrt(1 - t) (arXiv 2511.07384)
# rarely: optimizer
lr_schedule = "cosine"  # after the warm-up: cosine, linear, wsd (hold, then linear), constant
hold_iters = 400000  # lr_schedule=wsd: step at which the rate begins to fall
weight_decay_all = False  # decay norms, biases and embeddings too
spike_factor = 0.0  # skip steps whose gradient is longer than this times its median; 0: off
max_skips = 10  # stop after more skipped steps in a row, for spikes, NaN or Inf
spectral_clip_beta = 0.0  # largest singular value of looped blocks' matrices; 0: no bound
spectral_clip_interval = 1  # steps between these clips
spectral_clip_all = False  # clip all blocks, looped or not
ema_decay = 0.0  # evaluate and save a moving average of the weights, such as 0.999; 0: off
# rarely: evaluation, saving, logging
eval_stride = 0  # score the whole split, in windows this many tokens apart; 0: eval_iters batches
automatic_loop_exit = False  # evaluate with early exit too: each token stops looping by itself
exit_rule = "state"  # relative change of state; kl, entropy (nats); loops of one argmax; gate
automatic_loop_exit_threshold = (
    0.03  # state, kl, entropy: below; argmax, gate: from it on; 0: never
)
save_interval = 0  # steps between further checkpoints; 0: none
keep_last = 2  # number of checkpoints kept
wandb_mode = "online"  # online, offline
# rarely: data
stream = False  # read the corpus that the folder's prepare.py names while training; store nothing
input_files = ""  # with stream: local .parquet, .jsonl or .txt files instead of the hub
# rarely: memory and processes
loss_chunk = 0  # tokens whose logits exist at once, to save memory; 0: all
recompute = "none"  # recompute activations to save memory: cheap (no products), block, loop
param_dtype = "float32"  # float32, or bfloat16: weights that compute; the optimizer has float32
shard = False  # FSDP2: share parameters, gradients and moments among the processes
backend = "auto"  # of torchrun's processes: nccl, gloo; auto: nccl on CUDA
patience = 600  # seconds that processes wait for another one, for instance while it saves
config, given = configure(globals(), ("model.py", "GPTConfig"))

# -----------------------------------------------------------------------------
# check everything that was asked for, before anything is written
processes = ShardedProcesses() if shard else Processes()
rank, world_size = processes.rank, processes.world_size
with clear_errors():
    check_options(config, processes)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    has_checkpoint = checkpoint.exists(out_dir)
    fresh = init_from == "scratch" or (init_from == "auto" and not has_checkpoint)
    resume = init_from == "resume" or (init_from == "auto" and has_checkpoint)
    may_write = resume or eval_only or not has_checkpoint
    allowed = "free of other runs; --init_from=auto goes on with this one"
    require("out_dir", out_dir, may_write, allowed)

    # data: meta says what the token files hold
    data_dir = Path(__file__).parent / "data" / dataset
    if stream:
        n_held_out = eval_iters * batch_size * config["block_size"] + 1
        corpus, meta, held_out = open_stream(data_dir, input_files, n_held_out)
    else:
        meta = load_meta(data_dir)
    tokenizer = {name: meta[name] for name in ("tokenizer", "chars") if name in meta}

    # model: all options for a fresh one; else those of the checkpoint, and those given on top
    torch.manual_seed(seed)
    model_args = {name: config[name] for name in GPTConfig.__dataclass_fields__}
    if fresh:
        if "vocab_size" not in given:
            model_args["vocab_size"] = pad_vocab(meta["vocab_size"])
        if "row" in meta and "block_size" not in given:  # a task's rows have one length
            model_args["block_size"] = meta["row"]["length"] - 1
        ckpt, raw_model = {}, pretrained.new_model(GPTConfig(**model_args))
    else:
        overrides = {name: value for name, value in model_args.items() if name in given}
        source = out_dir if resume else init_from
        ckpt, raw_model = pretrained.load_run(source, resume, **overrides)
        matches = ckpt.get("tokenizer", tokenizer) == tokenizer
        require("dataset", dataset, matches, "one with the tokenizer of the checkpoint")
    if resume:
        complete = {"iter_num", "best_val_loss", "optimizer"} <= set(ckpt)
        allowed = "what fine-tunes: the checkpoint in out_dir lacks the run's state"
        require("init_from", init_from, complete, allowed)
        known = optimizer in ckpt["optimizer"]
        require("optimizer", optimizer, known, "the one that the run was trained with")
    weights = (loss_weighting, entropy_weight, distill_weight, ahead_weight)
    raw_objective = Objective(raw_model, objective, loss_chunk, *weights)
    if automatic_loop_exit:
        make_exit(raw_model, exit_rule, automatic_loop_exit_threshold)  # refuses what cannot be
    model_args = asdict(raw_model.config)
    config.update(model_args)
    block_size = raw_model.config.block_size
    known_ids = min(meta["vocab_size"], raw_model.config.vocab_size)
    allowed = f"from 0 to block_size={block_size}"
    require("eval_stride", eval_stride, 0 <= eval_stride <= block_size, allowed)

    # splits; a streamed run trains on lanes, one for each micro-step of all processes
    if stream:
        n_bytes = meta["splits"]["val"]["bytes"]
        splits = {"val": Split("val", held_out, n_bytes, block_size, known_ids)}
        lanes, lane_states = gradient_accumulation_steps, ckpt.get("stream", {}) if resume else {}
        allowed = f"{len(lane_states)}, as the run began"
        legal = len(lane_states) in (0, lanes)
        require("gradient_accumulation_steps", lanes, legal, allowed)
        own_lanes = range(rank, lanes, world_size)
        streamed = Stream(corpus, meta, lanes, own_lanes, (batch_size, block_size), lane_states)
    else:
        names = [name for name in ("train", "val", "hard") if name in meta["splits"]]
        splits = {name: open_split(data_dir, name, meta, block_size, known_ids) for name in names}

    # from here on files are written
    if processes.is_first and not eval_only:
        os.makedirs(out_dir, exist_ok=True)
        lock_file = checkpoint.lock(out_dir)
        unchanged = checkpoint.exists(out_dir) == has_checkpoint
        require("out_dir", out_dir, unchanged, "free of other runs; one has begun just now")
        as_json = json.dumps(config, indent=1).encode()
        write_atomically(Path(out_dir, "config.json"), as_json)

# -----------------------------------------------------------------------------
# processes, device, optimizers; what is off is an object that does nothing
device = processes.start(device, backend, patience)
signals, ENDING = checkpoint.listen(), {signal.SIGTERM, signal.SIGINT}
select_trained(raw_model, objective)
guard = optim.GradientGuard(spike_factor, ckpt.get("health") if resume else None)
average = optim.MovingAverage(raw_model, ema_decay)
if resume:
    average.restore(ckpt["averaged_model"], ckpt["iter_num"] - guard.state["skipped"])
processes.place(raw_model, device, DTYPES[param_dtype])
if average.model is not raw_model:
    processes.place(average.model, device, DTYPES[param_dtype])
optimizers = optim.Optimizers(raw_model, config)
if resume:
    with clear_errors():
        optimizers.restore(ckpt["optimizer"], processes)
clip_spectra = optim.SpectralClip(
    raw_model, spectral_clip_beta, spectral_clip_interval, spectral_clip_all
)
computed = optim.ComputeCopy(raw_objective, "float32" if shard else param_dtype)
if compile and compile_works(device):
    for block in {*raw_model.transformer.h, *computed.objective.model.transformer.h}:
        block.compile()  # in place: loops stay Python, so their number never recompiles
recompute_activations(computed.objective.model, recompute)
model = processes.wrap(computed.objective, raw_model, device)  # as it is called in training

iter_num, best_val_loss = 0, math.inf
if resume:
    iter_num, best_val_loss = ckpt["iter_num"], ckpt["best_val_loss"]
saved_iter = iter_num
ckpt = None  # free its memory
micro_steps = gradient_accumulation_steps // world_size  # of this process
rows_per_iter = gradient_accumulation_steps * batch_size
tokens_per_iter = rows_per_iter * block_size
flops_per_token = functools.cache(raw_objective.flops_per_token)
peak = peak_flops(device, dtype)
with clear_errors():
    agreed = processes.agree(iter_num) == iter_num
    allowed = "one folder for all processes: another has a newer checkpoint"
    require("out_dir", out_dir, agreed, allowed)
log = RunLog(config, iter_num, processes.is_first)
n_windows = "streamed" if stream else f"{splits['train'].n_windows:,}"
log.print(
    f"{raw_model.get_num_params() / 1e6:.2f}M parameters, {tokens_per_iter:,} tokens per step, "
    f"{n_windows} windows of {block_size} tokens, on {world_size} x {device} in {dtype}"
)
evaluator = evaluation.Evaluation(
    average.model,
    computed.objective,
    splits,
    processes,
    device,
    dtype,
    config,
    interrupted=lambda: bool(signals & ENDING),
)


# -----------------------------------------------------------------------------
# what a step needs, each a pure function of the iteration
def get_lr(it: int) -> float:
    """Return the share of the largest learning rate in step it."""
    if not decay_lr:
        return 1.0
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    start = hold_iters if lr_schedule == "wsd" else warmup_iters
    progress = min(1.0, max(0.0, (it - start) / (lr_decay_iters - start)))
    cosine = 0.5 * (1 - math.cos(math.pi * progress))
    falls = {"cosine": cosine, "linear": progress, "wsd": progress, "constant": 0.0}
    return 1 - (1 - min_lr / learning_rate) * falls[lr_schedule]


def get_loops(it: int) -> list[tuple]:
    """Return a list of loop counts, one int per group: one for step it, or one for each row."""
    share = min(1.0, (it + 1) / loop_warmup_iters) if loop_warmup_iters else 1.0
    if loop_warmup == "sqrt":
        share = 1 - math.sqrt(1 - share)
    means = [max(1, math.ceil(share * n)) for n in raw_model.config.counts()]
    generator = torch.Generator().manual_seed(random_key(seed, "loops", it))
    draws = rows_per_iter if loops_per_row else 1
    return [sample_loops(raw_model.config, generator, means) for _ in range(draws)]


def get_tokens(it: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this process's share of the global batch of step it: x, y (batch_size, block_size)."""
    number = micro_step * world_size + rank  # among the micro-steps of all processes
    if stream:
        x, y = streamed.next(number)
    else:
        first = (it * gradient_accumulation_steps + number) * batch_size
        positions = first + np.arange(batch_size)
        x, y = splits["train"].windows(splits["train"].shuffled(positions, seed))
    return evaluation.to_device(x, device), evaluation.to_device(y, device)


def get_batches(it: int, loops: list[tuple]) -> list[tuple]:
    """Return (x, y, n_loop, shift) of each micro-step of this process in step it."""
    generator = torch.Generator().manual_seed(random_key(seed, "shift", it))
    shifts = sample_shifts(raw_model.config, generator, rows_per_iter)
    batches = []
    for micro_step in range(micro_steps):
        first = (micro_step * world_size + rank) * batch_size
        rows = slice(first, first + batch_size)  # of the global batch
        n_loop = tuple(torch.tensor(loops[rows]).unbind(1)) if loops_per_row else loops[0]
        shift = shifts[rows].to(device) if raw_model.config.predict_ahead else 1
        batches.append((*get_tokens(it, micro_step), n_loop, shift))
    return batches


# -----------------------------------------------------------------------------
# logging and saving
def in_words(means: dict) -> str:
    return ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())


def log_evaluation(rows: list[dict], details: dict) -> None:
    report = evaluator.report_states()
    lines = ["", f"step {iter_num}", evaluation.table(rows)]
    if details:
        lines.append(f"besides, on val: {in_words(details)}")
    if iter_num:  # before training all states agree
        warnings = evaluation.warnings_of(report, raw_model.config.counts())
        lines += [f"warning: {words}" for words in warnings]
    lines.append(json.dumps(rows) if eval_only else "")
    entry = {"iter": iter_num, "eval": rows, "objective": details, "watch": report}
    log.write(entry, "\n".join(lines))


def log_step(means: dict, norm: float, loops: list, seconds: float, n_steps: int, flops: float):
    """Log this step's losses, gradient norm and mean loops, and the pace of the last n_steps."""
    seconds_per_step = seconds / n_steps
    entry = {"iter": iter_num, **means, "lr": learning_rate * get_lr(iter_num)}
    entry["ms"] = 1e3 * seconds_per_step
    entry["tokens_per_second"] = tokens_per_iter / seconds_per_step
    entry["mfu"] = flops / seconds / (peak * world_size) if peak else None
    entry["loops"] = sum(map(sum, loops)) / max(1, len(loops) * len(loops[0]))
    entry["grad_norm"] = norm
    left = time.strftime("%H:%M:%S", time.gmtime((max_iters - iter_num - 1) * seconds_per_step))
    mfu = f"{entry['mfu']:.1%}" if peak else "n/a"
    text = f"iter {iter_num}: {in_words(means)}, {entry['ms']:.1f} ms, "
    text += f"{entry['tokens_per_second']:,.0f} tokens/s, mfu {mfu}, "
    log.write(entry, text + f"loops {entry['loops']:.1f}, left {left}")


def log_skip(norm: float) -> None:
    """Log a step that is not made; after too many in a row, stop. The last checkpoint stays."""
    skipped, in_a_row = guard.state["skipped"], guard.state["in_a_row"]
    entry = {"iter": iter_num, "skipped": skipped, "grad_norm": norm}
    text = f"iter {iter_num}: skipped, the norm of its gradient is {norm:.3g} ({skipped} in all)"
    log.write(entry, text)
    if in_a_row > max_skips:
        what = f"max_skips={max_skips} steps in a row were skipped"
        text = f"train.py: {what}; {out_dir} keeps the last good checkpoint"
        sys.exit(text if processes.is_first else 1)


def save() -> None:
    """Save the run as it is before step iter_num; all processes take part."""
    positions = processes.merge(streamed.states) if stream else {}
    state = {"model": processes.state_of(average.model)}
    if average.model is not raw_model:
        state["training_model"] = processes.state_of(raw_model)
    state["optimizer"] = optimizers.state_dict()
    state = processes.gather(state)
    if processes.is_first:
        state |= {"format": 1, "model_args": model_args, "config": config, "tokenizer": tokenizer}
        state |= {"iter_num": iter_num, "best_val_loss": best_val_loss}
        state |= {"health": guard.state, "stream": positions}
        with clear_errors():
            checkpoint.save(out_dir, state, keep_last)


# -----------------------------------------------------------------------------
# training
computed.objective.train()
clock, clock_iter, flops_done = time.perf_counter(), iter_num, 0
while True:
    # once in a while: evaluate, save, stop. All processes agree on what a signal asks for
    asked = processes.agree(max(signals, default=0))
    signals.discard(asked)
    ending = asked in ENDING
    paused, improved = time.perf_counter(), False
    due = iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only
    if due and not ending:
        result = evaluator.run(eval_loops)
        if result is None:  # a signal came
            continue
        log_evaluation(*result)
        val_loss = next(row["loss"] for row in result[0] if row["split"] == "val")
        improved = val_loss < best_val_loss
        best_val_loss = val_loss if improved else best_val_loss
    timely = (due and not ending) or asked or (save_interval and iter_num % save_interval == 0)
    wanted = always_save_checkpoint and timely and iter_num > saved_iter
    if iter_num and not eval_only and (improved or wanted):
        save()
        saved_iter = iter_num
    clock += time.perf_counter() - paused  # evaluations are not training time
    if iter_num >= max_iters or eval_only or ending:
        break

    # one step: the gradient of the global batch, in micro-steps
    torch.manual_seed(random_key(seed, iter_num, rank))  # of dropout and noise
    loops = get_loops(iter_num)
    batches = get_batches(iter_num, loops)
    counts = [(shift_labels(y, shift) >= 0).sum() for _, y, _, shift in batches]
    n_targets = processes.sum(torch.stack(counts).sum())
    totals = {}
    for micro_step, batch in enumerate(batches):
        # processes average their gradients once, or where copies in bfloat16 compute, each time
        processes.sync_gradients(micro_step == micro_steps - 1 or computed.is_copy)
        with autocast(device, dtype):
            loss, parts = model(*batch)
        share = loss * world_size / n_targets  # of the mean; the average over processes sums up
        share.backward(1 + 0 * share.detach())  # 0 * Inf is NaN: an infinite loss is noticed
        computed.collect_gradients()
        evaluation.add(totals, parts)
    # all that a step waits for: one NaN in the weights would cost the run
    norm = processes.gradient_norm(optim.clip_gradient(raw_model, grad_clip))
    if guard.accepts(norm):
        optimizers.step(get_lr(iter_num))
        clip_spectra(iter_num)
        computed.copy_weights()
        average.update()
    else:
        log_skip(norm)
    optimizers.zero_grad()

    flops_done += sum(map(flops_per_token, loops)) / len(loops) * tokens_per_iter
    if iter_num % log_interval == 0:
        means = evaluation.means_of(totals, processes)  # waits for the device: the clock is true
        seconds, n_steps = time.perf_counter() - clock, iter_num + 1 - clock_iter
        log_step(means, norm, loops, seconds, n_steps, flops_done)
        clock, clock_iter, flops_done = clock + seconds, iter_num + 1, 0
    iter_num += 1
    log.step_done()

log.close()
if processes.is_first and not eval_only:
    lock_file.close()
if ending and processes.is_first:
    print(f"{signal.Signals(asked).name}: {out_dir} holds the run as of step {saved_iter}")
del model
processes.end(128 + asked if ending else 0)
