"""
The machine as the scripts see it: which device and precision, its peak FLOP/s, its clock and its memory.
"""

import contextlib
import functools
import re
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Gpu(NamedTuple):
    """Of a vendor's data sheet: dense peaks in FLOP/s (0: it has none), memory in GiB, and what one device sends to
    others of its node, in bytes/s one way: NVLink, Infinity Fabric or PCIe."""

    bfloat16: float
    float32: float  # with TF32 where there is such
    memory: int
    link: float


# By words of the name torch gives; the first that fits. An MI250X is two devices, and the numbers are those of one.
GPUS = {
    "B200": Gpu(2250e12, 1125e12, 180, 900e9),
    "GB200": Gpu(2500e12, 1250e12, 186, 900e9),
    "H200": Gpu(989.4e12, 494.7e12, 141, 450e9),
    "GH200": Gpu(989.4e12, 494.7e12, 96, 450e9),
    "H100 PCIe": Gpu(756e12, 378e12, 80, 64e9),
    "H100 NVL": Gpu(835.5e12, 417.5e12, 94, 300e9),
    "H100": Gpu(989.4e12, 494.7e12, 80, 450e9),
    "H20": Gpu(148e12, 74e12, 96, 450e9),
    "A100-PCIE-40GB": Gpu(312e12, 156e12, 40, 32e9),
    "A100-SXM4-40GB": Gpu(312e12, 156e12, 40, 300e9),
    "A100 80GB PCIe": Gpu(312e12, 156e12, 80, 32e9),
    "A100": Gpu(312e12, 156e12, 80, 300e9),
    "A40": Gpu(149.7e12, 74.8e12, 48, 32e9),
    "A30": Gpu(165e12, 82e12, 24, 32e9),
    "A10": Gpu(125e12, 62.5e12, 24, 32e9),
    "A10G": Gpu(70e12, 35e12, 24, 32e9),
    "L40S": Gpu(362e12, 183e12, 48, 32e9),
    "L40": Gpu(181e12, 90.5e12, 48, 32e9),
    "L4": Gpu(121e12, 60e12, 24, 32e9),
    "V100-SXM2": Gpu(0, 15.7e12, 16, 150e9),
    "V100-PCIE": Gpu(0, 14e12, 16, 16e9),
    "T4": Gpu(0, 8.1e12, 16, 16e9),
    "RTX A6000": Gpu(154.8e12, 77.4e12, 48, 32e9),
    "RTX 6000 Ada": Gpu(364.2e12, 182.1e12, 48, 32e9),
    "RTX 5090": Gpu(209.5e12, 104.8e12, 32, 64e9),
    "RTX 4090": Gpu(165.2e12, 82.6e12, 24, 32e9),
    "RTX 4080": Gpu(97.5e12, 48.7e12, 16, 32e9),
    "RTX 3090": Gpu(71e12, 35.6e12, 24, 32e9),
    "RTX 3080": Gpu(59.5e12, 29.8e12, 10, 32e9),
    "MI325X": Gpu(1307.4e12, 653.7e12, 256, 448e9),
    "MI300X": Gpu(1307.4e12, 653.7e12, 192, 448e9),
    "MI300A": Gpu(980.6e12, 490.3e12, 128, 384e9),
    "MI250X": Gpu(191.5e12, 47.9e12, 64, 200e9),
    "MI210": Gpu(181e12, 45.3e12, 64, 32e9),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name):
    """A torch.device from "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is. ValueError if it is not."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    kind, _, index = name.partition(":")
    if kind not in here or (index and not index.isdecimal()):
        raise ValueError(f"device={name!r}: must be auto, cpu, cuda, cuda:N or mps")
    if not here[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device={name}: this torch ({torch.__version__}) sees no such device; try --device=cpu"
        )
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)


def pick_dtype(name, device):
    """A torch.dtype from its name, or "auto": bfloat16 where a GPU has it, else float32. ValueError otherwise."""
    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported()
            else torch.float32
        )
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be auto, " + " or ".join(DTYPES))
    return DTYPES[name]


def autocast(device, dtype):
    """The context in which forward passes run: matrix products in dtype, parameters in float32; on a CPU attention in
    float32 too."""
    if dtype != torch.float32 and device.type == "cpu":
        attend_in_float32()
    return (
        contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    )


@functools.cache
def attend_in_float32():
    """From now on autocast on a CPU does so: in bfloat16 the backward pass of torch's attention is up to three times
    slower on short windows. A kernel of autocast's own, so that it also holds where a checkpoint computes anew."""
    kernels = torch.library.Library("aten", "IMPL", "AutocastCPU")
    with warnings.catch_warnings(
        action="ignore"
    ):  # of torch: that its own is replaced, as it is meant to be
        kernels.impl("scaled_dot_product_attention", attention_in_float32)
    return kernels  # with it they would go


def attention_in_float32(
    q, k, v, mask=None, dropout=0.0, causal=False, *, scale=None, enable_gqa=False
):
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa
        )
    return y.to(torch.get_autocast_dtype("cpu"))


def compile_works(device):
    """Whether torch.compile works here, tried on one small function; prints why where it does not."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (
        Exception
    ) as error:  # no C++ compiler, no Triton, an unsupported Python: many types, one consequence
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        print(f"compile: does not work here, running eager ({reason})")
        return False
    return True


def data_sheet(name):
    """The Gpu of a device's name as torch gives it, or None where it is not known."""
    words = r"(?<!\w){}(?!\w)(?! (Ti|SUPER|D|Laptop)\b)"  # these are other devices
    return next((gpu for part, gpu in GPUS.items() if re.search(words.format(part), name)), None)


def peak_flops(device, dtype):
    """Dense peak of the device in FLOP/s: of a GPU by its data sheet, of a CPU measured; None where it is not known."""
    if device.type == "cpu":
        return measured_flops(dtype, torch.get_num_threads())
    gpu = (
        data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    )  # Apple's have no name
    return getattr(gpu, str(dtype).removeprefix("torch."), None) or None


@functools.cache
def measured_flops(dtype, threads):
    """FLOP/s of a CPU in the fastest of the products of two matrices that fit into 0.1 s."""
    size, times = 1024, []
    a = torch.ones(size, size, dtype=dtype)  # not random: the run's numbers would depend on it
    while len(times) < 3 or sum(times) < 0.1:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def synchronize(device):
    """Wait until the device has done all it was given, so that a clock tells the truth."""
    {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "cpu": lambda: None}[
        device.type
    ]()


def peak_memory(device):
    """Most bytes in use so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux: what getrusage says there may be of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def pack(model, dtype=torch.float32):
    """Let the Linear layers of a model on a CPU read weights in dtype that oneDNN has put in order, to decode alone.

    A few rows of tokens then cost what reading the weights costs, on all threads; torch's own product of a matrix and
    one row runs on one. Takes the memory of one more model, and is nothing that torch.compile takes.
    Returns whether this torch has oneDNN for dtype; if not, nothing changes.
    """
    known = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
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
