"""
Compiling a model in parts whose shape does not depend on the number of loops.

A stage is one graph: a looped group's blocks with injection and norm are compiled as the loop's
step, the blocks before and after it as theirs. So one compilation serves every number of loops, and
the names of parameters stay. The index of a loop is a tensor where it is read: as a number, each
value would be a graph of its own.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT, Context, Identity, Loop
from nanorecur.objectives import Objective


def compile_parts(
    objective: Objective, *others: GPT, by_block: bool = False, backend: str = "inductor"
) -> None:
    """Compile the stages of an objective's model and of others in place, and on a GPU its loss.

    by_block: each block alone, where something else happens between them (shards are gathered,
    activations are recomputed).
    """
    # all stages of all models, with and without gradient, share this limit
    torch._dynamo.config.recompile_limit = 64
    for model in {objective.model, *others}:
        if by_block:
            for block in model.transformer.h:
                block.compile(backend=backend)
        else:
            for loop in model.stage_loops:
                loop.step = compiled_step(loop, backend)
    if objective.model.lm_head.weight.device.type == "cuda":
        objective.cross_entropy = torch.compile(objective.cross_entropy, backend=backend)


def compiled_step(loop: Loop, backend: str) -> Callable:
    """Return loop.step compiled: (s, e, i, ctx) -> the state after loop i."""
    step = torch.compile(loop.step, backend=backend)
    reads_index = not isinstance(loop.index, Identity)

    @functools.cache
    def index_tensor(i: int, device: torch.device) -> Tensor:
        return torch.tensor(i, device=device)

    def call(s: Tensor, e: Tensor, i: int | Tensor, ctx: Context) -> Tensor:
        if reads_index and isinstance(i, int):
            i = index_tensor(i, s.device)
        if s is e:  # in the first loop: one tensor in two places would be a graph of its own
            s = s.view_as(s)
        return step(s, e, i, ctx)

    return call
