"""
Token files: write, check and read data/<name>/train.bin, val.bin and meta.json.

The .bin files are raw little-endian uint16 or uint32 ids, as nanoGPT writes them; meta.json says
what they hold (tokenizer, vocab_size, dtype; tokens, bytes and sha256 of each split). The shards
of llm.c and modded-nanogpt, *_train_*.bin and *_val_*.bin of GPT-2's tokens, are read as they are.
Tokenizers are in tokenizer.py. Reading the documents of a large corpus, into token files or
directly into training, is in corpus.py.

The order of training is a function of (seed, split, position) alone: every epoch visits each window
of the split once, in an order of its own, and a checkpoint need not hold anything about it.
"""

import hashlib
import json
import math
import os
import random
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanorecur.files import flush, sha256, write_atomically
from nanorecur.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    check_tokenizer,
    make_tokenizer,
    with_identity,
)

DATA = Path(__file__).resolve().parents[1] / "data"
TOKENIZER_FILE = "tokenizer.json"  # beside meta.json, where the tokenizer is "huggingface"
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")  # what data/text/prepare.py reads


def random_key(*parts: object) -> int:
    """Return a 63-bit integer that depends on the parts alone, the same on every machine.

    parts: ints and strings that name a random event. The key is the event's seed.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# -----------------------------------------------------------------------------
# writing


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the dtype of the tokenizer's ids in a .bin file."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write_dataset(
    folder: str | Path,
    meta: dict,
    splits: dict[str, Iterable[str | bytes]],
    separate: bool = False,
) -> dict:
    """Write train.bin, val.bin and meta.json, print their sizes and return the complete meta.

    meta: {"tokenizer": name, ...}, as make_tokenizer takes it.
    splits: {"train": texts, "val": texts}; the texts of a split are written one after the other.
    Texts of type bytes are for the "bytes" tokenizer alone.
    separate: texts are documents, and the tokenizer's separator follows each.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(meta)
    sizes = {}
    (folder / "meta.json").unlink(missing_ok=True)  # first: unfinished files must not look complete
    for split, texts in splits.items():
        n_tokens = n_bytes = 0
        with open(part_path(folder, split), "wb") as file:
            for text in texts:
                raw = text if isinstance(text, bytes) else text.encode()
                if separate:
                    ids = tokenizer.encode_document(text)
                elif isinstance(tokenizer, ByteTokenizer):
                    ids = np.frombuffer(raw, np.uint8)
                else:
                    ids = tokenizer.encode(text)
                file.write(np.asarray(ids, token_dtype(tokenizer)).tobytes())
                n_tokens += len(ids)
                n_bytes += len(raw)
            flush(file)
        sizes[split] = (n_tokens, n_bytes)
    return finish_dataset(folder, meta, sizes)


def write_task(
    folder: str | Path,
    chars: str,
    make: Callable[[int, random.Random], tuple[str, str]],
    sizes: dict[str, dict[int, int]],
    seed: int,
) -> dict:
    """Write a reasoning task and return its meta; no prompt occurs twice in all splits together.

    A row is a prompt and its answer. meta.json gets
    "row": {"length", "prompt", "levels": {split: [[level, rows], ...]}}; rows stand in this order.

    chars: the alphabet.
    make: make(level, rng) -> (prompt, answer), of the same two lengths at every level.
    sizes: {"train": {level: rows}, "val": {...}, "hard": {...}}; a level says how difficult it is.
    Raises ValueError where a level has too few different prompts.
    """
    splits = {split: [] for split in sizes}
    seen, shapes = set(), set()
    total = sum(sum(levels.values()) for levels in sizes.values())
    with tqdm(total=total, unit=" rows") as bar:
        for split in sorted(sizes):  # hard before train, so that hard does not depend on its size
            for level, rows in sorted(sizes[split].items()):
                rng = random.Random(random_key(seed, split, level))
                for prompt, answer in new_rows(make, level, rng, rows, seen, split):
                    shapes.add((len(prompt), len(answer)))
                    splits[split].append(prompt + answer)
                    bar.update()
    if len(shapes) != 1:
        raise ValueError(f"prompts and answers must have one length each, not {sorted(shapes)}")
    prompt_length, answer_length = shapes.pop()
    levels = {split: [list(pair) for pair in sorted(sizes[split].items())] for split in sizes}
    row = {"length": prompt_length + answer_length, "prompt": prompt_length, "levels": levels}
    return write_dataset(folder, {"tokenizer": "char", "chars": chars, "row": row}, splits)


