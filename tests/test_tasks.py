"""Reasoning tasks: each row against a solver that has only its text, what is refused, and rows as Split gives them."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import Run

from nanorecur.dataset import load_meta, make_tokenizer, open_split

# -----------------------------------------------------------------------------
# solvers, written without a look at how rows are made: (prompt, knobs) -> (level, the answers that count as right)


def solve_addition(prompt, knobs):
    way = -1 if knobs.get("reverse", "True") == "True" else 1
    fields = prompt.removesuffix("=").split("+")
    assert {len(field) for field in fields} == {int(knobs["hard_digits"])} and len(fields) == int(
        knobs.get("terms", 2)
    )
    numbers = [field[::way].lstrip(" ") for field in fields]
    assert all(str(int(number)) == number for number in numbers)  # no leading zeros
    (level,) = {len(number) for number in numbers}
    width = len(str(len(fields) * int("9" * int(knobs["hard_digits"]))))
    return level, [str(sum(map(int, numbers))).rjust(width)[::way]]


def solve_phop(prompt, knobs):
    strokes, sequence = prompt[: int(knobs["hard_hops"])], prompt[int(knobs["hard_hops"]) :]
    level = strokes.count("|")
    assert strokes == " " * (len(strokes) - level) + "|" * level and len(sequence) == int(
        knobs["length"]
    )
    assert all(a != b for a, b in zip(sequence, sequence[1:]))
    latest, behind = (
        {},
        [],
    )  # where each symbol was seen last; for each place, the one behind its earlier occurrence
    for i, symbol in enumerate(sequence):
        behind.append(latest[symbol] + 1 if symbol in latest else None)
        latest[symbol] = i
    place = len(sequence) - 1
    for _ in range(level):
        place = behind[place]
    return level, [sequence[place]]


def solve_parity(prompt, knobs):
    bits = prompt.strip(" =")
    assert prompt == " " * (int(knobs["hard_bits"]) - len(bits)) + bits + "="
    return len(bits), ["01"[bits.count("1") & 1]]


def solve_maze(prompt, knobs):
    """Breadth first over characters, counting the ways to each; a wall between them, two characters are a move."""
    lines = prompt.splitlines()
    assert len(lines) == 2 * int(knobs["size"]) - 1 and {len(line) for line in lines} == {
        len(lines)
    }
    place = {char: (y, x) for y, line in enumerate(lines) for x, char in enumerate(line)}
    moves, ways = {place["S"]: ""}, Counter({place["S"]: 1})
    for y, x in (queue := [place["S"]]):
        for name, there in (
            ("U", (y - 1, x)),
            ("D", (y + 1, x)),
            ("L", (y, x - 1)),
            ("R", (y, x + 1)),
        ):
            inside = 0 <= there[0] < len(lines) and 0 <= there[1] < len(lines)
            if inside and lines[there[0]][there[1]] != "#":
                if there not in moves:
                    moves[there] = moves[y, x] + name
                    queue.append(there)
                ways[there] += len(moves[there]) == len(moves[y, x]) + 1 and there != place["S"]
    n_open = sum(char != "#" for line in lines for char in line)
    assert len(moves) == n_open == 2 * int(knobs["size"]) ** 2 - 1 and set(ways.values()) == {
        1
    }  # a tree of all cells
    answer = moves[place["G"]]
    assert answer[::2] == answer[1::2]
    return len(answer) // 2, [answer[::2].ljust(int(knobs["hard_moves"]), "-")]


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"


def solve_icl(prompt, knobs):
    """Least squares on the middles of the bins: the letter of its prediction, or one next to it."""
    width, bins = int(knobs["hard_dims"]) + 1, int(knobs.get("bins", 32))
    points = [prompt[i : i + width] for i in range(0, len(prompt), width)]
    (level,) = {len(point[: width - 1].rstrip("0")) for point in points}
    assert len(points) == int(knobs["examples"]) + 1 and not any(
        "0" in point[:level] for point in points
    )
    values = [
        [(LETTERS.index(char) + 0.5) * 6 / bins - 3 for char in p[:level] + p[width - 1 :]]
        for p in points
    ]
    known = np.array(values[:-1])
    y = np.linalg.lstsq(known[:, :-1], known[:, -1], rcond=None)[0] @ values[-1]
    letter = int(np.clip(np.floor((y + 3) * bins / 6), 0, bins - 1))
    return level, [LETTERS[i] for i in (letter, letter - 1, letter + 1) if 0 <= i < bins]


# task: its solver, how many rows have to be right, knobs small enough for a test, the last levels of train and of hard
TASKS = {
    "addition": (solve_addition, 1, {"digits": "4", "hard_digits": "6"}, 4, 6),
    "phop": (solve_phop, 1, {"hops": "3", "hard_hops": "5", "length": "24"}, 3, 5),
    "parity": (solve_parity, 1, {"bits": "8", "hard_bits": "12"}, 8, 12),
    "maze": (solve_maze, 1, {"size": "4", "moves": "4", "hard_moves": "6"}, 4, 6),
    "icl": (solve_icl, 0.97, {"dims": "2", "hard_dims": "3", "examples": "30"}, 2, 3),
}
FILES = ("train.bin", "val.bin", "hard.bin", "meta.json")


def prepare(task, folder, **knobs):
    folder.mkdir(exist_ok=True)
    knobs = {"train_rows": 160, "val_rows": 20, **TASKS[task][2], **knobs, "out_dir": folder}
    return Run(f"data/{task}/prepare.py", *(f"--{name}={value}" for name, value in knobs.items()))


def read(folder, split):
    """[(level, prompt, answer)] of a split as it was written."""
    meta = load_meta(folder)
    row, text = (
        meta["row"],
        make_tokenizer(meta).decode(np.fromfile(folder / f"{split}.bin", "<u2")),
    )
    rows = [text[i : i + row["length"]] for i in range(0, len(text), row["length"])]
    levels = [level for level, count in row["levels"][split] for _ in range(count)]
    assert len(levels) == len(rows)
    return [
        (level, text[: row["prompt"]], text[row["prompt"] :]) for level, text in zip(levels, rows)
    ]


def check(task, folder, **knobs):
    """Every row of every split; returns them all."""
    solve, share = TASKS[task][:2]
    rows = [row for split in ("train", "val", "hard") for row in read(folder, split)]
    solved = [solve(prompt, {**TASKS[task][2], **knobs}) for _, prompt, _ in rows]
    assert [level for level, _ in solved] == [level for level, _, _ in rows]
    right = [answer in answers for (_, _, answer), (_, answers) in zip(rows, solved)]
    assert np.mean(right) >= share, [row for row, good in zip(rows, right) if not good][:3]
    assert len({prompt for _, prompt, _ in rows}) == len(rows)  # none twice, in one split or in two
    return rows


@pytest.fixture(scope="module", params=TASKS)
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = prepare(request.param, folder)
    assert run.code == 0, run.err
    return request.param, folder


def test_every_row_is_solved_by_a_solver_of_its_own(prepared):
    check(*prepared)


def test_the_levels_of_the_splits(prepared):
    task, folder = prepared
    last, hardest = TASKS[task][3:]
    first, levels = (2 if task == "parity" else 1), load_meta(folder)["row"]["levels"]
    assert [level for level, _ in levels["train"]] == list(range(first, last + 1))
    assert [level for level, _ in levels["val"]] == list(range(first, last + 1))
    assert levels["hard"] == [[level, 20] for level in range(last + 1, hardest + 1)]
    assert sum(count for _, count in levels["train"]) == (
        159 if task == "phop" else 160
    )  # 160 over 3 levels
    assert levels["val"][-1] == [last, 20]


def test_answers_are_not_nearly_constant(prepared):
    task, folder = prepared
    answers = Counter(answer for _, _, answer in read(folder, "train"))
    share = answers.most_common(1)[0][1] / answers.total()
    assert share < {"addition": 0.06, "phop": 0.35, "parity": 0.6, "maze": 0.15, "icl": 0.15}[task]


def test_the_same_again_and_another_seed(prepared, tmp_path):
    task, folder = prepared
    assert prepare(task, tmp_path).code == 0
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    assert prepare(task, tmp_path, seed=1).code == 0
    for split in ("train", "val", "hard"):
        first, second = (
            {prompt for _, prompt, _ in read(place, split)} for place in (folder, tmp_path)
        )
        assert len(first & second) < 0.7 * len(first)


def test_more_rows_for_training_leave_the_hard_ones_as_they_are(prepared, tmp_path):
    task, folder = prepared
    assert prepare(task, tmp_path, train_rows=80).code == 0
    assert (tmp_path / "hard.bin").read_bytes() == (folder / "hard.bin").read_bytes()


@pytest.mark.parametrize(
    "task, knobs",
    [
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
    ],
)
def test_knobs_act(tmp_path, task, knobs):
    """The solver is told the knobs too, and asserts the widths that follow."""
    assert prepare(task, tmp_path, **knobs).code == 0
    rows = check(task, tmp_path, **knobs)
    if "symbols" in knobs:
        assert len(set(rows[0][1]) - {"|", " "}) == int(knobs["symbols"])
    if "bins" in knobs:
        assert load_meta(tmp_path)["vocab_size"] == 17


@pytest.mark.parametrize(
    "task, knobs, said",
    [
        (
            "addition",
            {"digits": "1", "train_rows": "120"},
            "train: level 1 has fewer than 120 different prompts",
        ),
        (
            "phop",
            {"symbols": "3", "hops": "1", "hard_hops": "2", "length": "6", "train_rows": "99"},
            "train: level 1 has fewer",
        ),
        ("parity", {"train_rows": "1000"}, "train: level 8 has fewer"),
        (
            "maze",
            {"size": "2", "moves": "1", "hard_moves": "2", "val_rows": "30"},
            "hard: level 2 has fewer",
        ),
        (
            "icl",
            {"bins": "2", "dims": "1", "hard_dims": "2", "examples": "2", "train_rows": "99"},
            "train: level 1 has fewer",
        ),
        ("addition", {"digits": "0"}, "digits=0: must be from 1"),
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
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, task, knobs, said):
    run = prepare(task, tmp_path, **knobs)
    last = re.split("[\r\n]", run.err.rstrip("\n"))[-1]  # in front of it may stand tqdm's bar
    assert run.code == 2 and re.match(f"prepare.py: {said}", last) and "Traceback" not in run.err, (
        run.err
    )
    assert not any((tmp_path / name).exists() for name in FILES)


# -----------------------------------------------------------------------------
# rows as dataset.Split gives them


def split_of(folder, name):
    meta = load_meta(folder)
    return open_split(folder, name, meta, meta["row"]["length"] - 1, meta["vocab_size"])


@pytest.mark.parametrize("name", ["train", "val", "hard"])
def test_labels_are_the_answer_alone(prepared, name):
    _, folder = prepared
    data, rows, decode = (
        split_of(folder, name),
        read(folder, name),
        make_tokenizer(load_meta(folder)).decode,
    )
    x, y = data.windows(data.spread(len(rows)))
    assert all(map(np.array_equal, (x, y), data.windows(*data.sliding(5))))  # rows never overlap
    for (_, prompt, answer), x_row, y_row in zip(rows, x, y, strict=True):
        assert decode(x_row) == (prompt + answer)[:-1]
        assert (y_row[: len(prompt) - 1] == -1).all() and decode(y_row[len(prompt) - 1 :]) == answer


def test_an_epoch_visits_every_row_once(prepared):
    data = split_of(prepared[1], "train")
    n, length = data.n_windows, data.row["length"]
    first, second = (data.shuffled(np.arange(n) + epoch * n, seed=1) for epoch in (0, 1))
    for starts in (first, second):
        assert sorted(starts) == list(range(0, n * length, length))  # always at the start of a row
    assert not np.array_equal(first, second)


def test_levels_of_shuffled_rows(prepared):
    task, folder = prepared
    data, decode = split_of(folder, "train"), make_tokenizer(load_meta(folder)).decode
    starts = data.shuffled(np.arange(40), seed=1)
    prompts = [decode(x[: data.row["prompt"]]) for x in data.windows(starts)[0]]
    assert data.levels(starts).tolist() == [
        TASKS[task][0](prompt, TASKS[task][2])[0] for prompt in prompts
    ]


def test_another_block_size_is_refused_with_the_right_one(prepared):
    meta = load_meta(prepared[1])
    right = meta["row"]["length"] - 1
    for wrong in (right - 1, right + 1, 1024):
        with pytest.raises(
            ValueError, match=f"block_size={wrong}: the rows of .*train.bin need {right}$"
        ):
            open_split(prepared[1], "train", meta, wrong, meta["vocab_size"])
