"""
Load other people's weights, and export ours:

    model = load("hf:HuggingFaceTB/SmolLM2-360M", n_prelude=2, n_block=4, n_coda=2, n_loop=7)
    python pretrained.py export out-quickstart --to=my-model
    python pretrained.py export out-x --to=my-model --as=llama --n_loop=4

The first folds a plain model into a loop. load opens checkpoints of ours, nanoGPT's and nanoLOOP's,
and Hugging Face folders of GPT-2, Llama, Qwen3, OLMo-2, Huginn, Ouro, Nanbeige, Parcae and xLLM;
how each of these names its fields and tensors is in nanorecur/families.py. Weights are read a few
rows at a time, so that loading takes little more memory than the model.

export chooses the first format that computes the same; this option chooses another:

    --as=gpt2, llama, qwen3, olmo2   a plain model for transformers; a loop that only applies its
                                     blocks again (input_injection=passthrough, loop_norm=none) is
                                     unrolled
    --as=nanbeige                    for vLLM, SGLang, llama.cpp, MLX; config/servable.py's shape
    --as=ouro, huginn, parcae        the released formats
    --as=nanorecur                   any model: a folder with model.py, for transformers with
                                     trust_remote_code=True
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from configurator import check_ranges, clear_errors, configure, freeze, require
from model import GPT, Diagonal, GPTConfig, Orthogonal
from nanorecur import checkpoint
from nanorecur.exports import describe, export
from nanorecur.families import (
    GPT2,
    IGNORED,
    LOOP,
    OURS,
    PARCAE,
    TRAINING,
    Family,
    Piece,
    family_of,
    find_value_embeddings,
    flatten_config,
    from_nanoloop,
    gates_have_tables,
    is_nanoloop,
    known_fields,
    pieces,
    read_config,
    split_name,
    to_ours,
    without_tied_head,
)
from nanorecur.files import runs_here
from nanorecur.tokenizer import Tokenizer, make_tokenizer, tokenizer_of_folder

# -----------------------------------------------------------------------------
source = ""  # the model to export, anything that load takes; a bare word after export is this too
out_dir = "out"  # without source: the run to export, its folder or a checkpoint file
to = ""  # the folder to write
n_loop = 0  # loops of every group in what is written; 0: as many as the model's config says


def main() -> None:
    arguments = sys.argv[1:] or ["-h"]
    command = arguments[0]
    with clear_errors():
        if command in ("-h", "--help"):
            configure(globals(), argv=["-h"])
        require("command", command, command == "export", "export")
        to_format, others = take_format(arguments[1:])
        configure(globals(), argv=others, positional="source")
        require("to", to, to != "", "the folder to write, --to=my-model")
        check_ranges(globals(), {"n_loop": (0, 9999)})
        check_exists(source, out_dir)
        name = source or out_dir
        ckpt, model = load_run(name, resume=False)
        tokenizer = ckpt.get("tokenizer") if ckpt else tokenizer_of(source)
        is_run = Path(name, "config.json").exists() and bool(ckpt)
        card = dict(run=name) if is_run else {}
        exported = export(model, to, tokenizer, to_format=to_format, n_loop=n_loop, **card)
        print(f"{to}: {describe(exported)}")


def take_format(arguments: list[str]) -> tuple[str, list[str]]:
    """Return (value of --as, other arguments). It is no knob, since as is a keyword of Python."""
    option, to_format, others = "--as=", "", []
    for word in arguments:
        if word.startswith(option):
            to_format = word.removeprefix(option)
        else:
            others.append(word)
    return to_format, others


def check_exists(source: str, out_dir: str) -> None:
    """Raise ValueError that names the runs which lie here where there is nothing to export."""
    if source:
        name = source
        found = name in HUB_NAMES or name.startswith("hf:") or Path(name).exists()
    else:
        name = out_dir
        found = checkpoint.exists(name) or Path(name).is_file()
    if not found:
        runs = ", ".join(runs_here()) or "none"
        raise ValueError(f"{name}: no such checkpoint; runs here: {runs}")


# -----------------------------------------------------------------------------
# loading

HUB_NAMES = {  # short names of models of the Hugging Face hub
    "gpt2": "hf:openai-community/gpt2",
    "gpt2-medium": "hf:openai-community/gpt2-medium",
    "gpt2-large": "hf:openai-community/gpt2-large",
    "gpt2-xl": "hf:openai-community/gpt2-xl",
}


class Stored(NamedTuple):
    """A tensor in a file or a checkpoint, of which rows are read when they are needed."""

    shape: tuple
    read: Callable[[slice], Tensor]  # from a slice of rows


def load(
    source: str | Path, layers: Sequence[int] = (), drop_weights: bool = False, **overrides
) -> GPT:
    """Return the model of a source, in eval mode, with float32 parameters.

    source: a checkpoint file; a run's folder (ours, nanoGPT's, nanoLOOP's); a Hugging Face folder
        (config.json and *.safetensors); hf:<name> for one of the hub, or gpt2, gpt2-medium,
        gpt2-large, gpt2-xl.
    overrides: GPTConfig fields that replace the source's. With n_prelude, n_block and n_coda a
        plain model is folded into a loop: its first layers, n_block evenly spaced, its last.
    layers: numbers of the source's layers to take instead, one for each block.
    drop_weights: drop what the new model has no place for, such as biases with bias=False, and
        print to stderr what that was. False: refuse it. Layers that are left out are no such thing.

    At one loop a folded model is its source cut to these layers: the loop's own weights begin so
    that one loop changes nothing. This allows loop_norm=none, loop_entry=none, loop_exit=none and
    linear, input_injection=passthrough, inject, inject_bias, diagonal and orthogonal, and add with
    state_init=zero. Two choices are not the source at one loop, and a line on stderr says so:
    state_init=noise and hash with add, diagonal or orthogonal, and residual, which adds
    residual_share of the input. Others are refused.
    Raises ValueError that names what is wrong with the source.
    """
    folder = find_folder(source)
    if checkpoint.exists(folder) or not (folder / "config.json").exists():
        return build(checkpoint.load(folder), layers, drop_weights, **overrides).eval()
    if (folder / "sessions.jsonl").exists():
        raise ValueError(f"{folder}: this run has not saved a checkpoint yet")
    try:
        config_json = read_config_json(folder)
        family = family_of(config_json)
        args = read_config(family, config_json)
        stored = open_safetensors(folder)
        if family is OURS:
            stored = {name.removeprefix("gpt."): tensor for name, tensor in stored.items()}
        if family is GPT2 and "wte.weight" in stored:  # saved without the head, as the hub's gpt2
            stored = {f"transformer.{name}": tensor for name, tensor in stored.items()}
        if family is PARCAE:
            args, stored = acting_value_embeddings(args, stored)
        return assemble(args, family, stored, layers, drop_weights, overrides).eval()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def build(ckpt: dict, layers: Sequence[int] = (), drop_weights: bool = False, **overrides) -> GPT:
    """Return the model of a checkpoint, the dict that checkpoint.load returns.

    layers, drop_weights, overrides: as in load. Raises ValueError where its model_args or tensors
    do not fit.
    """
    prefix = "_orig_mod."  # added by torch.compile
    weights = {name.removeprefix(prefix): tensor for name, tensor in ckpt["model"].items()}
    args = ckpt["model_args"]
    if is_nanoloop(weights):
        args, weights = from_nanoloop(args, weights)
    args = known_fields(args, "the checkpoint's model_args")
    stored = {name: Stored(tuple(w.shape), w.__getitem__) for name, w in weights.items()}
    return assemble(args, OURS, stored, layers, drop_weights, overrides)


def new_model(config: GPTConfig) -> GPT:
    """Return a model with fresh weights. ValueError where no memory holds it."""
    try:
        return GPT(config)
    except (RuntimeError, MemoryError) as error:
        reason = str(error)[:99]
        raise ValueError(f"there is no memory for a model of these sizes ({reason})") from None


def load_run(
    source: str | Path,
    resume: bool,
    ckpt: dict | None = None,
    layers: Sequence[int] = (),
    drop_weights: bool = False,
    **overrides,
) -> tuple[dict, GPT]:
    """Return (checkpoint, model) of a source to train on; {} for one that is no checkpoint.

    resume: take the weights that were trained where the checkpoint's "model" is their moving
    average, which is then in "averaged_model".
    ckpt: the source's checkpoint where it was read before; it stays as it is.
    layers, drop_weights, overrides: as in load.
    """
    if ckpt is None and not (resume or checkpoint.exists(source) or Path(source).is_file()):
        return {}, load(source, layers, drop_weights, **overrides)
    ckpt = dict(checkpoint.load(source) if ckpt is None else ckpt)
    ckpt["averaged_model"] = ckpt["model"]
    if resume and "training_model" in ckpt:
        ckpt["model"] = ckpt["training_model"]
    return ckpt, build(ckpt, layers, drop_weights, **overrides)


def open_tokenizer(source: str | Path, model: GPT) -> Tokenizer:
    """Return the tokenizer of a source that load has opened as model.

    GPT-2's where the source names none and has as many ids; else ValueError.
    """
    known = tokenizer_of(source)
    if not known and not 50257 <= model.config.vocab_size <= 50304:  # may be padded
        ids = f"{model.config.vocab_size} ids are not GPT-2's 50,257"
        raise ValueError(f"{source}: names no tokenizer, and {ids}")
    return make_tokenizer(known or {"tokenizer": "gpt2"})


def tokenizer_of(source: str | Path) -> dict | None:
    """Return the tokenizer that a source of load names, as make_tokenizer takes it, or None."""
    folder = find_folder(source)
    if checkpoint.exists(folder) or folder.is_file():
        return checkpoint.load(folder).get("tokenizer")
    if not (folder / "config.json").exists():
        return None
    tokenizer = read_config_json(folder).get("tokenizer")
    if not isinstance(tokenizer, dict):
        inside = folder / "tokenizer"  # of xLLM
        return tokenizer_of_folder(inside if inside.is_dir() else folder)
    if tokenizer.get("tokenizer") == "huggingface":  # export has put its text into a file
        text = (folder / "tokenizer.json").read_text("utf-8")
        tokenizer = {**tokenizer, "tokenizer_json": text}
    return tokenizer


# -----------------------------------------------------------------------------
# folders


def find_folder(source: str | Path) -> Path:
    """Return the folder or file of a source; a model of the hub is downloaded."""
    name = str(source)
    if not Path(name).exists():
        name = HUB_NAMES.get(name, name)
    path = Path(name.removeprefix("hf:"))
    if name.startswith("hf:") and not path.is_dir():
        return download(name.removeprefix("hf:"))
    return path


def download(name: str) -> Path:
    """Download a model of the hub and return its folder.

    Only .json and .safetensors files are downloaded, nothing that could be executed.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub and the network raise errors of many types
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:120]}"
        raise ValueError(f"hf:{name}: cannot be downloaded ({reason})") from None


