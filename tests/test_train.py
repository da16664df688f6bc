"""train.py as a user runs it: what it writes, that it can be stopped anywhere, and that its numbers are what they say."""

import ast
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TRAIN, Run, build, train

import pretrained
from nanorecur import checkpoint
from nanorecur.dataset import load_meta, open_split
from nanorecur.exit_rules import exit_evaluation, make_exit

NOISY = (
    "--dropout=0.2 --loop_noise_scale=1 --state_init=noise --loop_sampling=poisson --loop_warmup_iters=5 --optimizer=muon "
    "--ema_decay=0.9 --spectral_clip_beta=0.5 --recompute=loop"
).split()
AHEAD = (
    "--predict_ahead --n_ahead=2 --loops_per_row --loop_sampling=uniform --bptt_k=1 --ema_decay=0.9 --param_dtype=bfloat16 "
    "--loss_chunk=9 --lr_schedule=wsd --hold_iters=4 --weight_decay_all"
).split()
GATE = "--objective=exit --exit_gate=mean_state --ema_decay=0.9 --recompute=block --loop_sampling=poisson".split()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    """{iteration: loss} of the training lines."""
    return {entry["iter"]: entry["loss"] for entry in log(folder) if "loss" in entry}


def without_clock(folder):
    return [
        {k: v for k, v in entry.items() if k not in ("ms", "tokens_per_second", "mfu")}
        for entry in log(folder)
    ]


