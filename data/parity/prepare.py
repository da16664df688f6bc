"""
Parity of a string of bits:

    python data/parity/prepare.py [--bits=20 --hard_bits=40]

A row is some bits (how many is its level) and 1 if an odd number of them are ones, else 0. At hard_bits=6:

    "  1011=" "1"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

bits = (
    20  # in the longest strings of train and val, which begin at 2; the level of a row is how many
)
hard_bits = 40  # in the longest strings of hard, which begins at bits + 1
train_rows = 100_000  # shared evenly by the levels, where there are so many strings
val_rows = 500  # per level of val and of hard, where there are so many strings
seed = 1337  # of what is drawn
out_dir = ""  # where to write; "" for beside this script
configure(globals())

limits = {
    "bits": range(2, 1000),
    "hard_bits": range(bits + 1, 1001),
    "train_rows": range(bits, 10**9),
    "val_rows": range(1, 10**9),
}
with clear_errors():
    check_ranges(globals(), limits)


def make(level, rng):
    number = rng.getrandbits(level)
    return f"{number:0{level}b}=".rjust(hard_bits + 1), str(number.bit_count() % 2)


with clear_errors():
    train, val = {}, {}
    for level in range(2, bits + 1):  # short strings: half of them for train, a quarter for val
        even = (train_rows - sum(train.values())) // (bits + 1 - level)
        train[level] = min(even, 2**level // 2) if level < bits else even
        val[level] = min(val_rows, 2**level // 4)
    hard = dict.fromkeys(range(bits + 1, hard_bits + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    write_task(out_dir or Path(__file__).parent, "01= ", make, sizes, seed)