def read_config_json(folder: Path) -> dict:
    config_json = json.loads((folder / "config.json").read_text("utf-8"))
    if not isinstance(config_json, dict):
        raise ValueError("config.json: must be a JSON object")
    return flatten_config(config_json)


def open_safetensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors in a folder's safetensors files by name, without reading their values."""
    from safetensors import SafetensorError, safe_open

    stored = {}
    for path in safetensors_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    shape = tuple(file.get_slice(name).get_shape())
                    stored[name] = Stored(shape, partial(read_rows, path, name))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from None
    return stored


def safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: those that its index lists, or all."""
    index = folder / "model.safetensors.index.json"
    names = [path.name for path in folder.glob("*.safetensors")]
    if index.exists():
        listed = json.loads(index.read_text("utf-8"))["weight_map"].values()
        names = [Path(path).name for path in listed] or names  # no path to another folder
    if not names:
        raise ValueError(
            "holds no *.safetensors; pickled weights (.bin, .pt) can execute code and are not read"
        )
    return [folder / name for name in sorted(set(names))]


def read_rows(path: Path, name: str, rows: slice) -> Tensor:
    """Read some rows of a tensor; the file is opened anew, since an open one keeps all it read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_slice(name)[rows]


def acting_value_embeddings(args: dict, stored: dict[str, Stored]) -> tuple[dict, dict]:
    """Return the fields and tensors of a Parcae model, with the value embeddings that act.

    With an odd number of blocks the released code may give a gate to one block and a table to the
    next: neither acts. They are left out; where other blocks have both, a table of zeros, which
    adds as little, stands for the one without a gate.
    """
    check_size(args, stored)
    config = GPTConfig(**args)
    found = find_value_embeddings(config, stored)
    if not found.idle or gates_have_tables(config):
        return args, stored
    print(f"value embeddings that do not act: {', '.join(found.idle)}", file=sys.stderr)
    kept = {name: tensor for name, tensor in stored.items() if name not in found.idle}
    if not found.acting:
        return args | {"value_embedding": False}, kept
    for name, shape in found.without_gate.items():
        kept[name] = Stored(shape, torch.zeros(()).expand(shape).__getitem__)
    return args, kept


