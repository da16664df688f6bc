"""
The way through a maze:

    python data/maze/prepare.py [--size=8 --moves=16 --hard_moves=24]

A row is a maze of size x size cells, with one way between any two of them and without the wall around it, and the
moves from S to G (up, down, left, right), as many as its level. At size=3, hard_moves=4, three moves, / for a newline:

    "....S/##.#./G..#./####./...../" "LDL-"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

size = 6  # cells in a row and in a column
moves = 10  # of the longest ways in train and val; the level of a row is how many its way has
hard_moves = 16  # of the longest ways in hard, which begins at moves + 1; answers have this width
train_rows = 100_000  # shared evenly by the levels
val_rows = 500  # per level of val and of hard
seed = 1337  # of what is drawn
out_dir = ""  # where to write; "" for beside this script
configure(globals())

longest = min(3 * size, size**2 // 2)  # few mazes have longer ways
limits = {
    "size": range(2, 1000),
    "moves": range(1, longest),
    "hard_moves": range(moves + 1, longest + 1),
    "train_rows": range(moves, 10**9),
    "val_rows": range(1, 10**9),
}
with clear_errors():
    check_ranges(globals(), limits)

side = 2 * size  # characters in a line: a cell, a wall, ..., a cell, the line's end
cells = [
    side * row + column for row in range(0, side, 2) for column in range(0, side, 2)
]  # their places in the text
steps = [("U", -side), ("D", side), ("L", -1), ("R", 1)]


def grow(rng):
    """A maze as a list of characters, one cell the start, and for every cell the moves to it from there.

    A random walk breaks the wall to each cell it is new in: all mazes are equally likely (Aldous, 1990; Broder, 1989).
    """
    here = rng.choice(cells)
    text, ways = list(("#" * (side - 1) + "\n") * (side - 1)), dict.fromkeys(cells)
    text[here], ways[here], unseen = "S", "", len(cells) - 1
    while unseen:
        name, step = rng.choice(steps)
        there = here + 2 * step  # out of the grid it is between two cells or beyond the text
        if there in ways:
            if ways[there] is None:
                ways[there], unseen = ways[here] + name, unseen - 1
                text[here + step] = text[there] = "."
            here = there
    return text, ways


def make(level, rng):
    goals = []
    while not goals:
        text, ways = grow(rng)
        goals = [cell for cell in cells if len(ways[cell]) == level]
    goal = rng.choice(goals)
    text[goal] = "G"
    return "".join(text), ways[goal].ljust(hard_moves, "-")


with clear_errors():
    train = dict.fromkeys(range(1, moves + 1), train_rows // moves)
    val = dict.fromkeys(range(1, moves + 1), val_rows)
    hard = dict.fromkeys(range(moves + 1, hard_moves + 1), val_rows)
    write_task(
        out_dir or Path(__file__).parent,
        "#.SGUDLR-\n",
        make,
        {"train": train, "val": val, "hard": hard},
        seed,
    )
