"""
What a training step trains on, as pure functions of (seed, step): its loops, and of a task its
level.

Every process draws the same, so that all loop equally often and no message is sent.
"""

import math

import numpy as np
import torch

from configurator import require
from model import GPTConfig, sample_loops
from nanorecur.dataset import Split, random_key


class Curriculum:
    """The loops of each step, and which windows it trains on."""

    def __init__(self, config: dict, model: GPTConfig, split: Split | None):
        """config: train.py's options. split: the one that is trained on; None for a stream."""
        self.config, self.model, self.split = config, model, split
        self.seed = config["seed"]
        # the rows of a step have one level
        self.by_level = bool(config["loops_of_level"] or config["level_warmup_iters"])
        self.check()

    def check(self) -> None:
        """Raise ValueError where loops_of_level does not go with the data or the model."""
        pair, warmup = self.config["loops_of_level"], self.config["level_warmup_iters"]
        has_levels = self.split is not None and self.split.row is not None
        allowed = "0 without a task, whose rows have levels"
        require("level_warmup_iters", warmup, has_levels or not warmup, allowed)
        if not pair:
            return
        require("loops_of_level", pair, len(pair) == 2, "two numbers: 1,0 is as many as the level")
        require("loops_of_level", pair, has_levels, "() without a task, whose rows have levels")
        require("loops_of_level", pair, self.model.groups, "() where nothing is looped")
        own = not self.config["loops_per_row"] and self.model.loop_sampling == "fixed"
        allowed = "() with loop_sampling or loops_per_row: it gives the loops itself"
        require("loops_of_level", pair, own, allowed)

    def loops(self, it: int) -> list[tuple]:
        """Return a list of loop counts, one int per group: one for step it, or one for each row."""
        config = self.config
        generator = torch.Generator().manual_seed(random_key(self.seed, "loops", it))
        if config["loops_of_level"]:
            beyond = int(torch.randint(config["loops_beyond"] + 1, (1,), generator=generator))
            n = loops_at(config["loops_of_level"], self.level(it)) + beyond
            return [(n,) * len(self.model.groups)]
        share = risen(it, config["loop_warmup_iters"])
        if config["loop_warmup"] == "sqrt":
            share = 1 - math.sqrt(1 - share)
        means = [max(1, math.ceil(share * n)) for n in self.model.counts()]
        rows = config["batch_size"] * config["gradient_accumulation_steps"]
        draws = rows if config["loops_per_row"] else 1
        if it < steps_of_one_loop(config):
            return [(1,) * len(means)] * draws
        return [sample_loops(self.model, generator, means) for _ in range(draws)]

    def level(self, it: int) -> int:
        """Return the level of the rows of step it: uniform, up to one that rises at first."""
        levels = self.split.level_numbers()
        share = risen(it, self.config["level_warmup_iters"])
        reached = max(1, math.ceil(share * len(levels)))
        generator = torch.Generator().manual_seed(random_key(self.seed, "level", it))
        return levels[int(torch.randint(reached, (1,), generator=generator))]

    def starts(self, it: int, positions: np.ndarray) -> np.ndarray:
        """Return the starts (N,) of the windows at positions (N,) of the training order."""
        if self.by_level:
            return self.split.shuffled_level(self.level(it), positions, self.seed)
        return self.split.shuffled(positions, self.seed)


def steps_of_one_loop(config: dict) -> int:
    """Return the number of steps, the first ones, that loop once (loop_start)."""
    return math.ceil(config["loop_start"] * config["max_iters"])


def risen(it: int, over: int) -> float:
    """Return how far a value that rises over so many steps has come in step it, at most 1."""
    return min(1.0, (it + 1) / over) if over else 1.0


def loops_at(loops_of_level: tuple, level: int) -> int:
    """Return the loops that rows of a level get: (a, b) is a level + b, at least 1."""
    factor, offset = loops_of_level
    return max(1, math.ceil(factor * level + offset))
