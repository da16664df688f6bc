"""Reasoning tasks: rows that independent solvers check, refused options, and rows as windows."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import Run

from nanorecur.dataset import load_meta, open_split
from nanorecur.tokenizer import make_tokenizer

# -----------------------------------------------------------------------------
# solvers, written without a look at how rows are made: they read a prompt and return its level and
# the answers that count as right


def solve_addition(prompt, knobs):
    """Add the numbers, and check widths and that no number begins with 0."""
    order = -1 if knobs.get("reverse", "True") == "True" else 1
    fields = prompt.removesuffix("=").split("+")
    hard_digits = int(knobs["hard_digits"])
    assert {len(field) for field in fields} == {hard_digits}
    assert len(fields) == int(knobs.get("terms", 2))
    numbers = [field[::order].lstrip(" ") for field in fields]
    assert all(str(int(number)) == number for number in numbers)
    [level] = {len(number) for number in numbers}
    width = len(str(len(fields) * int("9" * hard_digits)))
    return level, [str(sum(map(int, numbers))).rjust(width)[::order]]


def solve_phop(prompt, knobs):
    """Note the last place of every symbol from left to right, and follow the hops."""
    hard_hops = int(knobs["hard_hops"])
    strokes, sequence = prompt[:hard_hops], prompt[hard_hops:]
    level = strokes.count("|")
    assert strokes == ("|" * level).rjust(hard_hops)
    assert len(sequence) == int(knobs["length"])
    assert all(a != b for a, b in zip(sequence, sequence[1:]))
    latest = {}  # the last place of each symbol so far
    targets = []  # of each place: where a hop from it leads
    for i, symbol in enumerate(sequence):
        targets.append(latest[symbol] + 1 if symbol in latest else None)
        latest[symbol] = i
    place = len(sequence) - 1
    for _ in range(level):
        place = targets[place]
    return level, [sequence[place]]


def solve_parity(prompt, knobs):
    bits = prompt.strip(" =")
    assert prompt == " " * (int(knobs["hard_bits"]) - len(bits)) + bits + "="
    return len(bits), ["01"[bits.count("1") & 1]]


def solve_maze(prompt, knobs):
    """Search breadth first over characters, and check that the open ones form a tree.

    A move between cells is two steps between characters.
    """
    lines = prompt.splitlines()
    size = int(knobs["size"])
    assert len(lines) == 2 * size - 1 and {len(line) for line in lines} == {2 * size - 1}
    places = {(y, x): char for y, line in enumerate(lines) for x, char in enumerate(line)}
    [start] = [place for place, char in places.items() if char == "S"]
    [goal] = [place for place, char in places.items() if char == "G"]
    moves, queue, n_edges = {start: ""}, [start], 0
    for y, x in queue:  # it grows
        for name, neighbour in neighbours(y, x).items():
            if places.get(neighbour, "#") == "#":
                continue
            n_edges += 1
            if neighbour not in moves:
                moves[neighbour] = moves[y, x] + name
                queue.append(neighbour)
    n_open = sum(char != "#" for char in places.values())
    assert len(moves) == n_open == 2 * size**2 - 1  # all connected
    assert n_edges == 2 * (n_open - 1)  # each seen from both sides: no circle
    answer = moves[goal]
    assert answer[::2] == answer[1::2]
    return len(answer) // 2, [answer[::2].ljust(int(knobs["hard_moves"]), "-")]


def neighbours(y, x):
    return {"U": (y - 1, x), "D": (y + 1, x), "L": (y, x - 1), "R": (y, x + 1)}


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"


def solve_icl(prompt, knobs):
    """Predict by least squares on the middles of the bins; a neighbouring letter is right too."""
    width, bins = int(knobs["hard_dims"]) + 1, int(knobs.get("bins", 32))
    points = [prompt[i : i + width] for i in range(0, len(prompt), width)]
    [level] = {len(point[: width - 1].rstrip("0")) for point in points}
    assert len(points) == int(knobs["examples"]) + 1
    assert not any("0" in point[:level] for point in points)
    values = []
    for point in points:
        chars = point[:level] + point[width - 1 :]  # the last point has no y
        values.append([(LETTERS.index(char) + 0.5) * 6 / bins - 3 for char in chars])
    known = np.array(values[:-1])
    w = np.linalg.lstsq(known[:, :-1], known[:, -1], rcond=None)[0]
    letter = int(np.clip(np.floor((w @ values[-1] + 3) * bins / 6), 0, bins - 1))
    return level, [LETTERS[i] for i in (letter, letter - 1, letter + 1) if 0 <= i < bins]


SOLVERS = {
    "addition": solve_addition,
    "phop": solve_phop,
    "parity": solve_parity,
    "maze": solve_maze,
    "icl": solve_icl,
}
SHARE_RIGHT = {"addition": 1, "phop": 1, "parity": 1, "maze": 1, "icl": 0.97}
KNOBS = {  # small enough for a test
    "addition": {"digits": "4", "hard_digits": "6"},
    "phop": {"hops": "3", "hard_hops": "5", "length": "24"},
    "parity": {"bits": "8", "hard_bits": "12"},
    "maze": {"size": "4", "moves": "4", "hard_moves": "6"},
    "icl": {"dims": "2", "hard_dims": "3", "examples": "30"},
}
LEVELS = {  # with these knobs: the first and last level of train, the last level of hard
    "addition": (1, 4, 6),
    "phop": (1, 3, 5),
    "parity": (2, 8, 12),
    "maze": (1, 4, 6),
    "icl": (1, 2, 3),
}
FILES = ("train.bin", "val.bin", "hard.bin", "meta.json")


def prepare(task, folder, **knobs):
    knobs = {"train_rows": 160, "val_rows": 20, **KNOBS[task], **knobs, "out_dir": folder}
    arguments = [f"--{name}={value}" for name, value in knobs.items()]
    return Run(f"data/{task}/prepare.py", *arguments)


def read(folder, split):
    """Return [(level, prompt, answer)] of a split as it was written."""
    meta = load_meta(folder)
    row = meta["row"]
    ids = np.fromfile(folder / f"{split}.bin", "<u2").reshape(-1, row["length"])
    texts = [make_tokenizer(meta).decode(row_ids) for row_ids in ids]
    levels = [level for level, count in row["levels"][split] for _ in range(count)]
    assert len(levels) == len(texts)
    cut = row["prompt"]
    return [(level, text[:cut], text[cut:]) for level, text in zip(levels, texts)]


def check(task, folder, **knobs):
    """Check every row of every split with the task's solver and return them."""
    rows = [row for split in ("train", "val", "hard") for row in read(folder, split)]
    wrong = []
    for level, prompt, answer in rows:
        found_level, answers = SOLVERS[task](prompt, {**KNOBS[task], **knobs})
        assert found_level == level
        if answer not in answers:
            wrong.append((prompt, answer))
    assert len(wrong) <= (1 - SHARE_RIGHT[task]) * len(rows), wrong[:3]
    assert len({prompt for _, prompt, _ in rows}) == len(rows)  # no prompt twice, in any splits
    return rows