def write_targets_task(
    folder: str | Path,
    chars: str,
    make: Callable[[int, random.Random], tuple[str, list]],
    sizes: dict[str, dict[int, int]],
    seed: int,
) -> dict:
    """Write a task whose targets stand beside its rows, at any position, and return its meta.

    As write_task, but make(level, rng) -> (row, targets): a text, and for each of its characters
    the one to predict there, or None. The targets of a split are ids in <split>.targets.bin, the
    largest number of its type where there is none.
    """
    splits, targets = {}, {}
    seen, lengths, id_of = set(), set(), {char: i for i, char in enumerate(chars)}
    dtype = targets_dtype(len(chars))
    no_target = np.iinfo(dtype).max
    for split in sorted(sizes):
        splits[split], rows_of_ids = [], []
        for level, rows in tqdm(sorted(sizes[split].items()), desc=split):
            rng = random.Random(random_key(seed, split, level))
            for row, wanted in new_rows(make, level, rng, rows, seen, split):
                lengths |= {len(row), len(wanted)}
                splits[split].append(row)
                rows_of_ids.append([no_target if char is None else id_of[char] for char in wanted])
        targets[split] = np.array(rows_of_ids, dtype)
    if len(lengths) != 1:
        raise ValueError(f"rows and targets must have one length, not {sorted(lengths)}")
    levels = {split: [list(pair) for pair in sorted(sizes[split].items())] for split in sizes}
    row = {"length": lengths.pop(), "prompt": 1, "targets": True, "levels": levels}
    row["targets_sha256"] = {split: digest_of(ids) for split, ids in targets.items()}
    os.makedirs(folder, exist_ok=True)
    for split, ids in targets.items():
        write_atomically(targets_path(folder, split), ids.tobytes())
    return write_dataset(folder, {"tokenizer": "char", "chars": chars, "row": row}, splits)


def targets_path(folder: str | Path, split: str) -> Path:
    """Return the path of a split's targets."""
    return Path(folder, f"{split}.targets.bin")


def digest_of(targets: np.ndarray) -> str:
    """Return the sha256 of a split's targets as they are stored."""
    return hashlib.sha256(targets.tobytes()).hexdigest()


def targets_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of targets; its largest number is no id, and stands for no target."""
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


def window_of(row: dict) -> int:
    """Return the block_size of a task's rows; row: "row" of its meta.json."""
    return row["length"] if row.get("targets") else row["length"] - 1


def new_rows(
    make: Callable, level: int, rng: random.Random, rows: int, seen: set[str], split: str
) -> Iterator[tuple[str, str]]:
    """Yield (prompt, answer) for so many prompts that are not in seen, and add them to it.

    Raises ValueError, which names the split, after 10,000 known prompts one after the other.
    """
    found = repeats = 0
    while found < rows:
        prompt, answer = make(level, rng)
        if prompt not in seen:
            seen.add(prompt)
            found, repeats = found + 1, 0
            yield prompt, answer
            continue
        repeats += 1
        if repeats > 10000:
            raise ValueError(
                f"{split}: level {level} has fewer than {rows:,} different prompts left"
            )


class AnswerRow(NamedTuple):
    """A prompt and its answer as one row of ids."""

    ids: list[int]  # of the prompt, the answer and the separator, if the tokenizer has one
    n_prompt: int  # ids of the prompt
    n_bytes: int  # of the answer's text


