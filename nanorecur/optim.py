"""
What happens between the gradient of a step and the next step: optimizers, weights in two number
types, the guard against bad gradients, spectral clipping, the moving average.

A training loop calls all of them: where an option is off, its object does nothing; only the guard
always refuses NaN and Inf.
"""

import copy
import math
import statistics
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import GPT, spectral_clip
from nanorecur import checkpoint
from nanorecur.muon import Muon


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters as matrices, embeddings (and the head) and vectors.

    Matrices are all others of two or more dimensions, but for those of a single row (an exit gate).
    """
    embeddings = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.lm_head:
            embeddings.add(id(module.weight))
    groups = {"matrices": [], "embeddings": [], "vectors": []}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if id(p) in embeddings:
            groups["embeddings"].append(p)
        elif p.dim() > 1 and len(p) > 1:
            groups["matrices"].append(p)
        else:
            groups["vectors"].append(p)
    return groups


class Optimizers:
    """AdamW on all parameters, or Muon on the matrices of Linear layers and AdamW on the rest."""

    def __init__(self, model: GPT, config: dict):
        """config: train.py's options."""
        groups = parameter_groups(model)
        decay = config["weight_decay"]
        matrices = {"params": groups["matrices"], "weight_decay": decay}
        others = {
            "params": groups["embeddings"] + groups["vectors"],
            "weight_decay": decay if config["weight_decay_all"] else 0.0,
        }
        rate, betas = config["learning_rate"], (config["beta1"], config["beta2"])
        adamw = partial(torch.optim.AdamW, lr=rate, betas=betas, fused=True)
        if config["optimizer"] == "muon":
            muon_rate = config["muon_learning_rate"]
            row_norm = config["muon_row_norm"]
            muon = Muon([matrices], lr=muon_rate, row_norm=row_norm)
            self.by_name = {"muon": muon, "adamw": adamw([others])}
            self.full_rates = {"muon": muon_rate, "adamw": rate}
        else:
            self.by_name = {"adamw": adamw([others, matrices])}
            self.full_rates = {"adamw": rate}

    def step(self, rate_share: float) -> None:
        """Make a step at this share of the full learning rates."""
        for name, optimizer in self.by_name.items():
            for group in optimizer.param_groups:
                group["lr"] = rate_share * self.full_rates[name]
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}

    def restore(self, states: dict, processes) -> None:
        """Load the states of a checkpoint. ValueError where they are not these optimizers'."""
        for name, optimizer in self.by_name.items():
            processes.before_restoring(optimizer)
            checkpoint.restore(optimizer, states[name])


class ComputeCopy:
    """The objective to call in training: the model's own, or with bfloat16 weights a copy of it.

    The gradients of a copy are added up in the model, which keeps its weights in float32.
    """

    def __init__(self, objective: nn.Module, param_dtype: str):
        self.model_objective = objective
        self.objective = objective  # the one to call in training
        self.is_copy = param_dtype == "bfloat16"
        if self.is_copy:
            self.objective = copy.deepcopy(objective)
            for p in self.objective.parameters():
                p.data = p.data.bfloat16()

    def collect_gradients(self) -> None:
        """Move the copy's gradients to the model, added to those that are there, in float32."""
        if not self.is_copy:
            return
        params = self.model_objective.parameters()
        sums, gradients = [], []
        for p, computed in zip(params, self.objective.parameters(), strict=True):
            if computed.grad is None:
                continue
            if p.grad is None:
                p.grad = computed.grad.float()
            else:
                sums.append(p.grad)
                gradients.append(computed.grad)
            computed.grad = None
        if sums:
            torch._foreach_add_(sums, gradients)

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copy the model's weights to the copy, rounded."""
        if self.is_copy:
            copies = list(self.objective.parameters())
            torch._foreach_copy_(copies, list(self.model_objective.parameters()))


class SpectralClip:
    """Brings singular values of the blocks' matrices above beta to beta; beta 0 is off."""

    def __init__(self, model: GPT, beta: float, every: int, all_blocks: bool):
        """every: steps between clips. all_blocks: also of blocks that are not looped."""
        self.beta, self.every = beta, every
        looped = {block for loop in model.transformer.loops for block in loop.blocks}
        self.by_shape = {}  # matrices of one shape are clipped in one batch
        if beta == 0:
            return
        for block in model.transformer.h:
            if all_blocks or block in looped:
                for module in block.modules():
                    if isinstance(module, nn.Linear):
                        weight = module.weight.detach()
                        self.by_shape.setdefault(weight.shape, []).append(weight)

    def __call__(self, iter_num: int) -> None:
        if iter_num % self.every != 0:
            return
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # in TF32 values end 0.2 % above beta
        for matrices in self.by_shape.values():
            clipped = spectral_clip(torch.stack(matrices), self.beta)
            torch._foreach_copy_(matrices, list(clipped))
        torch.set_float32_matmul_precision(precision)


class GradientGuard:
    """Refuses gradients that are not finite, or far longer than the last ones were."""

    KEPT = 100  # norms that the median is of

    def __init__(self, spike_factor: float, state: dict | None = None):
        """spike_factor: of the median norm; 0: only NaN and Inf are refused. state: as saved."""
        self.spike_factor = spike_factor
        self.state = {"norms": [], "skipped": 0, "in_a_row": 0} | (state or {})

    def accepts(self, norm: float) -> bool:
        """Return whether to make the step; norm is that of the global gradient."""
        state, limit = self.state, math.inf
        if self.spike_factor and len(state["norms"]) == self.KEPT:
            limit = self.spike_factor * statistics.median(state["norms"])
        if math.isfinite(norm) and norm <= limit:
            state["norms"] = [*state["norms"], norm][-self.KEPT :]
            state["in_a_row"] = 0
            return True
        state["in_a_row"] += 1
        state["skipped"] += 1
        return False


class MovingAverage:
    """The exponential moving average of a model's weights; without a decay the model itself."""

    def __init__(self, model: GPT, decay: float):
        self.source = model
        self.averaged = None
        if decay:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> GPT:
        """The model to evaluate and to save."""
        return self.averaged.module if self.averaged else self.source

    def restore(self, weights: dict, n_updates: int) -> None:
        """Go on from saved weights after so many updates."""
        if self.averaged:
            self.averaged.module.load_state_dict(weights)
            self.averaged.n_averaged.fill_(n_updates)  # 0 would start the average anew

    def update(self) -> None:
        if self.averaged:
            self.averaged.update_parameters(self.source)


def clip_gradient(model: nn.Module, most: float) -> Tensor:
    """Scale the gradient to a norm of at most most (0: no bound) and return what it was."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)
