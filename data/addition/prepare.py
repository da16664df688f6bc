"""
Addition of long numbers:

    python data/addition/prepare.py [--terms=4] [--reverse=False]

A row is a sum of numbers of equally many digits (its level) and its value, both least significant digit first, with
blanks where leading zeros would stand. At hard_digits=5, 123 + 904 = 1027:

    "321  +409  =" "7201  "
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

terms = 2  # numbers in a sum
digits = 8  # of the longest numbers in train and val; the level of a row is how many digits each number has
hard_digits = 12  # of the longest numbers in hard, which begins at digits + 1
reverse = True  # numbers and sum least significant digit first, the way a carry goes; False: as people write
train_rows = 200_000  # shared evenly by the levels, where short numbers have so many sums
val_rows = 500  # per level of val and of hard, where short numbers have so many sums
seed = 1337  # of what is drawn
out_dir = ""  # where to write; "" for beside this script
configure(globals())

limits = {
    "terms": range(2, 101),
    "digits": range(1, 1000),
    "hard_digits": range(digits + 1, 1001),
    "train_rows": range(digits, 10**9),
    "val_rows": range(1, 10**9),
}
with clear_errors():
    check_ranges(globals(), limits)


def lowest(level):
    """The smallest number of so many digits; 0 has one."""
    return 10 ** (level - 1) if level > 1 else 0


def show(number, width):
    return f"{number:>{width}}"[:: -1 if reverse else 1]


def make(level, rng):
    numbers = [rng.randrange(lowest(level), 10**level) for _ in range(terms)]
    width = len(str(terms * (10**hard_digits - 1)))
    return "+".join(show(number, hard_digits) for number in numbers) + "=", show(
        sum(numbers), width
    )


with clear_errors():
    train, val = {}, {}
    for level in range(
        1, digits + 1
    ):  # short numbers: half of their sums for train, a quarter for val
        sums = (10**level - lowest(level)) ** terms
        even = (train_rows - sum(train.values())) // (digits + 1 - level)
        train[level] = min(even, sums // 2) if level < digits else even
        val[level] = min(val_rows, sums // 4)
    hard = dict.fromkeys(range(digits + 1, hard_digits + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    write_task(out_dir or Path(__file__).parent, "0123456789+= ", make, sizes, seed)
