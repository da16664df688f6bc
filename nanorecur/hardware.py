"""
The machine: versions, devices, number types, data sheets, peak FLOP/s, clock, memory, weights laid
out for a CPU.
"""

import contextlib
import difflib
import functools
import json
import os
import platform
import re
import statistics
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from configurator import require
from model import GPT
from nanorecur.files import write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_TIMED = 2**27  # weights that are laid out in each way to time it, at most
LAYOUTS = ("packed", "plain", "transposed")  # of weights for decoding on a CPU, see lay_out
TORCH_VERSIONS = (2, 11), (2, 14)  # the oldest and the newest that were run
PYTHON_VERSIONS = (3, 11), (3, 13)


class Gpu(NamedTuple):
    """Numbers of a vendor's data sheet."""

    bfloat16: float  # dense peak in FLOP/s; 0: it has no such products
    float32: float  # the same; with TF32 where there is such
    memory: float  # GiB
    link: float  # bytes/s, one way, to others of its node: NVLink, Infinity Fabric or PCIe


# Keys are words of the names that torch gives; the first that fits counts. An MI250X is two
# devices, and the numbers are those of one.
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


# -----------------------------------------------------------------------------
# versions
def check_versions() -> None:
    """Raise ValueError where torch or Python is too old; warn on stderr of one that is too new."""
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    torch_version = (int(numbers[1]), int(numbers[2]))
    check_version("torch", torch.__version__, torch_version, *TORCH_VERSIONS)
    check_version("python", platform.python_version(), sys.version_info[:2], *PYTHON_VERSIONS)


def check_version(
    name: str,
    shown: str,
    version: tuple[int, int],
    oldest: tuple[int, int],
    newest: tuple[int, int],
) -> None:
    """Raise ValueError where a version is less than the oldest; warn where it is beyond newest."""
    allowed = "{}.{} to {}.{}".format(*oldest, *newest)
    require(name, shown, version >= oldest, allowed)
    if version > newest and os.environ.get("RANK", "0") == "0":
        words = f"warning: {name} {shown} is newer than what was tried, {allowed}"
        print(words, file=sys.stderr)


# -----------------------------------------------------------------------------
# device and number type
def pick_device(name: str) -> torch.device:
    """Return the device of a name: cpu, cuda, cuda:1, mps, or auto for the best there is.

    ValueError where there is no such device.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = [kind for kind in present if present[kind]][0]
    kind, _, index = name.partition(":")
    if kind not in present or (index and not index.isdecimal()):
        raise ValueError(f"device={name!r}: must be auto, cpu, cuda, cuda:N or mps")
    if not present[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        reason = f"this torch ({torch.__version__}) sees no such device"
        raise ValueError(f"device={name}: {reason}; try --device=cpu")
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; auto is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if on_gpu else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be auto, " + " or ".join(DTYPES))
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context of forward passes: matrix products in dtype, parameters in float32.

    On a CPU attention is in float32 too.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    if device.type == "cpu":
        attend_in_float32()
    return torch.autocast(device.type, dtype)


@functools.cache
def attend_in_float32() -> torch.library.Library:
    """Let autocast on a CPU compute attention in float32, from now on in this process.

    In bfloat16 the backward pass of torch's attention is up to three times slower on short windows.
    This is a kernel of autocast's own, so that it holds where activations are recomputed too.
    """
    kernels = torch.library.Library("aten", "IMPL", "AutocastCPU")
    with warnings.catch_warnings(action="ignore"):  # torch's, that a kernel of its own is replaced
        kernels.impl("scaled_dot_product_attention", attention_in_float32)
    return kernels  # the kernel lives as long as this object, which functools.cache keeps


def attention_in_float32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend in float32; return the dtype of autocast. Arguments are those of torch's attention."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    q, k, v = q.float(), k.float(), v.float()
    attend = F.scaled_dot_product_attention
    with torch.autocast("cpu", enabled=False):
        y = attend(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa)
    return y.to(torch.get_autocast_dtype("cpu"))


def compile_works(device: torch.device) -> bool:
    """Return whether torch.compile works here, tried on a small function; print why it does not."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an unsupported Python: of many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        need = "" if device.type == "cuda" else "; it needs a C++ compiler, see README"
        print(f"compile: does not work here, running eager ({reason}){need}")
        return False
    return True