def write_answers(
    folder: str | Path,
    meta: dict,
    pairs: list[tuple[str, str]],
    val_share: float,
    block_size: int = 0,
) -> dict:
    """Write prompts with their answers as rows in which answers alone are predicted; return meta.

    Each row is padded behind the answer, and its targets stand beside it. meta.json gets "row" as
    write_targets_task has it, all rows of level 0, and row["n_targets"], the number of targets by
    split; the bytes of a split are those of its answers.

    meta: a tokenizer's fields. pairs: (prompt, answer). val_share: share of the different prompts
    that is held out. block_size: tokens of a row; longer ones are left out, and how many is
    printed. 0: as many as the longest row needs.
    Raises ValueError where a prompt or an answer is empty, or a split would be.
    """
    tokenizer = make_tokenizer(meta)
    rows = {}
    for split, of_split in split_by_prompt(pairs, val_share).items():
        rows[split] = [answer_row(tokenizer, *pair) for pair in of_split]
    longest = max(len(row.ids) for of_split in rows.values() for row in of_split)
    length = block_size or longest - 1  # the last id is a target alone
    rows = rows_that_fit(rows, length)
    shape = {"length": length, "prompt": 1, "targets": True, "levels": {}, "n_targets": {}}
    shape["targets_sha256"] = {}
    sizes = {}
    os.makedirs(folder, exist_ok=True)
    Path(folder, "meta.json").unlink(missing_ok=True)  # unfinished files must not look complete
    for split, of_split in rows.items():
        tokens, targets = arrays_of(of_split, length, tokenizer)
        with open(part_path(folder, split), "wb") as file:
            file.write(tokens.tobytes())
            flush(file)
        write_atomically(targets_path(folder, split), targets.tobytes())
        shape["targets_sha256"][split] = digest_of(targets)
        sizes[split] = (tokens.size, sum(row.n_bytes for row in of_split))
        shape["levels"][split] = [[0, len(of_split)]]
        shape["n_targets"][split] = sum(len(row.ids) - row.n_prompt for row in of_split)
    return finish_dataset(folder, {**meta, "row": shape}, sizes)


def split_by_prompt(pairs: list[tuple[str, str]], val_share: float) -> dict[str, list[tuple]]:
    """Return {"train": pairs, "val": pairs}; a prompt's answers are in one split.

    Which one depends on the hash of the prompt. Raises ValueError where a split would be empty.
    """
    prompts = sorted({prompt for prompt, _ in pairs}, key=random_key)
    n_held_out = max(1, round(val_share * len(prompts)))
    if n_held_out >= len(prompts):
        both = f"must leave some of {len(prompts)} different prompts for train"
        raise ValueError(f"val_share={val_share}: {both}")
    held_out = set(prompts[:n_held_out])
    return {
        "train": [pair for pair in pairs if pair[0] not in held_out],
        "val": [pair for pair in pairs if pair[0] in held_out],
    }


def rows_that_fit(rows: dict[str, list[AnswerRow]], length: int) -> dict[str, list[AnswerRow]]:
    """Return rows by split without those that need more than length tokens; print their number.

    Raises ValueError where a split would be empty.
    """
    fitting = {}
    for split, of_split in rows.items():
        fitting[split] = [row for row in of_split if len(row.ids) <= length + 1]
        n_left_out = len(of_split) - len(fitting[split])
        if n_left_out:
            print(f"{split}: {n_left_out} of {len(of_split)} rows are longer than {length} tokens")
        if not fitting[split]:
            raise ValueError(f"block_size={length}: must leave rows for {split}")
    return fitting


def answer_row(tokenizer: Tokenizer, prompt: str, answer: str) -> AnswerRow:
    """Return the row of a prompt and its answer, each encoded alone, as in sampling."""
    asked = tokenizer.encode(prompt)
    if not asked or not answer:
        raise ValueError(f"prompt {prompt[:40]!r}: it and its answer must not be empty")
    answered = tokenizer.encode_document(answer).tolist()
    return AnswerRow(asked + answered, len(asked), len(answer.encode()))


