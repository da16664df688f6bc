"""
Write a model as a folder that other programs open: config.json and model.safetensors in the format
of a family of families.py, a tokenizer, generation_config.json and a model card.

Where no other family computes the same, the folder carries model.py and modeling_nanorecur.py, and
transformers opens it by these. A loop that does no more than apply its blocks again goes out as a
plain model too, unrolled: each block stands there as often as it is applied.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from configurator import require
from model import GPT, LOOP_OFF, GPTConfig
from nanorecur.families import (
    FORMATS,
    LOOP,
    OURS,
    PLAIN,
    Family,
    family_to_export,
    find_misfit,
    max_loops_for,
    pieces,
    spell_out,
    split_name,
    to_theirs,
    without_tied_head,
    write_config,
)
from nanorecur.files import write_atomically, write_part
from nanorecur.tokenizer import byte_alphabet, make_tokenizer

ROOT = Path(__file__).parents[1]
CODE = (ROOT / "model.py", ROOT / "nanorecur" / "modeling_nanorecur.py")  # of a folder of ours


# -----------------------------------------------------------------------------
# what is written
class Exported(NamedTuple):
    """A model in the format of a family."""

    family: Family
    config: GPTConfig
    tensors: dict[str, Tensor]  # under our names
    n_unrolled: int  # blocks for which a plain model has more; 0: nothing is unrolled


def choose_format(model: GPT, name: str = "", n_loop: int = 0) -> Exported:
    """Return a model in a format.

    name: of FORMATS; "": the first family that computes the same, else ours.
    n_loop: loops of every group; 0: as the config says.
    Raises ValueError that names the first option which the format does not have.
    """
    config, tensors = at_depth(model.config, n_loop), model.state_dict()
    if not name:
        return Exported(family_to_export(config), config, tensors, 0)
    require("as", name, name in FORMATS, f"one of {', '.join(FORMATS)}")
    families, n_unrolled = FORMATS[name], 0
    try:
        if families[0] in PLAIN and config.groups:
            n_unrolled = config.n_physical
            config, tensors = unroll(config, tensors)
        misfits = [find_misfit(family, config) for family in families]
        if all(misfits):
            raise ValueError(misfits[0])
    except ValueError as error:
        raise ValueError(f"as={name}: not exact with {error}") from None
    return Exported(families[misfits.index("")], config, tensors, n_unrolled)


def at_depth(config: GPTConfig, n_loop: int) -> GPTConfig:
    """Return a config with n_loop loops of every group; 0: as it is."""
    if not n_loop:
        return config
    require("n_loop", n_loop, bool(config.groups), "0: nothing is looped")
    max_loops = max(config.max_loops, max_loops_for(n_loop))
    return replace(config, n_loop=n_loop, loop_counts=(), max_loops=max_loops)


def unroll(config: GPTConfig, tensors: dict[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return (config, tensors) of a plain model that computes what a looped one does.

    Raises ValueError that names the first option with which a loop is more than its blocks.
    """
    for name in LOOP:
        value, off = getattr(config, name), LOOP_OFF[name]
        require(name, value, value == off, f"{off} to be unrolled")
    order, counts = [], iter(config.counts())
    for blocks, looped in config.layout:
        order += blocks * (next(counts) if looped else 1)
    shape = dict(n_prelude=0, n_block=0, n_coda=0, n_loop=1, loop_groups=(), loop_counts=())
    plain = replace(config, n_layer=len(order), **shape)
    copies = {}
    for name, tensor in tensors.items():
        block, part = split_name(name)
        if block is None:
            copies[name] = tensor
        for i, source in enumerate(order):
            if source == block:
                copies[f"transformer.h.{i}.{part}"] = tensor
    return plain, copies


def describe(exported: Exported) -> str:
    """Return what the format of an export is called, and what opens it."""
    family = exported.family
    *others, last = (*family.opened_by, "pretrained.load")
    opens = f"{', '.join(others)} and {last} open it" if others else f"{last} opens it"
    name = "nanoRecur's own" if family is OURS else f"{family.name}'s"
    unrolled = ""
    if exported.n_unrolled:
        unrolled = f" unrolled, {exported.n_unrolled} blocks as {exported.config.n_layer}"
    return f"{name} format{unrolled}; {opens}"


# -----------------------------------------------------------------------------
# the folder