@pytest.fixture(scope="module", params=SOLVERS)
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "new"
    run = prepare(request.param, folder)
    assert run.code == 0, run.err
    return request.param, folder


# -----------------------------------------------------------------------------
# rows


def test_an_independent_solver_finds_every_answer(prepared):
    check(*prepared)


def test_the_hard_split_begins_behind_the_last_level_of_training(prepared):
    task, folder = prepared
    first, last, hardest = LEVELS[task]
    levels = load_meta(folder)["row"]["levels"]
    assert [level for level, _ in levels["train"]] == list(range(first, last + 1))
    assert [level for level, _ in levels["val"]] == list(range(first, last + 1))
    assert levels["hard"] == [[level, 20] for level in range(last + 1, hardest + 1)]


def test_every_split_has_the_rows_that_were_asked_for(prepared):
    task, folder = prepared
    levels = load_meta(folder)["row"]["levels"]
    expected = 159 if task == "phop" else 160  # 160 is no multiple of phop's 3 levels
    assert sum(rows for _, rows in levels["train"]) == expected
    assert levels["val"][-1][1] == 20


LARGEST_SHARE = {"addition": 0.06, "phop": 0.35, "parity": 0.6, "maze": 0.15, "icl": 0.15}


def test_answers_are_not_nearly_constant(prepared):
    task, folder = prepared
    answers = Counter(answer for _, _, answer in read(folder, "train"))
    assert answers.most_common(1)[0][1] / answers.total() < LARGEST_SHARE[task]