def make_deterministic() -> None:
    """Let every operation give the same bits in every run on this machine, from now on.

    On CUDA this costs time: attention and embeddings otherwise add up gradients in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.use_deterministic_algorithms(True)


# -----------------------------------------------------------------------------
# peak FLOP/s
def data_sheet(name: str) -> Gpu | None:
    """Return the data sheet of a device by the name torch gives it; None where it is unknown."""
    for words, gpu in GPUS.items():
        others = r"(?! (Ti|SUPER|D|Laptop)\b)"  # words that follow the names of other devices
        if re.search(rf"(?<!\w){words}(?!\w){others}", name):
            return gpu
    return None


def find_gpu(name: str) -> Gpu:
    """Return the data sheet of a short name such as h100 or rtx-4090; of cpu what is measured."""
    known = {words.lower().replace(" ", "-"): gpu for words, gpu in GPUS.items()}
    if name == "cpu":
        return measure_cpu()
    if name not in known:
        close = similar_names(name, known)
        if close:
            hint = f"did you mean {' or '.join(close)}?"
            raise ValueError(f"gpu={name!r}: has no data sheet here, {hint}")
        raise ValueError(f"gpu={name!r}: must be cpu or one of {', '.join(known)}")
    return known[name]


def similar_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known name that differs in case and hyphens alone, else up to three like it."""
    letters = {"".join(filter(str.isalnum, other)): other for other in known}
    written = "".join(filter(str.isalnum, name.lower()))
    if written in letters:
        return [letters[written]]
    return [letters[close] for close in difflib.get_close_matches(written, letters)]


def measure_cpu() -> Gpu:
    """Return measured peaks of this CPU, the machine's memory, and the link of a usual network."""
    threads = torch.get_num_threads()
    bfloat16, float32 = (
        measured_flops(dtype, threads) for dtype in (torch.bfloat16, torch.float32)
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu(bfloat16, float32, memory=memory / 2**30, link=10e9)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the dense peak of a device in FLOP/s; None where it is unknown.

    A GPU's is that of its data sheet, a CPU's is measured.
    """
    if device.type == "cpu":
        return measured_flops(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    gpu = data_sheet(torch.cuda.get_device_name(device))
    return getattr(gpu, str(dtype).removeprefix("torch."), None) or None


@functools.cache
def measured_flops(dtype: torch.dtype, threads: int) -> float:
    """Return a CPU's FLOP/s in the fastest product of two matrices, of those that fit into 0.1 s.

    threads: of torch, for which it is remembered.
    """
    size, times = 1024, []
    a = torch.ones(size, size, dtype=dtype)  # not random: the run's numbers would depend on it
    while len(times) < 3 or sum(times) < 0.1:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


# -----------------------------------------------------------------------------
# clock and memory
def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Progress:
    """Says on stderr what is going on, as long as it is entered, every so many seconds.

    What takes less time says nothing.
    """

    def __init__(self, interval: float = 10.0):
        self.interval = interval  # seconds
        self.doing = "starting"
        self.ended = threading.Event()

    def now(self, doing: str) -> None:
        """Set what is going on from now on."""
        self.doing = doing

    def __enter__(self) -> "Progress":
        threading.Thread(target=self.tell, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()

    def tell(self) -> None:
        seconds = self.interval
        while not self.ended.wait(self.interval):
            print(f"  {seconds:.0f} s: {self.doing}", file=sys.stderr, flush=True)
            seconds += self.interval


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: allocated on a GPU, on a CPU those of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage may count the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# -----------------------------------------------------------------------------
# weights for decoding: in the dtype that computes, and on a CPU in the order that is read fastest
def cast_linear_weights(model: GPT, dtype: torch.dtype) -> None:
    """Keep the weights of Linear layers in dtype, to decode under autocast to it.

    The same bits as with float32 weights, which autocast casts anew for every token. A head that is
    tied to the embedding gets a matrix of its own.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype))
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach().to(dtype))


def lay_out(model: GPT, dtype: torch.dtype, layout: str = "auto", rows: int = 1) -> str:
    """Let Linear layers on a CPU read weights in dtype and in a layout, to decode only.

    A few rows of tokens cost what reading the weights costs. How fast that is depends on their
    order in memory, and the best order on the processor. layout: one of LAYOUTS, which is returned,
    or auto for the fastest with so many rows. Weights in another dtype or order are a second copy
    of the model. There is no backward pass, and torch.compile does not take packed weights.
    ValueError where this torch lacks the layout.
    """
    legal = usable_layouts(dtype)
    require("cpu_weights", layout, layout in ("auto", *legal), "one of auto, " + ", ".join(legal))
    if layout == "auto":
        layout = fastest_layout(layers_in_order(model), dtype, rows)
    for layer in linear_layers(model):
        layer.forward = laid_out(layer, dtype, layout)
    return layout


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """Return the Linear layers in a module, but not those of a class of their own."""
    return [part for part in module.modules() if type(part) is nn.Linear]