# -----------------------------------------------------------------------------
# folding a plain model into a loop

# options with which, and with the weights of pass_through, one loop computes what no loop does
NEW_LOOP = {"input_injection": "inject", "state_init": "input", "loop_norm": "none"}


class Folding(NamedTuple):
    """A config, and the layers of a source that its blocks are."""

    config: GPTConfig
    layers: Sequence[int]  # the number of the source's layer that block i is
    folded: bool  # True where a plain source gets a loop, or loses layers


def fold(source: GPTConfig, layers: Sequence[int], overrides: dict) -> Folding:
    """Return how a model is made of a source.

    layers: the source's layers to take; (): all, or with n_block evenly spaced ones.
    overrides: fields of GPTConfig. Raises ValueError where they do not fit the source.
    """
    n_block = overrides.get("n_block", 0)
    is_plain = not source.groups and not source.n_block
    if not is_plain:
        require("layers", layers, not layers, "(), since only plain models can be cut or folded")
    if not is_plain or not (layers or n_block or overrides.get("loop_groups")):
        config = replace(source, **overrides)
        return Folding(config, range(config.n_physical), folded=False)
    cut = {"n_layer": len(layers)} if layers and not n_block else {}
    config = replace(source, **{**NEW_LOOP, **cut, **overrides})
    if layers:
        layers = tuple(layers)
    elif n_block:
        layers = spread(source.n_layer, config)
    else:
        layers = range(source.n_layer)
    exist = set(layers) <= set(range(source.n_layer))
    allowed = f"{config.n_physical} numbers below {source.n_layer}"
    require("layers", layers, len(layers) == config.n_physical and exist, allowed)
    if config.groups:
        check_one_loop(config)
    return Folding(config, layers, folded=True)


