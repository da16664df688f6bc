"""
p-hop induction (Sanford et al., arXiv:2402.09268; in looped transformers: Saunshi et al., arXiv:2502.17416):

    python data/phop/prepare.py [--length=256 --hops=32 --hard_hops=48]

A hop goes from a symbol to the one behind its latest earlier occurrence. A row is the number of hops p (its level) in
strokes, which need no new symbol for a larger p, a sequence without equal neighbours, and the symbol p hops from its
last one. At symbols=4, length=16, hard_hops=4, two hops, from the last A to the C at its left and on to the A of "CAD":

    "  ||CBADCBCADBABDACA" "A"
"""

import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_task

symbols = 4  # of which sequences are made: A, B, C, ...
length = 96  # of a sequence
hops = 8  # most hops in train and val; the level of a row is how many
hard_hops = 16  # most hops in hard, which begins at hops + 1
train_rows = 200_000  # shared evenly by the levels
val_rows = 500  # per level of val and of hard
seed = 1337  # of what is drawn
out_dir = ""  # where to write; "" for beside this script
configure(globals())

letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
limits = {
    "symbols": range(3, 27),
    "hops": range(1, 10**4),
    "hard_hops": range(hops + 1, 10**4),
    "length": range(symbols * hard_hops, 10**6),  # a hop goes symbols - 1 places back on average
    "train_rows": range(hops, 10**9),
    "val_rows": range(1, 10**9),
}
with clear_errors():
    check_ranges(globals(), limits)


def draw(rng):
    """Any sequence without equal neighbours, each as likely: a first symbol, then how far to turn the alphabet."""
    turns = [rng.randrange(symbols), *rng.choices(range(1, symbols), k=length - 1)]
    return "".join(letters[turn % symbols] for turn in accumulate(turns))


def make(level, rng):
    place = 0
    while (
        not place
    ):  # the hops ran out; drawn again, by symmetry the answers stay as frequent as each other
        sequence, place = draw(rng), length - 1
        for _ in range(level):
            place = place and sequence.rfind(sequence[place], 0, place) + 1
    return f"{'|' * level:>{hard_hops}}{sequence}", sequence[place]


with clear_errors():
    train = dict.fromkeys(range(1, hops + 1), train_rows // hops)
    val = dict.fromkeys(range(1, hops + 1), val_rows)
    hard = dict.fromkeys(range(hops + 1, hard_hops + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    write_task(out_dir or Path(__file__).parent, letters[:symbols] + "| ", make, sizes, seed)