def layers_in_order(model: GPT) -> list[nn.Linear]:
    """Return the Linear layers that a token passes, the head first; looped ones come repeatedly."""
    order = [model.lm_head]
    for loop, n, _ in model.schedule():
        once = linear_layers(loop.inject)
        for block in loop.blocks:
            once += linear_layers(block)
        order += n * once
    return order


def usable_layouts(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the layouts that this torch has for dtype: packed ones are oneDNN's."""
    packs = torch.backends.mkldnn.is_available()
    if dtype == torch.bfloat16:
        packs = packs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return LAYOUTS if packs else tuple(layout for layout in LAYOUTS if layout != "packed")


def laid_out(layer: nn.Linear, dtype: torch.dtype, layout: str) -> Callable[[Tensor], Tensor]:
    """Return a Linear layer's forward with its weight in dtype and in a layout."""
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    if layout == "packed":
        weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        return functools.partial(packed_linear, weight, bias)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    return functools.partial(plain_linear, weight, bias)


def packed_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the product of x (.., in) and packed weights, in the dtype of x."""
    y = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")
    return y.to(x.dtype)


def plain_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the product of x (.., in) and weights (out, in), in the dtype of x."""
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def fastest_layout(order: list[nn.Linear], dtype: torch.dtype, rows: int) -> str:
    """Return the fastest layout of weights, timed once and kept in a cache folder.

    order: the layers that a token passes.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanorecur")
    path = path / "decoding.json"
    shapes = Counter(f"{layer.out_features}x{layer.in_features}" for layer in order)
    setting = [cpu_name(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    setting += [str(dtype).removeprefix("torch."), f"{rows} rows"]
    key = ", ".join([*setting, *(f"{count} of {shape}" for shape, count in shapes.items())])
    try:
        known = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged: another one is made
        known = {}
    if known.get(key) not in usable_layouts(dtype):
        seconds = time_layouts(order, dtype, rows)
        known[key] = min(seconds, key=seconds.get)
        if not is_busy():  # what a busy machine chooses is for this time alone
            with contextlib.suppress(OSError):  # of a folder that cannot be written
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(known, indent=1).encode())
    return known[key]


def time_layouts(order: list[nn.Linear], dtype: torch.dtype, rows: int) -> dict[str, float]:
    """Return {layout: seconds of a token's products}. order: the layers that it passes.

    Whole passes are timed, so that weights come from where they come from in decoding: the same
    layer again and again would come from the cache. Of a large model a part is passed. Layouts
    take turns, so that a busy machine disturbs all alike; the first turn only warms up.
    """
    order, n_values = list(order), 0
    for number, layer in enumerate(dict.fromkeys(order)):
        n_values += layer.weight.numel()
        if number and n_values > MOST_TIMED:
            order = order[: order.index(layer)]
            break
    inputs = {layer: torch.ones(rows, 1, layer.in_features) for layer in order}
    times, start = defaultdict(list), time.perf_counter()
    forwards = {}
    for layout in usable_layouts(dtype):
        forwards[layout] = {layer: laid_out(layer, dtype, layout) for layer in inputs}
    while len(times["plain"]) < 5 or time.perf_counter() - start < 0.05:
        for layout, forward in forwards.items():
            before = time.perf_counter()
            for layer in order:
                forward[layer](inputs[layer])
            times[layout].append(time.perf_counter() - before)
    return {layout: statistics.median(durations[1:]) for layout, durations in times.items()}


def is_busy() -> bool:
    """Return whether more programs than this machine has cores want to run."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    return load > os.cpu_count()


def cpu_name() -> str:
    """Return the processor's name; on Linux with family and model, or the parts of an ARM."""
    info = Path("/proc/cpuinfo")
    facts = {}
    if info.exists():
        for line in info.read_text().split("\n\n")[0].splitlines():  # of the first core
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    found = [facts[name] for name in ("model name",) if name in facts]
    for name in ("cpu family", "model", "CPU implementer", "CPU part"):
        if name in facts:
            found.append(f"{name} {facts[name]}")
    return ", ".join(found) or platform.processor() or platform.machine()
