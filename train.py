"""
Train a looped GPT, on one device or on many:

    python train.py config/quickstart.py                                  CUDA, Apple MPS or CPU
    python train.py config/quickstart.py --learning_rate=1e-3 --n_loop=6  any option listed by -h
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_looped.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=... train.py config/...

The same command with --init_from=auto goes on where the run in out_dir stopped, bit for bit: all
that is random in a step follows from (seed, iteration, rank), the order of data from (seed,
position); options that are not repeated come from the checkpoint. SIGTERM and SIGINT end a run
after the step it is in, saved, with exit code 128 + signal; SIGUSR1 saves and goes on.
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
from model import GPTConfig, shift_labels
from nanorecur import checkpoint, evaluation, hardware, optim, options, resuming, run_log
from nanorecur.compilation import compile_parts
from nanorecur.corpus import Stream, open_stream
from nanorecur.curriculum import Curriculum
from nanorecur.dataset import Split, load_meta, open_split, random_key, window_of
from nanorecur.files import write_atomically
from nanorecur.objectives import Objective, sample_shifts, select_trained
from nanorecur.parallel import Processes, ShardedProcesses
from nanorecur.recompute import recompute_activations
from nanorecur.tokenizer import same_tokenizer, tokenizer_fields

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
wandb_run_name = ""  # default: the name of out_dir, with blocks and loops
tensorboard = False  # log to TensorBoard too, in out_dir/tensorboard
# data
dataset = "openwebtext"  # a folder in data/, or the path of a prepared folder
batch_size = 12  # windows of block_size tokens in one micro-step of one process
gradient_accumulation_steps = 40  # micro-steps in a step, divided among the processes
# optimizer
optimizer = "adamw"  # adamw, or muon: Muon on the matrices of Linear layers, AdamW on the rest
learning_rate = 6e-4  # largest rate of AdamW
muon_learning_rate = 0.02  # largest rate of Muon, on the same schedule
muon_row_norm = False  # rows of Muon's steps get one length (NorMuon, arXiv 2510.05491)
max_iters = 600000  # steps
weight_decay = 0.1  # of matrices; norms, biases and embeddings have none
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: no bound
# learning rate schedule
decay_lr = True  # False: the largest rate in every step
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters = 0  # step at which the rate is min_lr; 0: max_iters
min_lr = 6e-5
# device
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype = "auto"  # float32, or bfloat16 for matrix products; auto: bfloat16 on a GPU that has it
compile = True  # compile the model's stages, once for any number of loops
deterministic = False  # the same bits in every run on a GPU too, at a cost in speed
# rarely: objective
objective = "next"  # next; by every loop: deep, distill, exit, exit_gate, confidence
loss_weighting = "uniform"  # objective=deep: weight of the loss after loop t: uniform, linear in t
entropy_weight = 0.1  # objective=exit: reward for the gate's entropy (Ouro's beta)
distill_weight = 0.5  # objective=distill: weight of the divergence from the last loop
ahead_weight = 0.3  # weight of the losses of n_ahead's further heads, together
# rarely: loops
loop_start = 0.0  # share of max_iters, from step 0 on, in which every step loops once
loops_per_row = False  # draw a loop count for each window instead of each step
loop_warmup_iters = 0  # steps over which loop counts rise to their value; 0: off
loops_of_level = ()  # 1,0: rows of a task get 1 x their level + 0 loops, one level in each step
loops_beyond = 0  # loops drawn on top of that for each step, from 0 to so many
level_warmup_iters = 0  # steps over which the largest level rises; each step has one; 0: off
loop_warmup = "linear"  # how they rise: linear, or sqrt: 1 - sqrt(1 - t) (arXiv 2511.07384)
# rarely: optimizer
lr_schedule = "cosine"  # after the warm-up: cosine, linear, wsd (hold, then linear), constant
hold_iters = 0  # lr_schedule=wsd: step at which the rate begins to fall; 0: two thirds of the way
weight_decay_all = False  # decay norms, biases and embeddings too
spike_factor = 0.0  # skip steps whose gradient is longer than this times its median; 0: off
max_skips = 10  # stop after more skipped steps in a row, for spikes, NaN or Inf
spectral_clip_beta = 0.0  # largest singular value of looped blocks' matrices; 0: no bound
spectral_clip_interval = 1  # steps between these clips
spectral_clip_all = False  # clip all blocks, looped or not
ema_decay = 0.0  # evaluate and save a moving average of the weights, such as 0.999; 0: off
# rarely: evaluation, saving, logging
eval_stride = 0  # score the whole split, in windows this many tokens apart; 0: eval_iters batches
automatic_loop_exit = False  # evaluate with exit too: tokens and a task's rows stop by themselves
exit_rule = "state"  # relative change of state; kl, entropy (nats); loops of one argmax; gate
automatic_loop_exit_threshold = 0.03  # stop below it; argmax, gate: from it on; 0: never
save_interval = 0  # steps between further checkpoints; 0: none
keep_last = 2  # number of checkpoints kept
keep_every = 0  # steps between checkpoints that are kept for good, as ckpt_<step>.pt; 0: none
wandb_mode = "online"  # online, offline
# rarely: data, weights to begin with
layers = ()  # of a plain model in init_from: the layers to take, one for each block; (): evenly
drop_weights = False  # begin without those weights of init_from that the model has no place for
allow_other_tokenizer = False  # train on tokens of another tokenizer than that of init_from
stream = False  # read the corpus that the folder's prepare.py names while training; store nothing
input_files = ""  # with stream: local .parquet, .jsonl or .txt files instead of the hub
val_share = 0.0  # with stream: share of documents held out for validation; 0: as prepared
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
ckpt, changed = {}, {}
with clear_errors():
    hardware.check_versions()
    has_checkpoint = checkpoint.exists(out_dir)
    resume = init_from == "resume" or (init_from == "auto" and has_checkpoint)
    fresh = init_from in ("scratch", "auto") and not resume
    if resume:  # options that were not given are those of the checkpoint
        ckpt = checkpoint.load(out_dir)
        config, changed = resuming.continued(config, given, ckpt)
        globals().update({name: config[name] for name in config if name in globals()})
    options.check_options(config, processes)
    objective = options.objective_of(config)
    run_log.check_wandb(config)
    run_log.check_tensorboard(config)
    device = hardware.pick_device(device)
    dtype = hardware.pick_dtype(dtype, device)
    if deterministic:
        hardware.make_deterministic()
    may_write = resume or eval_only or not has_checkpoint
    allowed = f"free of other runs; --init_from=auto goes on with this one, {resuming.ANOTHER_RUN}"
    require("out_dir", out_dir, may_write, allowed)
    iter_num = ckpt["iter_num"] if resume else 0
    finished = resume and not eval_only and checkpoint.is_finished(out_dir, iter_num, max_iters)
    writes = not (eval_only or finished)  # a run's record is not changed by looking at it

    # data: meta says what the token files hold
    data_dir = Path(__file__).parent / "data" / dataset
    if stream:
        n_held_out = eval_iters * batch_size * config["block_size"] + 1
        corpus, meta, held_out = open_stream(data_dir, input_files, n_held_out, val_share)
    else:
        meta = load_meta(data_dir)

    # model: all options for a fresh one; else those of the checkpoint, and those given on top
    torch.manual_seed(seed)
    model_args = {name: config[name] for name in GPTConfig.__dataclass_fields__}
    tokenizer = tokenizer_fields(meta)
    if fresh:
        if "vocab_size" not in given:
            model_args["vocab_size"] = options.pad_vocab(meta["vocab_size"])
        if "row" in meta and "block_size" not in given:  # a task's rows have one length
            model_args["block_size"] = window_of(meta["row"])
        raw_model = pretrained.new_model(GPTConfig(**model_args))
    else:
        overrides = {name: value for name, value in model_args.items() if name in given}
        source = out_dir if resume else init_from
        chosen = () if resume else layers  # a run that goes on has these layers already
        ckpt, raw_model = pretrained.load_run(
            source, resume, ckpt or None, chosen, drop_weights, **overrides
        )
        known = ckpt.get("tokenizer") or pretrained.tokenizer_of(source) or tokenizer
        matches = same_tokenizer(known, tokenizer) or allow_other_tokenizer
        allowed = "one with the tokenizer of the checkpoint, or --allow_other_tokenizer"
        require("dataset", dataset, matches, allowed)
    data_identity = {} if stream else resuming.identity_of(meta)
    if resume and writes:
        resuming.check_state(init_from, ckpt)
        resuming.check_data(dataset, data_identity, ckpt)
    weights = (loss_weighting, entropy_weight, distill_weight, ahead_weight)
    raw_objective = Objective(raw_model, objective, loss_chunk, *weights)
    model_args = asdict(raw_model.config)
    config.update(model_args)
    options.check_against_model(config, raw_model)
    warnings = options.warnings_of(config, given, sys.argv[1:], raw_model.config)
    block_size = raw_model.config.block_size
    known_ids = min(meta["vocab_size"], raw_model.config.vocab_size)

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
    curriculum = Curriculum(config, raw_model.config, splits.get("train"))

    # from here on files are written
    if processes.is_first and writes:
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
    average.restore(ckpt["averaged_model"], iter_num - guard.state["skipped"])
processes.place(raw_model, device, hardware.DTYPES[param_dtype])
if average.model is not raw_model:
    processes.place(average.model, device, hardware.DTYPES[param_dtype])
optimizers = optim.Optimizers(raw_model, config)
if resume and writes:
    with clear_errors():
        optimizers.restore(ckpt["optimizer"], processes)
clip_spectra = optim.SpectralClip(
    raw_model, spectral_clip_beta, spectral_clip_interval, spectral_clip_all
)
computed = optim.ComputeCopy(raw_objective, "float32" if shard else param_dtype)
compile = compile and hardware.compile_works(device)
if compile:
    alone = shard or recompute != "none"  # something else happens between blocks
    compile_parts(computed.objective, raw_model, average.model, by_block=alone)
recompute_activations(computed.objective.model, recompute)
model = processes.wrap(computed.objective, raw_model, device)  # as it is called in training

best_val_loss, spent = math.inf, {"tokens": 0, "flops": 0.0, "elapsed": 0.0}  # so far
if resume:
    best_val_loss = ckpt.get("best_val_loss", math.inf)
    spent |= ckpt.get("spent", {})
ckpt = None  # free its memory
micro_steps = gradient_accumulation_steps // world_size  # of this process
rows_per_iter = gradient_accumulation_steps * batch_size
tokens_per_iter = rows_per_iter * block_size
flops_per_token = functools.cache(raw_objective.flops_per_token)
peak = hardware.peak_flops(device, dtype)
decay_start, decay_end = options.decay_span(config)
with clear_errors():
    resuming.check_agreement(processes, out_dir, iter_num)
log = run_log.RunLog(config, iter_num, processes.is_first, writes)
log.session(run_log.session_of(config, device, world_size, iter_num, changed))
n_windows = "streamed" if stream else f"{splits['train'].n_windows:,}"
how = ", compiled at first use: a minute or more, unless --compile=False" if compile else ""
log.print(
    f"{raw_model.get_num_params() / 1e6:.2f}M parameters, {tokens_per_iter:,} tokens per step, "
    f"{n_windows} windows of {block_size} tokens, on {world_size} x {device} in {dtype}{how}"
)
if resume:
    log.print(resuming.first_line(config, changed, iter_num, finished))
for words in warnings:
    log.print(f"warning: {words}")


def interrupted() -> bool:
    log.alive(f"evaluating before step {iter_num}")
    return bool(signals & ENDING)


scored = Objective(average.model, objective, loss_chunk, *weights)
evaluator = evaluation.Evaluation(scored, splits, processes, device, dtype, config, interrupted)


# -----------------------------------------------------------------------------
# what a step needs, each a pure function of the iteration
def get_lr(it: int) -> float:
    """Return the share of the largest learning rate in step it."""
    if not decay_lr:
        return 1.0
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    progress = min(1.0, max(0.0, (it - decay_start) / max(1, decay_end - decay_start)))
    cosine = 0.5 * (1 - math.cos(math.pi * progress))
    falls = {"cosine": cosine, "linear": progress, "wsd": progress, "constant": 0.0}
    return 1 - (1 - min_lr / learning_rate) * falls[lr_schedule]


def get_tokens(it: int, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return this process's share of the global batch of step it: x, y (batch_size, T)."""
    number = micro_step * world_size + rank  # among the micro-steps of all processes
    if stream:
        return streamed.next(number)
    first = (it * gradient_accumulation_steps + number) * batch_size
    return splits["train"].windows(curriculum.starts(it, first + np.arange(batch_size)))


