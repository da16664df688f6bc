"""
Write the task of finding the way through a maze:

    python data/maze/prepare.py [--size=8 --moves=16 --hard_moves=24]

The prompt of a row is a maze of size x size cells, drawn without its outer wall, with exactly one
way between any two cells. The answer is the moves from S to G (up, down, left, right); its level is
how many. At size=3, hard_moves=4, with three moves, and / for a newline:

    "....S/##.#./G..#./####./...../" "LDL-"
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

size = 6  # cells in a row and in a column
moves = 10  # most moves in train and val; the level of a row is its number of moves
hard_moves = 16  # most moves in hard, which begins at moves + 1, and width of every answer
train_rows = 100_000  # rows of train, shared evenly among the levels
val_rows = 500  # rows per level of val and of hard
seed = 1337  # seed of the random rows
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

longest = min(3 * size, size**2 // 2)  # few mazes have longer ways
limits = {
    "size": (2, 999),
    "moves": (1, longest - 1),
    "hard_moves": (moves + 1, longest),
    "train_rows": (moves, 10**9 - 1),
    "val_rows": (1, 10**9 - 1),
}
with clear_errors():
    check_ranges(globals(), limits)

line = 2 * size  # characters in a line of the maze: cell, wall, cell, ..., cell, newline
cells = [line * y + x for y in range(0, line, 2) for x in range(0, line, 2)]  # places in the text
steps = [("U", -line), ("D", line), ("L", -1), ("R", 1)]


def grow(rng: random.Random) -> tuple[list[str], dict[int, str]]:
    """Return a random maze as a list of characters, with S in one cell, and {cell: moves from S}.

    A random walk breaks the wall to every cell that it enters for the first time. This makes all
    mazes equally likely (Aldous, 1990; Broder, 1989).
    """
    here = rng.choice(cells)
    text = list(("#" * (line - 1) + "\n") * (line - 1))
    text[here] = "S"
    routes = dict.fromkeys(cells)  # None: not visited yet
    routes[here] = ""
    unvisited = len(cells) - 1
    while unvisited:
        name, step = rng.choice(steps)
        there = here + 2 * step
        if there not in routes:  # outside of the grid: between two cells or beyond the text
            continue
        if routes[there] is None:
            routes[there] = routes[here] + name
            unvisited -= 1
            text[here + step] = text[there] = "."
        here = there
    return text, routes


def make(level: int, rng: random.Random) -> tuple[str, str]:
    """Return a random row (prompt, answer) of a level."""
    goals = []
    while not goals:
        text, routes = grow(rng)
        goals = [cell for cell in cells if len(routes[cell]) == level]
    goal = rng.choice(goals)
    text[goal] = "G"
    return "".join(text), routes[goal].ljust(hard_moves, "-")


with clear_errors():
    train = dict.fromkeys(range(1, moves + 1), train_rows // moves)
    val = dict.fromkeys(range(1, moves + 1), val_rows)
    hard = dict.fromkeys(range(moves + 1, hard_moves + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    write_task(out_dir or Path(__file__).parent, "#.SGUDLR-\n", make, sizes, seed)
