"""
Token files: data/<name>/train.bin and val.bin, raw little-endian uint16 or uint32 as nanoGPT writes them, and
meta.json, which says what is in them (tokenizer, vocab_size, dtype; tokens, bytes and sha256 of each split).

The order of training is a function of (seed, split, position) alone: each epoch visits every window of the split once,
in an order of its own, and nothing about it needs saving.
"""

import hashlib
import json
import os
import random
import re
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm


def random_key(*parts):
    """A 63-bit integer from ints and strings, the same on every machine: the seed of what happens under that name."""
    return (
        int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
    )


# -----------------------------------------------------------------------------
# tokenizers: encode(text) -> list of ids, decode(ids) -> text; encode_document(text) -> array with the separator behind


class CharTokenizer:
    """One id per character of a fixed alphabet."""

    def __init__(self, meta):
        self.chars = meta["chars"]
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.vocab_size = len(self.chars)

    def encode(self, text):
        strange = sorted(set(text) - set(self.ids))
        if strange:
            raise ValueError(
                f"{''.join(strange[:10])!r} is not in the alphabet of this model: {self.chars!r}"
            )
        return [self.ids[char] for char in text]

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


class ByteTokenizer:
    """The bytes of UTF-8; bytes that are no text decode to the replacement character."""

    vocab_size = 256

    def __init__(self, meta):
        pass

    def encode(self, text):
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_document(self, text):
        return np.frombuffer(text.encode() + b"\0", np.uint8)  # no text holds a NUL

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class TiktokenTokenizer:
    """One of tiktoken's encodings by its name, such as gpt2; <|endoftext|> in a text is the token."""

    def __init__(self, meta):
        import tiktoken

        self.encoding = tiktoken.get_encoding(meta["tokenizer"])
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def encode_document(self, text):
        ids = self.encoding.encode_to_numpy(
            text, disallowed_special=()
        )  # <|endoftext|> in a document is text
        return np.append(ids, self.encoding.eot_token)

    def decode(self, ids):
        return self.encoding.decode(ids)


def make_tokenizer(meta):
    """The tokenizer that meta.json (or a checkpoint) names: "char" with its alphabet, "bytes", or one of tiktoken's."""
    check_tokenizer(meta)
    return {"char": CharTokenizer, "bytes": ByteTokenizer}.get(
        meta["tokenizer"], TiktokenTokenizer
    )(meta)


def check_tokenizer(meta):
    """ValueError where the tokenizer is none of these."""
    name, alphabet = meta.get("tokenizer"), meta.get("chars")
    if not (isinstance(name, str) and re.fullmatch("[A-Za-z0-9_-]{1,99}", name)):
        raise ValueError(
            f"tokenizer={str(name)[:60]!r}: must be char, bytes or the name of one of tiktoken's"
        )
    if name == "char" and not isinstance(alphabet, str):
        raise ValueError("chars: must be the alphabet, as one text")


# -----------------------------------------------------------------------------
# writing


def write_dataset(folder, tokenizer, splits):
    """Write train.bin, val.bin and meta.json, each whole or not at all, and print what came out.

    tokenizer: {"tokenizer": name, ...}. splits: {"train": texts, "val": texts}, each an iterable of str or bytes
    (bytes only for the "bytes" tokenizer), written one after the other. Returns the meta.
    """
    folder, encoder = Path(folder), make_tokenizer(tokenizer)
    sizes = dict.fromkeys(splits, (0, 0))
    (folder / "meta.json").unlink(missing_ok=True)  # first, so that no half-written set looks whole
    for split, texts in splits.items():
        with open(part_of(folder, split), "wb") as file:
            for text in texts:
                raw = text if isinstance(text, bytes) else text.encode()
                ids = (
                    np.frombuffer(raw, np.uint8)
                    if isinstance(encoder, ByteTokenizer)
                    else encoder.encode(text)
                )
                sizes[split] = write_ids(
                    file, np.asarray(ids, token_dtype(encoder)), len(raw), sizes[split]
                )
            flush(file)
    return finish(folder, tokenizer, sizes)