def get_batches(it: int, loops: list[tuple]) -> tuple[list[tuple], list[int]]:
    """Return (x, y, n_loop, shift) of each micro-step of this process in step it, and counts.

    The counts are of targets and of tokens, on the CPU: nothing has to wait for the device.
    """
    generator = torch.Generator().manual_seed(random_key(seed, "shift", it))
    shifts = sample_shifts(raw_model.config, generator, rows_per_iter)
    batches, counts = [], [0, 0]
    for micro_step in range(micro_steps):
        first = (micro_step * world_size + rank) * batch_size
        rows = slice(first, first + batch_size)  # of the global batch
        n_loop = tuple(torch.tensor(loops[rows]).unbind(1)) if loops_per_row else loops[0]
        shift = shifts[rows] if raw_model.config.predict_ahead else 1
        x, y = get_tokens(it, micro_step)
        counts[0] += (shift_labels(torch.from_numpy(y), shift) >= 0).sum().item()
        counts[1] += x.size
        shift = shift.to(device) if raw_model.config.predict_ahead else 1
        x, y = evaluation.to_device(x, device), evaluation.to_device(y, device)
        batches.append((x, y, n_loop, shift))
    return batches, counts


# -----------------------------------------------------------------------------
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
        state |= {"iter_num": iter_num, "best_val_loss": best_val_loss, "spent": spent}
        state |= {"health": guard.state, "stream": positions, "data": data_identity}
        with clear_errors():
            checkpoint.save(out_dir, state, keep_last, keep=at(keep_every))


