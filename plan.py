"""
One optimizer step of train.py as a function, to be timed (bench.py train) or followed without memory (bench.py plan).
"""

import functools
import math

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from device import autocast
from model import GPT, GPTConfig
from objectives import GATED, Objective


# -----------------------------------------------------------------------------
# a step of train.py
def build(config):
    """The objective, and the model in it, that train.py makes of its options, in training mode."""
    model = GPT(GPTConfig(**{name: config[name] for name in GPTConfig.__dataclass_fields__}))
    details = ("loss_chunk", "loss_weighting", "entropy_weight", "distill_weight", "ahead_weight")
    scored = Objective(model, config["objective"], *(config[name] for name in details)).train()
    for name, p in model.named_parameters():
        gate = name.startswith("exit_gate.")
        p.requires_grad_(config["objective"] in GATED if gate else config["objective"] != "exit_gate")
    return scored


def make_optimizers(config, model):
    groups = {kind: [p for p in some if p.requires_grad] for kind, some in model.parameter_groups().items()}
    matrices = {"params": groups["matrices"], "weight_decay": config["weight_decay"]}
    rest = {"params": groups["embeddings"] + groups["vectors"], "weight_decay": 0.0}
    if config["optimizer"] == "muon":
        return [torch.optim.Muon([matrices]), torch.optim.AdamW([rest], fused=True)]
    return [torch.optim.AdamW([rest, matrices], fused=True)]


def make_worker(config, scored, compiled):
    """What computes: the objective itself, or with param_dtype=bfloat16 one with such weights."""
    worker = scored
    if config["param_dtype"] == "bfloat16":
        worker = build(config).to(next(scored.parameters()).device)
        for p in worker.parameters():
            p.data = p.data.bfloat16()
    for block in worker.model.transformer.h if compiled else ():
        block.compile()
    for block in worker.model.transformer.h if config["recompute"] == "block" else ():
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
    for loop in worker.model.transformer.loops if config["recompute"] == "loop" else ():
        loop.step = functools.partial(recomputed, loop.step, use_reentrant=False)
    return worker


def training_step(config, device, dtype, compiled=False, precision=autocast, micro_steps=1):
    """(objective, step): step(n_loop) is one optimizer step on the same random tokens in each micro-step."""
    torch.manual_seed(config["seed"])
    scored = build(config).to(device)
    optimizers, worker = make_optimizers(config, scored.model), make_worker(config, scored, compiled)
    masters, copies = list(scored.parameters()), list(worker.parameters())
    average = [p.detach().clone() for p in masters] if config["ema_decay"] else []
    rows, length = config["batch_size"], config["block_size"]
    tokens = torch.randint(config["vocab_size"], (rows, length + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(n_loop=None):
        for _ in range(micro_steps):
            with precision(device, dtype):
                loss, _ = worker(x, y, n_loop)
            (loss / (micro_steps * rows * length)).backward()
            if worker is not scored:
                to_masters(masters, copies)
        torch.nn.utils.clip_grad_norm_(masters, config["grad_clip"] or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            if worker is not scored:
                torch._foreach_copy_(copies, masters)
            if average:
                torch._foreach_lerp_(average, masters, 1 - config["ema_decay"])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    return scored, step


def to_masters(masters, copies):
    """The gradients of the copies that compute, added to those of the weights in float32."""
    for master, p in zip(masters, copies, strict=True):
        if p.grad is not None:
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None
