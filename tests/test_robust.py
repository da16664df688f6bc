"""Short forms of torture.py: what a run survives, and what it refuses; and the pieces of checkpoint.py behind it."""

import json
import os
import signal

import pytest
import torch
import torture
from conftest import build, train

from nanorecur import checkpoint

SHORT = {
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return torture.Place(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize("name", SHORT)
def test_a_row_of_the_torture(place, name):
    torture.random.seed(name)
    wrong = list(torture.ROWS[name][1](place, SHORT[name]))
    assert wrong and not any(wrong), [text for text in wrong if text]


def test_a_run_grows_neither_in_memory_nor_in_files(place):
    assert list(torture.long_run(place, 1, steps=300)) == [""]


def test_what_is_known_of_the_gradients_goes_on_with_the_run(place):
    """A first step that is skipped leaves the average to begin at the second, and the median of a spike is not begun anew."""
    options = (
        "--ema_decay=0.999",
        "--max_iters=120",
        "--eval_iters=1",
        "--eval_interval=200",
        "--spike_factor=50",
        "--save_interval=0",
    )
    runs = {}
    for stops in ((120,), (1, 110, 120)):
        out, printed = place.new()
        for first, stop in zip((0, *stops), stops):
            poison = (
                (torture.poison, "nan", 0, 1)
                if first == 0
                else (torture.poison, "spike", 2 * (115 - first), 2 * (115 - first) + 1)
            )
            prepare = (spoil, *poison[1:3]) if len(stops) == 1 else poison
            call = place.call(out, *options, f"--max_iters={stop}", "--lr_decay_iters=120")
            assert torture.end([torture.start(printed, *call, prepare=prepare)]) == [0], (
                torture.tail(printed)
            )
        assert [entry["iter"] for entry in torture.log(out) if "skipped" in entry] == [0, 115]
        runs[stops] = out
    steps = [[entry for entry in torture.log(out) if "loss" in entry] for out in runs.values()]
    assert torture.difference(*steps) == ""
    assert torture.difference(*(checkpoint.load(out)["model"] for out in runs.values())) == ""


def spoil(how, call):
    """Both of the above in one process: steps 0 and 115 of two micro-steps."""
    torture.poison("nan", 0, 1)
    torture.poison("spike", 230, 231)


def state(n, **parts):
    model = build(seed=n)
    return {
        "model": model.state_dict(),
        "model_args": vars(model.config),
        "iter_num": n,
        "format": 1,
        **parts,
    }


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path, capsys):
    for n in range(1, 7):
        checkpoint.save(tmp_path, state(n), keep_last=4)
    names = ["ckpt.pt", "ckpt_prev.pt", "ckpt_prev2.pt", "ckpt_prev3.pt"]
    assert [checkpoint.load(tmp_path / name)["iter_num"] for name in names] == [6, 5, 4, 3]
    for name in names[:3]:
        (tmp_path / name).write_bytes(b"torn")
    assert (
        checkpoint.load(tmp_path)["iter_num"] == 3
        and capsys.readouterr().err.count("going back") == 3
    )
    checkpoint.save(tmp_path, state(7))
    assert sorted(os.listdir(tmp_path)) == ["ckpt.json", "ckpt.pt", "ckpt_prev.pt"]


@pytest.mark.parametrize("part", ["model", "training_model"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, part):
    checkpoint.save(tmp_path, state(1))
    wrong = {name: tensor.clone() for name, tensor in state(2)["model"].items()}
    wrong["transformer.ln_f.weight"][3] = float("inf")
    with pytest.raises(ValueError, match="transformer.ln_f.weight holds NaN or Inf"):
        checkpoint.save(tmp_path, state(2, **{part: wrong}))
    assert checkpoint.load(tmp_path)["iter_num"] == 1


def test_a_checkpoint_without_its_list_is_named(tmp_path, capsys):
    checkpoint.save(tmp_path, state(1))
    (tmp_path / "ckpt.json").unlink()
    assert (
        checkpoint.load(tmp_path)["iter_num"] == 1
        and "ckpt.json: missing or damaged" in capsys.readouterr().err
    )


def test_nothing_is_written_through_links(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "out").mkdir()
    for name in ("ckpt.pt.part", "ckpt.json.part", "log.jsonl", "lock"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    checkpoint.save(tmp_path / "out", state(1))
    checkpoint.cut_log(tmp_path / "out" / "log.jsonl", 3)
    with pytest.raises(OSError):
        checkpoint.lock(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "x"


def test_a_torn_line_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"iter": i}) + "\n" for i in range(5)) + '{"iter": 2, "los')
    checkpoint.cut_log(path, 3)
    assert path.read_text() == '{"iter": 0}\n{"iter": 1}\n{"iter": 2}\n'


def test_a_save_that_died_before_its_last_step_wastes_no_place(tmp_path):
    for n in range(1, 4):
        checkpoint.save(tmp_path, state(n), keep_last=3)
    (tmp_path / "ckpt_prev.pt").unlink()
    os.link(
        tmp_path / "ckpt.pt", tmp_path / "ckpt_prev.pt"
    )  # 3, 3, 1: it died before the new one got its name
    checkpoint.save(tmp_path, state(4), keep_last=3)
    assert [
        checkpoint.load(tmp_path / name)["iter_num"]
        for name in ("ckpt.pt", "ckpt_prev.pt", "ckpt_prev2.pt")
    ] == [4, 3, 1]


def test_a_second_interrupt_ends_a_process_at_once():
    before = (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGUSR1),
    )
    try:
        asked = checkpoint.listen()
        signal.raise_signal(signal.SIGINT)
        assert asked == {signal.SIGINT} and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # schedulers and torchrun both send it
        assert asked == {signal.SIGINT, signal.SIGTERM}
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), before):
            signal.signal(number, handler)


def test_where_only_the_best_is_kept_other_saves_leave_it_alone(corpus, tmp_path):
    ruin = (
        "--always_save_checkpoint=False",
        "--decay_lr=False",
        "--learning_rate=3",
        "--grad_clip=0",
        "--save_interval=1",
    )
    train(corpus, tmp_path / "out", *ruin, "--eval_interval=2")
    evaluations = {
        e["iter"]: e["eval"][1]["loss"] for e in torture.log(tmp_path / "out") if "eval" in e
    }
    best = min(evaluations, key=evaluations.get)
    assert (
        checkpoint.load(tmp_path / "out")["iter_num"] if checkpoint.exists(tmp_path / "out") else 0
    ) == best


def test_tensors_larger_than_their_data_are_refused(tmp_path):
    torch.save(state(1, optimizer={"x": torch.zeros(1).expand(10**6, 10**6)}), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="optimizer.x is larger than its data"):
        checkpoint.load(tmp_path / "a.pt")
