"""Evaluations of a run, against losses computed from its checkpoint over the same windows."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build, evaluated, log, slow, split_of, train
from torch.testing import assert_close

import pretrained
from nanorecur import evaluation
from nanorecur.dataset import load_meta
from nanorecur.evaluation import Evaluation
from nanorecur.exit_rules import exit_evaluation, make_exit
from nanorecur.objectives import Objective
from nanorecur.parallel import Processes


def last_rows(folder):
    """Return the table of a run's last evaluation."""
    return log(folder)[-1]["eval"]


# -----------------------------------------------------------------------------
# the table


def test_the_table_has_the_models_own_loops_and_those_asked_for(plain_run):
    folder, run = plain_run
    rows = [(row["split"], row["loops"], row["shift"]) for row in last_rows(folder)]
    assert rows == [("train", [2], 1), ("val", [2], 1), ("val", [1], 1), ("val", [4], 1)]
    assert len(re.findall(r"^val +\*?\d+ ", run.out, re.M)) == 3 * 3  # evaluations times depths


def test_the_table_is_what_the_model_gives(plain_run, corpus):
    folder, _ = plain_run
    model, meta = pretrained.load(folder), load_meta(corpus)
    for row in last_rows(folder):
        x, y = evaluated(corpus, row["split"])
        with torch.no_grad():
            logits = model(x, y, n_loop=row["loops"])[0]
        nats = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        assert row["loss"] == pytest.approx(nats, rel=1e-5)
        assert row["accuracy"] == pytest.approx((logits.argmax(-1) == y).float().mean().item())
        bits = nats / math.log(2)
        assert row["bits_per_token"] == pytest.approx(bits, rel=1e-5)
        sizes = meta["splits"][row["split"]]
        per_byte = bits * sizes["tokens"] / sizes["bytes"]
        assert row["bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)


def test_the_printed_table():
    scores = dict(loss=1.5, bits_per_token=2.25, bits_per_byte=2.125, accuracy=0.5, shift=1)
    rows = [dict(split="train", loops=(4, 2), **scores), dict(split="val", loops=(1, 1), **scores)]
    head, first, second = evaluation.table(rows).splitlines()
    assert head.split() == ["split", "loops", "loss", "bits/token", "bits/byte", "accuracy"]
    assert first.split() == ["train", "*4,2", "1.5000", "2.2500", "2.1250", "50.00%"]
    assert second.split() == ["val", "1,1", "1.5000", "2.2500", "2.1250", "50.00%"]
    assert len(head) == len(first) == len(second)


def test_eval_only_prints_the_table_and_writes_nothing(plain_run, corpus):
    folder, run = plain_run
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = train(corpus, folder, "--init_from=resume", "--eval_only", "--eval_loops=1,2,4")
    assert again.code == 0, again.err
    printed, as_json = again.out.rstrip().rsplit("\n", 1)
    assert printed.rstrip().split("\n\n")[-1] in run.out
    assert json.loads(as_json) == last_rows(folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_the_baseline_is_evaluated_without_loops(corpus, tmp_path):
    run = train(corpus, tmp_path / "out", "--use_model_baseline", "--eval_loops=1,4")
    assert run.code == 0, run.err
    assert [row["loops"] for row in last_rows(tmp_path / "out")] == [[], []]


@pytest.mark.slow
def test_sliding_evaluation_scores_each_token_once_with_most_of_a_window_before_it(
    plain_run, corpus
):
    """Windows of 16 that move on by 8: of each the tokens that no window before it scored."""
    folder, _ = plain_run
    run = train(corpus, folder, "--init_from=resume", "--eval_only", "--eval_stride=8")
    row = json.loads(run.out.splitlines()[-1])[1]
    model = pretrained.load(folder)
    tokens = torch.from_numpy(split_of(corpus).tokens.astype(np.int64))
    last = len(tokens) - 1 - 16
    starts = [*range(0, last, 8), last]
    windows = torch.stack([tokens[start : start + 17] for start in starts])
    with torch.no_grad():
        logits = model(windows[:, :-1], windows[:, 1:])[0]
    nats = F.cross_entropy(logits.mT, windows[:, 1:], reduction="none")
    total, seen = 0.0, 0
    for start, of_window in zip(starts, nats):
        n_new = start + 16 - seen
        total += of_window[-n_new:].sum().item()
        seen += n_new
    assert seen == len(tokens) - 1
    assert row["loss"] == pytest.approx(total / seen, rel=1e-5)


# -----------------------------------------------------------------------------
# tasks, shifts, exits


def task_scores(model, rows, n_loop, levels):
    """Return the scores of rows (R, 7) of a task, by level: prompts of 5 tokens, answers of 2."""
    with torch.no_grad():
        logits = model(rows[:, :-1], rows[:, 1:], n_loop=n_loop)[0][:, 4:]
    answers = rows[:, 5:]
    right = logits.argmax(-1) == answers
    exact = right.all(1).float()
    parts = zip(levels, exact.split(list(levels.values())))
    return {
        "loss": F.cross_entropy(logits.flatten(0, 1), answers.flatten()).item(),
        "accuracy": right.float().mean().item(),
        "exact": exact.mean().item(),
        "by_level": {str(level): part.mean().item() for level, part in parts},
    }


def test_a_task_is_scored_on_its_answers_and_by_level(task, tmp_path):
    options = ("--block_size=6", "--eval_loops=1", "--eval_iters=25")
    options += ("--max_iters=60", "--eval_interval=60", "--lr_decay_iters=60")
    run = train(task, tmp_path / "out", *options)
    assert run.code == 0, run.err
    rows = last_rows(tmp_path / "out")
    assert [(row["split"], row["loops"]) for row in rows] == [
        ("train", [2]),
        ("val", [2]),
        ("val", [1]),
        ("hard", [2]),
        ("hard", [1]),
    ]
    meta, model = load_meta(task), pretrained.load(tmp_path / "out")
    for row in rows:
        data = np.fromfile(task / f"{row['split']}.bin", "<u2").astype(np.int64)
        levels = dict(meta["row"]["levels"][row["split"]])
        want = task_scores(model, torch.from_numpy(data).view(-1, 7), row["loops"], levels)
        assert row["by_level"] == pytest.approx(want.pop("by_level"))
        assert {name: row[name] for name in want} == pytest.approx(want, rel=1e-5)
    assert re.search(r"exact  exact by level\ntrain .* 1:\d+% 2:\d+%\n", run.out)


def test_each_shift_is_evaluated(corpus, tmp_path):
    run = train(corpus, tmp_path / "out", "--predict_ahead", "--max_shift=3", "--max_iters=4")
    assert run.code == 0, run.err
    assert "tokens ahead" in run.out
    rows = last_rows(tmp_path / "out")
    shifts = [(row["split"], row["shift"]) for row in rows]
    assert shifts == [("train", 1), ("val", 1), ("val", 2), ("val", 3)]
    model = pretrained.load(tmp_path / "out")
    for row in rows:
        x, y = evaluated(corpus, row["split"])
        with torch.no_grad():
            loss = model(x, y, shift=row["shift"])[1].item()
        assert row["loss"] == pytest.approx(loss, rel=1e-5)


EXITS = [slow("state", 0.0), slow("state", 0.5), ("gate", 0.6)]


@pytest.mark.parametrize("rule, threshold", EXITS)
def test_evaluation_with_exit(corpus, tmp_path, rule, threshold):
    """Threshold 0 is the evaluation without; else it is exit_evaluation over the same windows."""
    exits = ("--automatic_loop_exit", f"--exit_rule={rule}")
    exits += (f"--automatic_loop_exit_threshold={threshold}",)
    options = ("--exit_gate=state", "--objective=exit", "--n_loop=4")
    run = train(corpus, tmp_path / "out", *options, *exits)
    assert run.code == 0, run.err
    assert "loops with exit" in run.out
    details = log(tmp_path / "out")[-1]["objective"]
    loss, loops = details["loss with exit"], details["loops with exit"]
    if threshold == 0:
        assert loops == 4
        assert loss == pytest.approx(last_rows(tmp_path / "out")[1]["loss"], rel=1e-5)
        return
    model = pretrained.load(tmp_path / "out")
    want = exit_evaluation(model, *evaluated(corpus), make_exit(model, rule, threshold))
    assert (loss, loops) == pytest.approx(want, rel=1e-5)
    assert 1 < loops < 4


# -----------------------------------------------------------------------------
# the class, on its own


def evaluation_of(corpus, processes=None, interrupted=False, **options):
    """Return an Evaluation of a fresh tiny model on a corpus."""
    config = dict(eval_iters=5, batch_size=4, eval_stride=0, objective="next", loops_of_level=())
    config |= dict(level_warmup_iters=0, automatic_loop_exit=False, **options)
    model = build(vocab_size=100, spread=0.1)
    return Evaluation(
        Objective(model),
        {name: split_of(corpus, name) for name in ("train", "val")},
        processes or Processes(),
        torch.device("cpu"),
        torch.float32,
        config,
        interrupted=lambda: interrupted,
    )


def processes_of(rank, world_size):
    """Return processes that believe to be one of several, without messages."""
    processes = Processes()
    processes.rank, processes.world_size = rank, world_size
    return processes


@pytest.mark.parametrize("options", [{}, dict(eval_stride=5), dict(eval_iters=10**6)], ids=str)
def test_processes_share_the_windows_and_none_is_scored_twice(corpus, options):
    """Each runs equally many batches; what pads the last ones has no targets."""
    alone = evaluation_of(corpus, **options)
    windows = alone.windows(alone.splits["val"])
    targets = dict(zip(*(part.tolist() for part in windows)))
    scored, lengths = {}, []
    for rank in range(3):
        part = evaluation_of(corpus, processes_of(rank, 3), **options)
        batches = list(part.batches(part.splits["val"]))
        lengths.append(len(batches))
        for starts, x, y in batches:
            assert x.shape == y.shape == (4, 16)
            for start, row in zip(starts.tolist(), y):
                n_targets = int((row >= 0).sum())
                if n_targets:
                    assert start not in scored
                    scored[start] = n_targets
    assert scored == targets
    assert len(set(lengths)) == 1


def test_an_interrupted_evaluation_returns_nothing(corpus):
    assert evaluation_of(corpus, interrupted=True).run(()) is None


def test_several_depths_are_one_pass_to_the_largest(corpus, monkeypatch):
    """The looped block runs as often as the largest depth asks, in each batch."""
    part, steps = evaluation_of(corpus), []
    loop = next(stage.loop for stage in part.model.schedule() if stage.looped)
    step = loop.step
    monkeypatch.setattr(loop, "step", lambda *given: steps.append(1) or step(*given))
    val, depths = part.splits["val"], [(4,), (1,), (2,), (4,)]
    together = part.score(val, depths)
    n_batches = len(list(part.batches(val)))
    assert len(steps) == 4 * n_batches
    assert together == [part.score(val, [depth])[0] for depth in depths]


def test_an_evaluation_leaves_the_model_in_training_mode(corpus):
    part = evaluation_of(corpus)
    part.run(())
    part.report_states()
    assert part.model.training
    assert part.objective.training


# -----------------------------------------------------------------------------
# health of the states


def test_the_report_on_the_states_is_what_the_model_gives(plain_run, corpus):
    folder, _ = plain_run
    report, model = log(folder)[-1]["watch"], pretrained.load(folder)
    x, y = evaluated(corpus, count=4)
    with torch.no_grad():
        gain = (model(x, y, n_loop=1)[1] - model(x, y)[1]).item()
    assert report["gain"] == pytest.approx(gain, abs=1e-5)
    first, last = model.loops_representation(x)[0]
    (group,) = report["groups"]
    norms = [s.norm(dim=-1).mean().item() for s in (first, last)]
    assert group["norm"] == pytest.approx(norms, rel=1e-5)
    change = (last - first).norm(dim=-1).mean().item() / norms[1]
    assert group["change"] == pytest.approx([change], rel=1e-5)
    correlation = evaluation.token_correlation(last).mean().item()
    assert group["token_correlation"] == pytest.approx(correlation, rel=1e-4)


def test_token_correlation_is_the_mean_cosine_of_different_tokens():
    s = torch.randn(3, 5, 8) + 1
    for row in range(3):
        cosines = F.cosine_similarity(s[row][:, None], s[row][None], dim=-1)
        want = (cosines.sum() - 5) / (5 * 4)
        assert_close(evaluation.token_correlation(s)[row], want)


def test_warnings_name_states_that_are_alike_or_not_used():
    def warned(correlation, gain, counts):
        report = {"groups": [{"token_correlation": c} for c in correlation], "gain": gain}
        return " ".join(evaluation.warnings_of(report, counts))

    assert warned([0.5, 0.9], 0.1, (2, 4)) == ""
    assert "the states of all tokens are nearly the same" in warned([0.5, 0.9995], 0.1, (2, 4))
    assert "the state is not used" in warned([0.5], -1e-5, (2,))
    assert warned([0.5], 0.0, (1,)) == ""  # one loop: nothing to gain
    assert warned([], 0.0, ()) == ""


STATES = ("--loop_norm=none", "--input_injection=inject", "--weight_decay=0")


def test_a_run_whose_states_become_alike_is_warned_of(corpus, tmp_path):
    ruin = ("--learning_rate=1", "--decay_lr=False", "--grad_clip=0", "--bptt_k=1")
    run = train(corpus, tmp_path / "out", *STATES, *ruin)
    assert run.code == 0, run.err
    assert "warning: the states of all tokens are nearly the same" in run.out


def test_a_run_that_does_not_use_its_state_is_warned_of(corpus, tmp_path):
    """The injection begins by handing on its input alone, and hardly learns here."""
    run = train(corpus, tmp_path / "out", *STATES, "--learning_rate=1e-9", "--min_lr=1e-9")
    assert run.code == 0, run.err
    assert "warning: the state is not used" in run.out


@pytest.mark.slow
def test_a_run_that_goes_well_is_not_warned_of(corpus, tmp_path):
    longer = ("--max_iters=80", "--eval_interval=80", "--lr_decay_iters=80")
    run = train(corpus, tmp_path / "out", *STATES, *longer, "--learning_rate=3e-3", "--bias=False")
    assert run.code == 0, run.err
    assert "warning" not in run.out
    assert log(tmp_path / "out")[-1]["watch"]["groups"][0]["token_correlation"] < 0.9
