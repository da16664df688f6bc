"""
Write the task of adding long numbers:

    python data/addition/prepare.py [--terms=4] [--reverse=False]

The prompt of a row is a sum of numbers with equally many digits (the level), the answer is its
value, both with the least significant digit first and with blanks in place of leading zeros. At
hard_digits=5, 123 + 904 = 1027 is

    "321  +409  =" "7201  "

With columns the digits of one place stand together, those of the ones first, behind a mark of the
beginning, and the sum's digit is the target of the last of them, beside the row and unseen by the
model:

    row       |   3 4   2 0   1 9   0 0
    targets   -   - 7   - 2   - 0   - 1
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure, require
from nanorecur.dataset import write_targets_task, write_task

terms = 2  # numbers in a sum
digits = 8  # most digits of a number in train and val; the level of a row is its number of digits
hard_digits = 12  # most digits of a number in hard, which begins at digits + 1
reverse = True  # least significant digit first, the way a carry goes; False: as people write
columns = False  # the digits of one place together, each column with its target
train_rows = 200_000  # rows of train, as many per level as short numbers have different sums for
val_rows = 500  # rows per level of val and of hard, fewer where short numbers have too few sums
seed = 1337  # seed of the random rows
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

limits = {
    "terms": (2, 100),
    "digits": (1, 999),
    "hard_digits": (digits + 1, 1000),
    "train_rows": (digits, 10**9 - 1),
    "val_rows": (1, 10**9 - 1),
}
with clear_errors():
    check_ranges(globals(), limits)
    require("reverse", reverse, reverse or not columns, "True with columns: carries go one way")


def smallest(level: int) -> int:
    """Return the smallest number with so many digits; 0 has one digit."""
    return 10 ** (level - 1) if level > 1 else 0


def show(number: int, width: int) -> str:
    """Return a number as text of that width, in the order of digits that reverse asks for."""
    text = f"{number:>{width}}"
    return text[::-1] if reverse else text


def make(level: int, rng: random.Random) -> tuple[str, str]:
    """Return a random row (prompt, answer) of a level."""
    numbers = [rng.randrange(smallest(level), 10**level) for _ in range(terms)]
    prompt = "+".join(show(number, hard_digits) for number in numbers) + "="
    answer_width = len(str(terms * (10**hard_digits - 1)))
    return prompt, show(sum(numbers), answer_width)


def make_columns(level: int, rng: random.Random) -> tuple[str, list]:
    """Return a random row of a level, in columns, and its targets; blanks fill it up."""
    n_columns = len(str(terms * (10**level - 1)))
    numbers = [rng.randrange(smallest(level), 10**level) for _ in range(terms)]
    digits = [f"{number:0{n_columns}}"[::-1] for number in numbers]
    row, targets = "|" + "".join(map("".join, zip(*digits))), [None]
    for digit in f"{sum(numbers):0{n_columns}}"[::-1]:
        targets += [None] * (terms - 1) + [digit]
    width = 1 + terms * len(str(terms * (10**hard_digits - 1)))
    return row.ljust(width), targets + [None] * (width - len(row))


with clear_errors():
    train, val = {}, {}
    for level in range(1, digits + 1):
        # short numbers have few sums: at most half of them go to train, a quarter to val
        sums = (10**level - smallest(level)) ** terms
        share = (train_rows - sum(train.values())) // (digits + 1 - level)
        train[level] = min(share, sums // 2) if level < digits else share
        val[level] = min(val_rows, sums // 4)
    hard = dict.fromkeys(range(digits + 1, hard_digits + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    folder = out_dir or Path(__file__).parent
    if columns:
        write_targets_task(folder, "0123456789| ", make_columns, sizes, seed)
    else:
        write_task(folder, "0123456789+= ", make, sizes, seed)
