"""
Write the task of adding long numbers:

    python data/addition/prepare.py [--terms=4] [--reverse=False]

The prompt of a row is a sum of numbers with equally many digits (the level), the answer is its
value, both with the least significant digit first and with blanks in place of leading zeros. At
hard_digits=5, 123 + 904 = 1027 is

    "321  +409  =" "7201  "
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

terms = 2  # numbers in a sum
digits = 8  # most digits of a number in train and val; the level of a row is its number of digits
hard_digits = 12  # most digits of a number in hard, which begins at digits + 1
reverse = True  # least significant digit first, the way a carry goes; False: as people write
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
    write_task(out_dir or Path(__file__).parent, "0123456789+= ", make, sizes, seed)