def export(
    model: GPT,
    folder: str | Path,
    tokenizer: dict | None = None,
    *,
    to_format: str = "",
    n_loop: int = 0,
    run: str | Path = "",
) -> Exported:
    """Write a folder that other programs open, and return what was written.

    to_format, n_loop: as in choose_format. load(folder) returns the same model, bit for bit, where
    it is not unrolled; options of training are kept in our format alone.
    tokenizer: as make_tokenizer takes it. run: the folder whose log the model card tells.
    Raises ValueError for what a format cannot express, and for a folder that holds a run, or
    weights in other files.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    check_target(folder)
    exported = choose_format(model, to_format, n_loop)
    family = exported.family
    config = exported.config if family is OURS else spell_out(exported.config)
    tensors = stored_tensors(family, config, exported.tensors)
    files = folder_files(exported, tokenizer, run, folder.name)

    def save(file: BinaryIO) -> None:
        save_file(tensors, file.name, {"format": "pt"})

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    os.replace(write_part(weights, save), weights)
    replace_files(folder, files)
    return exported


def replace_files(folder: Path, files: dict[str, str]) -> None:
    """Write files {name: text} and remove those of an earlier export that are not among them."""
    for name in (*TOKENIZER_FILES, *(path.name for path in CODE)):
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())


def check_target(folder: Path) -> None:
    """Raise ValueError where an export would damage a run, or lie beside weights of others."""
    for path in sorted(folder.glob("*")):
        of_a_run = path.name.startswith("ckpt") or path.name == "log.jsonl"
        is_weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
        is_weights = is_weights and path.name != "model.safetensors"
        allowed = f"another one, since it holds {path.name}"
        require("folder", str(folder), not (of_a_run or is_weights), allowed)


def stored_tensors(
    family: Family, config: GPTConfig, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a model's tensors as a family stores them, in float32."""
    tensors = {}
    for name, tensor in without_tied_head(config, state).items():
        tensors[name] = to_theirs(family, config, name, tensor.detach().float().cpu())
    stored = {}
    for piece in pieces(family, config, tensors, range(config.n_physical)):
        if piece.shape == tuple(piece.view.shape):
            stored[piece.theirs] = piece.view.contiguous().clone()
        else:  # one of several that are rows of a stored tensor
            stacked = stored.setdefault(piece.theirs, piece.view.new_empty(piece.shape))
            stacked[piece.first_row : piece.first_row + 1] = piece.view
    if family is OURS:
        stored = {f"gpt.{name}": tensor for name, tensor in stored.items()}
    return stored


def folder_files(
    exported: Exported, tokenizer: dict | None, run: str | Path, name: str
) -> dict[str, str]:
    """Return {name: text} of the files beside the weights. name: of the model."""
    family, config = exported.family, exported.config
    files = tokenizer_files(tokenizer, config.block_size) if tokenizer else {}
    config_json = write_config(family, config)
    tokenizer = dict(tokenizer or {})
    tokenizer.pop("tokenizer_json", None)  # it has a file of its own
    if tokenizer:
        config_json["tokenizer"] = tokenizer
    if family is OURS:
        files |= {path.name: path.read_text("utf-8") for path in CODE}
    files["config.json"] = as_json(config_json)
    files["generation_config.json"] = as_json(generation_config(tokenizer))
    files["README.md"] = model_card(exported, run, name)
    return files


