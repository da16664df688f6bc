"""train.py as a user runs it: what it writes, how it goes on, and that its numbers are true."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    NOISY,
    ROOT,
    TRAIN,
    Run,
    assert_refused,
    assert_same,
    build,
    evaluated,
    log,
    logged,
    losses,
    slow,
    split_of,
    started,
    train,
    val_losses,
    without_clock,
)

import pretrained
from nanorecur import checkpoint
from nanorecur.dataset import load_meta, write_dataset
from nanorecur.objectives import Objective
from nanorecur.tokenizer import make_tokenizer, tokenizer_fields

AHEAD = """
    --predict_ahead --n_ahead=2 --loops_per_row --loop_sampling=uniform --bptt_k=1
    --ema_decay=0.9 --param_dtype=bfloat16 --loss_chunk=9 --lr_schedule=wsd --hold_iters=4
    --weight_decay_all
""".split()
GATE = """
    --objective=exit --exit_gate=mean_state --ema_decay=0.9 --recompute=block
    --loop_sampling=poisson
""".split()


# -----------------------------------------------------------------------------
# what a run leaves


def test_a_run_leaves_two_checkpoints_its_config_and_its_log(plain_run, corpus):
    folder, run = plain_run
    files = ["ckpt.json", "ckpt.pt", "ckpt_prev.pt", "config.json", "lock", "log.jsonl"]
    assert sorted(os.listdir(folder)) == [*files, "sessions.jsonl"]
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    nanogpts = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert nanogpts | {"tokenizer"} <= set(ckpt)
    assert ckpt["iter_num"] == 8
    assert checkpoint.load(folder / "ckpt_prev.pt")["iter_num"] == 4
    config = json.loads((folder / "config.json").read_text())
    assert config["n_embd"] == 32
    assert config["batch_size"] == 4
    assert config["vocab_size"] == load_meta(corpus)["vocab_size"]
    assert [entry["iter"] for entry in log(folder)] == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    line = (
        r"iter 3: loss \d\.\d{4}, norm [\d.]+, [\d.]+ ms, [\d,]+ tokens/s, mfu [\d.]+%, loops 2.0, "
    )
    assert re.search(line + r"0.00M tokens, time 0:00:\d\d, left 0:00:\d\d\n", run.out), run.out


def test_a_run_says_how_it_was_started(plain_run, corpus):
    folder, _ = plain_run
    (session,) = [json.loads(line) for line in (folder / "sessions.jsonl").open()]
    command = rf"python (/\S*/)?train.py --dataset={corpus} --out_dir={folder} "
    assert re.match(command, session["command"])
    assert session["torch"] == torch.__version__
    assert (session["iter"], session["processes"], session["changed"]) == (0, 1, {})
    commit = subprocess.run("git rev-parse HEAD".split(), cwd=ROOT, capture_output=True, text=True)
    assert session.get("commit", "") == commit.stdout.strip()
    for name in ("start", "host", "python", "device"):
        assert session[name]


def test_tokens_and_flops_so_far_are_those_of_the_steps(corpus, tmp_path):
    """Also behind a stop; seconds of training never fall."""
    sampled = ("--loop_sampling=uniform", "--n_loop=3", "--eval_iters=1")
    for stop in (5, 8):
        train(corpus, tmp_path, *sampled, "--init_from=auto", f"--max_iters={stop}")
    loops, model = logged(tmp_path, "loops"), pretrained.load(tmp_path)
    flops = [128 * model.flops_per_token(int(n)) for n in loops]
    assert len(set(loops)) > 1
    assert logged(tmp_path, "tokens") == [128 * (step + 1) for step in range(8)]
    assert logged(tmp_path, "flops") == pytest.approx(list(itertools.accumulate(flops)))
    elapsed = logged(tmp_path, "elapsed")
    assert elapsed == sorted(elapsed)
    assert elapsed[0] > 0


def test_it_learns(plain_run):
    evaluations = val_losses(plain_run[0])
    assert evaluations[8] < evaluations[0] - 0.5


def test_nothing_is_saved_before_the_first_step(corpus, tmp_path):
    assert train(corpus, tmp_path / "out", "--max_iters=0").code == 0
    assert not checkpoint.exists(tmp_path / "out")


def test_the_baseline_has_no_parameters_of_a_loop(corpus, tmp_path):
    assert train(corpus, tmp_path / "out", "--use_model_baseline", "--max_iters=1").code == 0
    assert not any("loops" in name for name in checkpoint.load(tmp_path / "out")["model"])


def test_the_rows_of_a_task_set_the_block_size(task, tmp_path):
    options = [option for option in TRAIN if not option.startswith("--block_size")]
    out = tmp_path / "a"
    run = Run("train.py", f"--dataset={task}", f"--out_dir={out}", *options, "--max_iters=1")
    assert run.code == 0, run.err
    assert checkpoint.load(out)["model_args"]["block_size"] == 6
    run = train(task, tmp_path / "b")
    assert_refused(run, "block_size=16")
    assert "need 6" in run.err


# -----------------------------------------------------------------------------
# which checkpoints are kept

# the rate rises from 0.01 in step 2 to 3
RUINED_LATER = ("--lr_schedule=linear", "--min_lr=3", "--grad_clip=0", "--weight_decay=0")


def only_the_best(corpus, out_dir, *options):
    """Return (validation losses, iter_num of the checkpoint, or None) of a run that keeps one."""
    run = train(corpus, out_dir, "--always_save_checkpoint=False", "--eval_interval=1", *options)
    assert run.code == 0, run.err
    saved = checkpoint.load(out_dir)["iter_num"] if checkpoint.exists(out_dir) else None
    return val_losses(out_dir), saved


@pytest.mark.parametrize("interval", [0, 1], ids=["", "save_interval=1"])
def test_only_the_best_is_saved_when_asked(corpus, tmp_path, interval):
    """In a run that gets better and is then ruined; other saves leave the best one alone."""
    options = (*RUINED_LATER, f"--save_interval={interval}")
    evaluations, saved = only_the_best(corpus, tmp_path / "out", *options)
    best = min(evaluations, key=evaluations.get)
    assert 0 < best < 8, evaluations
    assert saved == best
    assert checkpoint.load(tmp_path / "out")["best_val_loss"] == evaluations[best]


def test_where_the_start_is_the_best_nothing_is_saved(corpus, tmp_path):
    options = ("--decay_lr=False", "--learning_rate=3", "--grad_clip=0")
    evaluations, saved = only_the_best(corpus, tmp_path / "out", *options)
    assert min(evaluations, key=evaluations.get) == 0
    assert saved is None


# -----------------------------------------------------------------------------
# going on


STOPPED = [slow([]), NOISY, AHEAD, slow(GATE)]


@pytest.mark.parametrize("options", STOPPED, ids=["", "noisy", "ahead", "gate"])
def test_a_stopped_run_goes_on_bit_for_bit(corpus, tmp_path, options):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert train(corpus, undisturbed, *options).code == 0
    for stop in (4, 8):
        run = train(corpus, stopped, "--init_from=auto", f"--max_iters={stop}", *options)
        assert run.code == 0, run.err
    a, b = checkpoint.load(undisturbed), checkpoint.load(stopped)
    assert a.keys() == b.keys()
    assert ("training_model" in a) == bool(options)
    for ckpt in (a, b):
        assert ckpt["spent"].pop("elapsed") > 0
    for name in a.keys() - {"config"}:
        assert_same(a[name], b[name], name)
    assert without_clock(undisturbed) == without_clock(stopped)


def test_lines_after_the_checkpoint_are_written_again_not_twice(corpus, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(corpus, undisturbed)
    train(corpus, killed, "--max_iters=7")  # saved at 4 and at its end
    (killed / "ckpt.pt").write_bytes(b"torn")
    assert train(corpus, killed, "--init_from=resume").code == 0
    assert without_clock(undisturbed) == without_clock(killed)


def in_call(monkeypatch, number, act):
    """Let the call of the objective in training with this number act before it computes."""
    forward, calls = Objective.forward, iter(range(10**9))

    def acting_forward(self, *arguments):
        if self.training and next(calls) == number:
            act()
        return forward(self, *arguments)

    monkeypatch.setattr(Objective, "forward", acting_forward)


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_signal_ends_a_run_after_the_step_it_is_in_saved(
    corpus, tmp_path, monkeypatch, plain_run, number
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        in_call(patch, 2 * 5 + 1, lambda: signal.raise_signal(number))  # in step 5
        run = train(corpus, out, "--eval_loops=1,2,4")
    assert run.code == 128 + number
    assert "holds the run as of step 6; the same command goes on" in run.out
    assert checkpoint.load(out)["iter_num"] == 6
    assert train(corpus, out, "--eval_loops=1,2,4", "--init_from=auto").code == 0
    assert without_clock(out) == without_clock(plain_run[0])


def test_a_run_goes_on_with_the_options_it_began_with(corpus, tmp_path):
    """None of them repeated: an average of the weights, Muon, sampled loops, the data."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(corpus, whole, *NOISY).code == 0
    assert train(corpus, stopped, *NOISY, "--max_iters=4").code == 0
    bare = (f"--out_dir={stopped}", "--init_from=resume", "--device=cpu", "--compile=False")
    run = Run("train.py", *bare, "--max_iters=8")
    assert run.code == 0, run.err
    assert "max_iters: 4 in the checkpoint, 8 asked for" in run.out
    for name in ("model", "training_model", "optimizer"):
        assert_same(checkpoint.load(whole)[name], checkpoint.load(stopped)[name], name)
    assert without_clock(whole) == without_clock(stopped)
    session = json.loads((stopped / "sessions.jsonl").read_text().splitlines()[1])
    assert session["changed"] == {"max_iters": [4, 8]}
    evaluation = Run("train.py", *bare, "--eval_only")
    rows = json.loads(evaluation.out.splitlines()[-1])
    assert rows == [{**row, "loops": row["loops"]} for row in log(whole)[-1]["eval"]]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LOOKS = [(), ("--eval_interval=1", "--eval_loops=1,2,4"), ("--eval_only", "--n_loop=4")]


