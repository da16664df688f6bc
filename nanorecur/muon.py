"""
Muon (kellerjordan.github.io/posts/muon): steps along the momentum of a matrix with all its singular
values brought near to 1.

The numbers and the state are torch.optim.Muon's, but matrices of one shape are orthogonalised as
one batch, and the processes of a run divide every batch among them.
"""

import functools
import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

# each of these (a, b, c) takes every singular value x to a x + b x^3 + c x^5
QUINTIC = 5 * ((3.4445, -4.7750, 2.0315),)
BETA2 = 0.95  # of row_norm's average
MOST = 2**26  # entries of a batch in one process: more would take memory and save no time
MOST_ON_CPU = 2**21  # more would not stay in its cache


@functools.cache
def product_dtype(device_type: str) -> torch.dtype:
    """Return the dtype in which matrices are orthogonalised: bfloat16, as in torch.optim.Muon.

    It is float32 on processors without instructions for bfloat16, where that is much slower.
    """
    if device_type != "cpu":
        return torch.bfloat16
    onednn = torch.backends.mkldnn.is_available()
    has_bfloat16 = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices (n, rows, columns) with their singular values near to 1."""
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.to(product_dtype(matrices.device.type))
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in QUINTIC:
        gram = torch.bmm(x, x.mT)  # of the shorter sides
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices alone."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        row_norm: bool = False,
    ):
        """params: parameters or groups of them. lr: tall matrices get sqrt(rows / columns) of it.

        row_norm: steps of all rows are about equally long (NorMuon, arXiv 2510.05491).
        In a run of several processes all of them make every step.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if any(p.dim() != 2 for p in group["params"]):
                raise ValueError("Muon's parameters must be matrices")
        self.row_norm = row_norm
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for params in self.batches(group["params"]):
                self.step_batch(params, group)

    def batches(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield lists of parameters of one shape, those that have a gradient."""
        by_shape = {}
        for p in params:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for alike in by_shape.values():
            most = MOST_ON_CPU if alike[0].device.type == "cpu" else MOST
            size = self.world_size * max(1, most // alike[0].numel())
            for first in range(0, len(alike), size):
                yield alike[first : first + size]

    def step_batch(self, params: list[Tensor], group: dict) -> None:
        """Make the step of parameters of one shape."""
        gradients = [local(p.grad) for p in params]
        momenta = [local(self.momentum_of(p)) for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        updates = [gather(update, p) for update, p in zip(updates, params)]
        updates = self.orthogonalized(updates).float()
        if self.row_norm:
            updates = self.normalized(updates, params)
        updates = [share(update, p) for update, p in zip(updates, params)]
        rows, columns = params[0].shape
        rate = group["lr"] * math.sqrt(max(1, rows / columns))
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-rate)

    def momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def orthogonalized(self, updates: list[Tensor]) -> Tensor:
        """Return matrices (n, rows, columns), each orthogonalised by one of the processes."""
        # a single matrix is not worth a message
        rank, world_size = (self.rank, self.world_size) if len(updates) > 1 else (0, 1)
        size = math.ceil(len(updates) / world_size)
        device = updates[0].device
        dtype = product_dtype(device.type)
        part = torch.zeros(size, *updates[0].shape, dtype=dtype, device=device)
        own = updates[rank * size : (rank + 1) * size]  # the last processes can have fewer, or none
        if own:
            torch._foreach_copy_(list(part[: len(own)]), own)
        part = orthogonalize(part)
        if world_size == 1:
            return part
        gathered = part.new_empty(world_size * size, *part.shape[1:])
        dist.all_gather(list(gathered.split(size)), part.contiguous())
        return gathered[: len(updates)]

    def normalized(self, updates: Tensor, params: list[Tensor]) -> Tensor:
        """Divide the rows of updates (n, rows, columns) by their usual size; keep whole norms."""
        moments = [self.second_moment_of(p) for p in params]
        torch._foreach_lerp_(moments, list(updates.square().mean(2)), 1 - BETA2)
        norms = updates.norm(dim=(1, 2), keepdim=True)
        updates = updates / (torch.stack(moments).sqrt() + 1e-10).unsqueeze(2)
        return updates * norms / (updates.norm(dim=(1, 2), keepdim=True) + 1e-10)

    def second_moment_of(self, p: Tensor) -> Tensor:
        """Return the average squares (rows,) of the rows of p's steps, whole in each process."""
        state = self.state[p]
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros(len(p), device=p.device)
        elif hasattr(state["second_moment"], "to_local"):  # a checkpoint was shared out
            state["second_moment"] = state["second_moment"].full_tensor()
        return state["second_moment"]


# -----------------------------------------------------------------------------
# parameters that processes share (DTensor, whose module takes a second to import)


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, to be changed in place."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather(update: Tensor, p: Tensor) -> Tensor:
    """Return the whole update of p from this process's share of it."""
    if not hasattr(p, "to_local"):
        return update
    from torch.distributed.tensor import DTensor

    layout = dict(shape=p.shape, stride=p.stride())
    update = update.to(product_dtype(update.device.type))  # as it is orthogonalised
    return DTensor.from_local(update, p.device_mesh, p.placements, **layout).full_tensor()


def share(update: Tensor, p: Tensor) -> Tensor:
    """Return this process's share of the whole update of p."""
    if not hasattr(p, "to_local"):
        return update
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None).to_local()