def spread(n_layer: int, config: GPTConfig) -> tuple[int, ...]:
    """Return the first n_prelude layers, n_block evenly spaced ones, and the last n_coda."""
    n_prelude, n_block, n_coda = config.n_prelude, config.n_block, config.n_coda
    middle = n_layer - n_prelude - n_coda
    allowed = f"at most {max(0, middle)}, the layers between prelude and coda"
    require("n_block", n_block, n_block <= middle, allowed)
    core = [n_prelude + int((i + 0.5) * middle / n_block) for i in range(n_block)]
    return (*range(n_prelude), *core, *range(n_layer - n_coda, n_layer))


def check_one_loop(config: GPTConfig) -> None:
    """Raise ValueError for options with which one loop cannot compute what its blocks alone do.

    Noise and residual's share of the input can be meant so: a line on stderr says what they do.
    """
    goal = "so that one loop is the source"
    for name in ("loop_norm", "loop_entry"):
        value = getattr(config, name)
        require(name, value, value == "none", f"none {goal}")
    injection, start = config.input_injection, config.state_init
    require("loop_exit", config.loop_exit, config.loop_exit != "final_norm", f"linear, none {goal}")
    if injection == "add":
        require("state_init", start, start != "input", f"zero with input_injection=add {goal}")
    if injection == "residual":
        allowed = f"input with input_injection=residual {goal}"
        require("state_init", start, start == "input", allowed)
        cause = f"input_injection=residual adds {config.residual_share} of the input"
        print(f"at one loop not the source: {cause}", file=sys.stderr)
    if start in ("noise", "hash") and injection in ("add", "diagonal", "orthogonal"):
        print(f"at one loop not the source: state_init={start}", file=sys.stderr)


@torch.no_grad()
def pass_through(model: GPT) -> None:
    """Fill what a loop adds to a plain model so that one loop computes what the model did."""
    for loop in model.transformer.loops:
        for module in loop.modules():
            for p in module.parameters(recurse=False):
                nn.init.constant_(p, 1.0 if isinstance(module, nn.RMSNorm) else 0.0)
            if hasattr(module, "init"):
                module.init()
            elif isinstance(module, nn.Linear):  # the exit
                nn.init.eye_(module.weight)
        if isinstance(loop.inject, Diagonal):
            undo_decay(loop.inject, model.config.state_init)


def undo_decay(inject: Diagonal, state_init: str) -> None:
    """Set B of decay * s + dt * B e so that the first loop's injection is e; noise counts as 0."""
    dt = nn.functional.softplus(inject.dt_bias)
    share = torch.ones_like(dt)
    if state_init == "input" and not isinstance(inject, Orthogonal):  # decay * e is there already
        share = 1 - torch.exp(-dt * inject.A_log.exp())
    inject.weight.copy_(torch.diag(share / dt))