def at(interval: int) -> bool:
    """Return True in every interval-th step; 0: never."""
    return interval > 0 and iter_num % interval == 0


# -----------------------------------------------------------------------------
# training
computed.objective.train()
saved_iter, fetched = iter_num, None
start = time.perf_counter() - spent["elapsed"]  # moved on by whatever is not training
before = {**spent, "iter": iter_num}  # what was spent at the last line of the log
while True:
    # once in a while: evaluate, save, stop. All processes agree on what a signal asks for
    asked = processes.agree(max(signals, default=0))
    signals.discard(asked)
    ending = asked in ENDING
    paused, improved = time.perf_counter(), False
    spent["elapsed"] = paused - start
    due = at(eval_interval) or iter_num >= max_iters or eval_only
    if due and not ending:
        result = evaluator.run(eval_loops)
        if result is None:  # a signal came
            start += time.perf_counter() - paused
            continue
        entry = {"iter": iter_num, **result, "watch": evaluator.report_states()}
        log.evaluation(entry, raw_model.config.counts())
        if eval_only:
            log.print(json.dumps(result["eval"]))
        val_loss = next(row["loss"] for row in result["eval"] if row["split"] == "val")
        improved = val_loss < best_val_loss
        best_val_loss = val_loss if improved else best_val_loss
    timely = (due and not ending) or asked or at(save_interval) or at(keep_every)
    wanted = always_save_checkpoint and timely and iter_num > saved_iter
    if writes and iter_num and (improved or wanted):
        save()
        saved_iter = iter_num
    start += time.perf_counter() - paused
    if iter_num >= max_iters or eval_only or ending:
        break

    # one step: the gradient of the global batch, in micro-steps
    torch.manual_seed(random_key(seed, iter_num, rank))  # of dropout and noise
    loops = curriculum.loops(iter_num)
    batches, counts = fetched or get_batches(iter_num, loops)
    n_targets, n_tokens = processes.sum(torch.tensor(counts)).tolist()
    totals = {}
    for micro_step, batch in enumerate(batches):
        # processes average their gradients once, or where copies in bfloat16 compute, each time
        processes.sync_gradients(micro_step == micro_steps - 1 or computed.is_copy)
        with hardware.autocast(device, dtype):
            loss, parts = model(*batch)
        share = loss * world_size / n_targets  # of the mean; the average over processes sums up
        share.backward(1 + 0 * share.detach())  # 0 * Inf is NaN: an infinite loss is noticed
        computed.collect_gradients()
        evaluation.add(totals, parts)
    # the next step's tokens while the device computes; a stream's position is saved before they are
    fetched = None if stream else get_batches(iter_num + 1, curriculum.loops(iter_num + 1))
    # all that a step waits for: one NaN in the weights would cost the run
    norm = processes.gradient_norm(optim.clip_gradient(raw_model, grad_clip))
    if guard.accepts(norm):
        optimizers.step(get_lr(iter_num))
        clip_spectra(iter_num)
        computed.copy_weights()
        average.update()
    else:
        log.skip({"iter": iter_num, "skipped": guard.state["skipped"], "grad_norm": norm})
        if guard.state["in_a_row"] > max_skips:
            words = f"train.py: max_skips={max_skips} steps in a row were skipped; "
            words += f"{out_dir} keeps the last good checkpoint"
            sys.exit(words if processes.is_first else 1)
    optimizers.zero_grad()

    spent["tokens"] += n_tokens
    spent["flops"] += sum(map(flops_per_token, loops)) / len(loops) * n_tokens
    if at(log_interval) or iter_num + 1 == max_iters:
        means = evaluation.means_of(totals, processes)  # waits for the device: the clock is true
        spent["elapsed"] = time.perf_counter() - start
        seconds = spent["elapsed"] - before["elapsed"]
        entry = {"iter": iter_num, **means, "lr": learning_rate * get_lr(iter_num)}
        entry["ms"] = 1e3 * seconds / (iter_num + 1 - before["iter"])
        entry["tokens_per_second"] = (spent["tokens"] - before["tokens"]) / seconds
        flops = (spent["flops"] - before["flops"]) / seconds
        entry["mfu"] = flops / (peak * world_size) if peak else None
        entry["loops"] = sum(map(sum, loops)) / max(1, len(loops) * len(loops[0]))
        log.step({**entry, "grad_norm": norm, **spent})
        before = {**spent, "iter": iter_num + 1}
    log.alive(f"iter {iter_num} of {max_iters}")
    iter_num += 1
    log.step_done()

log.close(finished=not ending, is_task="row" in meta)
if processes.is_first and writes:
    lock_file.close()
if ending and processes.is_first:
    held = f"{out_dir} holds the run as of step {saved_iter}; the same command goes on"
    print(f"{signal.Signals(asked).name}: {held if saved_iter else 'nothing was saved yet'}")
del model
processes.end(128 + asked if ending else 0)