def test_a_seed_gives_the_same_bytes_and_another_seed_other_rows(prepared, tmp_path):
    task, folder = prepared
    assert prepare(task, tmp_path).code == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert prepare(task, tmp_path, seed=1).code == 0
    for split in ("train", "val", "hard"):
        first = {prompt for _, prompt, _ in read(folder, split)}
        second = {prompt for _, prompt, _ in read(tmp_path, split)}
        assert len(first & second) < 0.7 * len(first)


def test_more_rows_for_training_leave_the_hard_ones_as_they_are(prepared, tmp_path):
    task, folder = prepared
    assert prepare(task, tmp_path, train_rows=80).code == 0
    assert (tmp_path / "hard.bin").read_bytes() == (folder / "hard.bin").read_bytes()


ACTING_KNOBS = [
    ("addition", {"reverse": "False"}),
    ("addition", {"terms": "3"}),
    ("addition", {"terms": "11", "reverse": "False"}),
    ("phop", {"symbols": "3"}),
    ("phop", {"symbols": "6", "length": "40"}),
    ("phop", {"hops": "4", "hard_hops": "6"}),
    ("parity", {"bits": "9", "hard_bits": "14"}),
    ("maze", {"size": "5"}),
    ("maze", {"moves": "3", "hard_moves": "5"}),
    ("icl", {"dims": "1"}),
    ("icl", {"bins": "16"}),
    ("icl", {"examples": "40", "hard_dims": "4"}),
]


@pytest.mark.parametrize("task, knobs", ACTING_KNOBS)
def test_every_knob_acts(tmp_path, task, knobs):
    """The solver is told the knobs too, and asserts the widths that follow from them."""
    assert prepare(task, tmp_path, **knobs).code == 0
    rows = check(task, tmp_path, **knobs)
    if "symbols" in knobs:
        assert len(set(rows[0][1]) - {"|", " "}) == int(knobs["symbols"])
    if "bins" in knobs:
        assert load_meta(tmp_path)["vocab_size"] == 17


# -----------------------------------------------------------------------------
# what is refused

FEW = {  # options with which a level has fewer prompts than rows
    "addition": {"digits": "1", "train_rows": "120"},
    "phop": {"symbols": "3", "hops": "1", "hard_hops": "2", "length": "6", "train_rows": "99"},
    "parity": {"train_rows": "1000"},
    "maze": {"size": "2", "moves": "1", "hard_moves": "2", "val_rows": "30"},
    "icl": {"bins": "2", "dims": "1", "hard_dims": "2", "examples": "2", "train_rows": "99"},
}
REFUSED = [
    ("addition", FEW["addition"], "train: level 1 has fewer than 120 different prompts"),
    ("phop", FEW["phop"], "train: level 1 has fewer"),
    ("parity", FEW["parity"], "train: level 8 has fewer"),
    ("maze", FEW["maze"], "hard: level 2 has fewer"),
    ("icl", FEW["icl"], "train: level 1 has fewer"),
    ("addition", {"digits": "0"}, "digits=0: must be from 1"),
    ("addition", {"columns": "True", "reverse": "False"}, "reverse=False: must be True with"),
    ("addition", {"terms": "1"}, "terms=1: must be from 2"),
    ("addition", {"hard_digits": "4"}, "hard_digits=4: must be from 5"),
    ("addition", {"val_rows": "0"}, "val_rows=0: must be"),
    ("addition", {"train_rows": "3"}, "train_rows=3: must be from 4"),
    ("phop", {"hops": "-1"}, "hops=-1: must be from 1"),
    ("phop", {"length": "19"}, "length=19: must be from 20"),
    ("phop", {"symbols": "2"}, "symbols=2: must be from 3 to 26"),
    ("phop", {"hard_hops": "3"}, "hard_hops=3: must be from 4"),
    ("parity", {"bits": "1"}, "bits=1: must be from 2"),
    ("parity", {"hard_bits": "8"}, "hard_bits=8: must be from 9"),
    ("maze", {"size": "1"}, "size=1: must be from 2"),
    ("maze", {"size": "9" * 9}, "size=9{9}: must be from 2"),
    ("maze", {"moves": "0"}, "moves=0: must be from 1"),
    ("maze", {"hard_moves": "9"}, "hard_moves=9: must be from 5 to 8"),
    ("icl", {"dims": "0"}, "dims=0: must be from 1"),
    ("icl", {"hard_dims": "2"}, "hard_dims=2: must be from 3"),
    ("icl", {"examples": "2"}, "examples=2: must be from 3"),
    ("icl", {"bins": "53"}, "bins=53: must be from 2 to 52"),
]