def arrays_of(
    rows: list[AnswerRow], length: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the targets (rows, length) of rows, as they are stored."""
    dtype = targets_dtype(tokenizer.vocab_size)
    tokens = np.zeros((len(rows), length), token_dtype(tokenizer))
    targets = np.full((len(rows), length), np.iinfo(dtype).max, dtype)
    for i, row in enumerate(rows):
        n = len(row.ids) - 1
        tokens[i, :n] = row.ids[:-1]
        targets[i, row.n_prompt - 1 : n] = row.ids[row.n_prompt :]
    return tokens, targets


def part_path(folder: str | Path, split: str) -> Path:
    """Return the path of a split's file until it is complete."""
    return Path(folder, f"{split}.bin.part")


def finish_dataset(folder: str | Path, meta: dict, sizes: dict[str, tuple[int, int]]) -> dict:
    """Rename the splits' complete files, write meta.json and return the meta.

    The text of a tokenizer.json stands in a file of its own. sizes: {split: (tokens, bytes of
    text)}.
    """
    tokenizer = make_tokenizer(meta)
    splits = {}
    for split, (n_tokens, n_bytes) in sizes.items():
        path = Path(folder, f"{split}.bin")
        os.replace(part_path(folder, split), path)
        splits[split] = {"tokens": n_tokens, "bytes": n_bytes, "sha256": sha256(path)}
        print(f"{path}: {n_tokens:,} tokens")
    meta = {
        **with_identity(meta),
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer).name,
        "splits": splits,
    }
    stored = dict(meta)
    if "tokenizer_json" in meta:
        write_atomically(Path(folder, TOKENIZER_FILE), stored.pop("tokenizer_json").encode())
    text = json.dumps(stored, indent=1, ensure_ascii=False)
    write_atomically(Path(folder, "meta.json"), text.encode())
    return meta


def download(url: str, path: str | Path, size: int, digest: str) -> None:
    """Download a file of known size and sha256 (digest) unless path holds it already.

    Raises ValueError where there is no network or the download is another file.
    """
    path = Path(path)
    if path.exists() and sha256(path) == digest:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read(size + 1)
    except OSError as error:
        message = f"could not download {url} ({error}); --input_files= takes a local copy"
        raise ValueError(message) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{url}: not the expected file of {size:,} bytes with sha256 {digest[:12]}..."
        )
    write_atomically(path, data)


# -----------------------------------------------------------------------------
# checking


def load_meta(folder: str | Path) -> dict:
    """Return meta.json of a prepared folder, with the tokenizer's identity and tokenizer.json.

    A folder without one that holds shards of llm.c's form gets a meta from their headers.
    Raises ValueError with the command that makes it, where it is missing or damaged.
    """
    folder = Path(folder)
    path = folder / "meta.json"
    if not path.exists() and shards_of(folder, "train"):
        return meta_of_shards(folder)
    if not folder.is_dir():
        raise ValueError(no_such_dataset(folder))
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["tokenizer"] == "huggingface":
            meta["tokenizer_json"] = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        check_meta(meta)
        return with_identity(meta)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:100] if type(error) is ValueError else type(error).__name__
        raise ValueError(
            f"{path}: missing or damaged ({reason}); run: {prepare_command(folder)}"
        ) from None


def prepare_command(folder: str | Path) -> str:
    """Return the command that makes a folder's files."""
    script = Path(folder) / "prepare.py"
    if script.exists():
        return f"python {script}"
    if any(path.suffix in TEXT_SUFFIXES for path in Path(folder).glob("*.*")):
        return f"python data/text/prepare.py --input_files={folder}"
    return f"python data/<name>/prepare.py --out_dir={folder}"


def no_such_dataset(folder: Path) -> str:
    """Return the message about a data set that is not there: a text, or a name."""
    if folder.suffix in TEXT_SUFFIXES:
        command = f"python data/text/prepare.py --input_files={folder.name} --name={folder.stem}"
        return f"dataset={folder.name}: is a text, not a prepared folder; run: {command}"
    prepared = sorted(path.parent.name for path in DATA.glob("*/meta.json"))
    scripts = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    return (
        f"dataset={folder.name}: no such folder in data; prepared: {', '.join(prepared) or 'none'};"
        f" python data/<name>/prepare.py prepares {', '.join(scripts)}"
    )


def check_meta(meta: dict) -> None:
    """Raise ValueError, KeyError or TypeError where meta is not what finish_dataset writes."""
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError("dtype is neither uint16 nor uint32")
    if not is_count(meta["vocab_size"], 1) or meta["vocab_size"] > 2**20:
        raise ValueError("vocab_size is not from 1 to 2**20")
    check_tokenizer(meta)
    for name in sorted({"train", "val"} | set(meta["splits"])):
        n_tokens, n_bytes = meta["splits"][name]["tokens"], meta["splits"][name]["bytes"]
        if not is_count(n_tokens, 0):
            raise ValueError(f"tokens of {name} is not a count")
        if n_tokens and not is_count(n_bytes, 1):
            raise ValueError(f"bytes of {name} is not a count")
    if "row" in meta:
        check_row(meta["row"], meta["splits"])


