"""
The machine as the scripts see it: which device and precision, its peak FLOP/s, its clock and its memory.
"""

import contextlib
import functools
import sys

import torch

# Dense peak FLOP/s by a part of the device's name, from the vendors' data sheets: (bfloat16, float32 with TF32).
PEAK_FLOPS = {
    "H200": (989.4e12, 494.7e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835.5e12, 417.5e12),
    "H100": (989.4e12, 494.7e12),
    "B200": (2250e12, 1125e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "MI300X": (1307.4e12, 653.7e12),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name):
    """A torch.device from "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is. ValueError if it is not."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    kind, _, index = name.partition(":")
    if kind not in here or (index and not index.isdecimal()):
        raise ValueError(f"device={name!r}: must be auto, cpu, cuda, cuda:N or mps")
    if not here[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device={name}: this torch ({torch.__version__}) sees no such device; try --device=cpu")
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)


def pick_dtype(name, device):
    """A torch.dtype from its name, or "auto": bfloat16 where a GPU has it, else float32. ValueError otherwise."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be auto, " + " or ".join(DTYPES))
    return DTYPES[name]


def autocast(device, dtype):
    """The context in which forward passes run: matrix products in dtype, parameters in float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def compile_works(device):
    """Whether torch.compile works here, tried on one small function; prints why where it does not."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an unsupported Python: many types, one consequence
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        print(f"compile: does not work here, running eager ({reason})")
        return False
    return True


def peak_flops(device, dtype):
    """Dense peak of the device in FLOP/s, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = (peaks for part, peaks in PEAK_FLOPS.items() if part in name)
    return next(known, (None, None))[dtype == torch.float32]


def synchronize(device):
    """Wait until the device has done all it was given, so that a clock tells the truth."""
    {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "cpu": lambda: None}[device.type]()


def peak_memory(device):
    """Most bytes in use so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pack(model, dtype=torch.float32):
    """Let the Linear layers of a model on a CPU read weights in dtype that oneDNN has put in order, to decode alone.

    A few rows of tokens then cost what reading the weights costs, on all threads; torch's own product of a matrix and
    one row runs on one. Takes the memory of one more model, and is nothing that torch.compile takes.
    Returns whether this torch has oneDNN for dtype; if not, nothing changes.
    """
    known = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not known:
        return False
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            order = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().to(dtype))
            bias = None if module.bias is None else module.bias.detach().to(dtype)
            module.forward = functools.partial(packed_linear, order, bias, dtype)
    return True


def packed_linear(order, bias, dtype, x):
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), order, bias, "none", [], "").to(x.dtype)
