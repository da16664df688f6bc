"""
Write the task of finding the parity of a string of bits:

    python data/parity/prepare.py [--bits=20 --hard_bits=40]

The prompt of a row is a string of bits (its level is how many), the answer is 1 if an odd number of
them are ones, else 0. At hard_bits=6:

    "  1011=" "1"
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

bits = 20  # most bits in train and val, which begin at 2; the level of a row is its number of bits
hard_bits = 40  # most bits in hard, which begins at bits + 1
train_rows = 100_000  # rows of train, as many per level as there are different short strings for
val_rows = 500  # rows per level of val and of hard, fewer where there are too few short strings
seed = 1337  # seed of the random rows
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

limits = {
    "bits": (2, 999),
    "hard_bits": (bits + 1, 1000),
    "train_rows": (bits, 10**9 - 1),
    "val_rows": (1, 10**9 - 1),
}
with clear_errors():
    check_ranges(globals(), limits)


def make(level: int, rng: random.Random) -> tuple[str, str]:
    """Return a random row (prompt, answer) of a level."""
    number = rng.getrandbits(level)
    prompt = f"{number:0{level}b}=".rjust(hard_bits + 1)
    return prompt, str(number.bit_count() % 2)


with clear_errors():
    train, val = {}, {}
    for level in range(2, bits + 1):
        # there are few short strings: at most half of them go to train, a quarter to val
        share = (train_rows - sum(train.values())) // (bits + 1 - level)
        train[level] = min(share, 2**level // 2) if level < bits else share
        val[level] = min(val_rows, 2**level // 4)
    hard = dict.fromkeys(range(bits + 1, hard_bits + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    write_task(out_dir or Path(__file__).parent, "01= ", make, sizes, seed)
