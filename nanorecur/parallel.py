"""
A model divided among the processes of torchrun by FSDP2: each keeps its share of every parameter, gradient and moment.

A block is gathered whenever it is called, so for each loop anew, and its gradients are averaged over the processes.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def divide(model, device, dtype):
    """Leave this process its share of a GPT, on its device; it computes in dtype and sums gradients in float32."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in (
        *model.transformer.h,
        model,
    ):  # what is in no block is gathered for the whole of model.run
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.run = run
    register_fsdp_forward_method(model, "run")


def run(function, *arguments):
    """function(*arguments): as a method of a model, it is there that the parts of the model may be used."""
    return function(*arguments)


@torch.no_grad()
def gathered(state, keep):
    """Nested dicts with whole tensors on the CPU in place of shares, None without keep. All processes take part."""
    whole = {}  # by identity, so that tied weights stay one tensor

    def gather(part):
        if isinstance(part, dict):
            return {name: gather(inner) for name, inner in part.items()}
        if isinstance(part, DTensor) and id(part) not in whole:
            tensor = part.full_tensor()
            whole[id(part)] = tensor.cpu() if keep else None
        return whole.get(id(part), part)

    return gather(state)


def divided(optimizer, state):
    """The other way round, for load_state_dict: an optimizer's state with this process's share of its moments."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def share(moment, p):
        return (
            distribute_tensor(moment, p.device_mesh, p.placements, src_data_rank=None)
            if moment.dim()
            else moment
        )

    shares = {
        i: {name: share(m, params[i]) for name, m in part.items()}
        for i, part in state["state"].items()
    }
    return {**state, "state": shares}
