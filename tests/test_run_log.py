"""The log of a run: the terminal, log.jsonl, Weights & Biases, TensorBoard."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanorecur.run_log import RunLog, check_tensorboard, check_wandb


def run_log(folder, iter_num=0, is_first=True, writes=True, **options):
    config = dict(out_dir=str(folder), wandb_log=False, tensorboard=False, max_iters=10)
    return RunLog({**config, **options}, iter_num, is_first, writes)


def lines(folder):
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_entry_is_a_line_of_json_and_its_text_is_printed(tmp_path, capsys):
    log = run_log(tmp_path)
    for number in range(2):
        log.write({"iter": number, "loss": 0.5}, f"iter {number}")
        log.step_done()
    log.close(finished=False)
    assert lines(tmp_path) == [{"iter": 0, "loss": 0.5}, {"iter": 1, "loss": 0.5}]
    assert capsys.readouterr().out == "iter 0\niter 1\n"


def test_a_run_that_goes_on_cuts_what_it_will_write_again(tmp_path):
    log = run_log(tmp_path)
    for number in range(5):
        log.write({"iter": number}, "")
    run_log(tmp_path, iter_num=3).write({"iter": 3, "again": True}, "")
    assert lines(tmp_path) == [{"iter": 0}, {"iter": 1}, {"iter": 2}, {"iter": 3, "again": True}]


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    log = run_log(tmp_path, is_first=False)
    log.write({"iter": 0}, "text")
    log.print("text")
    assert lines(tmp_path) == []
    assert capsys.readouterr().out == ""


def test_what_only_looks_prints_and_writes_nothing(tmp_path, capsys):
    run_log(tmp_path, writes=False).write({"iter": 0}, "text")
    assert lines(tmp_path) == []
    assert capsys.readouterr().out == "text\n"


def test_on_a_terminal_text_is_written_above_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = run_log(tmp_path, iter_num=3)
    assert (log.bar.n, log.bar.total) == (3, 10)
    log.print("text")
    log.step_done()
    assert log.bar.n == 4
    log.close(finished=False)
    assert "text\n" in capsys.readouterr().out


@pytest.mark.parametrize("name, as_typed", [("out", "out"), ("out a b", "'out a b'")])
def test_a_finished_run_says_what_comes_next(name, as_typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    run_log(name).close(finished=True)
    out = capsys.readouterr().out
    assert [line.strip() for line in out.splitlines()[1:]] == [
        f"python sample.py {as_typed}",
        f"python analyze.py {as_typed}",
    ]
    run_log(name).close(finished=True, is_task=True)
    out = capsys.readouterr().out
    assert f"python analyze.py {as_typed}" in out and "sample.py" not in out
    run_log(name).close(finished=False)
    run_log(name, writes=False).close(finished=True)
    assert capsys.readouterr().out == ""


def test_ten_seconds_of_silence_are_broken_then_twenty(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = run_log(tmp_path)
    for now in range(0, 80):
        log.alive(f"at {now}")
    assert capsys.readouterr().out == "at 11\nat 32\nat 73\n"


# -----------------------------------------------------------------------------
# Weights & Biases, without it

ROW = {
    "split": "val",
    "loops": (4,),
    "shift": 1,
    "loss": 2.0,
    "bits_per_byte": 1.5,
    "accuracy": 0.5,
}
EVALUATION = {
    "iter": 8,
    "eval": [
        {**ROW, "split": "train", "loss": 1.9},
        ROW,
        {**ROW, "loops": (8,), "loss": 1.8},
        {**ROW, "shift": 3, "loss": 3.0},
    ],
    "objective": {"loss with exit": 2.1},
    "watch": {
        "groups": [{"norm": [1], "change": [0.5, 0.1], "token_correlation": 0.3}],
        "gain": 0.2,
    },
}
STEP = {"iter": 7, "loss": 2.5, "lr": 0.1, "ms": 1.0, "mfu": None, "loops": 4.0, "tokens": 9}


class FakeWandb(SimpleNamespace):
    """What is used of wandb; keeps what it is told."""

    def __init__(self, logged_in=True):
        super().__init__(logged=[], begun=[], metrics=[])
        self.login = lambda prompt: logged_in
        self.init = lambda **options: self.begun.append(options)
        self.define_metric = lambda *names, **options: self.metrics.append((names, options))
        self.log = self.logged.append
        self.finish = lambda: None


def wandb_log(monkeypatch, folder, **options):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    wanted = dict(wandb_log=True, wandb_mode="online", wandb_project="p", wandb_run_name="")
    shape = dict(n_prelude=1, n_block=2, n_loop=4, n_coda=1, use_model_baseline=False)
    return run_log(folder, **wanted, **shape, **options), fake


def test_wandb_gets_numbers_with_names(tmp_path, monkeypatch):
    log, fake = wandb_log(monkeypatch, tmp_path)
    log.write(STEP, "")
    log.write(EVALUATION, "")
    step, evaluation = fake.logged
    assert step == {
        "iter": 7, "train/loss": 2.5, "lr": 0.1, "ms": 1.0, "loops": 4.0, "tokens": 9,
    }  # fmt: skip
    assert all(isinstance(value, (int, float)) for value in evaluation.values())
    want = {
        "iter": 8,
        "train/eval_loss": 1.9,
        "val/loss": 2.0,
        "val/loss@8": 1.8,
        "val/loss+3": 3.0,
        "val/bits_per_byte": 1.5,
        "val/accuracy": 0.5,
        "val/loss_with_exit": 2.1,
        "watch/gain": 0.2,
        "watch/token_correlation": 0.3,
        "watch/last_change": 0.1,
    }
    assert evaluation.items() >= want.items()


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    begun = []
    for iter_num in (0, 5):
        log, fake = wandb_log(monkeypatch, tmp_path, iter_num=iter_num)
        begun += fake.begun
        log.close(finished=False)
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["name"] == f"{tmp_path.name} 1+2x4+1"
    assert (("*",), {"step_metric": "iter"}) in fake.metrics


def test_without_a_login_wandb_is_refused_in_words(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(logged_in=False))
    config = dict(wandb_log=True, wandb_mode="online")
    with pytest.raises(ValueError, match="wandb login, or --wandb_mode=offline"):
        check_wandb(config)
    check_wandb({**config, "wandb_mode": "offline"})
    check_wandb({**config, "wandb_log": False})
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(logged_in=True))
    check_wandb(config)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    with pytest.raises(ValueError, match="wandb is not installed"):
        check_wandb(config)


# -----------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_gets_the_same_numbers_and_a_resumed_run_goes_on_in_its_folder(
    tmp_path, monkeypatch
):
    """A stand-in for the package keeps what it is told."""
    begun, told = [], []

    def writer(folder, purge_step):
        begun.append((folder, purge_step))

        def add_scalar(name, value, step):
            told.append((name, value, step))

        return SimpleNamespace(add_scalar=add_scalar, close=lambda: told.append("closed"))

    fake = SimpleNamespace(SummaryWriter=writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = run_log(tmp_path, tensorboard=True)
    log.write(STEP, "")
    log.write(EVALUATION, "")
    log.close(finished=False)
    assert ("train/loss", 2.5, 7) in told and ("val/loss@8", 1.8, 8) in told
    assert told[-1] == "closed"
    run_log(tmp_path, iter_num=5, tensorboard=True)
    folder = tmp_path / "tensorboard"
    assert begun == [(folder, 0), (folder, 5)]
    check_tensorboard({"tensorboard": True})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import fails
    check_tensorboard({"tensorboard": False})
    with pytest.raises(ValueError, match="pip install tensorboard"):
        check_tensorboard({"tensorboard": True})


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for iter_num in (0, 7):  # killed in step 7, it is done again
        log = run_log(tmp_path, iter_num=iter_num, tensorboard=True)
        log.write({**STEP, "loss": 2.5 - iter_num / 10}, "")
        log.write(EVALUATION, "")
        log.close(finished=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("train/loss")
    assert (point.step, round(point.value, 4)) == (7, 1.8)
    assert [point.step for point in events.Scalars("val/loss@8")] == [8]
