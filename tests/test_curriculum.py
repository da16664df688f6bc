"""Tasks with a target at every position, batches of one level, loops by level."""

import random

import numpy as np
import pytest
import torch
from conftest import (
    TRAIN,
    Run,
    assert_refused,
    assert_same,
    log,
    logged,
    losses,
    train,
    without_clock,
)
from forked import end, start_two, tail

import pretrained
from nanorecur import checkpoint
from nanorecur.curriculum import Curriculum, loops_at
from nanorecur.dataset import load_meta, open_split, targets_path, write_targets_task
from nanorecur.exit_rules import StateExit, exit_logits

LEVELS = {"train": {1: 40, 2: 60, 3: 50}, "val": {1: 10, 2: 10, 3: 10}, "hard": {5: 10}}
LENGTH = 8


def make(level, rng):
    """Return a row of letters and, from place level on, the letter so many places before."""
    row = "".join(rng.choices("abcdef", k=LENGTH - level % 2)).ljust(LENGTH)
    targets = [row[i - level] if i >= level and row[i] != " " else None for i in range(LENGTH)]
    return row, targets


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A prepared task whose targets stand beside its rows."""
    folder = tmp_path_factory.mktemp("beside")
    write_targets_task(folder, "abcdef ", make, LEVELS, seed=3)
    return folder


def split_of(folder, name="train"):
    meta = load_meta(folder)
    return open_split(folder, name, meta, LENGTH, meta["vocab_size"])


# -----------------------------------------------------------------------------
# rows and targets


@pytest.mark.parametrize("name", LEVELS)
def test_targets_are_those_of_the_rows_and_minus_one_where_there_is_none(beside, name):
    split = split_of(beside, name)
    starts = np.arange(split.n_windows) * LENGTH
    x, y = split.windows(starts)
    level = split.levels(starts)
    assert set(level) == set(LEVELS[name])
    for row, targets, n in zip(x, y, level):
        letters = [i for i in range(len(row)) if row[i] != 6]
        for i in range(len(row)):
            want = row[i - n] if i >= n and i in letters else -1
            assert targets[i] == want


def test_columns_at_the_end_without_a_target_are_left_out(beside):
    split = split_of(beside)
    odd, even = split.rows_of_level(1), split.rows_of_level(2)
    assert split.windows(np.array(odd) * LENGTH)[0].shape == (40, LENGTH - 1)
    assert split.windows(np.array(even) * LENGTH)[0].shape == (60, LENGTH)


def test_a_target_beyond_the_vocabulary_is_refused(beside, tmp_path):
    write_targets_task(tmp_path, "abcdef ", make, LEVELS, seed=3)
    path = targets_path(tmp_path, "train")
    ids = np.fromfile(path, "<u2")
    ids[LENGTH - 2] = 700
    ids.tofile(path)
    with pytest.raises(ValueError, match="a target is beyond vocab_size=7"):
        split_of(tmp_path).windows(np.array([0]))


def test_rows_and_targets_of_another_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one length"):
        write_targets_task(tmp_path, "ab", lambda n, rng: ("ab" * n, [None]), {"train": {1: 1}}, 0)


# -----------------------------------------------------------------------------
# the curriculum


def curriculum_of(folder, **options):
    config = dict(seed=7, loops_of_level=(1, 0), loops_beyond=0, level_warmup_iters=0)
    config |= dict(loop_warmup_iters=0, loop_warmup="linear", loops_per_row=False)
    config |= dict(loop_start=0.0, max_iters=100)
    config |= dict(batch_size=4, gradient_accumulation_steps=2, **options)
    model = pretrained.GPTConfig(n_block=1, n_loop=2, n_embd=32, n_head=4)
    return Curriculum(config, model, split_of(folder))


def test_the_rows_of_a_step_are_of_its_level_and_differ(beside):
    curriculum = curriculum_of(beside)
    split, levels = curriculum.split, set()
    for it in range(40):
        starts = curriculum.starts(it, 8 * it + np.arange(8))
        assert set(split.levels(starts)) == {curriculum.level(it)}
        levels.add(curriculum.level(it))
    assert levels == {1, 2, 3}
    for level, rows in LEVELS["train"].items():  # an epoch visits each row once
        starts = split.shuffled_level(level, np.arange(rows), 7)
        assert sorted(starts // LENGTH) == list(split.rows_of_level(level))
        later = split.shuffled_level(level, rows + np.arange(rows), 7)
        assert sorted(later) == sorted(starts)
        assert list(later) != list(starts)


def test_the_largest_level_rises_to_the_last(beside):
    curriculum = curriculum_of(beside, level_warmup_iters=30)
    drawn = [curriculum.level(it) for it in range(200)]
    assert set(drawn[:10]) == {1}
    assert set(drawn[10:20]) == {1, 2}
    assert set(drawn[30:]) == {1, 2, 3}


def test_levels_rise_without_loops_of_their_own(beside):
    curriculum = curriculum_of(beside, loops_of_level=(), level_warmup_iters=30)
    split = curriculum.split
    for it in range(40):
        assert curriculum.loops(it) == [(2,)]
        starts = curriculum.starts(it, 8 * it + np.arange(8))
        assert set(split.levels(starts)) == {curriculum.level(it)}
    assert {curriculum.level(it) for it in range(10)} == {1}


def test_loops_follow_from_the_level_and_what_is_drawn_beyond(beside):
    curriculum = curriculum_of(beside, loops_of_level=(2, 1), loops_beyond=3)
    beyond = set()
    for it in range(100):
        ((n,),) = curriculum.loops(it)
        beyond.add(n - 2 * curriculum.level(it) - 1)
    assert beyond == {0, 1, 2, 3}
    assert [loops_at((0.5, 0), level) for level in (1, 2, 3, 7)] == [1, 1, 2, 4]
    assert loops_at((1, -5), 2) == 1


REFUSED = {
    "--loops_of_level=1": "loops_of_level=(1,): must be two numbers",
    "--loops_of_level=1,0 --use_model_baseline": "loops_of_level=(1, 0): must be () where nothing",
    "--loops_of_level=1,0 --loop_sampling=poisson": "it gives the loops itself",
    "--loops_beyond=2": "loops_beyond=2: has no effect, loops_of_level=()",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_go_together_is_refused(beside, tmp_path, options):
    run = train(beside, tmp_path / "out", f"--block_size={LENGTH}", *options.split())
    assert_refused(run, REFUSED[options])
    assert not (tmp_path / "out").exists()


def test_loops_of_level_need_levels(corpus, tmp_path):
    run = train(corpus, tmp_path / "out", "--loops_of_level=1,0")
    assert_refused(run, "loops_of_level=(1, 0): must be () without a task")
    run = train(corpus, tmp_path / "out", "--level_warmup_iters=4")
    assert_refused(run, "level_warmup_iters=4: must be 0 without a task")


# -----------------------------------------------------------------------------
# runs

BY_LEVEL = (
    f"--block_size={LENGTH}",
    "--loops_of_level=1,0",
    "--loops_beyond=2",
    "--eval_loops=1,4",
)
BY_LEVEL += ("--level_warmup_iters=4", "--eval_iters=30")
# rows of this little model change by 0.16 to 0.18 in loop 2, so that some end there
BY_LEVEL += ("--automatic_loop_exit", "--automatic_loop_exit_threshold=0.172")


@pytest.fixture(scope="module")
def run_by_level(beside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    run = train(beside, folder, *BY_LEVEL)
    assert run.code == 0, run.err
    return folder, run


def test_a_run_by_level_goes_on_bit_for_bit(run_by_level, beside, tmp_path):
    folder, _ = run_by_level
    for stop in (4, 8):
        run = train(beside, tmp_path, "--init_from=auto", f"--max_iters={stop}", *BY_LEVEL)
        assert run.code == 0, run.err
    for name in ("model", "optimizer"):
        assert_same(checkpoint.load(folder)[name], checkpoint.load(tmp_path)[name], name)
    assert without_clock(folder) == without_clock(tmp_path)


@pytest.mark.parametrize("rows, micro_steps", [(8, 1), (1, 8)])
def test_other_layouts_see_the_same_rows_and_loops(
    run_by_level, beside, tmp_path, rows, micro_steps
):
    layout = (f"--batch_size={rows}", f"--gradient_accumulation_steps={micro_steps}")
    train(beside, tmp_path, *BY_LEVEL, *layout)
    assert losses(tmp_path) == pytest.approx(losses(run_by_level[0]), rel=1e-5)
    assert logged(tmp_path, "loops") == logged(run_by_level[0], "loops")


def test_tokens_are_those_that_the_steps_computed(run_by_level, beside):
    """Odd levels leave out the last column."""
    curriculum = curriculum_of(beside, level_warmup_iters=4, loops_beyond=2)
    curriculum.seed = 1337
    widths = [LENGTH - curriculum.level(it) % 2 for it in range(8)]
    assert set(widths) == {LENGTH, LENGTH - 1}
    tokens = [sum(widths[: it + 1]) * 8 for it in range(8)]
    assert logged(run_by_level[0], "tokens") == tokens
    model = pretrained.load(run_by_level[0])
    flops, loops = logged(run_by_level[0], "flops"), logged(run_by_level[0], "loops")
    assert flops[0] == model.flops_per_token(int(loops[0])) * tokens[0]
    assert flops[-1] - flops[-2] == model.flops_per_token(int(loops[-1])) * 8 * widths[-1]


def test_levels_are_scored_at_their_own_loops_and_at_those_asked_for(run_by_level, beside):
    folder, run = run_by_level
    model, entries = pretrained.load(folder), log(folder)[-1]["levels"]
    found = {(e["split"], e["level"], e["loops"], e["own"]) for e in entries}
    own = {("val", n, n) for n in (1, 2, 3)} | {("hard", 5, 5)}
    want = {(*key, True) for key in own}
    for split, level, _ in own:
        want |= {(split, level, n, (split, level, n) in own) for n in (1, 4)}
    assert found == want
    for entry in entries:
        split = split_of(beside, entry["split"])
        x, y = map(
            torch.from_numpy, split.windows(np.array(split.rows_of_level(entry["level"])) * 8)
        )
        with torch.no_grad():
            logits, loss = model(x, y, n_loop=entry["loops"])
        right = (logits.argmax(-1) == y)[y >= 0]
        assert entry["accuracy"] == pytest.approx(right.float().mean().item())
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
        all_right = ((logits.argmax(-1) == y) | (y < 0)).all(1)
        assert entry["exact"] == pytest.approx(all_right.float().mean().item())
    title = "positions that are right, by level, at its own loops and at others; where rows end"
    table = run.out.split(title)[-1].splitlines()[1:]
    words = ["level", "loops", "right", "at", "1", "at", "4", "ends", "at", "right"]
    assert table[0].split() == words
    assert set(table[4]) == {"-"}
    at = {(e["level"], e["loops"]): f"{e['accuracy']:.1%}" for e in entries}
    ends = {e["level"]: e for e in log(folder)[-1]["levels_with_exit"]}
    for line, level in zip(table[1:4] + table[5:6], (1, 2, 3, 5)):
        want = [str(level), str(level), at[level, level], at[level, 1], at[level, 4]]
        want += [f"{ends[level]['loops']:.1f}", f"{ends[level]['accuracy']:.1%}"]
        assert line.split() == want


def test_levels_are_scored_where_their_rows_end(run_by_level, beside):
    folder, _ = run_by_level
    model, entries = pretrained.load(folder), log(folder)[-1]["levels_with_exit"]
    assert [(e["split"], e["level"]) for e in entries] == [
        *(("val", n) for n in (1, 2, 3)),
        ("hard", 5),
    ]
    loops = []
    for entry in entries:
        split = split_of(beside, entry["split"])
        starts = np.array(split.rows_of_level(entry["level"])) * 8
        x, y = map(torch.from_numpy, split.windows(starts))
        most = max(entry["level"], 4)
        logits, used = exit_logits(model, x, StateExit(0.172), most, together=y >= 0)
        right = logits.argmax(-1) == y
        assert entry["accuracy"] == pytest.approx(right[y >= 0].float().mean().item())
        assert entry["exact"] == pytest.approx((right | (y < 0)).all(1).float().mean().item())
        assert entry["loops"] == pytest.approx(used.float().mean().item())
        loops.append(entry["loops"])
    assert len(set(loops)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["whole", "divided"])
def test_two_processes_end_rows_where_one_does(run_by_level, beside, tmp_path, shard):
    """With divided weights no process may leave a loop before the other."""
    out, printed = tmp_path / "out", tmp_path / "printed"
    call = (f"--dataset={beside}", f"--out_dir={out}", *TRAIN, *BY_LEVEL, *shard)
    assert end(start_two(printed, *call)) == [0, 0], tail(printed)
    for name in ("levels", "levels_with_exit"):
        ours, theirs = logged(out, name)[-1], logged(run_by_level[0], name)[-1]
        for a, b in zip(ours, theirs, strict=True):
            for key in ("level", "loops", "accuracy", "exact"):
                assert a[key] == pytest.approx(b[key]), (name, key)


@pytest.mark.parametrize(
    "options, most",
    [
        ("--loops_of_level=1,0 --eval_loops=1,4", {1: 4, 2: 4, 3: 4, 5: 5}),
        ("--level_warmup_iters=4 --predict_ahead --max_shift=2", {1: 2, 2: 2, 3: 2, 5: 2}),
        (
            "--level_warmup_iters=4 --n_layer=5 --loop_groups=[[0],[2,3]] --loop_counts=2,5"
            " --n_prelude=0 --n_block=0 --n_coda=0 --n_loop=1",
            {1: 7, 2: 7, 3: 7, 5: 7},
        ),
    ],
    ids=["by level", "a token ahead", "two groups"],
)
def test_rows_that_never_rest_end_at_the_most_loops_of_their_level(beside, tmp_path, options, most):
    """There all is as right as without exit."""
    out = tmp_path / "out"
    options = f"{options} --automatic_loop_exit --automatic_loop_exit_threshold=1e-12".split()
    run = train(beside, out, f"--block_size={LENGTH}", "--max_iters=2", *options)
    assert run.code == 0, run.err
    entry = log(out)[-1]
    assert {e["level"]: e["loops"] for e in entry["levels_with_exit"]} == most
    deepest = {e["level"]: e["accuracy"] for e in entry["levels"]}  # sorted by loops
    for e in entry["levels_with_exit"]:
        assert e["accuracy"] == pytest.approx(deepest[e["level"]])


@pytest.mark.parametrize("options", ["", "--use_model_baseline"])
def test_levels_are_scored_at_the_models_own_loops(beside, tmp_path, options):
    """Without loops_of_level; a model without a loop has one accuracy for each level."""
    run = train(
        beside,
        tmp_path / "out",
        f"--block_size={LENGTH}",
        "--level_warmup_iters=4",
        "--max_iters=2",
        *options.split(),
    )
    assert run.code == 0, run.err
    entries = log(tmp_path / "out")[-1]["levels"]
    own = 1 if options else 2
    assert [(e["level"], e["loops"], e["own"]) for e in entries] == [
        (level, own, True) for level in (1, 2, 3, 5)
    ]


# -----------------------------------------------------------------------------
# the tasks


def prepared(name, folder, *options):
    run = Run(f"data/{name}/prepare.py", f"--out_dir={folder}", *options)
    assert run.code == 0, run.err
    meta = load_meta(folder)
    chars, block_size = meta["chars"], meta["row"]["length"]
    for split in ("train", "val", "hard"):
        found = open_split(folder, split, meta, block_size, meta["vocab_size"])
        starts = np.arange(found.n_windows) * block_size
        for row, targets, level in zip(*found.windows(starts), found.levels(starts)):
            text = "".join(chars[i] for i in row)
            yield text, ["" if i < 0 else chars[i] for i in targets], int(level)


@pytest.mark.parametrize("strokes", [False, True])
def test_hops_lead_where_they_lead_one_by_one(tmp_path, strokes):
    options = "--every_position --symbols=4 --length=30 --hops=3 --hard_hops=5 --train_rows=60"
    options += f" --val_rows=10 --strokes={strokes}"
    for text, targets, level in prepared("phop", tmp_path, *options.split()):
        before = 5 if strokes else 0
        assert text[:before].strip() == "|" * level * strokes
        sequence, targets = text[before:], targets[before:]
        assert any(targets)
        for place in range(len(sequence)):
            end = place
            for _ in range(level):
                end = sequence.rfind(sequence[end], 0, end) + 1 if end is not None else None
                end = end or None
            assert targets[place] == (sequence[end] if end else "")


@pytest.mark.parametrize("modulus", [2, 7])
def test_prefixes_sum_up(tmp_path, modulus):
    options = (f"--modulus={modulus}", "--length=9", "--hard_lengths=20,30", "--train_rows=90")
    for text, targets, level in prepared("prefix", tmp_path, *options, "--val_rows=5"):
        assert text[0] == "|"
        digits, targets = [int(digit) for digit in text[1:].strip()], targets[1:]
        assert len(digits) == level
        assert targets[:level] == [str(sum(digits[: i + 1]) % modulus) for i in range(level)]
        assert not any(targets[level:])


@pytest.mark.parametrize("terms", [2, 12])
def test_columns_add_up(tmp_path, terms):
    options = ("--columns", f"--terms={terms}", "--digits=3", "--hard_digits=5")
    for text, targets, level in prepared(
        "addition", tmp_path, *options, "--train_rows=90", "--val_rows=5"
    ):
        assert text[0] == "|"
        digits, targets = text[1:].rstrip(), targets[1:]
        numbers = [int(digits[i::terms][::-1]) for i in range(terms)]
        assert max(len(str(number)) for number in numbers) == level
        ends = targets[terms - 1 :: terms]
        assert int("".join(ends)[::-1]) == sum(numbers)
        assert sum(target != "" for target in targets) == len(digits) // terms
        assert not any(targets[len(digits) :])


def test_a_row_is_random_and_repeats_with_its_seed():
    assert make(1, random.Random(1)) == make(1, random.Random(1)) != make(1, random.Random(2))


# -----------------------------------------------------------------------------
# what it is for
SHORT = """
    --n_loop=3 --max_iters=500 --level_warmup_iters=150 --hold_iters=250 --eval_interval=500
    --eval_loops=3,6 --seed=1 --device=cpu
""".split()


@pytest.mark.slow
def test_more_loops_make_twice_as_many_hops_as_any_in_training(tmp_path):
    """config/depth_phop.py in short: trained up to 3 hops."""
    data, out = tmp_path / "data", tmp_path / "out"
    sizes = ("--every_position", "--length=48", "--hops=3", "--hard_hops=6", "--train_rows=30000")
    assert Run("data/phop/prepare.py", *sizes, "--val_rows=100", f"--out_dir={data}").code == 0
    run = Run("train.py", "config/depth_phop.py", f"--dataset={data}", f"--out_dir={out}", *SHORT)
    assert run.code == 0, run.err
    accuracy = {(row["level"], row["loops"]): row["accuracy"] for row in logged(out, "levels")[-1]}
    assert accuracy[3, 3] > 0.98
    assert accuracy[4, 3] < 0.4 and accuracy[6, 3] < 0.4  # chance is 0.25
    assert accuracy[4, 4] > 0.95 and accuracy[6, 6] > 0.9
