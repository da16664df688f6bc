"""Many runs: grids, tables, reference curves, and runs.py, which trains and compares."""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from math import sqrt
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN, Run, assert_refused, losses, train, val_losses
from forked import forked_python

from configurator import read_knobs
from model import GPT, GPTConfig
from nanorecur import run_table
from nanorecur.objectives import Objective

KNOBS = read_knobs(ROOT / "train.py") | read_knobs(ROOT / "model.py", "GPTConfig")
PLAIN = ["--n_block=0", "--n_layer=2", "--n_prelude=0", "--n_coda=0"]


def runs(*arguments):
    return Run("runs.py", *arguments)


def rows_of(*arguments):
    """Return the rows of a table as runs.py prints them in JSON."""
    run = runs("table", *arguments, "--format=json")
    assert run.code == 0, run.err
    return json.loads(run.out)


# -----------------------------------------------------------------------------
# the grid


def test_repeated_options_span_the_grid_and_others_hold_for_all():
    words = ["c.py", "--seed=1", "--n_embd=8", "--n_loop=2", "--seed=2", "--n_loop=4"]
    fixed, grid = run_table.split_grid(words, KNOBS)
    assert fixed == ["c.py", "--n_embd=8"]
    assert list(run_table.grid_points(grid)) == [
        ("seed=1+n_loop=2", ["--seed=1", "--n_loop=2"]),
        ("seed=1+n_loop=4", ["--seed=1", "--n_loop=4"]),
        ("seed=2+n_loop=2", ["--seed=2", "--n_loop=2"]),
        ("seed=2+n_loop=4", ["--seed=2", "--n_loop=4"]),
    ]


def test_one_value_in_two_spellings_spans_nothing():
    words = ["--max_iters=1000", "--max_iters=1e3", "--compile", "--compile=False"]
    fixed, grid = run_table.split_grid(words, KNOBS)
    assert fixed == ["--max_iters=1000", "--max_iters=1e3"]
    assert list(grid) == ["compile"]


def test_a_folder_has_a_name_that_no_shell_expands_and_no_other_point_has():
    _, grid = run_table.split_grid(["--dataset=a/b c", "--dataset=$x*"], KNOBS)
    names = [name for name, _ in run_table.grid_points(grid)]
    assert names == ["dataset=a_b_c", "dataset=_x_"]
    _, grid = run_table.split_grid(["--dataset=a/b", "--dataset=a b"], KNOBS)
    with pytest.raises(ValueError, match="two runs"):
        list(run_table.grid_points(grid))


# -----------------------------------------------------------------------------
# runs made by hand: the config of a real run, and a log as train.py writes it


@pytest.fixture(scope="module")
def config(plain_run):
    return json.loads((plain_run[0] / "config.json").read_text())


def evaluation(step, loss, own=(2,), at=(1,)):
    """Return an evaluation's entry: train, val at the model's own loops and at others."""
    rows = [{"split": "train", "loops": list(own), "shift": 1, "loss": 9.0, "bits_per_byte": 9.0}]
    for n in [own, *((n,) for n in at)]:
        value = loss if n == own else loss + n[0] / 10
        rows.append({"split": "val", "loops": list(n), "shift": 1, "loss": value})
        rows[-1]["bits_per_byte"] = 1.5 * value
    return {"iter": step, "eval": rows}


