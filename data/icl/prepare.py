"""
Linear regression in context (Garg et al., arXiv:2208.01066; in looped transformers: Yang et al., arXiv:2311.12424):

    python data/icl/prepare.py [--dims=8 --hard_dims=12 --examples=24]

Each row has a linear function of its own, y = w.x, with w of length 1 in any direction and x normal. The row is some
examples of x and y, one more x, and the y that belongs to it, every number one letter (A for about -3, then B, ...),
with a 0 for each dimension that x has less than hard_dims. Level: the dimensions. Two, at hard_dims=3, examples=3:

    "TD0WPD0aVR0KXN0" "M"
"""

import math
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

dims = 4  # most dimensions in train and val; the level of a row is how many
hard_dims = 6  # most dimensions in hard, which begins at dims + 1
examples = 16  # pairs of x and y in front of the question
bins = 32  # equal parts of -3 to 3, what is beyond goes into the outer ones
train_rows = 100_000  # shared evenly by the levels
val_rows = 500  # per level of val and of hard
seed = 1337  # of what is drawn
out_dir = ""  # where to write; "" for beside this script
configure(globals())

letters = string.ascii_uppercase + string.ascii_lowercase
limits = {
    "dims": range(1, 1000),
    "hard_dims": range(dims + 1, 1001),
    "bins": range(2, len(letters) + 1),
    "examples": range(hard_dims, 10**5),  # fewer would leave w open
    "train_rows": range(dims, 10**9),
    "val_rows": range(1, 10**9),
}
with clear_errors():
    check_ranges(globals(), limits)


def letter(number):
    return letters[min(max(int((number + 3) / 6 * bins), 0), bins - 1)]


def make(level, rng):
    w, text = [rng.gauss(0, 1) for _ in range(level)], ""
    for _ in range(examples + 1):
        x = [rng.gauss(0, 1) for _ in range(level)]
        y = sum(a * b for a, b in zip(w, x)) / math.hypot(*w)  # of variance 1 in every row
        text += "".join(map(letter, x)) + "0" * (hard_dims - level) + letter(y)
    return text[:-1], text[-1]


with clear_errors():
    train = dict.fromkeys(range(1, dims + 1), train_rows // dims)
    val = dict.fromkeys(range(1, dims + 1), val_rows)
    hard = dict.fromkeys(range(dims + 1, hard_dims + 1), val_rows)
    chars = letters[:bins] + "0"
    write_task(
        out_dir or Path(__file__).parent,
        chars,
        make,
        {"train": train, "val": val, "hard": hard},
        seed,
    )