@pytest.mark.parametrize("options", LOOKS, ids=str)
def test_looking_at_a_finished_run_changes_nothing(plain_run, corpus, options):
    folder, _ = plain_run
    before = contents(folder)
    run = train(corpus, folder, "--init_from=auto", *options)
    assert run.code == 0, run.err
    assert ("already finished at step 8" in run.out) == ("--eval_only" not in options)
    assert ("n_loop: 2 in the checkpoint, 4 asked for" in run.out) == ("--n_loop=4" in options)
    assert contents(folder) == before


def test_a_run_that_ended_inside_its_last_evaluation_is_not_finished(corpus, tmp_path, plain_run):
    out = tmp_path / "out"
    assert train(corpus, out, "--eval_loops=1,2,4").code == 0
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:-1]))
    assert train(corpus, out, "--eval_loops=1,2,4", "--init_from=auto").code == 0
    assert without_clock(out) == without_clock(plain_run[0])


def test_a_stream_of_other_tokens_is_another_run(corpus, tmp_path):
    out, copy = tmp_path / "out", shutil.copytree(corpus, tmp_path / "copy")
    assert train(corpus, out, "--max_iters=4").code == 0
    assert train(copy, out, "--init_from=auto", "--max_iters=5").code == 0  # moved
    fields = tokenizer_fields(load_meta(corpus))
    text = make_tokenizer(fields).decode(np.fromfile(corpus / "train.bin", "<u2"))
    write_dataset(copy, fields, {"train": [text[1:]], "val": [text]})
    run = train(copy, out, "--init_from=auto")
    assert_refused(run, "its train, val tokens are not those that the run began with")