def write_run(folder, config, log, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return folder


def log_of(loss, steps=8):
    entries = [{"iter": i, "loss": 5.0} for i in range(steps)]
    return [evaluation(0, 6.0), *entries, evaluation(steps, loss)]


def test_a_row_says_what_the_run_logged_and_what_its_model_costs(plain_run):
    folder, _ = plain_run
    (row,) = rows_of(folder)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["eval"]
    config = json.loads((folder / "config.json").read_text())
    model = GPT(GPTConfig(**{name: config[name] for name in GPTConfig.__dataclass_fields__}))
    assert row["state"] == "finished" and row["loops"] == "2"
    assert row["loss"] == val_losses(folder)[8] == row["loss_at_2"]
    assert row["loss_at_4"] == next(r["loss"] for r in last if r["loops"] == [4])
    assert row["bits_per_byte_at_1"] == next(r["bits_per_byte"] for r in last if r["loops"] == [1])
    assert row["parameters"] == model.get_num_params()
    assert row["flops_per_token"] == model.flops_per_token()
    assert row["tokens"] == 8 * 2 * 4 * 16
    assert row["flops"] == pytest.approx(row["tokens"] * model.flops_per_token())


def test_flops_and_seconds_are_those_that_the_log_adds_up(tmp_path, config):
    log = log_of(3.0)
    log[6] |= {"tokens": 768, "flops": 6e9, "elapsed": 3.0}  # step 5: six of eight steps
    (row,) = rows_of(write_run(tmp_path / "a", config, log))
    assert (row["tokens"], row["flops"], row["seconds"]) == (1024, 8e9, 4.0)
    (row,) = rows_of(write_run(tmp_path / "b", config, log_of(3.0)))
    assert row["seconds"] is None
    assert row["flops"] == row["flops_per_token"] * 1024


def test_flops_per_token_are_the_mean_over_the_depths_that_are_drawn(config):
    changed = config | {"loop_sampling": "uniform", "n_loop": 3, "max_loops": 5}
    objective = run_table.model_of(changed)
    mean = run_table.mean_flops(changed, objective)
    of_depths = [objective.flops_per_token(n) for n in range(1, 6)]  # uniform of mean 3: 1 to 5
    assert mean == pytest.approx(statistics.fmean(of_depths), rel=0.03)
    assert mean not in of_depths


def test_a_late_loop_costs_one_loop_until_it_begins(config):
    looped = config | {"loop_sampling": "fixed", "n_loop": 3}
    objective = run_table.model_of(looped)
    late = run_table.mean_flops(looped | {"loop_start": 0.5, "max_iters": 9}, objective)
    one, three = objective.flops_per_token(1), objective.flops_per_token(3)
    assert late == pytest.approx((5 * one + 4 * three) / 9) and one < three
    first = run_table.mean_flops(looped | {"loop_start": 1}, objective)
    assert first == objective.flops_per_token(1)


def test_a_run_of_older_code_has_the_defaults_of_options_that_it_did_not_have(tmp_path, config):
    older = {name: value for name, value in config.items() if name != "loop_start"}
    (row,) = rows_of(write_run(tmp_path / "a", older, log_of(3.0)))
    assert row["flops_per_token"] == run_table.mean_flops(config, run_table.model_of(config))


def test_a_baseline_counts_what_it_trains(config):
    changed = config | {"use_model_baseline": True, "objective": "deep"}
    objective = run_table.model_of(changed)
    assert isinstance(objective, Objective) and objective.name == "next"
    assert run_table.mean_flops(changed, objective) == objective.model.flops_per_token()


def test_a_run_that_is_not_finished_is_marked_and_in_no_mean(tmp_path, config):
    for seed in (1, 2):
        write_run(tmp_path / f"{seed}", config, log_of(float(seed)), seed=seed)
    write_run(tmp_path / "3", config, log_of(9.0, steps=5), seed=3)
    *rows, mean, error = rows_of(tmp_path)
    assert [row["state"] for row in rows] == ["finished", "finished", "step 5 of 8"]
    assert (mean["run"], mean["loss"]) == ("mean of 2 seeds", 1.5)
    assert error["loss"] == pytest.approx(0.5)


def test_means_are_over_runs_that_differ_in_the_seed_alone(tmp_path, config):
    values = {1: 1.0, 2: 1.5, 3: 3.0}
    for seed, loss in values.items():
        write_run(tmp_path / f"a{seed}", config, log_of(loss), seed=seed, out_dir=f"a{seed}")
    write_run(tmp_path / "b", config, log_of(7.0), seed=1, dropout=0.5)
    *rows, mean, error = rows_of(tmp_path)
    assert len(rows) == 4 and rows[0].keys() >= {"seed", "dropout"}
    assert not rows[0].keys() & {"out_dir", "n_embd"}
    assert (mean["dropout"], "seed" in mean) == ("0.0", False)
    assert mean["loss"] == pytest.approx(5.5 / 3)
    spread = sqrt(sum((loss - 5.5 / 3) ** 2 for loss in values.values()) / 2)
    assert error["loss"] == pytest.approx(spread / sqrt(3))
    assert mean["loss_at_1"] == pytest.approx(5.5 / 3 + 0.1)
    assert mean["bits_per_byte"] == pytest.approx(5.5 / 2)


def test_losses_against_cost_are_means_over_seeds_with_their_range(tmp_path, config):
    found = []
    for seed, loss, pace in [(1, 3.0, 1.0), (2, 4.0, 2.0)]:
        log = log_of(loss)
        log.insert(5, evaluation(4, loss + 1))  # before step 4
        for entry in log:
            if "eval" not in entry and entry["iter"] in (2, 5):
                done = entry["iter"] + 1
                entry |= {"tokens": done, "flops": done * 1e9, "elapsed": done * pace}
        found.append(write_run(tmp_path / f"s{seed}", config, log, seed=seed))
    plain = {"n_block": 0, "n_prelude": 0, "n_coda": 0, "n_layer": 2, "n_loop": 1}
    found.append(write_run(tmp_path / "plain", config, log_of(5.0), **plain))
    curves = run_table.cost_curves([run_table.read_run(folder) for folder in found])
    name = f"{tmp_path / 's1'}, 2 seeds"
    assert list(curves) == [name, str(tmp_path / "plain")]
    assert curves[name]["flops"].tolist() == [4e9, 8e9]  # between lines, and behind the last one
    assert curves[name]["seconds"].tolist() == [6.0, 12.0]
    assert curves[name]["loss"].tolist() == [4.5, 3.5]
    assert curves[name]["least"].tolist() == [4.0, 3.0]
    assert curves[name]["largest"].tolist() == [5.0, 4.0]
    assert curves[name]["looped"] and not curves[str(tmp_path / "plain")]["looped"]
    (row,) = rows_of(tmp_path / "plain")
    assert curves[str(tmp_path / "plain")]["flops"].tolist() == [row["flops"]]
    assert all(map(math.isnan, curves[str(tmp_path / "plain")]["seconds"]))


def test_the_formats_show_the_same_rows(tmp_path, config):
    folder = write_run(tmp_path / "a", config, log_of(1.25))
    head, line = runs("table", folder, "--format=csv").out.splitlines()
    cells = dict(zip(head.split(","), line.split(",")))
    assert (cells["loss"], cells["loss_at_1"], cells["tokens"]) == ("1.25", "1.35", "1024")
    head, _, line = runs("table", folder).out.splitlines()
    assert [len(part) for part in head.split("|")] == [len(part) for part in line.split("|")]
    assert "loss at 1" in head and " 1.3500 " in line and " 1,024 " in line
    assert "bits per byte at" not in head
    to = tmp_path / "table.json"
    assert runs("table", folder, "--format=json", f"--to={to}").out == ""
    assert json.loads(to.read_text()) == rows_of(folder)


def test_depths_stand_in_their_order_whichever_run_has_them():
    rows = [{"run": "a", "loss_at_4": 1, "loss_at_16": 1}, {"run": "b", "loss_at_1,2": 1, "x": 0}]
    names = ["run", "x", "loss_at_1,2", "loss_at_4", "loss_at_16"]
    assert run_table.column_names(rows) == names


def test_a_line_that_a_kill_left_incomplete_is_no_error(tmp_path, config):
    folder = write_run(tmp_path / "a", config, log_of(1.25))
    log = folder / "log.jsonl"
    log.write_text(log.read_text() + '{"iter": 8, "lo')
    assert rows_of(folder)[0]["loss"] == 1.25
    log.write_text('{"iter": 8, "lo\n' + log.read_text())
    assert_refused(runs("table", folder), "line 1 is not one that train.py writes")


def test_what_is_no_run_is_refused(tmp_path):
    assert_refused(runs("table"), "1 or more folders")
    assert_refused(runs("table", tmp_path), "no config.json")
    (tmp_path / "config.json").write_text("[]")
    assert_refused(runs("table", tmp_path), "not one that train.py writes")


# -----------------------------------------------------------------------------
# reference curves


def test_a_curve_is_the_mean_and_half_the_range_of_its_runs(tmp_path, config):
    for name, loss in {"a": 1.0, "b": 2.0, "c": 4.0}.items():
        log = [evaluation(0, 6.0), evaluation(4, 2 * loss), evaluation(8, loss)]
        write_run(tmp_path / name, config, log[1 if name == "c" else 0 :])
    curve = tmp_path / "curve.jsonl"
    folders = [tmp_path / name for name in "abc"]
    assert runs("curve", *folders, f"--to={curve}").code == 0
    points = [json.loads(line) for line in curve.read_text().splitlines()]
    assert points == [  # c was not evaluated at step 0
        {"iter": 4, "loss": 14 / 3, "spread": 3.0},
        {"iter": 8, "loss": 7 / 3, "spread": 1.5},
    ]
    (row,) = rows_of(folders[0], f"--against={curve}")
    assert row["largest_distance"] == pytest.approx((1 - 7 / 3) / 1.5)
    assert row["largest_distance"] == row["last_distance"]
    (row,) = rows_of(folders[2], f"--against={curve}")
    assert row["largest_distance"] == pytest.approx((8 - 14 / 3) / 3)
    assert row["last_distance"] == pytest.approx((4 - 7 / 3) / 1.5)
    log = [evaluation(4, -1.0), evaluation(8, 7 / 3)]
    (row,) = rows_of(write_run(tmp_path / "d", config, log), f"--against={curve}")
    assert row["largest_distance"] == pytest.approx((-1 - 14 / 3) / 3) and not row["last_distance"]


def test_a_run_without_a_step_of_the_curve_is_refused(tmp_path, config):
    folder = write_run(tmp_path / "a", config, log_of(1.0))
    curve = tmp_path / "curve.jsonl"
    curve.write_text('{"iter": 5, "loss": 1.0, "spread": 0.1}\n')
    assert_refused(runs("table", folder, f"--against={curve}"), "a step of the curve")
    curve.write_text('{"iter": 8, "loss": 1.0, "spread": 0.0}\n')
    assert rows_of(folder, f"--against={curve}")[0]["last_distance"] == 0.0
    curve.write_text("{}\n")
    assert_refused(runs("table", folder, f"--against={curve}"), "line 1 is not iter")
    assert_refused(runs("curve", folder), "2 or more")


# -----------------------------------------------------------------------------
# match


@pytest.fixture
def pair(tmp_path):
    """Two config files: a looped model, and a plain one."""
    (tmp_path / "a.py").write_text("n_block = 2\nn_loop = 4\nmax_iters = 300\nbatch_size = 8\n")
    (tmp_path / "b.py").write_text("n_layer = 3\nmax_iters = 200\nlr_decay_iters = 200\n")
    return [str(tmp_path / "a.py"), str(tmp_path / "b.py")]


SHAPE = dict(n_embd=32, n_head=4, block_size=16, vocab_size=61)
OPTIONS = [f"--{name}={value}" for name, value in SHAPE.items()]


def flops(**options):
    return GPT(GPTConfig(**SHAPE, **options)).flops_per_token()


def test_match_finds_the_steps_that_spend_the_flops(pair):
    run = runs("match", *pair, *OPTIONS)
    steps = round(300 * 8 * flops(n_block=2, n_loop=4) / (12 * flops(n_layer=3)))
    assert run.code == 0, run.err
    assert f"at max_iters={steps}, " in run.out
    command = run.out.splitlines()[-1].split()
    assert f"--max_iters={steps}" in command and f"--lr_decay_iters={steps}" in command
    assert command[:3] == ["python", "train.py", pair[1]] and OPTIONS[0] in command


def test_match_counts_the_steps_that_loop_once(pair):
    run = runs("match", *pair[::-1], *OPTIONS, "--loop_start=0.5")
    per_step = (flops(n_block=2, n_loop=1) + flops(n_block=2, n_loop=4)) / 2
    steps = round(200 * 12 * flops(n_layer=3) / (8 * per_step))
    assert f"at max_iters={steps}, " in run.out, run.err


@pytest.mark.slow
def test_match_finds_the_layers_that_spend_the_flops(pair):
    run = runs("match", *pair, *OPTIONS, "--by=n_layer")
    target = 300 * 8 * flops(n_block=2, n_loop=4) / (200 * 12)
    nearest = min(range(1, 40), key=lambda n: abs(flops(n_layer=n) - target))
    assert f"at n_layer={nearest}, " in run.out, run.err


def test_match_refuses_what_it_cannot_count(pair):
    assert_refused(runs("match", *pair[::-1], *OPTIONS, "--by=n_layer"), "by='n_layer'")
    warmed = runs("match", *pair, *OPTIONS, "--loop_warmup_iters=5")
    assert_refused(warmed, "loop_warmup_iters=5: must be 0")
    leveled = runs("match", *pair, *OPTIONS, "--loops_of_level=1,0")
    assert_refused(leveled, "loops_of_level=(1, 0): must be ()")
    assert_refused(runs("match", pair[0]), "two config files, not 1")
    assert_refused(runs("match", *pair, "--n_embd=32", "--n_embd=64"), "n_embd='32, 64'")
    assert_refused(runs("match", *pair, *OPTIONS, "--by=n_embd"), "max_iters, n_layer")


# -----------------------------------------------------------------------------
# commands


@pytest.mark.parametrize("arguments", [[], ["-h"], ["sweep", "-h"]])
def test_help_lists_commands_and_options(arguments):
    run = runs(*arguments)
    assert run.code == 0
    assert "python runs.py sweep" in run.out and "--jobs=1" in run.out and "--n_loop=1" in run.out


def test_wrong_words_are_refused_in_one_line():
    assert_refused(runs("tabel"), "did you mean table?")
    assert_refused(runs("sweep", "--sed=1"), "did you mean 'seed'?")
    assert_refused(runs("table", "out", "--jobs=2"), "--jobs: table takes only")
    assert_refused(runs("table", "out", "--seed=2"), "--seed: table takes only")
    assert_refused(runs("match", "a.py", "b.py", "--start=x"), "--start: match takes only by")
    assert_refused(runs("sweep", "--jobs=0"), "jobs=0: must be at least 1")
    assert_refused(
        runs("sweep", "--out_dir=a", "--out_dir=b"), "out_dir='a, b': must be given once"
    )
    assert_refused(runs("sweep", "--eval_only"), "eval_only=True")
    same = runs("compare", "config/quickstart.py", "config/quickstart.py")
    assert_refused(same, "two folders")


# -----------------------------------------------------------------------------
# sweep, in this process


@pytest.fixture
def in_this_process(monkeypatch):
    """Let runs.py start train.py in this process; return the list of what it started."""
    started, real = [], subprocess.Popen

    class Ended:
        def __init__(self, code):
            self.code = code

        def poll(self):
            return self.code

    def popen(command, **options):
        if "train.py" not in str(command):
            return real(command, **options)
        started.append(command[2:])
        run = Run("train.py", *command[2:])
        options["stdout"].write((run.out + run.err).encode())
        return Ended(run.code)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return started


def training(corpus, *arguments):
    """Return the options of a tiny model without those that arguments have too, and arguments."""
    given = {run_table.option_name(argument) for argument in arguments}
    words = [*TRAIN, "--max_iters=2", f"--dataset={corpus}"]
    words.remove("--max_iters=8")
    return [*(word for word in words if run_table.option_name(word) not in given), *arguments]


def sweep(corpus, out_dir, *arguments):
    words = training(corpus, f"--out_dir={out_dir}", *arguments)
    return runs("sweep", *words, "--format=json")


def states_of(run):
    """Return what a sweep printed before its table, without the folders."""
    return re.findall(": (started|finished|failed|waiting.*)$", run.out, re.M)


def table_of(run):
    return json.loads(run.out[run.out.index("[\n") :])


@pytest.mark.slow
def test_a_sweep_trains_the_grid_and_leaves_finished_runs_alone(corpus, tmp_path, in_this_process):
    grid = ("--seed=1", "--seed=2", "--n_embd=8", "--n_embd=16")
    run = sweep(corpus, tmp_path, *grid)
    assert run.code == 0, run.err
    names = [f"seed={seed}+n_embd={n}" for seed in (1, 2) for n in (8, 16)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert states_of(run) == ["started", "finished"] * 4
    *rows, first_mean, _, second_mean, _ = table_of(run)
    assert [row["run"] for row in rows] == [str(tmp_path / name) for name in names]
    for row in rows:
        assert row["loss"] == val_losses(Path(row["run"]))[2]
    assert (first_mean["n_embd"], second_mean["n_embd"]) == ("8", "16")
    assert "parameters" in (tmp_path / names[0] / "train.txt").read_text()
    again = sweep(corpus, tmp_path, *grid)
    assert len(in_this_process) == 4 and states_of(again) == []
    assert json.loads(again.out) == table_of(run)


def test_a_run_of_a_sweep_is_that_of_train(corpus, tmp_path, in_this_process):
    assert sweep(corpus, tmp_path / "a", "--dropout=0.1").code == 0
    assert train(corpus, tmp_path / "b", "--dropout=0.1", "--max_iters=2").code == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert val_losses(tmp_path / "a") == val_losses(tmp_path / "b")


def test_a_failed_run_is_named_with_its_error_and_the_others_go_on(
    corpus, tmp_path, in_this_process
):
    run = sweep(corpus, tmp_path, "--n_head=5", "--n_head=8")
    assert run.code == 1
    assert states_of(run) == ["started", "failed", "started", "finished"]
    assert run.err.count("\n") == 1
    assert run.err.startswith(f"{tmp_path}/n_head=5: exit code 2: train.py: n_embd=32")
    assert [row["run"] for row in table_of(run)] == [str(tmp_path / "n_head=8")]


@pytest.mark.slow
def test_a_folder_with_a_run_of_other_options_is_refused(corpus, tmp_path, in_this_process):
    assert sweep(corpus, tmp_path).code == 0
    assert sweep(corpus, tmp_path, "--log_interval=2", "--keep_last=3").code == 0
    run = sweep(corpus, tmp_path, "--dropout=0.5", "--max_iters=3")
    assert_refused(run, "a run with other values of dropout, max_iters; choose another --out_dir")
    assert len(in_this_process) == 1


@pytest.mark.slow
def test_a_run_begun_with_other_weights_goes_on_with_its_own(corpus, tmp_path, in_this_process):
    source, out = tmp_path / "source", tmp_path / "out"
    assert train(corpus, source, "--max_iters=2").code == 0
    assert sweep(corpus, out, f"--init_from={source}").code == 0
    (out / "log.jsonl").unlink()  # so it is not finished
    sweep(corpus, out, f"--init_from={source}")
    assert [words[-1] for words in in_this_process] == [f"--init_from={source}", "--init_from=auto"]


WORSENING = ("--eval_interval=1", "--learning_rate=0.2", "--warmup_iters=0", "--seed=3")


def test_a_run_whose_last_checkpoint_is_not_whole_goes_on(corpus, tmp_path, in_this_process):
    assert sweep(corpus, tmp_path, *WORSENING).code == 0
    newest = tmp_path / "ckpt.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    sweep(corpus, tmp_path, *WORSENING)
    assert len(in_this_process) == 2


@pytest.mark.slow
def test_a_run_that_saves_its_best_alone_is_finished_without_a_last_checkpoint(
    corpus, tmp_path, in_this_process
):
    words = (*WORSENING, "--always_save_checkpoint=False")
    assert sweep(corpus, tmp_path, *words).code == 0
    curve = val_losses(tmp_path)
    assert curve[2] > curve[1] < curve[0]
    sweep(corpus, tmp_path, *words)
    assert len(in_this_process) == 1


# -----------------------------------------------------------------------------
# processes


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A program whose scripts are forked, since a start takes longer than what they do here."""
    with forked_python(tmp_path_factory.mktemp("bin") / "python") as program:
        yield program


@pytest.fixture
def start(python):
    """Return a function that starts runs.py, whose runs are processes of their own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return lambda *words: subprocess.Popen([python, ROOT / "runs.py", *words], **pipes)


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def trainer_of(folder):
    """Return the process number of the run that is at work in a folder."""
    return int((folder / "lock").read_text().split()[1])


LONG = ("--max_iters=200", "--eval_interval=20", "--seed=1", "--seed=2")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The losses of the two runs of LONG without a sweep."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    for seed in (1, 2):
        words = (*LONG[:2], f"--seed={seed}")
        assert train(corpus, folder / f"{seed}", *words).code == 0
        found[seed] = losses(folder / f"{seed}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL", "all SIGKILL"])
def test_a_sweep_that_is_killed_goes_on_and_ends_as_undisturbed(
    start, corpus, tmp_path, undisturbed, how
):
    words = ["sweep", *training(corpus, f"--out_dir={tmp_path}", *LONG), "--format=json"]
    first = tmp_path / "seed=1"
    process = start(*words)
    wait_for((first / "ckpt.pt").exists, process)
    trainer = trainer_of(first)
    number = getattr(signal, how.split()[-1])
    process.send_signal(number)
    if how.startswith("all"):
        os.kill(trainer, number)
    _, err = process.communicate(timeout=60)
    assert not (tmp_path / "seed=2").exists()
    if how == "SIGINT":
        assert process.returncode == 128 + number and "the same command goes on" in err
        assert f"SIGINT: {first} holds the run" in (first / "train.txt").read_text()
        assert max(losses(first)) < 199
    process = start(*words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert ": waiting for the run" not in out or how == "SIGKILL"
    for seed in (1, 2):
        assert losses(tmp_path / f"seed={seed}") == undisturbed[seed]
    assert [row["state"] for row in json.loads(out[out.index("[\n") :])[:2]] == ["finished"] * 2


@pytest.mark.slow
def test_runs_go_on_at_a_time_and_a_signal_ends_them_all(start, corpus, tmp_path):
    words = training(corpus, f"--out_dir={tmp_path}", "--max_iters=100000", *LONG[1:])
    process = start("sweep", *words, "--jobs=2", "--threads=1")
    folders = [tmp_path / "seed=1", tmp_path / "seed=2"]
    wait_for(lambda: all((folder / "ckpt.pt").exists() for folder in folders), process)
    trainers = [trainer_of(folder) for folder in folders]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    for trainer, folder in zip(trainers, folders):
        assert "SIGTERM" in (folder / "train.txt").read_text()
        with pytest.raises(ProcessLookupError):
            os.kill(trainer, 0)


@pytest.mark.slow
def test_compare_trains_two_configs_and_prints_them_side_by_side(
    corpus, tmp_path, python, monkeypatch
):
    monkeypatch.setattr(sys, "executable", str(python))
    (tmp_path / "mha.py").write_text('attention = "mha"\n')
    (tmp_path / "mla.py").write_text('attention = "mla"\nn_latent = 8\nposition = "rope"\n')
    configs = [str(tmp_path / "mha.py"), str(tmp_path / "mla.py")]
    words = training(corpus, f"--out_dir={tmp_path / 'out'}")
    run = runs("compare", *configs, *words, "--start=Ka", "--max_new_tokens=20")
    assert run.code == 0, run.err
    lines = {}
    for line in run.out.splitlines():
        if line.startswith("|"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            lines[name] = cells
    assert lines["attention"] == ["mha", "mla"]
    # three blocks, one of them twice: keys and values of 32, or a latent of 8 and a rotary part
    assert lines["cache bytes per token"][0] == f"{4 * 2 * 32 * 4:,}"
    assert int(lines["cache bytes per token"][1].replace(",", "")) < 4 * 2 * 32 * 4
    for name, cells in zip(("mha", "mla"), zip(*lines.values())):
        folder = tmp_path / "out" / name
        assert str(folder) in cells
        assert lines["loss"][name == "mla"] == f"{val_losses(folder)[2]:.4f}"
    samples = run.out.split(f"{tmp_path}/out/")[-2:]
    assert all("\nKa" in text for text in samples)
    again = runs("compare", *configs, *words, "--start=Ka", "--max_new_tokens=20")
    assert again.out == run.out[run.out.index("| ") :]