# -----------------------------------------------------------------------------
# putting a model together

CHUNK = 2**22  # values read at a time
ADDABLE = ("exit_gate.", "ahead.", "prefix.")  # a trained model may get these, filled with 0


def assemble(
    args: dict,
    family: Family,
    stored: dict[str, Stored],
    layers: Sequence[int],
    drop_weights: bool,
    overrides: dict,
) -> GPT:
    """Return the model of GPTConfig fields (args, replaced by overrides) and stored tensors.

    layers, drop_weights: as in load.
    """
    check_size(args, stored)
    source = GPTConfig(**args)
    folding = fold(source, layers, overrides)
    config = folding.config
    model = model_without_weights(config)
    shapes = without_tied_head(config, model.state_dict())
    tensors = {name: torch.empty(tensor.shape) for name, tensor in shapes.items()}
    new = new_tensors(source, folding, tensors)
    for name in new:
        tensors[name].zero_()
    read = {name: tensor for name, tensor in tensors.items() if name not in new}
    to_read = list(pieces(family, config, read, folding.layers))
    extra = find_extra(family, source, folding, stored, to_read)
    changed = changes(source, folding, overrides)
    check_fit(to_read, stored, extra.unknown, changed)
    check_dropped(extra.dropped, drop_weights, changed)
    for piece in to_read:
        read_piece(piece, stored[piece.theirs])
    for name in read:
        tensors[name] = to_ours(family, config, name, tensors[name])
    set_weights(model, tensors)
    if folding.folded:
        pass_through(model)
    return model


def new_tensors(source: GPTConfig, folding: Folding, names: Iterable[str]) -> set[str]:
    """Return those of the model's tensors that the source does not have."""
    addable = {name for name in names if name.startswith(ADDABLE)}
    new = addable - meta_tensors(source).keys() if addable else set()
    if folding.folded:
        new |= {name for name in names if name.startswith("transformer.loops.")}
    return new


class Extra(NamedTuple):
    """Names of stored tensors that a model does not read, though it should."""

    unknown: list[str]  # the source itself has no place for them either
    dropped: list[str]  # the source uses them, the model has no place for them


def find_extra(
    family: Family, source: GPTConfig, folding: Folding, stored: dict, to_read: list[Piece]
) -> Extra:
    """Return the stored tensors that are not read, except a tied head, layers left out, masks."""
    placed = {piece.theirs for piece in to_read}
    if source.tie_weights:
        placed.add("lm_head.weight")
    names = {name for name in stored if name not in placed and not name.endswith(IGNORED)}
    if not names:
        return Extra([], [])
    used, left_out = set(), set()
    for piece in pieces(family, source, meta_tensors(source), range(source.n_physical)):
        block, _ = split_name(piece.ours)
        if block is None or block in folding.layers:
            used.add(piece.theirs)
        else:
            left_out.add(piece.theirs)
    if folding.folded:
        names -= left_out
    return Extra(sorted(names - used), sorted(names & used))


def check_dropped(names: list[str], drop_weights: bool, changes: list[str]) -> None:
    """Print which tensors are dropped, or raise ValueError that names the first of them."""
    if not names:
        return
    shown = f"tensors that the new model has no place for ({names[0]}, ...)"
    if len(names) == 1:
        shown = f"tensor that the new model has no place for ({names[0]})"
    what = f"{len(names)} {shown}"
    allowed = ", ".join([f"True to drop {what}", *changes])
    require("drop_weights", drop_weights, drop_weights, allowed)
    print(f"dropped: {what}", file=sys.stderr)


# fields that fold a model: their change is no reason why a tensor of its blocks does not fit
FOLD_SIZES = ("n_layer", "n_prelude", "n_block", "n_coda", "n_loop", "loop_groups", "loop_counts")
FOLD_FIELDS = FOLD_SIZES + TRAINING + LOOP


def changes(source: GPTConfig, folding: Folding, overrides: dict) -> list[str]:
    """Describe the overrides that differ from the source's fields."""
    lines = []
    for name, value in overrides.items():
        before = getattr(source, name)
        folds = folding.folded and name in FOLD_FIELDS
        if freeze(value) != freeze(before) and not folds:
            lines.append(f"{name}={value} where the checkpoint has {before}")
    return lines