def assert_same(a, b, where=""):
    """Nested dicts, lists and tensors, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def plain_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    run = train(corpus, folder, "--eval_loops=1,2,4")
    assert run.code == 0, run.err
    return folder, run


def test_what_a_run_leaves(plain_run, corpus):
    folder, run = plain_run
    assert sorted(os.listdir(folder)) == [
        "ckpt.json",
        "ckpt.pt",
        "ckpt_prev.pt",
        "config.json",
        "lock",
        "log.jsonl",
    ]
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    assert {
        "model",
        "optimizer",
        "model_args",
        "iter_num",
        "best_val_loss",
        "config",
        "tokenizer",
    } <= set(ckpt)
    assert ckpt["iter_num"] == 8 and checkpoint.load(folder / "ckpt_prev.pt")["iter_num"] == 4
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["n_embd"] == 32
        and config["vocab_size"] == load_meta(corpus)["vocab_size"]
        and config["batch_size"] == 4
    )
    assert [entry["iter"] for entry in log(folder)] == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert re.search(
        r"iter 3: loss \d\.\d{4}, .* ms, .* tokens/s, mfu [\d.]+%, loops 2.0, left 00:00:", run.out
    )


def test_it_learns(plain_run):
    evaluations = [entry["eval"][1]["loss"] for entry in log(plain_run[0]) if "eval" in entry]
    assert evaluations[-1] < evaluations[0] - 0.5


def test_the_table_is_what_the_model_gives(plain_run, corpus):
    """Loss and accuracy recomputed from the checkpoint over the same fixed windows."""
    folder, run = plain_run
    rows = log(folder)[-1]["eval"]
    assert [(row["split"], row["loops"]) for row in rows] == [
        ("train", [2]),
        ("val", [2]),
        ("val", [1]),
        ("val", [4]),
    ]
    assert len(re.findall(r"val +\*?\d+ ", run.out)) == 9  # three evaluations of three depths
    model, meta = pretrained.load(folder), load_meta(corpus)
    for row in rows:
        split = open_split(corpus, row["split"], meta, 16, meta["vocab_size"])
        x, y = map(torch.from_numpy, split.windows(split.spread(3 * 4)))
        with torch.no_grad():
            logits = model(x, y, n_loop=row["loops"])[0]
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["accuracy"] == pytest.approx((logits.argmax(-1) == y).float().mean().item())
        assert row["bits_per_token"] == pytest.approx(loss / math.log(2), rel=1e-5)
        sizes = meta["splits"][row["split"]]
        assert row["bits_per_byte"] == pytest.approx(
            loss / math.log(2) * sizes["tokens"] / sizes["bytes"], rel=1e-5
        )


def test_the_watch_on_the_states_is_what_the_model_gives(plain_run, corpus):
    folder, run = plain_run
    report, model, meta = log(folder)[-1]["watch"], pretrained.load(folder), load_meta(corpus)
    split = open_split(corpus, "val", meta, 16, meta["vocab_size"])
    x, y = map(torch.from_numpy, split.windows(split.spread(4)))
    with torch.no_grad():
        gain = (model(x, y, n_loop=1)[1] - model(x, y)[1]).item()
    first, last = model.loops_representation(x)[0]
    pairs = [
        F.cosine_similarity(last[b, i], last[b, j], dim=0)
        for b in range(4)
        for i in range(16)
        for j in range(16)
        if i != j
    ]
    (group,) = report["groups"]
    assert report["gain"] == pytest.approx(gain, abs=1e-5) and group[
        "token_correlation"
    ] == pytest.approx((sum(pairs) / len(pairs)).item(), rel=1e-4)
    assert group["norm"] == pytest.approx(
        [s.norm(dim=-1).mean().item() for s in (first, last)], rel=1e-5
    )
    assert group["change"] == pytest.approx(
        [((last - first).norm(dim=-1).mean() / last.norm(dim=-1).mean()).item()], rel=1e-5
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ("--learning_rate=1e-9", "--min_lr=1e-9"),
            "the state is not used",
        ),  # inject begins by handing on its input alone
        (
            ("--learning_rate=1", "--decay_lr=False", "--grad_clip=0", "--bptt_k=1"),
            "all tokens are nearly the same",
        ),
        (
            (
                "--max_iters=80",
                "--eval_interval=80",
                "--lr_decay_iters=80",
                "--learning_rate=3e-3",
                "--bias=False",
            ),
            None,
        ),
    ],
    ids=str,
)
def test_a_run_that_dies_of_its_states_is_warned_of(corpus, tmp_path, options, words):
    run = train(
        corpus,
        tmp_path / "out",
        "--loop_norm=none",
        "--input_injection=inject",
        "--weight_decay=0",
        *options,
    )
    assert run.code == 0 and (
        f"warning: {words}" in run.out or words in run.out if words else "warning" not in run.out
    ), run.out
    if not words:  # and by far
        assert log(tmp_path / "out")[-1]["watch"]["groups"][0]["token_correlation"] < 0.9


def test_eval_only_prints_the_table_and_writes_nothing(plain_run, corpus):
    folder, run = plain_run
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = train(corpus, folder, "--init_from=resume", "--eval_only", "--eval_loops=1,2,4")
    printed, as_json = again.out.rstrip().rsplit("\n", 1)
    assert again.code == 0 and run.out.rstrip().endswith(printed.split("\n\n")[-1])
    assert json.loads(as_json) == log(folder)[-1]["eval"]
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_sliding_evaluation_scores_each_token_with_most_context(plain_run, corpus):
    """Against logits computed token by token, each with the 8 to 15 tokens before it."""
    folder = plain_run[0]
    run = train(corpus, folder, "--init_from=resume", "--eval_only", "--eval_stride=8")
    row = json.loads(run.out.splitlines()[-1])[1]
    meta = load_meta(corpus)
    model, tokens = (
        pretrained.load(folder),
        torch.from_numpy(open_split(corpus, "val", meta, 16, 256).tokens.astype(np.int64)),
    )
    last, total = len(tokens) - 1 - 16, 0.0
    for start in [*range(0, last, 8), last]:
        x, y = tokens[start : start + 16], tokens[start + 1 : start + 17]
        fresh = 16 if start == 0 else 8 if start < last else (last - 1) % 8 + 1
        with torch.no_grad():
            logits = model(x[None], y[None])[0][0]
        total += F.cross_entropy(logits[16 - fresh :], y[16 - fresh :], reduction="sum").item()
    assert row["loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Rows "ab=?": the answer is a for level 1 and b for level 2."""
    from nanorecur.dataset import write_task

    def make(level, rng):
        a, b, c = (rng.choice("0123456789") for _ in range(3))
        return f"{level}{a}{b}{c}=", (a, b)[level - 1] + "."

    folder, levels = tmp_path_factory.mktemp("task"), {1: 60, 2: 40}
    write_task(
        folder, "0123456789=.", make, {"train": levels, "val": levels, "hard": {2: 30}}, seed=1
    )
    return folder