def write_task(folder, chars, make, sizes, seed):
    """Write a reasoning task: rows of one length, each a prompt and its answer, and no prompt twice in any split.

    chars: the alphabet. make(level, rng) -> (prompt, answer), of the same lengths at every level; rng is a
    random.Random. sizes: {"train": {level: rows}, "val": {...}, "hard": {...}}, a level being an int that says how
    difficult a row is. meta.json gets "row": {"length", "prompt", "levels": {split: [[level, rows], ...]}}, rows
    standing in this order. Returns the meta. Raises ValueError where a level has too few different prompts.
    """
    splits, seen, shapes = {split: [] for split in sizes}, set(), set()
    with tqdm(total=sum(sum(levels.values()) for levels in sizes.values()), unit=" rows") as bar:
        for split in sorted(sizes):  # hard, train, val
            for level, rows in sorted(sizes[split].items()):
                rng, goal, repeats = (
                    random.Random(random_key(seed, split, level)),
                    len(seen) + rows,
                    0,
                )
                while len(seen) < goal:
                    prompt, answer = make(level, rng)
                    repeats = repeats + 1 if prompt in seen else 0
                    if repeats > 10000:
                        raise ValueError(
                            f"{split}: level {level} has fewer than {rows:,} different prompts left"
                        )
                    if not repeats:
                        seen.add(prompt)
                        shapes.add((len(prompt), len(answer)))
                        splits[split].append(prompt + answer)
                        bar.update()
    ((prompt, answer),) = shapes
    levels = {split: sorted(map(list, sizes[split].items())) for split in sizes}
    row = {"length": prompt + answer, "prompt": prompt, "levels": levels}
    return write_dataset(folder, {"tokenizer": "char", "chars": chars, "row": row}, splits)


def part_of(folder, split):
    return Path(folder, f"{split}.bin.part")


def token_dtype(encoder):
    return np.dtype("<u2" if encoder.vocab_size <= 2**16 else "<u4")


def write_ids(file, ids, n_bytes, size):
    """Append token ids to an open file; (tokens, bytes) of the split grow from size to what is returned."""
    file.write(ids.tobytes())
    return size[0] + len(ids), size[1] + n_bytes


def finish(folder, tokenizer, sizes):
    """Give the split files their names, then write the meta.json that says they are whole."""
    encoder, splits = make_tokenizer(tokenizer), {}
    for split, (tokens, n_bytes) in sizes.items():
        path = Path(folder, f"{split}.bin")
        os.replace(part_of(folder, split), path)
        splits[split] = {"tokens": tokens, "bytes": n_bytes, "sha256": sha256(path)}
        print(f"{path}: {tokens:,} tokens")
    meta = {
        **tokenizer,
        "vocab_size": encoder.vocab_size,
        "dtype": token_dtype(encoder).name,
        "splits": splits,
    }
    write_atomically(
        Path(folder, "meta.json"), json.dumps(meta, indent=1, ensure_ascii=False).encode()
    )
    return meta


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(file):
    """Down to the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path, data):
    """Write bytes under a temporary name, then rename: whoever reads path finds all of them or the file before."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        file.write(data)
        flush(file)
    os.replace(part, path)


def download(url, path, size, sha256):
    """Fetch a fixed file once. ValueError where there is no network or what came is not that file."""
    path = Path(path)
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read(size + 1)
    except OSError as error:
        raise ValueError(
            f"could not download {url} ({error}); --input_file= takes a local copy"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{url}: not the expected file of {size:,} bytes with sha256 {sha256[:12]}..."
        )
    write_atomically(path, data)


# -----------------------------------------------------------------------------
# reading


