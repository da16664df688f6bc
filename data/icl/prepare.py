"""
Write the task of linear regression in context (Garg et al., arXiv:2208.01066; in looped
transformers: Yang et al., arXiv:2311.12424):

    python data/icl/prepare.py [--dims=8 --hard_dims=12 --examples=24]

Every row has a linear function y = w.x of its own, with w of length 1 in a random direction and
normally distributed x. The prompt is examples of x and y and one more x, the answer is its y. Each
number is one letter (A for about -3, then B, ...), and x is padded with 0 to hard_dims letters. The
level is the number of dimensions of x. Two dimensions, at hard_dims=3, examples=3:

    "TD0WPD0aVR0KXN0" "M"
"""

import math
import random
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

dims = 4  # most dimensions in train and val; the level of a row is its number of dimensions
hard_dims = 6  # most dimensions in hard, which begins at dims + 1
examples = 16  # pairs of x and y before the last x
bins = 32  # letters for the numbers from -3 to 3; larger numbers get the first or the last
train_rows = 100_000  # rows of train, shared evenly among the levels
val_rows = 500  # rows per level of val and of hard
seed = 1337  # seed of the random rows
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

letters = string.ascii_uppercase + string.ascii_lowercase
limits = {
    "dims": (1, 999),
    "hard_dims": (dims + 1, 1000),
    "bins": (2, len(letters)),
    "examples": (hard_dims, 10**5 - 1),  # fewer examples do not determine w
    "train_rows": (dims, 10**9 - 1),
    "val_rows": (1, 10**9 - 1),
}
with clear_errors():
    check_ranges(globals(), limits)


def letter(number: float) -> str:
    """Return the letter of the bin that a number falls into."""
    place = int((number + 3) / 6 * bins)
    return letters[min(max(place, 0), bins - 1)]


def make(level: int, rng: random.Random) -> tuple[str, str]:
    """Return a random row (prompt, answer) of a level."""
    w = [rng.gauss(0, 1) for _ in range(level)]
    text = ""
    for _ in range(examples + 1):
        x = [rng.gauss(0, 1) for _ in range(level)]
        y = sum(a * b for a, b in zip(w, x)) / math.hypot(*w)  # has variance 1 in every row
        text += "".join(letter(number) for number in x) + "0" * (hard_dims - level) + letter(y)
    return text[:-1], text[-1]


with clear_errors():
    train = dict.fromkeys(range(1, dims + 1), train_rows // dims)
    val = dict.fromkeys(range(1, dims + 1), val_rows)
    hard = dict.fromkeys(range(dims + 1, hard_dims + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    write_task(out_dir or Path(__file__).parent, letters[:bins] + "0", make, sizes, seed)