def check_row(row: dict, splits: dict[str, dict]) -> None:
    """Raise ValueError, KeyError or TypeError where a task's rows do not fit its splits."""
    length, prompt = row["length"], row["prompt"]
    if not (is_count(length, 1) and is_count(prompt, 1) and prompt < length):
        raise ValueError("prompt and length of row are not counts, the first less than the second")
    for name, split in splits.items():
        rows = 0
        for level, count in row["levels"][name]:
            if not (is_count(level, 0) and is_count(count, 0)):
                raise ValueError(f"levels of {name} are not pairs of counts")
            rows += count
        if rows * length != split["tokens"]:
            raise ValueError(f"levels of {name} have not as many tokens as {name}")
        if "n_targets" in row and not is_count(row["n_targets"][name], 1):
            raise ValueError(f"n_targets of {name} is not a count")


def is_count(value: object, least: int) -> bool:
    """Return True for an int from least to 2**62 - 1; a bool is not a count."""
    return type(value) is int and least <= value < 2**62


# -----------------------------------------------------------------------------
# reading


def open_split(
    folder: str | Path, name: str, meta: dict, block_size: int, vocab_size: int
) -> "Split":
    """Return a split of a prepared folder; its tokens stay on the disk (memmap).

    Raises ValueError with the command that repairs it, where the file is not what meta says.
    """
    path = Path(folder, f"{name}.bin")
    if meta.get("shards"):
        path = Path(folder, f"*_{name}_*.bin")
        tokens = Shards(shards_of(folder, name))
    else:
        tokens = open_tokens(path, meta["splits"][name]["tokens"], meta["dtype"])
    n_tokens, n_bytes = meta["splits"][name]["tokens"], meta["splits"][name]["bytes"]
    row, targets = meta.get("row"), None
    if row and row.get("targets"):
        dtype = targets_dtype(meta["vocab_size"])
        targets = open_tokens(targets_path(folder, name), n_tokens, dtype.name)
        if "n_targets" in row:  # as many for each token of the file as answers have for theirs
            n_bytes *= n_tokens / row["n_targets"][name]
    return Split(name, tokens, n_bytes, block_size, vocab_size, row, path, targets)


def open_tokens(path: Path, n_tokens: int, dtype: str) -> np.ndarray:
    """Return the tokens of a .bin file (memmap). Raises ValueError where it has another size."""
    dtype = np.dtype(dtype).newbyteorder("<")
    expected = n_tokens * dtype.itemsize
    if not path.exists():
        raise ValueError(f"{path}: is missing; run: {prepare_command(path.parent)}")
    size = path.stat().st_size
    if size != expected:
        found = f"{size:,} bytes where meta.json says {expected:,}"
        raise ValueError(f"{path}: {found}; run: {prepare_command(path.parent)}")
    return np.memmap(path, dtype, mode="r") if expected else np.zeros(0, dtype)


