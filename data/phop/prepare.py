"""
Write the task of p-hop induction (Sanford et al., arXiv:2402.09268; in looped transformers:
Saunshi et al., arXiv:2502.17416):

    python data/phop/prepare.py [--length=256 --hops=32 --hard_hops=48]
    python data/phop/prepare.py --every_position --symbols=8 --length=64 --hops=6 --hard_hops=24

A hop goes from a symbol to the symbol behind its latest earlier occurrence. The prompt of a row is
the number of hops p (its level) in strokes, so that a larger p needs no new symbol, and a sequence
without equal neighbours. The answer is the symbol p hops from the last one. At symbols=4,
length=16, hard_hops=4, two hops go from the last A to the C at its left, and on to the A of "CAD":

    "  ||CBADCBCADBABDACA" "A"

With every_position each symbol from which so many hops are possible has the symbol they lead to as
its target, beside the row and unseen by the model. The number of hops is then in the row only with
strokes; without them the model's loops tell it, as many as hops (--loops_of_level=1,0).
"""

import random
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure
from nanorecur.dataset import write_targets_task, write_task

symbols = 4  # number of symbols of the sequences: A, B, C, ...
length = 96  # symbols in a sequence
hops = 8  # most hops in train and val; the level of a row is its number of hops
hard_hops = 16  # most hops in hard, which begins at hops + 1
every_position = False  # a target at every symbol, instead of one answer behind the row
strokes = False  # with every_position: the number of hops in strokes before the row
train_rows = 200_000  # rows of train, shared evenly among the levels
val_rows = 500  # rows per level of val and of hard
seed = 1337  # seed of the random rows
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
limits = {
    "symbols": (3, 26),
    "hops": (1, 10**4 - 1),
    "hard_hops": (hops + 1, 10**4 - 1),
    # a hop goes symbols - 1 places back on average; with targets everywhere some places suffice
    "length": (hard_hops + 2 if every_position else symbols * hard_hops, 10**6 - 1),
    "train_rows": (hops, 10**9 - 1),
    "val_rows": (1, 10**9 - 1),
}
with clear_errors():
    check_ranges(globals(), limits)


def draw(rng: random.Random) -> str:
    """Return a random sequence without equal neighbours, each with the same probability.

    Each symbol is so many letters further in the alphabet than the one before it, modulo symbols.
    """
    steps = [rng.randrange(symbols), *rng.choices(range(1, symbols), k=length - 1)]
    return "".join(letters[total % symbols] for total in accumulate(steps))


def hop(sequence: str, place: int) -> int:
    """Return the place that a hop leads to, or 0 where the symbol does not occur earlier."""
    return sequence.rfind(sequence[place], 0, place) + 1


def make(level: int, rng: random.Random) -> tuple[str, str]:
    """Return a random row (prompt, answer) of a level.

    A sequence in which so many hops are not possible is drawn anew. The symbols are symmetric, so
    that all answers stay equally frequent.
    """
    place = 0
    while place == 0:
        sequence = draw(rng)
        place = length - 1
        for _ in range(level):
            place = hop(sequence, place)
    return f"{'|' * level:>{hard_hops}}{sequence}", sequence[place]


def make_everywhere(level: int, rng: random.Random) -> tuple[str, list]:
    """Return a random row of a level and its targets, None where so many hops are not possible.

    A sequence without any target is drawn anew.
    """
    targets = []
    while not any(targets):
        sequence = draw(rng)
        after, latest = [0], {sequence[0]: 1}  # of each place where a hop leads, 0: nowhere
        for place, symbol in enumerate(sequence[1:], 2):
            after.append(latest.get(symbol, 0))
            latest[symbol] = place
        ends = range(length)
        for _ in range(level):
            ends = [after[end] if end else 0 for end in ends]
        targets = [sequence[end] if end else None for end in ends]
    if not strokes:
        return sequence, targets
    return f"{'|' * level:>{hard_hops}}{sequence}", [None] * hard_hops + targets


with clear_errors():
    train = dict.fromkeys(range(1, hops + 1), train_rows // hops)
    val = dict.fromkeys(range(1, hops + 1), val_rows)
    hard = dict.fromkeys(range(hops + 1, hard_hops + 1), val_rows)
    sizes = {"train": train, "val": val, "hard": hard}
    folder, alphabet = out_dir or Path(__file__).parent, letters[:symbols] + "| "
    if every_position:
        write_targets_task(folder, alphabet, make_everywhere, sizes, seed)
    else:
        write_task(folder, alphabet, make, sizes, seed)