def test_an_option_that_an_older_checkpoint_does_not_know_had_its_default(corpus, tmp_path):
    out = tmp_path / "out"
    assert train(corpus, out, "--max_iters=4", "--optimizer=muon").code == 0
    ckpt = checkpoint.load(out)
    del ckpt["config"]["muon_row_norm"], ckpt["config"]["keep_every"]
    checkpoint.save(out, ckpt)
    run = train(corpus, out, "--init_from=auto", "--optimizer=muon", "--muon_row_norm")
    assert_refused(run, "muon_row_norm: False in the checkpoint, True asked for")
    run = train(corpus, out, "--init_from=auto", "--optimizer=muon", "--keep_every=2")
    assert "keep_every: 0 in the checkpoint, 2 asked for" in run.out


def test_the_same_batch_in_other_micro_steps_goes_on(corpus, tmp_path):
    out = tmp_path / "out"
    assert train(corpus, out, "--max_iters=4").code == 0
    layout = ("--init_from=auto", "--batch_size=8", "--gradient_accumulation_steps=1")
    run = train(corpus, out, *layout)
    assert run.code == 0, run.err
    assert "batch_size: 4 in the checkpoint, 8 asked for" in run.out


def test_checkpoints_are_kept_for_good_at_intervals(corpus, tmp_path):
    out = tmp_path / "out"
    assert train(corpus, out, "--keep_every=3", "--eval_interval=8").code == 0
    assert {path.name for path in out.glob("ckpt*.pt")} == {
        "ckpt.pt", "ckpt_prev.pt", "ckpt_3.pt", "ckpt_6.pt",
    }  # fmt: skip
    for step in (3, 6):
        assert checkpoint.load(out / f"ckpt_{step}.pt")["iter_num"] == step