def as_json(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


def generation_config(tokenizer: dict) -> dict:
    """Return how transformers draws tokens: as sample.py does. tokenizer: its fields, or {}."""
    config = {"do_sample": True, "temperature": 0.8, "top_k": 200}
    separator = separator_of(tokenizer)
    if separator is not None:
        config |= {"eos_token_id": separator, "pad_token_id": separator}
    return config


def separator_of(tokenizer: dict) -> int | None:
    """Return the id that ends a document, None where none does. tokenizer: its fields, or {}."""
    known = {"bytes": 0, "gpt2": 50256}
    return tokenizer.get("separator", known.get(tokenizer.get("tokenizer")))


# -----------------------------------------------------------------------------
# the tokenizer, as a file of Hugging Face's

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_files(fields: dict, block_size: int) -> dict[str, str]:
    """Return tokenizer.json and tokenizer_config.json; {} of a tiktoken encoding but gpt2."""
    writers = {"char": char_json, "bytes": bytes_json, "gpt2": gpt2_json}
    name = fields["tokenizer"]
    if name == "huggingface":
        text = fields["tokenizer_json"]
    elif name in writers:
        text = writers[name](fields)
    else:
        return {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    separator = separator_of(fields)
    if separator is not None:
        token = token_of(text, separator)
        config |= {"eos_token": token, "pad_token": token}
    return {"tokenizer.json": text, "tokenizer_config.json": as_json(config)}


def token_of(tokenizer_json: str, i: int) -> str:
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(tokenizer_json).id_to_token(i)


def char_json(fields: dict) -> str:
    """Return the tokenizer.json of an alphabet."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.WordLevel({char: i for i, char in enumerate(fields["chars"])}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend.to_str()


def bytes_json(fields: dict) -> str:
    """Return the tokenizer.json of bytes: byte-level pieces without a merge; NUL ends a text."""
    vocab = {char: byte for char, byte in byte_alphabet().items() if byte != 0}
    return byte_level_json({"\0": 0, **vocab}, [], "\0")


def gpt2_json(fields: dict) -> str:
    """Return the tokenizer.json of GPT-2's byte-level pieces; their ids are their ranks."""
    table = make_tokenizer(fields).table()
    special = max(table)  # <|endoftext|>
    end = table.pop(special).decode()
    ranks = {token: i for i, token in table.items()}
    char_of = {byte: char for char, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(char_of[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            left, right = split_token(token, ranks)
            merges.append((spell(left), spell(right)))
    return byte_level_json({spell(token): i for token, i in ranks.items()}, merges, end)


def split_token(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two pieces of which a token was merged: what earlier merges make of its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_level_json(vocab: dict[str, int], merges: Sequence[tuple], end: str) -> str:
    """Return the tokenizer.json of pieces in GPT-2's alphabet of bytes.

    end: the special token that ends a text; its id is that in vocab, or comes after all others.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab, list(merges)))
    words = bool(merges)  # no piece goes beyond a word
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(end, normalized=False)])
    return backend.to_str()


# -----------------------------------------------------------------------------
# the model card

OPEN_OURS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, n_loop={n_loop})
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)  # if it has one
"""
OPEN_PLAIN = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
"""
OPEN_OTHERS = """
from pretrained import load  # of nanoRecur

model = load("{name}")
"""


def model_card(exported: Exported, run: str | Path, name: str) -> str:
    """Return README.md: what the model is, how to open it, and what its run knows of it."""
    family, config = exported.family, exported.config
    n_loop = list(config.loop_counts) or config.n_loop
    template = OPEN_OTHERS
    if family is OURS:
        template = OPEN_OURS
    elif family in PLAIN:
        template = OPEN_PLAIN
    lines = ["---", "library_name: transformers", "tags: [looped-transformer, nanorecur]", "---"]
    lines += [f"# {name}", "", f"Written by nanoRecur in {describe(exported)}."]
    lines += fenced("python", template.format(name=name, n_loop=n_loop).strip())
    if family is OURS:
        lines.append(
            "`n_loop` is how often the looped blocks are applied; any number works. So does"
        )
        lines.append(f"`lm_eval --model hf --model_args pretrained={name},trust_remote_code=True`.")
    lines += run_lines(run) if run else []
    fields = {key: value for key, value in vars(config).items() if is_changed(key, value)}
    lines += ["", "## Config", "", "Fields of `GPTConfig` that are not at their default."]
    lines += fenced("json", as_json(fields).strip())
    return "\n".join(lines) + "\n"


def is_changed(name: str, value: object) -> bool:
    return value != getattr(GPTConfig, name)


def fenced(language: str, text: str) -> list[str]:
    return ["", f"```{language}", text, "```", ""]


def run_lines(run: str | Path) -> list[str]:
    """Return the lines of a model card on data, losses by depth and command of a run."""
    from nanorecur import evaluation, run_table  # much of the training: only a card needs it

    found = run_table.read_run(run)
    sessions = run_table.read_log(Path(run, "sessions.jsonl"))
    costs = run_table.cost_cells(found)
    lines = ["", "## Training", ""]
    lines.append(f"{costs['tokens']:,} tokens of `{Path(found.config['dataset']).name}`.")
    entries = run_table.evaluations(found.log)
    if entries:
        lines.append(f"Losses at step {entries[-1]['iter']:,}, by loops:")
        lines += fenced("", evaluation.table(entries[-1]["eval"]))
    if sessions:
        lines += fenced("", sessions[-1]["command"])
    return lines