def test_a_task_is_trained_on_its_answers_and_scored_by_level(task, tmp_path):
    """Loss, accuracy and exact match of every split, recomputed row by row."""
    options = (
        "--block_size=6",
        "--eval_loops=1",
        "--max_iters=60",
        "--eval_interval=60",
        "--lr_decay_iters=60",
        "--eval_iters=25",
    )
    run = train(task, tmp_path / "out", *options)
    assert run.code == 0, run.err
    rows = log(tmp_path / "out")[-1]["eval"]
    assert [(row["split"], row["loops"]) for row in rows] == [
        ("train", [2]),
        ("val", [2]),
        ("val", [1]),
        ("hard", [2]),
        ("hard", [1]),
    ]
    meta, model = load_meta(task), pretrained.load(tmp_path / "out")
    for row in rows:
        tokens = torch.from_numpy(
            np.fromfile(task / f"{row['split']}.bin", "<u2").astype(np.int64)
        ).view(-1, 7)
        with torch.no_grad():
            logits = model(tokens[:, :-1], tokens[:, 1:], n_loop=row["loops"])[0][:, 4:]
        answers = tokens[:, 5:]
        exact = (logits.argmax(-1) == answers).all(1).float()
        assert row["loss"] == pytest.approx(
            F.cross_entropy(logits.flatten(0, 1), answers.flatten()).item(), rel=1e-5
        )
        assert row["accuracy"] == pytest.approx(
            (logits.argmax(-1) == answers).float().mean().item()
        )
        assert row["exact"] == pytest.approx(exact.mean().item())
        sizes = dict(meta["row"]["levels"][row["split"]])
        parts = dict(zip(sizes, exact.split(list(sizes.values()))))
        assert row["by_level"] == pytest.approx(
            {str(level): part.mean().item() for level, part in parts.items()}
        )
    assert re.search(r"exact  by level\ntrain .* 1:\d+% 2:\d+%\n", run.out)


def test_the_rows_of_a_task_set_the_block_size(task, tmp_path):
    without = [option for option in TRAIN if not option.startswith("--block_size")]
    run = Run(
        "train.py", f"--dataset={task}", f"--out_dir={tmp_path / 'a'}", *without, "--max_iters=1"
    )
    assert run.code == 0 and checkpoint.load(tmp_path / "a")["model_args"]["block_size"] == 6
    run = train(task, tmp_path / "b")
    assert run.code == 2 and "block_size=16" in run.err and "need 6" in run.err