@pytest.mark.parametrize("task, knobs, message", REFUSED)
def test_an_impossible_task_is_refused_in_one_line(tmp_path, task, knobs, message):
    run = prepare(task, tmp_path, **knobs)
    last_line = re.split("[\r\n]", run.err.rstrip("\n"))[-1]  # tqdm's bar may precede it
    assert run.code == 2 and re.match(f"prepare.py: {message}", last_line), run.err
    assert "Traceback" not in run.err
    assert not any((tmp_path / name).exists() for name in FILES)


# -----------------------------------------------------------------------------
# rows as windows of dataset.Split


def split_of(folder, name):
    meta = load_meta(folder)
    return open_split(folder, name, meta, meta["row"]["length"] - 1, meta["vocab_size"])


@pytest.mark.parametrize("name", ["train", "val", "hard"])
def test_the_answer_alone_is_predicted(prepared, name):
    folder = prepared[1]
    data, rows = split_of(folder, name), read(folder, name)
    decode = make_tokenizer(load_meta(folder)).decode
    x, y = data.windows(data.spread(len(rows)))
    for (_, prompt, answer), inputs, targets in zip(rows, x, y, strict=True):
        assert decode(inputs) == (prompt + answer)[:-1]
        assert (targets[: len(prompt) - 1] == -1).all()
        assert decode(targets[len(prompt) - 1 :]) == answer


def test_sliding_windows_of_a_task_are_its_rows(prepared):
    data = split_of(prepared[1], "val")
    rows = data.windows(data.spread(data.n_windows))
    for row, window in zip(rows, data.windows(*data.sliding(5))):
        assert np.array_equal(row, window)


def test_an_epoch_visits_every_row_once(prepared):
    data = split_of(prepared[1], "train")
    n, length = data.n_windows, data.row["length"]
    first, second = data.shuffled(np.arange(2 * n), seed=1).reshape(2, n)
    for starts in (first, second):
        assert sorted(starts) == list(range(0, n * length, length))  # always at the start of a row
    assert not np.array_equal(first, second)


def test_a_row_keeps_its_level_when_it_is_shuffled(prepared):
    task, folder = prepared
    data = split_of(folder, "train")
    decode = make_tokenizer(load_meta(folder)).decode
    starts = data.shuffled(np.arange(40), seed=1)
    prompts = [decode(x[: data.row["prompt"]]) for x in data.windows(starts)[0]]
    levels = [SOLVERS[task](prompt, KNOBS[task])[0] for prompt in prompts]
    assert data.levels(starts).tolist() == levels


@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_another_block_size_is_refused_with_the_right_one(prepared, change):
    meta = load_meta(prepared[1])
    right = meta["row"]["length"] - 1
    wrong = right + change
    words = f"block_size={wrong}: the rows of .*train.bin need {right}$"
    with pytest.raises(ValueError, match=words):
        open_split(prepared[1], "train", meta, wrong, meta["vocab_size"])
