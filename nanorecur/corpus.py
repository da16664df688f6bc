"""
Documents: read a corpus too large to hold, from the Hugging Face hub or from local files.

A prepare script turns the documents into token files (write_documents); train.py --stream trains on
them while they are read and stores nothing (Stream). Reading and checking the token files is in
dataset.py.
"""

import glob
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from configurator import read_knobs
from nanorecur.dataset import DATA, finish_dataset, part_path, random_key, token_dtype
from nanorecur.files import flush, write_atomically
from nanorecur.tokenizer import Tokenizer, find_tokenizer, make_tokenizer, with_identity

if TYPE_CHECKING:
    from datasets import IterableDataset

JOURNAL = "journal.part"  # progress of write_documents
READERS = {  # file suffix: datasets' name of the format, and its options
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {"sample_by": "document"}),
    ".md": ("text", {"sample_by": "document"}),
}


def open_corpus(input_files: str, repository: str, subset: str, revision: str) -> "IterableDataset":
    """Return the documents of local files, or of a repository on the hub where there are none.

    input_files: comma-separated globs or folders of .parquet or .jsonl files with a column "text",
        or of .txt and .md files, one document each; "" for the hub.
    Raises ValueError where there is nothing to read.
    """
    import datasets

    if input_files:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # would ask the hub, for local files too
        paths = find_files(input_files)
        reader, options = READERS[Path(paths[0]).suffix]
    try:
        if input_files:
            corpus = datasets.load_dataset(
                reader, data_files=paths, split="train", streaming=True, **options
            )
        else:
            corpus = datasets.load_dataset(
                repository, subset, split="train", revision=revision, streaming=True
            )
        first_text(corpus)
    except Exception as error:  # the hub's client, Arrow and json have types of their own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        hint = "" if input_files else "; --input_files= takes local .parquet, .jsonl or .txt files"
        raise ValueError(f"{input_files or repository}: cannot be read ({reason}){hint}") from None
    return corpus


def find_files(input_files: str) -> list[str]:
    """Return the sorted paths that comma-separated globs match, in a folder all that are readable.

    Raises ValueError where there are none, or files of several or unknown formats.
    """
    paths = set()
    for pattern in input_files.split(","):
        for name in glob.glob(pattern.strip(), recursive=True):
            paths.update(files_in(name) if os.path.isdir(name) else [name])
    if not paths:
        raise ValueError(f"input_files={input_files}: no file has such a name")
    suffixes = {Path(path).suffix for path in paths}
    readers = {READERS[suffix][0] for suffix in suffixes if suffix in READERS}
    if len(readers) != 1 or not suffixes <= set(READERS):
        raise ValueError(
            f"input_files={input_files}: must match .parquet, .jsonl, .txt or .md files,"
            f" all of one format, not {len(paths)} files with {sorted(suffixes)}"
        )
    return sorted(paths)


def files_in(folder: str) -> list[str]:
    """Return the paths of all files under a folder whose suffix is known."""
    return [str(path) for path in Path(folder).rglob("*.*") if path.suffix in READERS]


def first_text(corpus: "IterableDataset") -> str:
    """Return the text of the first document. Raises ValueError where there is none."""
    for document in corpus:
        if "text" not in document:
            raise ValueError("a document has no column named text")
        return document["text"]
    raise ValueError("there are no documents")


def held_out(text: str, val_share: float) -> bool:
    """Return True where a document is for validation.

    That depends on the sha256 of its text alone, not on its place or on other documents.
    """
    return place_of(text) < val_share * 2**64


def place_of(text: str) -> int:
    """Return a number below 2**64 that depends on a text alone, evenly distributed over texts."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big")


# -----------------------------------------------------------------------------
# documents into token files


def write_documents(
    folder: str | Path, meta: dict, corpus: "IterableDataset", val_share: float, batch: int = 500
) -> dict:
    """Write train.bin, val.bin and meta.json of a corpus and return the meta.

    Every document is followed by the separator. A call after one that was killed continues behind
    the last batch that it had finished.

    meta: a tokenizer's fields, as make_tokenizer takes them. val_share: share of the documents that
    is held out for validation. batch: documents per batch; two batches are in memory at a time.
    Raises ValueError where a split would be empty or the reading or writing fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(meta)
    dtype = token_dtype(tokenizer)
    task = random_key(meta, val_share, corpus.num_shards, first_text(corpus))
    progress = read_journal(folder, task, dtype.itemsize)
    (folder / "meta.json").unlink(missing_ok=True)  # unfinished files must not look complete

    def encode(text):
        split = "val" if held_out(text, val_share) else "train"
        return split, tokenizer.encode_document(text).astype(dtype), len(text.encode())

    try:
        append_documents(folder, corpus, encode, batch, progress)
    except (OSError, ValueError) as error:  # a full disk, a lost connection, a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder}: {reason}; what is done is kept, the same command goes on with it"
        ) from None
    for split, (n_tokens, _) in progress["sizes"].items():
        if n_tokens == 0:
            raise ValueError(
                f"val_share={val_share}: must leave documents for both splits;"
                f" none of {progress['documents']:,} goes to {split}.bin"
            )
    (folder / JOURNAL).unlink()
    return finish_dataset(folder, meta, progress["sizes"])


