"""
Write the task of sums modulo m over all beginnings of a string:

    python data/prefix/prepare.py [--modulus=2 --length=32 --hard_lengths=64,128,256]

A row is a string of digits (its level is how many) behind a mark of its beginning, without which
attention to equal digits could not tell how many there are. The target at each digit is the sum of
the digits up to it, modulo m; it stands beside the row, unseen by the model. At modulus=2 that is
the parity so far:

    row       | 1 0 1 1
    targets   - 1 1 0 1
"""

import random
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure, require
from nanorecur.dataset import write_targets_task

modulus = 2  # of the sums; digits are from 0 to modulus - 1
length = 32  # most digits in train and val, which begin at 3; the level of a row is their number
hard_lengths = (64, 128, 256)  # digits of the rows of hard
train_rows = 60_000  # rows of train, shared among the levels; short strings have fewer
val_rows = 200  # rows per level of val and of hard, fewer where there are too few short strings
seed = 1337  # seed of the random rows
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

limits = {
    "modulus": (2, 10),
    "length": (3, 10**4),
    "train_rows": (length, 10**9 - 1),
    "val_rows": (1, 10**9 - 1),
}
with clear_errors():
    check_ranges(globals(), limits)
    longer = all(type(n) is int and n > length for n in hard_lengths) and len(hard_lengths) > 0
    require("hard_lengths", hard_lengths, longer, f"whole numbers above length={length}")


def make(level: int, rng: random.Random) -> tuple[str, list]:
    """Return a random row of a level and its targets; blanks without a target fill it up."""
    digits = rng.choices(range(modulus), k=level)
    sums = [str(total % modulus) for total in accumulate(digits)]
    empty = max(hard_lengths) - level
    row = "|" + "".join(map(str, digits)) + " " * empty
    return row, [None, *sums] + [None] * empty


with clear_errors():
    train, val = {}, {}
    for level in range(3, length + 1):
        # there are few short strings: at most half of them go to train, a quarter to val
        share = (train_rows - sum(train.values())) // (length + 1 - level)
        train[level] = min(share, modulus**level // 2)
        val[level] = min(val_rows, modulus**level // 4)
    sizes = {"train": train, "val": val, "hard": dict.fromkeys(hard_lengths, val_rows)}
    write_targets_task(out_dir or Path(__file__).parent, "0123456789| ", make, sizes, seed)