def test_sigusr1_saves_and_goes_on(corpus, tmp_path, monkeypatch):
    in_call(monkeypatch, 2 * 5, lambda: signal.raise_signal(signal.SIGUSR1))
    out = tmp_path / "out"
    run = train(corpus, out, "--keep_last=4")
    assert run.code == 0, run.err
    names = ("ckpt.pt", "ckpt_prev.pt", "ckpt_prev2.pt")
    assert [checkpoint.load(out / name)["iter_num"] for name in names] == [8, 6, 4]


def poison(monkeypatch, number, add):
    """Add to the loss of the micro-step with this number in training, or of all for None."""
    forward, calls = Objective.forward, iter(range(10**9))

    def poisoned_forward(self, *arguments):
        loss, parts = forward(self, *arguments)
        hit = self.training and number in (None, next(calls))
        return (loss + add(loss) if hit else loss), parts

    monkeypatch.setattr(Objective, "forward", poisoned_forward)


BAD = {
    "a gradient of NaN": lambda loss: loss * math.nan,
    "a loss of Inf, its gradient as it was": lambda loss: math.inf,
}


@pytest.mark.parametrize("bad", BAD)
def test_a_step_with_a_bad_gradient_is_skipped_and_the_next_ones_made(
    corpus, tmp_path, monkeypatch, bad
):
    poison(monkeypatch, 2 * 3, BAD[bad])  # in step 3
    out = tmp_path / "out"
    run = train(corpus, out)
    assert run.code == 0, run.err
    assert "iter 3: skipped" in run.out
    assert [entry["iter"] for entry in log(out) if "skipped" in entry] == [3]
    ckpt = checkpoint.load(out)
    assert ckpt["health"]["skipped"] == 1
    assert all(w.isfinite().all() for w in ckpt["model"].values())
    assert ckpt["optimizer"]["adamw"]["state"][0]["step"] == 7