def append_documents(
    folder: Path, corpus: "IterableDataset", encode: Callable, batch: int, progress: dict
) -> None:
    """Append the documents that are left to the split files.

    After every batch, progress and the journal are updated: {"documents", "sizes", "corpus"}.
    """
    sizes = progress["sizes"]
    with (
        open(part_path(folder, "train"), "ab") as train,
        open(part_path(folder, "val"), "ab") as val,
        tqdm(
            total=number_of_documents(corpus), initial=progress["documents"], unit=" documents"
        ) as bar,
    ):
        files = {"train": train, "val": val}
        for documents, state in encode_ahead(corpus, progress["corpus"], encode, batch):
            for split, ids, size in documents:
                files[split].write(ids.tobytes())
                n_tokens, n_bytes = sizes[split]
                sizes[split] = (n_tokens + len(ids), n_bytes + size)
                bar.update()
            for file in files.values():
                flush(file)
            progress["documents"] = bar.n
            progress["corpus"] = state
            write_atomically(folder / JOURNAL, json.dumps(progress).encode())


def encode_ahead(
    corpus: "IterableDataset", state: dict | None, encode: Callable, batch: int
) -> Iterator[tuple[Iterable, dict]]:
    """Yield (encoded documents, state of the corpus behind them) of each batch.

    Threads encode the next batch while the caller handles one. state: where the corpus continues.
    """
    if state:
        corpus.load_state_dict(state)

    def encode_all(texts):
        return [encode(text) for text in texts]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = None
        for rows in corpus.iter(batch_size=batch):
            texts = rows["text"]
            chunks = [texts[i : i + 20] for i in range(0, len(texts), 20)]  # one task each
            documents = itertools.chain.from_iterable(pool.map(encode_all, chunks))
            submitted = (documents, corpus.state_dict())
            if waiting:
                yield waiting
            waiting = submitted
        if waiting:
            yield waiting


def read_journal(folder: Path, task: int, itemsize: int) -> dict:
    """Return the progress of a killed write_documents, or that of a new one, and fit its files.

    The split files are cut to the sizes in the journal. task: a key of what is written; the journal
    of another task is ignored. itemsize: bytes of a token.
    """
    progress = {
        "task": task,
        "documents": 0,
        "sizes": {"train": (0, 0), "val": (0, 0)},
        "corpus": None,
    }
    parts = {split: part_path(folder, split) for split in progress["sizes"]}
    for part in parts.values():
        part.touch()
    if (folder / JOURNAL).exists():
        journal = json.loads((folder / JOURNAL).read_text())
        complete = all(
            part.stat().st_size >= journal["sizes"][split][0] * itemsize
            for split, part in parts.items()
        )
        if journal["task"] == task and complete:
            progress = journal
    for split, part in parts.items():
        os.truncate(part, progress["sizes"][split][0] * itemsize)
    return progress


def number_of_documents(corpus: "IterableDataset") -> int | None:
    """Return the number of documents that the hub states, or None where it states none."""
    return corpus.info.splits["train"].num_examples if corpus.info.splits else None


# -----------------------------------------------------------------------------
# documents into training


def open_stream(
    folder: str | Path, input_files: str, n_held_out: int, val_share: float = 0.0
) -> tuple["IterableDataset", dict, np.ndarray]:
    """Return (corpus, meta, validation tokens) of the corpus that a folder's prepare.py names.

    meta: as in meta.json. The validation tokens are about n_held_out of the held-out documents.
    val_share: share of the documents that are held out; 0: as prepare.py says.
    Raises ValueError where prepare.py names no corpus, or no document is held out.
    """
    path = Path(folder, "prepare.py")
    settings = corpus_settings(path)
    if not settings:
        names = sorted(p.parent.name for p in DATA.glob("*/prepare.py") if corpus_settings(p))
        raise ValueError(f"{path}: names no corpus to stream; these do: {', '.join(names)}")
    corpus = open_corpus(
        input_files, settings["repository"], settings["subset"], settings["revision"]
    )
    val_share = val_share or settings["val_share"]
    meta = {**find_tokenizer(settings["tokenizer"]), "val_share": val_share}
    tokenizer = make_tokenizer(meta)
    documents, n_bytes = first_held_out(corpus, tokenizer, val_share, n_held_out)
    if not documents:
        raise ValueError(
            f"val_share={val_share}: holds out none of the documents;"
            f" --val_share={sufficient_share(corpus):g} holds out some"
        )
    validation = np.concatenate(documents)
    meta = with_identity(meta)
    meta["vocab_size"] = tokenizer.vocab_size
    meta["splits"] = {"val": {"tokens": len(validation), "bytes": n_bytes}}
    return corpus, meta, validation