@pytest.mark.parametrize(
    "options", [[], NOISY, AHEAD, GATE], ids=["plain", "noisy", "ahead", "gate"]
)
def test_a_stopped_run_goes_on_bit_for_bit(corpus, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(corpus, whole, *options).code == 0
    for stop in (4, 8):
        assert train(corpus, parts, "--init_from=auto", f"--max_iters={stop}", *options).code == 0
    a, b = checkpoint.load(whole), checkpoint.load(parts)
    assert a.keys() == b.keys() and ("training_model" in a) == bool(options)
    for name in a.keys() - {"config"}:
        assert_same(a[name], b[name], name)
    assert without_clock(whole) == without_clock(parts)


def test_lines_after_the_checkpoint_are_written_again_not_twice(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(corpus, whole)
    train(corpus, killed, "--max_iters=7", "--eval_interval=4")  # saves at 4 and at its end
    (killed / "ckpt.pt").write_bytes(b"torn")
    assert train(corpus, killed, "--init_from=resume").code == 0
    assert without_clock(whole) == without_clock(killed)


@pytest.mark.parametrize(
    "layout",
    [
        "--batch_size=8 --gradient_accumulation_steps=1",
        "--batch_size=1 --gradient_accumulation_steps=8",
    ],
)
def test_micro_steps_see_the_same_tokens(plain_run, corpus, tmp_path, layout):
    train(corpus, tmp_path / "out", *layout.split(), "--eval_iters=1")
    ours, theirs = losses(tmp_path / "out"), losses(plain_run[0])
    assert ours == pytest.approx(theirs, rel=1e-6) and len(ours) == 8


def torchrun(corpus, out_dir, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
    ]
    command += [f"--dataset={corpus}", f"--out_dir={out_dir}", *TRAIN, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_are_one(corpus, tmp_path):
    """Same losses, sampled depth included; and a run saved by two goes on on one."""
    one, two = tmp_path / "one", tmp_path / "two"
    sampled = ("--loop_sampling=poisson", "--bptt_k=1", "--eval_loops=1,3", "--exit_gate=state")
    train(corpus, one, *sampled)
    run = torchrun(corpus, two, *sampled, "--max_iters=4")
    assert run.returncode == 0, run.stderr
    assert train(corpus, two, "--init_from=resume", *sampled).code == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    for a, b in zip(log(one), log(two), strict=True):
        for x, y in zip(a.get("eval", []), b.get("eval", []), strict=True):
            assert x["loops"] == y["loops"] and x["loss"] == pytest.approx(y["loss"], rel=1e-6)
        assert a.get("loops") == b.get("loops")


def note(calls, bucket):
    """In place of the all-reduce of one process."""
    calls.append(bucket.is_last())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_processes_average_their_gradients_once_per_step(corpus, tmp_path, monkeypatch):
    """One process under DDP, of two micro-steps, and the bits of none."""
    calls = []

    class Counted(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(calls, note)

    train(corpus, tmp_path / "alone")
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Counted)
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    run = train(corpus, tmp_path / "out")
    assert run.code == 0, run.err
    assert sum(calls) == 8
    assert_same(
        checkpoint.load(tmp_path / "out")["model"], checkpoint.load(tmp_path / "alone")["model"]
    )


def test_loops_of_a_step_follow_from_seed_and_iteration(corpus, tmp_path):
    for name in ("a", "b"):
        train(
            corpus,
            tmp_path / name,
            "--loop_sampling=uniform",
            "--n_loop=3",
            f"--batch_size={2 if name == 'a' else 4}",
        )
    train(corpus, tmp_path / "c", "--loop_sampling=uniform", "--n_loop=3", "--seed=5")
    a, b, c = (
        [entry["loops"] for entry in log(tmp_path / name) if "loops" in entry] for name in "abc"
    )
    assert a == b != c and all(1 <= n <= 5 for n in a) and len(set(a)) > 1


def test_a_step_makes_the_loops_it_logs(corpus, tmp_path):
    """The loss of the first step is the starting model's on the first global batch at the logged number of loops."""
    model = build(
        spread=0.1, vocab_size=load_meta(corpus)["vocab_size"], loop_sampling="uniform", n_loop=4
    )
    torch.save(
        {"model": model.state_dict(), "model_args": vars(model.config)}, tmp_path / "start.pt"
    )
    options = (
        "--batch_size=8",
        "--gradient_accumulation_steps=1",
        "--eval_iters=1",
        "--device=cpu",
        "--compile=False",
    )
    run = Run(
        "train.py",
        f"--dataset={corpus}",
        f"--out_dir={tmp_path / 'out'}",
        f"--init_from={tmp_path / 'start.pt'}",
        "--seed=5",
        "--max_iters=1",
        *options,
    )
    assert run.code == 0, run.err
    first, split = log(tmp_path / "out")[1], open_split(corpus, "train", load_meta(corpus), 16, 256)
    x, y = map(torch.from_numpy, split.windows(split.shuffled(np.arange(8), 5)))
    losses = {n: model(x, y, n_loop=n)[1].item() for n in range(1, 8)}
    same = [n for n in losses if first["loss"] == pytest.approx(losses[n], rel=1e-5)]
    assert same == [first["loops"]] != [4]


@pytest.mark.parametrize(
    "kind,expected", [("linear", [1, 2, 3, 4, 4, 4, 4, 4]), ("sqrt", [1, 2, 2, 4, 4, 4, 4, 4])]
)
def test_loop_warmup(corpus, tmp_path, kind, expected):
    train(corpus, tmp_path / "out", "--n_loop=4", "--loop_warmup_iters=4", f"--loop_warmup={kind}")
    assert [entry["loops"] for entry in log(tmp_path / "out") if "loops" in entry] == expected


@pytest.mark.parametrize(
    "schedule, rates",
    {
        "--lr_schedule=linear": [1 - 0.9 * i / 6 for i in range(6)],
        "--lr_schedule=constant": [1] * 6,
        "--lr_schedule=wsd --hold_iters=4": [1, 1, 1, 1 - 0.9 / 4, 1 - 1.8 / 4, 1 - 2.7 / 4],
    }.items(),
)
def test_schedules(corpus, tmp_path, schedule, rates):
    assert train(corpus, tmp_path / "out", *schedule.split(), "--eval_iters=1").code == 0
    got = [entry["lr"] / 1e-2 for entry in log(tmp_path / "out") if "lr" in entry]
    assert got == pytest.approx([1 / 3, 2 / 3, *rates])


def test_the_average_of_the_weights_is_evaluated_and_saved(corpus, tmp_path, monkeypatch):
    """Against the weights of every step, averaged here."""
    steps = {}
    for stop in range(1, 5):
        train(corpus, tmp_path / str(stop), f"--max_iters={stop}", "--eval_iters=1")
        steps[stop] = checkpoint.load(tmp_path / str(stop))["model"]
    run = train(corpus, tmp_path / "out", "--max_iters=4", "--ema_decay=0.75", "--eval_iters=3")
    ckpt = checkpoint.load(tmp_path / "out")
    assert_same(ckpt["training_model"], steps[4])
    average = steps[1]
    for stop in (2, 3, 4):
        average = {name: 0.75 * average[name] + 0.25 * steps[stop][name] for name in average}
    for name, tensor in average.items():
        torch.testing.assert_close(ckpt["model"][name], tensor, atol=1e-6, rtol=1e-5)
    split = open_split(corpus, "val", load_meta(corpus), 16, 256)
    x, y = map(torch.from_numpy, split.windows(split.spread(12)))
    with torch.no_grad():
        assert log(tmp_path / "out")[-1]["eval"][1]["loss"] == pytest.approx(
            pretrained.load(tmp_path / "out")(x, y)[1].item(), rel=1e-5
        )
    assert run.code == 0


@pytest.mark.parametrize(
    "options, clipped",
    [((), (1,)), (("--spectral_clip_all",), (0, 1, 2)), (("--use_model_baseline",), ())],
    ids=str,
)
def test_spectral_clipping_bounds_the_looped_matrices(corpus, tmp_path, options, clipped):
    train(corpus, tmp_path / "out", "--spectral_clip_beta=0.2", "--eval_iters=1", *options)
    for name, W in checkpoint.load(tmp_path / "out")["model"].items():
        if re.search(r"h\.\d.*(attn|mlp).*weight", name):
            top = torch.linalg.matrix_norm(W, 2)
            assert top <= 0.2 * 1.01 if int(name.split(".")[2]) in clipped else top > 0.21, name


def test_spectral_clipping_every_few_steps(corpus, tmp_path):
    for interval in (3, 4):  # the last of 8 steps is step 7, clipped where 7 is a multiple
        train(
            corpus,
            tmp_path / str(interval),
            "--spectral_clip_beta=0.2",
            f"--spectral_clip_interval={interval}",
            "--max_iters=7",
            "--eval_iters=1",
        )
    tops = {
        i: torch.linalg.matrix_norm(
            checkpoint.load(tmp_path / str(i))["model"]["transformer.h.1.mlp.c_fc.weight"], 2
        )
        for i in (3, 4)
    }
    assert tops[3] <= 0.2 * 1.01 < tops[4]


@pytest.mark.parametrize("what", ["cheap", "block", "loop"])
def test_recomputed_activations_change_no_number(plain_run, corpus, tmp_path, what):
    train(corpus, tmp_path / "out", f"--recompute={what}", "--eval_loops=1,2,4")
    assert losses(tmp_path / "out") == losses(plain_run[0])


def test_learning_rate_is_warmed_up_and_decayed(plain_run):
    rates = [entry["lr"] for entry in log(plain_run[0]) if "lr" in entry]
    cosine = [1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, *cosine])


@pytest.mark.parametrize(
    "option",
    [
        "--grad_clip=0.01",
        "--weight_decay=5",
        "--beta1=0.5",
        "--beta2=0.5",
        "--seed=1",
        "--decay_lr=False",
    ],
)
def test_options_of_the_optimizer_act(plain_run, corpus, tmp_path, option):
    train(corpus, tmp_path / "out", option)
    assert losses(tmp_path / "out") != losses(plain_run[0])


def test_decay_spares_norms_biases_and_embeddings(corpus, tmp_path):
    """At a tiny learning rate and a huge decay, matrices shrink and nothing else does."""
    quiet = ("--learning_rate=1e-6", "--min_lr=1e-6", "--max_iters=3", "--eval_iters=1")
    weights = {}
    for decay in (0, 1e5):
        train(corpus, tmp_path / str(decay), *quiet, f"--weight_decay={decay}")
        weights[decay] = checkpoint.load(tmp_path / str(decay))["model"]
    for name, tensor in weights[0].items():
        matrix = tensor.dim() == 2 and not re.search("wte|wpe|lm_head", name)
        moved = (weights[1e5][name] - tensor).norm().item()
        assert moved > 0.1 * tensor.norm() if matrix else moved < 1e-4 * tensor.numel() ** 0.5, name


def test_nothing_is_saved_before_the_first_step(corpus, tmp_path):
    assert train(corpus, tmp_path / "out", "--max_iters=0").code == 0
    assert not checkpoint.exists(tmp_path / "out")


def test_the_control_loops_nothing(corpus, tmp_path):
    run = train(corpus, tmp_path / "out", "--use_model_baseline", "--eval_loops=1,4")
    assert run.code == 0 and [row["loops"] for row in log(tmp_path / "out")[-1]["eval"]] == [[], []]
    assert not any("loops" in name for name in checkpoint.load(tmp_path / "out")["model"])


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(plain_run, corpus, tmp_path):
    folder = plain_run[0]
    run = Run(
        "train.py",
        f"--init_from={folder}",
        f"--dataset={corpus}",
        f"--out_dir={tmp_path / 'out'}",
        "--n_loop=3",
        "--eval_iters=3",
        "--batch_size=4",
        "--gradient_accumulation_steps=1",
        "--max_iters=1",
        "--device=cpu",
        "--compile=False",
    )
    assert run.code == 0, run.err
    start = log(tmp_path / "out")[0]["eval"][1]
    split = open_split(corpus, "val", load_meta(corpus), 16, 256)
    x, y = map(torch.from_numpy, split.windows(split.spread(12)))
    with torch.no_grad():
        assert start["loss"] == pytest.approx(
            pretrained.load(folder)(x, y, n_loop=3)[1].item(), rel=1e-5
        )
    assert checkpoint.load(tmp_path / "out")["iter_num"] == 1


def test_fine_tuning_another_models_weights_folded_into_a_loop(corpus, tmp_path):
    """A Llama of three layers in a Hugging Face folder becomes 1 + 1x2 + 1 blocks and trains."""
    options = dict(
        norm="rmsnorm", position="rope", mlp="swiglu", bias=False, n_kv_head=2, block_size=32
    )
    source = build(n_layer=3, vocab_size=load_meta(corpus)["vocab_size"], spread=0.1, **options)
    pretrained.export(source, tmp_path / "llama")
    run = train(corpus, tmp_path / "out", f"--init_from=hf:{tmp_path / 'llama'}", "--eval_loops=1")
    assert run.code == 0, run.err
    first, model = log(tmp_path / "out")[0]["eval"], pretrained.load(tmp_path / "out")
    assert (
        model.config.norm == "rmsnorm"
        and model.config.groups == ((1,),)
        and model.config.block_size == 16
    )
    split = open_split(corpus, "val", load_meta(corpus), 16, 256)
    x, y = map(torch.from_numpy, split.windows(split.spread(12)))
    with torch.no_grad():  # at one loop it begins as the model it was
        assert first[2]["loops"] == [1] and first[2]["loss"] == pytest.approx(
            source(x, y)[1].item(), rel=1e-5
        )


def test_only_the_best_is_saved_when_asked(corpus, tmp_path):
    """With a learning rate that ruins the model, the first evaluation after the start is never beaten."""
    options = (
        "--always_save_checkpoint=False",
        "--eval_interval=2",
        "--decay_lr=False",
        "--learning_rate=3",
        "--grad_clip=0",
    )
    train(corpus, tmp_path / "out", *options)
    evaluations = {
        entry["iter"]: entry["eval"][1]["loss"]
        for entry in log(tmp_path / "out")
        if "eval" in entry
    }
    saved = checkpoint.exists(tmp_path / "out")
    best = min(evaluations, key=evaluations.get)
    assert saved == (best > 0) and (
        not saved or checkpoint.load(tmp_path / "out")["iter_num"] == best
    )


def test_bfloat16(corpus, tmp_path):
    for dtype in (
        "bfloat16",
        "float32",
    ):  # at a rate at which rounding does not grow from step to step
        train(corpus, tmp_path / dtype, f"--dtype={dtype}", "--learning_rate=1e-3")
    ours, theirs = losses(tmp_path / "bfloat16"), losses(tmp_path / "float32")
    assert ours != theirs and ours == pytest.approx(theirs, rel=1e-3) and len(ours) == 8


def test_wandb_offline(corpus, tmp_path):
    run = train(corpus, tmp_path / "out", "--max_iters=1", "--wandb_log", "--wandb_mode=offline")
    assert run.code == 0 and list((tmp_path / "out" / "wandb").glob("offline-run-*"))


WRONG = {
    "--learning_rte=1": "did you mean 'learning_rate'",
    "--max_iters=abc": "max_iters='abc'",
    "--n_embd=30": "n_embd=30",
    "--n_loop=0": "n_loop=0",
    "--loop_counts=2,3": "loop_counts=",
    "--loop_groups=[[0,1],[1]]": "loop_groups=",
    "--dataset=nowhere": "run: python",
    "--block_size=100000": "block_size=100000",
    "--shard": "shard=True: must be False in one process",
    "--vocab_size=10": "beyond vocab_size=10",
    "--batch_size=0": "batch_size=0",
    "--optimizer=sgd": "adamw or muon",
    "--device=tpu": "device='tpu'",
    "--dtype=float8": "dtype=",
    "--eval_loops=0": "eval_loops",
    "--init_from=nowhere": "no such checkpoint",
    "--init_from=resume": "no such checkpoint",
    "--bptt_k=1 --input_injection=passthrough": "no gradient",
    "--lr_decay_iters=1": "lr_decay_iters",
    "--backend=mpi": "backend",
    "--loop_warmup=cosine": "loop_warmup",
    "--eval_stride=17": "eval_stride=17",
    "--lr_schedule=step": "cosine, linear",
    "--lr_schedule=wsd --hold_iters=8": "hold_iters=8",
    "--recompute=all": "none, cheap, block, loop",
    "--ema_decay=1": "ema_decay=1.0",
    "--spectral_clip_beta=-1": "spectral_clip_beta",
    "--spectral_clip_interval=0": "spectral_clip_interval",
    "nowhere.py": "nowhere.py",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(corpus, tmp_path, wrong):
    run = train(corpus, tmp_path / "out", *wrong.split())
    assert run.code == 2 and run.err.count("\n") == 1 and WRONG[wrong] in run.err, run.err
    assert not (tmp_path / "out").exists()


def test_another_run_is_never_overwritten(plain_run, corpus):
    folder = plain_run[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for wrong, words in {
        "--init_from=scratch": "--init_from=auto goes on with this one",
        "--init_from=resume --n_embd=64": "n_embd=64 where the checkpoint has 32",
        "--init_from=auto --n_block=2": "n_block=2 where the checkpoint has 1",
        "--init_from=resume --optimizer=muon": "optimizer=",
    }.items():
        run = train(corpus, folder, *wrong.split())
        assert run.code == 2 and run.err.count("\n") == 1 and words in run.err, run.err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_of_another_alphabet_is_refused(plain_run, tmp_path):
    from nanorecur.dataset import write_dataset

    (tmp_path / "other").mkdir()
    write_dataset(
        tmp_path / "other",
        {"tokenizer": "char", "chars": "ab"},
        {"train": ["ab" * 99], "val": ["ab" * 99]},
    )
    run = train(tmp_path / "other", plain_run[0], "--init_from=resume")
    assert run.code == 2 and "tokenizer" in run.err


def test_a_token_beyond_the_vocabulary_stops_the_start(corpus, tmp_path):
    import shutil

    copy = shutil.copytree(corpus, tmp_path / "copy")
    data = np.fromfile(copy / "train.bin", "<u2")
    data[-1] = 9999
    data.tofile(copy / "train.bin")
    run = train(copy, tmp_path / "out")
    assert run.code == 2 and "token id 9999" in run.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule,threshold", [("state", 0.0), ("state", 0.5), ("gate", 0.6)])
def test_evaluation_with_exit(corpus, tmp_path, rule, threshold):
    """Threshold 0 is the evaluation without; else loss and loops are those of exit_rules.py over the same windows."""
    options = (
        "--exit_gate=state",
        "--objective=exit",
        "--n_loop=4",
        "--automatic_loop_exit",
        f"--exit_rule={rule}",
        f"--automatic_loop_exit_threshold={threshold}",
        "--eval_iters=3",
    )
    run = train(corpus, tmp_path / "out", *options)
    assert run.code == 0 and "loops with exit" in run.out, run.err
    entry = log(tmp_path / "out")[-1]
    loss, loops = entry["objective"]["loss with exit"], entry["objective"]["loops with exit"]
    if not threshold:
        assert loss == pytest.approx(entry["eval"][1]["loss"], rel=1e-5) and loops == 4
        return
    model, meta = pretrained.load(tmp_path / "out"), load_meta(corpus)
    split = open_split(corpus, "val", meta, 16, meta["vocab_size"])
    x, y = map(torch.from_numpy, split.windows(split.spread(12)))
    assert (loss, loops) == pytest.approx(
        exit_evaluation(model, x, y, make_exit(model, rule, threshold)), rel=1e-5
    )
    assert 1 < loops < 4


@pytest.mark.parametrize("giant", ["--block_size=1e15", "--n_embd=1e12", "--vocab_size=1e18"])
def test_a_model_that_no_memory_holds_is_refused_in_a_line(corpus, tmp_path, giant):
    run = train(corpus, tmp_path / "out", giant)
    assert run.code == 2 and run.err.count("\n") == 1 and not (tmp_path / "out").exists(), run.err


def started(corpus, out_dir, asked, *arguments, **environment):
    """A run in a fresh Python, and what an expression is there after it."""
    script = (
        f"import runpy, sys; runpy.run_path('train.py', run_name='__main__'); print(list({asked}))"
    )
    command = [
        sys.executable,
        "-c",
        script,
        f"--dataset={corpus}",
        f"--out_dir={out_dir}",
        *TRAIN,
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr
    return ast.literal_eval(run.stdout.splitlines()[-1])


def test_a_run_imports_nothing_heavy_that_it_does_not_use(corpus, tmp_path):
    heavy = {
        "transformers",
        "datasets",
        "huggingface_hub",
        "tiktoken",
        "safetensors",
        "wandb",
        "matplotlib",
        "pyarrow",
        "nanorecur.parallel",
        "torch._inductor.compile_fx",
        "triton",
    }
    imported = started(corpus, tmp_path / "out", "sys.modules", "--max_iters=1", "--eval_iters=1")
    assert "model" in imported and not heavy & set(imported)


def test_the_second_start_finds_the_compiled_blocks(corpus, tmp_path):
    """In inductor's cache on the disk: no block is compiled twice, also for other numbers of loops."""
    asked = "[__import__('torch')._dynamo.utils.counters['inductor'][n] for n in ('fxgraph_cache_miss', 'fxgraph_cache_hit')]"
    options = ("--compile", "--eval_only", "--eval_iters=1", "--n_prelude=0", "--n_coda=0")
    first, second = (
        started(
            corpus,
            tmp_path / f"out{n}",
            asked,
            *options,
            f"--n_loop={n}",
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        )
        for n in (2, 3)
    )
    assert first[0] > 0 and second == [0, first[0]]
