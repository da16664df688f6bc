"""
The processes of a run: one alone, several under torchrun with a whole model each (DDP), or several
that share one model's parameters, gradients and moments (FSDP2).

A script calls the same methods in all three cases; alone they do next to nothing.
"""

import gc
import inspect
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel as DDP

from model import GPT


class Processes:
    """This process and its peers under torchrun, if there are any; each holds the whole model."""

    sharded = False

    def __init__(self):
        """Read rank and number of processes from torchrun's environment; nothing is started."""
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 0))
        self.distributed = self.world_size > 0
        self.world_size = max(1, self.world_size)
        self.is_first = self.rank == 0  # this process prints, logs and saves

    def start(self, device: torch.device, backend: str, timeout: float) -> torch.device:
        """Join the process group and return this process's device.

        backend: nccl, gloo, or auto, which is nccl on CUDA. timeout: seconds of each collective.
        """
        if device.type == "cuda":
            device = torch.device("cuda", self.local_rank) if self.distributed else device
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32
        if self.distributed:
            on_gpu = backend == "nccl" or (backend == "auto" and device.type == "cuda")
            waits = timedelta(seconds=timeout)
            self.store, *_ = next(rendezvous("env://", timeout=waits))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun's own store outlives a restart and then still has the addresses of dead
                # processes, for which the living would wait: a prefix per restart hides them.
                # Agents of several hosts count restarts differently; docs/machines.md
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                self.store = dist.PrefixStore("restart" + restart, self.store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # gloo beside NCCL waits for no GPU
                timeout=waits,
                world_size=self.world_size,
                rank=self.rank,
                store=self.store,
            )
        return device

    # -------------------------------------------------------------------------
    # messages

    def agree(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        largest = torch.tensor(number)
        if self.distributed:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place, and return it."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def merge(self, part: dict) -> dict:
        """Return the dicts of all processes as one."""
        parts = [part] * self.world_size
        if self.distributed:
            dist.all_gather_object(parts, part)
        return {key: value for part in parts for key, value in part.items()}

    # -------------------------------------------------------------------------
    # the model

    def place(self, model: GPT, device: torch.device, dtype: torch.dtype) -> None:
        """Move a model to the device. dtype: what it computes in where processes share it."""
        model.to(device)

    def wrap(self, objective: nn.Module, model: GPT, device: torch.device) -> Callable:
        """Return the objective as it is called in training."""
        self.wrapped = objective
        if self.distributed:
            devices = [device.index] if device.type == "cuda" else None
            options = {buffers_option(DDP): False}  # they are constants
            # would cut each compiled graph in two; they are small enough to overlap as they are
            torch._dynamo.config.optimize_ddp = False
            self.wrapped = DDP(objective, devices, gradient_as_bucket_view=True, **options)
        return self.wrapped

    def sync_gradients(self, sync: bool) -> None:
        """Average gradients over the processes in the backward passes that follow, or do not."""
        self.wrapped.require_backward_grad_sync = sync

    def run(self, model: GPT, function: Callable, *arguments) -> object:
        """Return function(*arguments), which uses the model's parameters."""
        return function(*arguments)

    def gradient_norm(self, norm: Tensor) -> float:
        """Return the norm of the global gradient, from what clip_grad_norm_ returned."""
        return norm.item()

    # -------------------------------------------------------------------------
    # checkpoints

    def state_of(self, model: GPT) -> dict:
        return model.state_dict()

    def gather(self, state: dict) -> dict:
        """Return nested dicts of states with whole tensors; all processes take part."""
        return state

    def before_restoring(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare an optimizer for load_state_dict with whole tensors."""

    def end(self, code: int) -> None:
        """Leave the process group; exit with a code that is not 0."""
        if self.distributed:
            # these hold the group, whose threads must not outlive Python (pytorch issue 190489)
            del self.wrapped, self.store
            gc.collect()
            dist.destroy_process_group()
        self.exit(code)

    def exit(self, code: int) -> None:
        if code:
            sys.exit(code)


class ShardedProcesses(Processes):
    """Processes that share one model by FSDP2: each keeps its part of every parameter and moment.

    A block is gathered whenever it is called, so for each loop anew. Gradients are averaged in
    float32, after the last micro-step of a step.
    """

    sharded = True

    def place(self, model: GPT, device: torch.device, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        mesh = init_device_mesh(device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        # parameters outside the blocks are gathered for the whole of model.call_gathered
        for part in (*model.transformer.h, model):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        model.call_gathered = call
        register_fsdp_forward_method(model, "call_gathered")

    def wrap(self, objective: nn.Module, model: GPT, device: torch.device) -> Callable:
        self.model = model

        def call_objective(*arguments):
            return self.run(model, objective, *arguments)

        return call_objective

    def sync_gradients(self, sync: bool) -> None:
        self.model.set_requires_gradient_sync(sync)

    def run(self, model: GPT, function: Callable, *arguments) -> object:
        return model.call_gathered(function, *arguments)

    def gradient_norm(self, norm: Tensor) -> float:
        return norm.full_tensor().item()

    def state_of(self, model: GPT) -> dict:
        return model.state_dict(keep_vars=True)  # by which gather() knows tied weights

    def gather(self, state: dict) -> dict:
        return gather_tensors(state, keep=self.is_first)

    def before_restoring(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_load_state_dict_pre_hook(shard_moments)

    def end(self, code: int) -> None:
        """Leave by os._exit: torch keeps a shared model's group in caches that nobody can empty."""
        self.model = None
        gc.collect()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)


def buffers_option(wrapper: type) -> str:
    """Return the name of DDP's argument that sends buffers before each forward pass."""
    new = "forward_sync_buffers"  # since torch 2.13
    known = any(new in inspect.signature(cls).parameters for cls in wrapper.__mro__)
    return new if known else "broadcast_buffers"


def call(function: Callable, *arguments) -> object:
    """Return function(*arguments): as a method of a model it runs with gathered parameters."""
    return function(*arguments)


@torch.no_grad()
def gather_tensors(state: dict, keep: bool) -> dict:
    """Return nested dicts with whole tensors, on the CPU, in place of shards; None without keep."""
    from torch.distributed.tensor import DTensor

    gathered = {}  # by identity, so that tied weights stay one tensor

    def gather(part):
        if isinstance(part, dict):
            return {name: gather(inner) for name, inner in part.items()}
        if isinstance(part, DTensor) and id(part) not in gathered:
            tensor = part.full_tensor()
            gathered[id(part)] = tensor.cpu() if keep else None
        return gathered.get(id(part), part)

    return gather(state)


def shard_moments(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Replace whole moments by this process's shards: a hook of load_state_dict."""
    from torch.distributed.tensor import distribute_tensor

    params = [p for group in optimizer.param_groups for p in group["params"]]

    def shard(moment: Tensor, p: Tensor) -> Tensor:
        if moment.dim() == 0:
            return moment
        return distribute_tensor(moment, p.device_mesh, p.placements, src_data_rank=None)

    shards = {}
    for i, moments in state["state"].items():
        shards[i] = {name: shard(moment, params[i]) for name, moment in moments.items()}
    return {**state, "state": shards}