class Split:
    """Tokens as training windows: block_size inputs and their successors, or the rows of a task."""

    SCAN = 2**26  # ids checked on opening (0.1 s); windows() checks the others as they are drawn

    def __init__(
        self,
        name: str,
        tokens: np.ndarray,
        n_bytes: float,
        block_size: int,
        vocab_size: int,
        row: dict | None = None,
        path: str | Path = "",
        targets: np.ndarray | None = None,
    ):
        """Check the tokens and count the windows.

        n_bytes: size of the text. row: "row" of a task's meta.json. path: for error messages.
        targets: what to predict at each token, the largest number of the dtype for nothing; None:
            the next token.
        Raises ValueError where an id is beyond vocab_size or block_size does not fit.
        """
        self.name = name
        self.tokens = tokens
        self.n_tokens = len(tokens)
        self.n_bytes = n_bytes
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.row = row
        self.targets = targets
        self.path = path or name
        if row:
            self.step = row["length"]  # from one window to the next
            self.n_windows = self.n_tokens // self.step
        else:
            self.step = block_size
            self.n_windows = (self.n_tokens - 1) // self.step  # the last target is a token more
        if row and block_size != window_of(row):
            raise ValueError(
                f"block_size={block_size}: the rows of {self.path} need {window_of(row)}"
            )
        if self.n_windows < 1:
            raise ValueError(
                f"block_size={block_size}: {self.path} has only {self.n_tokens} tokens"
            )
        self._check_ids(tokens[: self.SCAN])

    def _check_ids(self, tokens: np.ndarray) -> None:
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self.path}: token id {largest} is beyond vocab_size={self.vocab_size}"
            )

    def shuffled(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Return the starts (N,) int64 of the windows at positions (N,) of the training order.

        The first epoch cuts a text into windows from its first token on, each later one from an
        offset of its own.
        """
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.n_windows)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            key = random_key(seed, self.name, int(epoch))
            offset = key % self.step
            if self.row or epoch == 0:
                offset = 0
            in_epoch = epochs == epoch
            windows = permute(places[in_epoch], self.n_windows, key)
            starts[in_epoch] = windows * self.step + offset
        return starts

    def level_numbers(self) -> list[int]:
        """Return the levels of the task's rows, ascending."""
        return [level for level, rows in self.row["levels"][self.name] if rows]

    def rows_of_level(self, level: int) -> range:
        """Return the numbers of the rows of a level, which stand one after the other."""
        first = 0
        for number, rows in self.row["levels"][self.name]:
            if number == level:
                return range(first, first + rows)
            first += rows
        raise ValueError(f"{self.path}: has no rows of level {level}")

    def shuffled_level(self, level: int, positions: np.ndarray, seed: int) -> np.ndarray:
        """Return the starts (N,) of rows of one level, at positions (N,) of its shuffled order."""
        rows = self.rows_of_level(level)
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(rows))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            key = random_key(seed, self.name, level, int(epoch))
            numbers[in_epoch] = permute(places[in_epoch], len(rows), key)
        return (numbers + rows.start) * self.step

    def spread(self, count: int) -> np.ndarray:
        """Return the starts (count,) of evenly spaced windows, for evaluation: always the same."""
        return np.arange(count, dtype=np.int64) * self.n_windows // count * self.step

    def sliding(self, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (starts, n_scored): windows stride tokens apart, and how many targets count.

        Windows overlap; only the last n_scored targets of a window count, so that every token but
        the first is scored once, with as much context as block_size allows. Rows of a task do not
        overlap, and stride is not used.
        """
        if self.row:
            return self.spread(self.n_windows), np.full(self.n_windows, self.block_size)
        last = self.n_tokens - 1 - self.block_size
        starts = np.append(np.arange(0, last, stride), last)
        return starts, np.diff(starts, prepend=-self.block_size)

    def windows(
        self, starts: np.ndarray, n_scored: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (x, y), each (N, block_size) int64: tokens, and targets one token ahead.

        A target is -1, which the loss ignores, inside the prompt of a task's row, and before the
        last n_scored (N,) targets. A window that reaches the end of the split continues at its
        beginning. Columns at the end in which no row has a target beside it are left out.
        """
        if self.targets is not None:
            return self.windows_beside_targets(starts, n_scored)
        places = starts[:, None] + np.arange(self.block_size + 1)
        tokens = self.tokens.take(places, mode="wrap").astype(np.int64)
        self._check_ids(tokens)
        x, y = tokens[:, :-1], tokens[:, 1:].copy()
        if self.row:
            y[:, : self.row["prompt"] - 1] = -1
        if n_scored is not None:
            y[np.arange(self.block_size) < self.block_size - n_scored[:, None]] = -1
        return x, y

    def windows_beside_targets(
        self, starts: np.ndarray, n_scored: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        places = starts[:, None] + np.arange(self.block_size)
        x, y = self.tokens[places].astype(np.int64), self.targets[places].astype(np.int64)
        self._check_ids(x)
        y[y == np.iinfo(self.targets.dtype).max] = -1
        if y.max() >= self.vocab_size:
            raise ValueError(f"{self.path}: a target is beyond vocab_size={self.vocab_size}")
        if n_scored is not None:
            y[n_scored == 0] = -1  # rows that pad a batch
        width = np.flatnonzero((y >= 0).any(0)).max(initial=0) + 1
        return x[:, :width].copy(), y[:, :width].copy()

    def levels(self, starts: np.ndarray) -> np.ndarray:
        """Return the level (N,) of the task's rows at these starts, 0 for text."""
        if not self.row:
            return np.zeros(len(starts), int)
        levels, rows = zip(*self.row["levels"][self.name])
        return np.repeat(levels, rows)[starts // self.step]


# -----------------------------------------------------------------------------
# shards of llm.c and modded-nanogpt: 256 int32 (magic, version, tokens, zeros), then uint16 tokens

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 1024  # the header in bytes


def shards_of(folder: str | Path, name: str) -> list[Path]:
    """Return the paths of a split's shards, in order."""
    return sorted(Path(folder).glob(f"*_{name}_*.bin"))


def open_shard(path: Path) -> np.ndarray:
    """Return the tokens of a shard (memmap). Raises ValueError where it is none, or damaged."""
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        known = f"magic {SHARD_MAGIC}, version {SHARD_VERSION}"
        raise ValueError(f"{path}: is no shard of GPT-2 tokens, which begins with {known}")
    size, expected = path.stat().st_size, SHARD_HEADER + 2 * int(header[2])
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes where its header says {expected:,}")
    return np.memmap(path, "<u2", mode="r", offset=SHARD_HEADER, shape=(int(header[2]),))


class Shards:
    """The tokens of several shards one after the other, as the array that they would be."""

    def __init__(self, paths: list[Path]):
        self.files = [open_shard(path) for path in paths]
        self.ends = np.cumsum([len(file) for file in self.files])
        self.begins = self.ends - [len(file) for file in self.files]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        pieces = []
        for file, begin in zip(self.files, self.begins):
            pieces.append(file[max(0, start - begin) : max(0, stop - begin)])
        return np.concatenate(pieces)

    def take(self, places: np.ndarray, mode: str = "wrap") -> np.ndarray:
        """Return the tokens at places of any shape; behind the last token comes the first."""
        places = places % len(self)
        numbers = np.searchsorted(self.ends, places, side="right")  # of the file of each token
        tokens = np.empty(places.shape, np.uint16)
        for number in np.unique(numbers):
            found = numbers == number
            tokens[found] = self.files[number][places[found] - self.begins[number]]
        return tokens


def meta_of_shards(folder: Path) -> dict:
    """Return the meta of a folder of shards; nothing is written.

    Raises ValueError that names a shard which is damaged, or the split that has none.
    """
    splits = {}
    for name in ("train", "val"):
        paths = shards_of(folder, name)
        if not paths:
            raise ValueError(f"{folder}: has no shards *_{name}_*.bin")
        shards = Shards(paths)
        splits[name] = {"tokens": len(shards), "bytes": bytes_of(shards)}
    fields = with_identity({"tokenizer": "gpt2"})
    return {**fields, "vocab_size": 50257, "dtype": "uint16", "shards": True, "splits": splits}


def bytes_of(shards: Shards) -> int | float:
    """Return the bytes of text in shards: all of them, or what the first 10**8 tokens suggest.

    nan where GPT-2's tokens cannot be downloaded: then bits per byte are not known.
    """
    try:
        table = make_tokenizer({"tokenizer": "gpt2"}).table()
    except ValueError:
        return math.nan
    sizes = np.zeros(2**16, np.int64)
    for i, token in table.items():
        sizes[i] = len(token)
    sizes[50256] = 0  # <|endoftext|> is no text
    n_read, chunk, counts = min(len(shards), 10**8), 2**22, np.zeros(2**16, np.int64)
    for begin in range(0, n_read, chunk):
        tokens = shards[begin : min(begin + chunk, n_read)]
        counts += np.bincount(tokens, minlength=2**16)
    return round(int(counts @ sizes) * len(shards) / n_read)


# -----------------------------------------------------------------------------
# the order of training


def permute(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """Return the images (N,) int64 of places (N,) under a pseudo-random permutation of range(n).

    It is a Feistel cipher of four rounds on the next power of 4. An image that is not below n is
    encrypted again until it is (cycle walking; Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, (n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)

    def encrypt(x):
        left, right = x >> half, x & mask
        for i in range(4):
            left, right = right, left ^ (mix(right + np.uint64(random_key(key, i))) & mask)
        return left << half | right

    x = encrypt(np.asarray(places).astype(np.uint64))
    outside = x >= n
    while outside.any():
        x[outside] = encrypt(x[outside])
        outside = x >= n
    return x.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """Return uint64 values hashed so that every bit depends on all (SplitMix64; Steele, 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