def read_piece(piece: Piece, stored: Stored) -> None:
    """Fill a piece of our tensor from the stored tensor, a few rows at a time."""
    step = max(1, CHUNK // piece.view[0].numel())
    for start in range(0, len(piece.view), step):
        rows = piece.view[start : start + step]
        first = piece.first_row + start
        rows.copy_(stored.read(slice(first, first + len(rows))))


def set_weights(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Make tensors the parameters of a model without weights."""
    tied = model.config.tie_weights
    if tied:
        tensors = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight


def meta_tensors(config: GPTConfig) -> dict[str, Tensor]:
    """Return the tensors of a model by name, with shapes and without values."""
    return without_tied_head(config, model_without_weights(config).state_dict())


class NoValues(TorchFunctionMode):
    """Skips filling new parameters: on the meta device it only imports much of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        if func.__name__ == "eye" and "out" in kwargs:
            return kwargs["out"]
        return func(*args, **kwargs)


def to_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> nn.Parameter | None:
    """Replace a parameter that is being registered by one on the meta device."""
    return None if p is None or p.is_meta else nn.Parameter(p.to("meta"))


def model_without_weights(config: GPTConfig) -> GPT:
    """Return a model with its parameters on the meta device and its buffers on the CPU."""
    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with NoValues():
            return GPT(config)
    finally:
        hook.remove()


# -----------------------------------------------------------------------------
# checking that config and tensors fit


def check_size(args: dict, stored: dict[str, Stored]) -> None:
    """Raise ValueError for sizes far beyond the stored tensors: such a model could fill the memory.

    Sizes that are not whole numbers are left to GPTConfig to refuse.
    """
    sizes = {name: value for name, value in args.items() if type(value) is int}
    n_values = 2**20 + sum(math.prod(tensor.shape) for tensor in stored.values())
    n_embd = sizes.get("n_embd", GPTConfig.n_embd)
    # sizes that are the number of rows of a stored matrix of n_embd or more columns
    matrices = ["vocab_size", "n_head", "head_size", "n_latent", "n_hidden"]
    if args.get("loop_embedding") == "learned":
        matrices.append("max_loops")
    if args.get("position", "learned") == "learned":
        matrices.append("block_size")
    n_rows = {name: sizes.get(name, 0) for name in matrices}
    n_rows["n_embd"] = sizes.get("n_hidden") or 4 * n_embd
    for name, rows in n_rows.items():
        check_limit(name, sizes, rows * n_embd <= n_values, stored)
    for name in ("n_layer", "n_prelude", "n_block", "n_coda", "n_ahead"):
        check_limit(name, sizes, sizes.get(name, 0) <= 1000 + len(stored), stored)
    # rotary positions are in no tensor
    check_limit("block_size", sizes, sizes.get("block_size", 0) <= 2**22, stored)


def check_limit(name: str, sizes: dict, ok: bool, stored: dict[str, Stored]) -> None:
    """Raise ValueError that names a size and its value, unless ok."""
    if not ok:
        value = sizes.get(name, getattr(GPTConfig, name))
        shown = value if value < 10**20 else "enormous"
        raise ValueError(f"{name}={shown}: too large for the {len(stored)} tensors beside it")


def check_fit(
    to_read: list[Piece], stored: dict[str, Stored], unknown: list[str], changes: list[str]
) -> None:
    """Raise ValueError that names the first tensor that is missing, of another shape or unknown.

    unknown: stored tensors that are in no model. changes: what was overridden, for the message.
    """
    expected = {piece.theirs: piece for piece in to_read}
    wrong = sorted(name for name, piece in expected.items() if not fits(piece, stored.get(name)))
    wrong += unknown
    if wrong:
        name = wrong[0]
        found = stored[name].shape if name in stored else "missing"
        wanted = expected[name].shape if name in expected else "none"
        reasons = ", ".join([f"{name} is {found}, expected {wanted}", *changes])
        count = f"{len(wrong)} tensors differ"
        raise ValueError(f"the weights do not fit this model: {reasons} ({count})")


def fits(piece: Piece, stored: Stored | None) -> bool:
    """Return True if a piece can be read from a stored tensor; None: there is none."""
    if stored is None:
        return False
    if piece.ours == "transformer.wpe.weight":  # a shorter context reads the first positions
        return stored.shape[1:] == piece.shape[1:] and stored.shape[0] >= piece.shape[0]
    return stored.shape == piece.shape


if __name__ == "__main__":
    main()