def corpus_settings(path: Path) -> dict:
    """Return the knobs of a prepare.py that names a corpus, or {} where it names none."""
    if not path.exists():
        return {}
    settings = {name: knob.value for name, knob in read_knobs(path).items()}
    return settings if "repository" in settings else {}


def sufficient_share(corpus: "IterableDataset") -> float:
    """Return a val_share, in hundredths, that holds out at least one document of a small corpus."""
    least = min(place_of(row["text"]) for row in corpus) / 2**64
    return math.floor(100 * least + 1) / 100


def first_held_out(
    corpus: "IterableDataset", tokenizer: Tokenizer, val_share: float, n_tokens: int
) -> tuple[list[np.ndarray], int]:
    """Return (ids of each document, bytes of text) of the first held-out documents.

    They are as many documents as n_tokens needs, or all where these are fewer.
    """
    documents, found, n_bytes = [], 0, 0
    for row in corpus:
        if held_out(row["text"], val_share):
            ids = tokenizer.encode_document(row["text"]).astype(token_dtype(tokenizer))
            documents.append(ids)
            found += len(ids)
            n_bytes += len(row["text"].encode())
        if found >= n_tokens:
            break
    return documents, n_bytes


class Stream:
    """Training batches from a corpus that is read as they are needed.

    Lane m makes the batches of micro-step m. The lanes share the corpus's files (or, if these are
    fewer, its documents) without overlap. Documents are packed one after the other with the
    separator between them, and a lane that is through begins again. Each process makes the batches
    of some lanes, so batches do not depend on the number of processes.
    """

    def __init__(
        self,
        corpus: "IterableDataset",
        meta: dict,
        n_lanes: int,
        own_lanes: Sequence[int],
        shape: tuple[int, int],
        states: dict[int, dict],
    ):
        """Start to make the first batch of each of this process's lanes (own_lanes).

        corpus, meta: from open_stream. shape: (batch_size, block_size).
        states: {lane: state}, self.states of the run to resume, or {}.
        """
        self.tokenizer, self.val_share, self.shape = make_tokenizer(meta), meta["val_share"], shape
        self.states = {lane: states.get(lane, {"corpus": {}, "left": []}) for lane in own_lanes}
        self.batches = {lane: self._batches(corpus, n_lanes, lane) for lane in own_lanes}
        self.pool = ThreadPoolExecutor(len(own_lanes))
        self.pending = {lane: self.pool.submit(next, self.batches[lane]) for lane in own_lanes}

    def next(self, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane's next (x, y), each (batch_size, block_size) int64.

        A thread begins to make the batch after it.
        """
        x, y, self.states[lane] = self.pending[lane].result()
        self.pending[lane] = self.pool.submit(next, self.batches[lane])
        return x, y

    def _batches(self, corpus, n_lanes, lane):
        """Yield (x, y, state to resume from) without end, epoch after epoch."""
        state = self.states[lane]
        tokens = yield from self._cut(np.array(state["left"], np.int64), state["corpus"])
        while True:
            share = lane_of(corpus, n_lanes, lane)
            if state["corpus"]:
                share.load_state_dict(state["corpus"])
            is_empty = True
            for rows in share.iter(batch_size=16):
                is_empty = False
                texts = [text for text in rows["text"] if not held_out(text, self.val_share)]
                documents = [self.tokenizer.encode_document(text) for text in texts]
                tokens = np.concatenate((tokens, *documents))
                tokens = yield from self._cut(tokens, share.state_dict())
            if is_empty and not state["corpus"]:
                raise ValueError(
                    f"gradient_accumulation_steps={n_lanes}:"
                    " the corpus has too few documents for so many"
                )
            state = {"corpus": {}}

    def _cut(self, tokens, corpus_state):
        """Yield (x, y, state to resume from) while tokens last; return those that are left."""
        B, T = self.shape
        while len(tokens) > B * T:
            x, y, tokens = tokens[: B * T], tokens[1 : B * T + 1], tokens[B * T :]
            state = {"corpus": corpus_state, "left": tokens.tolist()}
            yield x.reshape(B, T), y.reshape(B, T), state
        return tokens


def lane_of(corpus: "IterableDataset", n_lanes: int, lane: int) -> "IterableDataset":
    """Return the documents of one lane: whole files if there are enough, else every n-th one."""
    from datasets.distributed import split_dataset_by_node

    if corpus.num_shards >= n_lanes:
        return corpus.shard(n_lanes, lane)
    return split_dataset_by_node(corpus, rank=lane, world_size=n_lanes)