def load_meta(folder):
    """meta.json of a prepared folder. ValueError with the command that makes it where it is missing or damaged."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        check_meta(meta)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:100] if type(error) is ValueError else type(error).__name__
        raise ValueError(
            f"{path}: missing or damaged ({reason}); run: {prepare_command(folder)}"
        ) from None
    return meta


def check_meta(meta):
    """ValueError, KeyError or TypeError where meta.json is not what finish writes."""

    def require(ok, words):
        if not ok:
            raise ValueError(words)

    def whole(least, *numbers):
        return all(type(n) is int and least <= n < 2**62 for n in numbers)

    require(meta["dtype"] in ("uint16", "uint32"), "dtype is neither uint16 nor uint32")
    require(
        whole(1, meta["vocab_size"]) and meta["vocab_size"] <= 2**20,
        "vocab_size is not from 1 to 2**20",
    )
    check_tokenizer(meta)
    for name in {"train", "val"} | set(meta["splits"]):
        require(whole(0, meta["splits"][name]["tokens"]), f"tokens of {name}")
        require(
            whole(1, meta["splits"][name]["bytes"]) or not meta["splits"][name]["tokens"],
            f"bytes of {name}",
        )
    if "row" in meta:
        length, prompt, levels = (meta["row"][name] for name in ("length", "prompt", "levels"))
        require(whole(1, length, prompt) and prompt < length, "row's length or prompt")
        for name, split in meta["splits"].items():
            known = [len(level) == 2 and whole(0, *level) for level in levels[name]]
            rows = sum(count for _, count in levels[name]) if all(known) else -1
            require(rows * length == split["tokens"], f"row's levels of {name}")


def prepare_command(folder):
    return f"python {Path(folder) / 'prepare.py'}"


def open_split(folder, name, meta, block_size, vocab_size):
    """A split of a prepared folder. ValueError with the command that mends it where a file is not what meta says."""
    path, sizes, dtype = (
        Path(folder, f"{name}.bin"),
        meta["splits"][name],
        np.dtype(meta["dtype"]).newbyteorder("<"),
    )
    expected, size = sizes["tokens"] * dtype.itemsize, path.stat().st_size if path.exists() else -1
    if size != expected:
        found = f"{size:,} bytes where meta.json says {expected:,}" if size >= 0 else "is missing"
        raise ValueError(f"{path}: {found}; run: {prepare_command(folder)}")
    tokens = np.memmap(path, dtype, mode="r") if expected else np.zeros(0, dtype)
    return Split(name, tokens, sizes["bytes"], block_size, vocab_size, meta.get("row"), path)


class Split:
    """Tokens, seen as windows of block_size and their successors, or as a task's rows."""

    SCAN = 2**26  # tokens looked at when a split is opened (0.1 s); the rest as they are drawn

    def __init__(self, name, tokens, n_bytes, block_size, vocab_size, row=None, path=""):
        """row: of meta.json, for a task. path: for what is said of wrong tokens. ValueError for those."""
        self.split, self.tokens, self.n_tokens, self.n_bytes = name, tokens, len(tokens), n_bytes
        self.block_size, self.vocab_size, self.row, self.path = (
            block_size,
            vocab_size,
            row,
            path or name,
        )
        self.step = row["length"] if row else block_size  # from one window to the next
        if row and row["length"] != block_size + 1:
            raise ValueError(
                f"block_size={block_size}: the rows of {self.path} need {row['length'] - 1}"
            )
        self.n_windows = (self.n_tokens - (not row)) // self.step
        if self.n_windows < 1:
            raise ValueError(
                f"block_size={block_size}: {self.path} has only {self.n_tokens} tokens"
            )
        self._check(tokens[: self.SCAN])

    def _check(self, tokens):
        top = int(tokens.max())
        if top >= self.vocab_size:
            raise ValueError(f"{self.path}: token id {top} is beyond vocab_size={self.vocab_size}")

    def shuffled(self, positions, seed):
        """Starts (N,) of the windows at these places of the training order, int64.

        The first epoch cuts a text into windows from its first token on; each later one from an offset of its own.
        """
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.n_windows)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = random_key(seed, self.split, int(epoch))
            offset = 0 if self.row or not epoch else key % self.step
            starts[here] = permute(places[here], self.n_windows, key) * self.step + offset
        return starts

    def spread(self, count):
        """Starts of count windows spread evenly over the split, always the same: for evaluation."""
        return np.arange(count, dtype=np.int64) * self.n_windows // count * self.step

    def sliding(self, stride):
        """(starts, fresh): windows stride tokens apart over the whole split, and how many targets each adds at its end.

        Together they have every token but the first once, with as many before it as such windows can hold; a task's
        rows are taken one by one.
        """
        if self.row:
            return self.spread(self.n_windows), np.full(self.n_windows, self.block_size)
        last = self.n_tokens - 1 - self.block_size
        starts = np.append(np.arange(0, last, stride), last)
        return starts, np.diff(starts, prepend=-self.block_size)

    def windows(self, starts, fresh=None):
        """(x, y), each (N, block_size) int64, y one token ahead, or -1 where it is not to be predicted.

        That is inside the prompt of a task's row, and before the last fresh (N,) targets. A window over the end of the
        split goes on at its beginning.
        """
        places = starts[:, None] + np.arange(self.block_size + 1)
        tokens = self.tokens.take(places, mode="wrap").astype(np.int64)
        self._check(tokens)
        x, y = tokens[:, :-1], tokens[:, 1:].copy()
        if self.row:
            y[:, : self.row["prompt"] - 1] = -1
        if fresh is not None:
            y[np.arange(self.block_size) < self.block_size - fresh[:, None]] = -1
        return x, y

    def levels(self, starts):
        """How difficult the task's rows at these starts are, (N,) ints; all 0 for text."""
        if not self.row:
            return np.zeros(len(starts), int)
        levels, rows = zip(*self.row["levels"][self.split])
        return np.repeat(levels, rows)[starts // self.step]


def permute(places, n, key):
    """Where a keyed pseudo-random permutation of range(n) takes these places: a Feistel cipher on the next power of 4,
    applied again to what falls outside (cycle walking)."""
    half = np.uint64(max(1, (n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)

    def encrypt(x):
        left, right = x >> half, x & mask
        for turn in range(4):
            left, right = right, left ^ (mix(right + np.uint64(random_key(key, turn))) & mask)
        return left << half | right

    x = encrypt(np.asarray(places).astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = encrypt(x[outside])
    return x.astype(np.int64)


def mix(x):
    """The finalizer of SplitMix64 (Steele et al., 2014): every bit of a uint64 array spread over all."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
