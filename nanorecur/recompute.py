"""
Activations computed again in the backward pass, to save their memory (arXiv 1604.06174).
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from model import GPT

RECOMPUTE = ("none", "cheap", "block", "loop")  # legal values of the option
aten = torch.ops.aten
EXPENSIVE = [  # what "cheap" keeps: matrix products and the kernels of attention
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def recompute_activations(model: GPT, what: str) -> None:
    """Let the backward pass compute activations again: of every block, of every loop, or cheap.

    "cheap" keeps the results of matrix products and attention, and computes the rest again.
    """
    # with "cheap" both passes need the same casts of weights, so none may be remembered
    torch.set_autocast_cache_enabled(what != "cheap")
    options = {}
    if what == "cheap":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    if what in ("cheap", "block"):
        for block in model.transformer.h:
            block.forward = partial(recomputed, block.forward, use_reentrant=False, **options)
    if what == "loop":
        for loop in model.transformer.loops:
            loop.step = partial(recomputed, loop.step, use_reentrant=False)
