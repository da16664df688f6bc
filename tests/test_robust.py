"""Short forms of torture.py: what a run survives; and of checkpoint.py what protects its files."""

import json
import os
import signal

import pytest
import torch
import torture
from conftest import build
from forked import end, start, tail

from nanorecur import checkpoint

# -----------------------------------------------------------------------------
# rows of the torture

ROWS = {  # name: trials
    "killed": 1,
    "killed_two": 1,
    "damaged": 6,
    "full": 2,
    "signalled": 3,
    "signalled_two": 1,
    "interrupted": 1,
    "restarted": 1,
    "dead": 1,
    "layouts": 1,
    "poisoned": 2,
    "hostile": 40,
    "fuzzed": 40,
    "locked": 1,
}
FAST = {"damaged": 2, "locked": 1, "fuzzed": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return torture.Place(tmp_path_factory.mktemp("torture"))


@pytest.fixture(scope="module")
def another_place(tmp_path_factory):
    return torture.Place(tmp_path_factory.mktemp("torture"))


def assert_nothing_is_wrong(place, name, trials):
    torture.random.seed(name)
    wrong = list(torture.ROWS[name][1](place, trials))
    assert wrong
    assert not any(wrong), [text for text in wrong if text]


@pytest.mark.parametrize("name", FAST)
def test_a_few_trials_of_a_row(place, name):
    assert_nothing_is_wrong(place, name, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_row(another_place, name):
    assert_nothing_is_wrong(another_place, name, ROWS[name])


def test_every_row_has_a_short_form():
    assert set(ROWS) == set(torture.ROWS) - {"long"}


@pytest.mark.slow
def test_a_run_grows_neither_in_memory_nor_in_files(place):
    assert list(torture.long_run(place, 1, steps=300)) == [""]


def poison_twice():
    """Skip step 0 for NaN and step 115 for a spike, of two micro-steps each."""
    torture.poison("nan", 0, 1)
    torture.poison("spike", 230, 231)


@pytest.mark.slow
def test_what_is_known_of_the_gradients_goes_on_with_the_run(place):
    """The average begins at the first step that is made; the median survives a restart."""
    options = ("--ema_decay=0.999", "--spike_factor=50", "--max_iters=120", "--lr_decay_iters=120")
    options += ("--eval_iters=1", "--eval_interval=200", "--save_interval=0")

    def run(out, printed, stop, prepare):
        call = place.call(out, *options, f"--max_iters={stop}")
        assert end([start(printed, *call, prepare=prepare)]) == [0], tail(printed)

    undisturbed, printed = place.new()
    run(undisturbed, printed, 120, (poison_twice,))
    stopped, printed = place.new()
    run(stopped, printed, 1, (torture.poison, "nan", 0, 1))
    run(stopped, printed, 110, ())
    run(stopped, printed, 120, (torture.poison, "spike", 10, 11))  # counted from step 110
    for out in (undisturbed, stopped):
        assert [entry["iter"] for entry in torture.log(out) if "skipped" in entry] == [0, 115]
    steps = [
        [entry for entry in torture.log(out) if "loss" in entry] for out in (undisturbed, stopped)
    ]
    assert torture.difference(*steps) == ""
    weights = [checkpoint.load(out)["model"] for out in (undisturbed, stopped)]
    assert torture.difference(*weights) == ""


def test_difference_finds_a_bit():
    a = {"x": [torch.zeros(2), 1.0], "y": float("nan")}
    b = {"x": [torch.zeros(2), 1.0], "y": float("nan")}
    assert torture.difference(a, b) == ""
    b["x"][0][1] = 1e-30
    assert torture.difference(a, b) == ".x.0"
    assert torture.difference({"x": 1}, {"y": 1}, "log") == "log"
    assert torture.difference(torch.zeros(2), torch.zeros(2).double(), "w") == "w"


# -----------------------------------------------------------------------------
# what protects the files of a run


def state(number, **parts):
    """Return a checkpoint of step number."""
    model = build(seed=number)
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config), "format": 1}
    return {**ckpt, "iter_num": number, **parts}


def steps_of(folder, names):
    return [checkpoint.load(folder / name)["iter_num"] for name in names]


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path, capsys):
    for number in range(1, 7):
        checkpoint.save(tmp_path, state(number), keep_last=4)
    names = ["ckpt.pt", "ckpt_prev.pt", "ckpt_prev2.pt", "ckpt_prev3.pt"]
    assert steps_of(tmp_path, names) == [6, 5, 4, 3]
    for name in names[:3]:
        (tmp_path / name).write_bytes(b"torn")
    assert checkpoint.load(tmp_path)["iter_num"] == 3
    assert capsys.readouterr().err.count("going back") == 3
    checkpoint.save(tmp_path, state(7))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.json", "ckpt.pt", "ckpt_prev.pt"]


def test_a_save_that_died_before_its_last_rename_costs_no_older_checkpoint(tmp_path):
    for number in range(1, 4):
        checkpoint.save(tmp_path, state(number), keep_last=3)
    (tmp_path / "ckpt_prev.pt").unlink()
    os.link(tmp_path / "ckpt.pt", tmp_path / "ckpt_prev.pt")  # steps 3, 3, 1
    checkpoint.save(tmp_path, state(4), keep_last=3)
    assert steps_of(tmp_path, ["ckpt.pt", "ckpt_prev.pt", "ckpt_prev2.pt"]) == [4, 3, 1]


@pytest.mark.parametrize("part", ["model", "training_model"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, part):
    checkpoint.save(tmp_path, state(1))
    wrong = {name: tensor.clone() for name, tensor in state(2)["model"].items()}
    wrong["transformer.ln_f.weight"][3] = float("inf")
    with pytest.raises(ValueError, match="transformer.ln_f.weight holds NaN or Inf"):
        checkpoint.save(tmp_path, state(2, **{part: wrong}))
    assert checkpoint.load(tmp_path)["iter_num"] == 1


def test_a_checkpoint_without_its_manifest_is_named(tmp_path, capsys):
    checkpoint.save(tmp_path, state(1))
    (tmp_path / "ckpt.json").unlink()
    assert checkpoint.load(tmp_path)["iter_num"] == 1
    assert "ckpt.json: missing or damaged" in capsys.readouterr().err


def test_nothing_is_written_through_links(tmp_path):
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("x")
    out.mkdir()
    for name in ("ckpt.pt.part", "ckpt.json.part", "log.jsonl", "lock"):
        (out / name).symlink_to(precious)
    checkpoint.save(out, state(1))
    checkpoint.cut_log(out / "log.jsonl", 3)
    with pytest.raises(OSError):
        checkpoint.lock(out)
    assert precious.read_text() == "x"


def test_a_torn_line_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"iter": i}) + "\n" for i in range(5)) + '{"iter": 2, "los')
    checkpoint.cut_log(path, 3)
    assert path.read_text() == '{"iter": 0}\n{"iter": 1}\n{"iter": 2}\n'


def test_a_second_interrupt_ends_a_process_at_once():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        asked = checkpoint.listen()
        signal.raise_signal(signal.SIGINT)
        assert asked == {signal.SIGINT}
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # schedulers and torchrun both send it
        assert asked == {signal.SIGINT, signal.SIGTERM}
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def test_tensors_larger_than_their_data_are_refused(tmp_path):
    large = torch.zeros(1).expand(10**6, 10**6)
    torch.save(state(1, optimizer={"x": large}), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="optimizer.x is larger than its data"):
        checkpoint.load(tmp_path / "a.pt")