def test_a_run_of_bad_gradients_alone_stops_and_keeps_its_last_checkpoint(
    corpus, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    assert train(corpus, out, "--max_iters=4").code == 0
    poison(monkeypatch, None, BAD["a gradient of NaN"])
    run = train(corpus, out, "--init_from=resume", "--max_skips=2", "--max_iters=20")
    assert "max_skips=2 steps in a row were skipped" in str(run.code)
    assert checkpoint.load(out)["iter_num"] == 4


# -----------------------------------------------------------------------------
# what a step does


@pytest.mark.parametrize("rows, micro_steps", [(8, 1), (1, 8)])
def test_micro_steps_see_the_same_tokens(plain_run, corpus, tmp_path, rows, micro_steps):
    layout = (f"--batch_size={rows}", f"--gradient_accumulation_steps={micro_steps}")
    train(corpus, tmp_path / "out", *layout, "--eval_iters=1")
    want = losses(plain_run[0])
    assert len(want) == 8
    assert losses(tmp_path / "out") == pytest.approx(want, rel=1e-6)


def test_the_loops_of_a_step_follow_from_seed_and_iteration(corpus, tmp_path):
    sampled = ("--loop_sampling=uniform", "--n_loop=3", "--eval_iters=1")
    for name, option in dict(a="--batch_size=2", b="--batch_size=4", c="--seed=5").items():
        train(corpus, tmp_path / name, *sampled, option)
    a, b, c = (logged(tmp_path / name, "loops") for name in "abc")
    assert a == b != c
    assert len(set(a)) > 1
    assert all(1 <= n <= 5 for n in a)


def saved_model(path, **options):
    """Save a model for --init_from, in the shape that TRAIN asks for, and return it."""
    shape = dict(n_prelude=1, n_block=1, n_coda=1, n_loop=2, max_loops=6, vocab_size=100)
    model = build(spread=0.1, **{**shape, **options})
    torch.save({"model": model.state_dict(), "model_args": vars(model.config)}, path)
    return model


def test_a_step_makes_the_loops_it_logs(corpus, tmp_path):
    """The first loss is the starting model's, on the first batch, at the logged loops alone."""
    options = dict(loop_sampling="uniform", n_loop=4)
    model = saved_model(tmp_path / "start.pt", **options)
    given = [f"--{name}={value}" for name, value in options.items()]
    given += ["--batch_size=8", "--gradient_accumulation_steps=1", "--seed=5", "--max_iters=1"]
    run = train(corpus, tmp_path / "out", f"--init_from={tmp_path / 'start.pt'}", *given)
    assert run.code == 0, run.err
    split = split_of(corpus, "train")
    x, y = map(torch.from_numpy, split.windows(split.shuffled(np.arange(8), 5)))
    first = losses(tmp_path / "out")[0]
    with torch.no_grad():
        by_loops = {n: model(x, y, n_loop=n)[1].item() for n in range(1, 8)}
    fitting = [n for n, loss in by_loops.items() if first == pytest.approx(loss, rel=1e-5)]
    assert fitting == logged(tmp_path / "out", "loops") != [4]


WARMUPS = [("linear", [1, 2, 3, 4, 4, 4, 4, 4]), ("sqrt", [1, 2, 2, 4, 4, 4, 4, 4])]


@pytest.mark.parametrize("kind, expected", WARMUPS)
def test_loops_are_warmed_up(corpus, tmp_path, kind, expected):
    options = ("--n_loop=4", "--loop_warmup_iters=4", f"--loop_warmup={kind}", "--eval_iters=1")
    train(corpus, tmp_path / "out", *options)
    assert logged(tmp_path / "out", "loops") == expected


@pytest.mark.parametrize("start, once", [("0", 0), ("0.3", 3), ("0.5", 4), ("1", 8)])
def test_the_first_steps_loop_once(corpus, tmp_path, start, once):
    options = ("--n_loop=4", "--n_block=1", f"--loop_start={start}", "--eval_iters=1")
    train(corpus, tmp_path / "out", *options)
    assert logged(tmp_path / "out", "loops") == [1] * once + [4] * (8 - once)


SCHEDULES = {  # as shares of the largest rate
    "": [1 / 3, 2 / 3, *[0.1 + 0.45 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]],
    "--lr_schedule=linear": [1 / 3, 2 / 3, *[1 - 0.9 * i / 6 for i in range(6)]],
    "--lr_schedule=constant": [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1],
    "--lr_schedule=wsd --hold_iters=4": [1 / 3, 2 / 3, 1, 1, 1, 0.775, 0.55, 0.325],
    "--lr_schedule=wsd --lr_decay_iters=6": [1 / 3, 2 / 3, 1, 1, 1, 0.55, 0.1, 0.1],
    "--lr_schedule=linear --lr_decay_iters=0": [1 / 3, 2 / 3, *[1 - 0.9 * i / 6 for i in range(6)]],
    "--lr_schedule=linear --lr_decay_iters=1": [1 / 3, 2 / 3, 1, *[0.1] * 5],
    "--decay_lr=False": [1] * 8,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates(corpus, tmp_path, schedule):
    run = train(corpus, tmp_path / "out", *schedule.split(), "--eval_iters=1")
    assert run.code == 0, run.err
    rates = [rate / 1e-2 for rate in logged(tmp_path / "out", "lr")]
    assert rates == pytest.approx(SCHEDULES[schedule])


def test_bfloat16_rounds_and_learns_the_same(corpus, tmp_path):
    """At a rate at which rounding does not grow from step to step."""
    for dtype in ("bfloat16", "float32"):
        train(corpus, tmp_path / dtype, f"--dtype={dtype}", "--learning_rate=1e-3")
    ours, theirs = losses(tmp_path / "bfloat16"), losses(tmp_path / "float32")
    assert len(ours) == 8
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=1e-3)


# -----------------------------------------------------------------------------
# fine-tuning


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(plain_run, corpus, tmp_path):
    folder, _ = plain_run
    out = tmp_path / "out"
    options = ("--n_loop=3", "--max_iters=1", "--device=cpu", "--compile=False")
    options += ("--eval_iters=3", "--batch_size=4", "--gradient_accumulation_steps=1")
    sources = (f"--init_from={folder}", f"--dataset={corpus}", f"--out_dir={out}")
    run = Run("train.py", *sources, *options)
    assert run.code == 0, run.err
    x, y = evaluated(corpus)
    with torch.no_grad():
        loss = pretrained.load(folder)(x, y, n_loop=3)[1].item()
    assert val_losses(out)[0] == pytest.approx(loss, rel=1e-5)
    assert checkpoint.load(out)["iter_num"] == 1


def test_fine_tuning_another_models_weights_folded_into_a_loop(corpus, tmp_path):
    """A Llama of three layers becomes 1 + 1x2 + 1 blocks, at one loop begins as it was, trains."""
    llama = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, n_kv_head=2)
    source = build(n_layer=3, vocab_size=100, block_size=32, spread=0.1, **llama)
    pretrained.export(source, tmp_path / "llama")
    out = tmp_path / "out"
    run = train(corpus, out, f"--init_from=hf:{tmp_path / 'llama'}", "--eval_loops=1")
    assert run.code == 0, run.err
    config = pretrained.load(out).config
    assert config.norm == "rmsnorm"
    assert config.groups == ((1,),)
    assert config.block_size == 16
    row = log(out)[0]["eval"][2]
    assert row["loops"] == [1]
    x, y = evaluated(corpus)
    with torch.no_grad():
        loss = source(x, y)[1].item()
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    evaluations = val_losses(out)
    assert evaluations[8] < evaluations[0]


# -----------------------------------------------------------------------------
# what is refused

WRONG = {
    "--learning_rte=1": "did you mean 'learning_rate'",
    "--max_iters=abc": "max_iters='abc'",
    "--n_embd=30": "n_embd=30",
    "--n_loop=0": "n_loop=0",
    "--loop_counts=2,3": "loop_counts=",
    "--loop_groups=[[0,1],[1]]": "loop_groups=",
    "--dataset=nowhere": "dataset=nowhere",
    "--block_size=100000": "block_size=100000",
    "--shard": "shard=True: must be False in one process",
    "--vocab_size=10": "beyond vocab_size=10",
    "--batch_size=0": "batch_size=0",
    "--optimizer=sgd": "one of adamw, muon",
    "--device=tpu": "device='tpu'",
    "--dtype=float8": "dtype=",
    "--eval_loops=0": "eval_loops",
    "--init_from=nowhere": "no such checkpoint",
    "--init_from=resume": "no such checkpoint",
    "--bptt_k=1 --input_injection=passthrough": "no gradient",
    "--lr_decay_iters=-1": "lr_decay_iters",
    "--predict_ahead --max_shift=17": "max_shift=17: must be at most block_size=16",
    "--exit_rule=kl": "exit_rule=kl: has no effect, automatic_loop_exit=False",
    "--use_model_baseline --exit_gate=state --objective=exit_gate": "objective='exit_gate': must",
    "--wandb_log": "wandb_log=True: ",
    "--backend=mpi": "backend",
    "--loop_warmup=cosine": "loop_warmup",
    "--eval_stride=17": "eval_stride=17",
    "--lr_schedule=step": "cosine, linear",
    "--recompute=all": "none, cheap, block, loop",
    "--ema_decay=1": "ema_decay=1.0",
    "--spectral_clip_beta=-1": "spectral_clip_beta",
    "--spectral_clip_interval=0": "spectral_clip_interval",
    "--objective=exit": "objective='exit': needs a gate",
    "--automatic_loop_exit --exit_rule=gate": "exit_rule=gate: needs a model with a gate",
    "--block_size=1e15": "no memory for a model of these sizes",
    "--n_embd=1e12": "no memory for a model of these sizes",
    "--vocab_size=1e18": "no memory for a model of these sizes",
    "nowhere.py": "nowhere.py",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(corpus, tmp_path, wrong):
    assert_refused(train(corpus, tmp_path / "out", *wrong.split()), WRONG[wrong])
    assert not (tmp_path / "out").exists()


ANOTHER_RUN = {
    "--init_from=scratch": "--init_from=auto goes on with this one",
    "--init_from=resume --n_embd=64": "n_embd: 32 in the checkpoint, 64 asked for",
    "--init_from=auto --n_block=2 --n_loop=3": "1 in the checkpoint, 2 asked for; n_loop: 2 in",
    "--init_from=resume --optimizer=muon": "optimizer: adamw in the checkpoint, muon asked for",
    "--init_from=resume --ema_decay=0.9": "--eval_only evaluates this one so",
    "--init_from=resume --batch_size=8": "batch_size: 4 in the checkpoint, 8 asked for",
}


@pytest.mark.parametrize("wrong", ANOTHER_RUN)
def test_another_run_is_never_overwritten(plain_run, corpus, wrong):
    folder, _ = plain_run
    before = contents(folder)
    assert_refused(train(corpus, folder, *wrong.split()), ANOTHER_RUN[wrong])
    assert contents(folder) == before


def test_a_checkpoint_of_another_alphabet_is_refused(plain_run, tmp_path):
    tokenizer = {"tokenizer": "char", "chars": "ab"}
    write_dataset(tmp_path, tokenizer, {"train": ["ab" * 99], "val": ["ab" * 99]})
    run = train(tmp_path, plain_run[0], "--init_from=resume")
    assert_refused(run, "one with the tokenizer of the checkpoint, or --allow_other_tokenizer")


def test_tokens_of_another_tokenizer_are_taken_where_one_insists(plain_run, tmp_path):
    tokenizer = {"tokenizer": "char", "chars": "ab"}
    write_dataset(tmp_path, tokenizer, {"train": ["ab" * 99], "val": ["ab" * 99]})
    run = train(tmp_path, tmp_path / "out", f"--init_from={plain_run[0]}", "--max_iters=1")
    assert_refused(run, "allow_other_tokenizer")
    options = (f"--init_from={plain_run[0]}", "--max_iters=1", "--allow_other_tokenizer")
    run = train(tmp_path, tmp_path / "out", *options)
    assert run.code == 0, run.err
    assert checkpoint.load(tmp_path / "out")["tokenizer"]["chars"] == "ab"


def test_a_token_beyond_the_vocabulary_stops_the_start(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    data = np.fromfile(copy / "train.bin", "<u2")
    data[-1] = 9999
    data.tofile(copy / "train.bin")
    run = train(copy, tmp_path / "out")
    assert_refused(run, "token id 9999")
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# in a fresh Python

HEAVY = set("transformers datasets huggingface_hub tiktoken safetensors".split())
HEAVY |= set("wandb matplotlib pyarrow triton torch._inductor.compile_fx".split())


@pytest.mark.slow
def test_a_run_imports_nothing_heavy_that_it_does_not_use(corpus, tmp_path):
    imported = started(corpus, tmp_path / "out", "sys.modules", "--max_iters=1", "--eval_iters=1")
    assert "model" in imported
    assert not HEAVY & set(imported)


@pytest.mark.slow
def test_wandb_offline(corpus, tmp_path):
    run = train(corpus, tmp_path / "out", "--max_iters=1", "--wandb_log", "--wandb_mode=offline")
    assert run.code == 0, run.err
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))


CACHE_COUNTS = """[
    __import__('torch')._dynamo.utils.counters['inductor'][name]
    for name in ('fxgraph_cache_miss', 'fxgraph_cache_hit')
]"""


@pytest.mark.slow
def test_the_second_start_finds_the_compiled_blocks(corpus, tmp_path):
    """In inductor's cache on the disk, also for another number of loops."""
    options = ("--compile", "--eval_only", "--eval_iters=1", "--n_prelude=0", "--n_coda=0")
    counts = []
    for n in (2, 3):
        out, cache = tmp_path / f"out{n}", str(tmp_path / "cache")
        arguments = (corpus, out, CACHE_COUNTS, *options, f"--n_loop={n}")
        counts.append(started(*arguments, TORCHINDUCTOR_CACHE_DIR=cache))
    first, second = counts
    assert first[0] > 0
    assert second == [0, first[0]]
