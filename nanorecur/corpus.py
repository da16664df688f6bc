"""
Corpora too large to hold: read document by document from the Hugging Face hub or from local files, tokenized into
train.bin and val.bin by a prepare script (write_documents), or while a model trains on them, nothing stored (Stream).
"""

import glob
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import read_knobs
from nanorecur.dataset import (
    finish,
    flush,
    make_tokenizer,
    part_of,
    random_key,
    token_dtype,
    write_atomically,
    write_ids,
)

JOURNAL = "journal.part"  # how far write_documents came


def open_corpus(input_files, repository, subset, revision):
    """The documents of a corpus on the hub, or of local files of the same form, as a datasets.IterableDataset.

    input_files: globs with commas between them, of .parquet or .jsonl files with a "text" column, or of .txt files, one
    document each; "" for the hub's repository. Raises ValueError where there is nothing to read.
    """
    import datasets

    paths = sorted(
        {
            path
            for pattern in input_files.split(",")
            for path in glob.glob(pattern.strip(), recursive=True)
        }
    )
    kinds = {Path(path).suffix for path in paths}
    readers = {
        ".parquet": ("parquet", {}),
        ".jsonl": ("json", {}),
        ".txt": ("text", {"sample_by": "document"}),
    }
    if input_files and (len(kinds) != 1 or not kinds <= set(readers)):
        raise ValueError(
            f"input_files={input_files}: {len(paths)} files; expected some, all .parquet, .jsonl or .txt"
        )
    try:
        if input_files:
            reader, options = readers[kinds.pop()]
            corpus = datasets.load_dataset(
                reader, data_files=paths, split="train", streaming=True, **options
            )
        else:
            corpus = datasets.load_dataset(
                repository, subset, split="train", revision=revision, streaming=True
            )
        next(iter(corpus))["text"]
    except Exception as error:  # the hub's client, Arrow and json all have their own types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        mend = "" if input_files else "; --input_files= takes local .parquet, .jsonl or .txt files"
        raise ValueError(f"{input_files or repository}: cannot be read ({reason}){mend}") from None
    return corpus


def held_out(text, val_share):
    """Whether a document is for validation: by its text alone, so that it stays there whatever stands around it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < val_share * 2**64


# -----------------------------------------------------------------------------
# into files


def write_documents(folder, tokenizer, corpus, val_share, batch=500):
    """Write train.bin, val.bin and meta.json of a corpus, each document followed by the separator.

    tokenizer: as in write_dataset. corpus: what open_corpus returns; two batches of its documents are in memory.
    val_share: of the documents, about so many are held out. Run again after it was killed, it goes on after the last
    batch it finished. Returns the meta. Raises ValueError where a split would be empty.
    """
    folder, encoder = Path(folder), make_tokenizer(tokenizer)
    task = random_key(tokenizer, val_share, corpus.num_shards, next(iter(corpus))["text"])
    done = read_journal(folder, task, token_dtype(encoder).itemsize)
    (folder / "meta.json").unlink(missing_ok=True)  # so that no half-written set looks whole

    def encode(text):
        split = "val" if held_out(text, val_share) else "train"
        return split, encoder.encode_document(text).astype(token_dtype(encoder)), len(text.encode())

    try:
        append_documents(folder, corpus, encode, batch, done)
    except (OSError, ValueError) as error:  # a full disk, a lost connection, a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder}: {reason}; what is done is kept, the same command goes on with it"
        ) from None
    for split, (tokens, _) in done["sizes"].items():
        if not tokens:
            raise ValueError(
                f"val_share={val_share}: none of {done['documents']:,} documents goes to {split}.bin"
            )
    (folder / JOURNAL).unlink()
    return finish(folder, tokenizer, done["sizes"])


def append_documents(folder, corpus, encode, batch, done):
    """Append the rest of the corpus to the split files, noting in done and in the journal what each batch brought."""
    sizes = done["sizes"]
    with (
        open(part_of(folder, "train"), "ab") as train,
        open(part_of(folder, "val"), "ab") as val,
        tqdm(
            total=number_of_documents(corpus), initial=done["documents"], unit=" documents"
        ) as bar,
    ):
        files = {"train": train, "val": val}
        for encoded, state in encode_ahead(corpus, done["corpus"], encode, batch):
            for split, ids, n_bytes in (document for some in encoded for document in some):
                sizes[split] = write_ids(files[split], ids, n_bytes, sizes[split])
                bar.update()
            for file in files.values():
                flush(file)
            done |= {"documents": bar.n, "corpus": state}
            write_atomically(folder / JOURNAL, json.dumps(done).encode())


def encode_ahead(corpus, state, encode, batch):
    """Yields (encoded documents, state of the corpus after them); threads encode the next batch in the meantime."""
    if state:
        corpus.load_state_dict(state)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        before = None
        for texts in corpus.iter(batch_size=batch):
            shares = [
                texts["text"][i : i + 20] for i in range(0, len(texts["text"]), 20)
            ]  # few tasks, small overhead
            after = pool.map(lambda share: list(map(encode, share)), shares), corpus.state_dict()
            if before:
                yield before
            before = after
        if before:
            yield before


def read_journal(folder, task, itemsize):
    """How far a killed write_documents came with this task, its files cut back to just that."""
    done = {"task": task, "documents": 0, "sizes": {"train": (0, 0), "val": (0, 0)}, "corpus": None}
    parts = {split: part_of(folder, split) for split in done["sizes"]}
    for part in parts.values():
        part.touch()
    if (folder / JOURNAL).exists():
        journal = json.loads((folder / JOURNAL).read_text())
        whole = all(
            part.stat().st_size >= journal["sizes"][split][0] * itemsize
            for split, part in parts.items()
        )
        if journal["task"] == task and whole:
            done = journal
    for split, part in parts.items():
        os.truncate(part, done["sizes"][split][0] * itemsize)
    return done


def number_of_documents(corpus):
    """As the hub tells it, or None."""
    return corpus.info.splits["train"].num_examples if corpus.info.splits else None


# -----------------------------------------------------------------------------
# into a model


def open_stream(folder, input_files, n_tokens):
    """The corpus that a folder's prepare.py names, to train on while it is read.

    Returns (corpus, meta, validation): meta as in meta.json, and the first n_tokens or so of the held-out documents.
    Raises ValueError where the folder names no corpus, or nothing is held out.
    """
    path = Path(folder, "prepare.py")
    knobs = {name: knob.value for name, knob in read_knobs(path).items()} if path.exists() else {}
    if "repository" not in knobs:
        raise ValueError(f"{path}: names no corpus that could be streamed")
    corpus = open_corpus(input_files, knobs["repository"], knobs["subset"], knobs["revision"])
    meta = {"tokenizer": knobs["tokenizer"], "val_share": knobs["val_share"]}
    encoder, parts, tokens, n_bytes = make_tokenizer(meta), [], 0, 0
    for text in (document["text"] for document in corpus):
        if held_out(text, knobs["val_share"]):
            parts.append(encoder.encode_document(text).astype(token_dtype(encoder)))
            tokens, n_bytes = tokens + len(parts[-1]), n_bytes + len(text.encode())
        if tokens >= n_tokens:
            break
    if not parts:
        raise ValueError(f"{path}: val_share={knobs['val_share']} holds out no document")
    meta |= {
        "vocab_size": encoder.vocab_size,
        "splits": {"val": {"tokens": tokens, "bytes": n_bytes}},
    }
    return corpus, meta, np.concatenate(parts)


class Stream:
    """Training batches from a corpus that is read while it is needed.

    Lane m makes the batches of micro-step m. The lanes share the corpus's files, or where these are fewer its
    documents, without overlap; documents are packed one after the other with the separator between them, and a lane
    that is through begins again. So the batches do not depend on the number of processes, each of which takes lanes.
    """

    def __init__(self, corpus, meta, lanes, mine, shape, states):
        """corpus, meta: from open_stream. lanes: how many; mine: the numbers of this process's.

        shape: (batch_size, block_size). states: {lane: state} to go on from, as self.states was, or {}.
        """
        self.encoder, self.val_share, self.shape = make_tokenizer(meta), meta["val_share"], shape
        self.states = {lane: states.get(lane, {"corpus": {}, "left": []}) for lane in mine}
        self.pool = ThreadPoolExecutor(len(mine))
        self.batches = {lane: self._batches(corpus, lanes, lane) for lane in mine}
        self.ahead = {
            lane: self.pool.submit(next, batches) for lane, batches in self.batches.items()
        }

    def next(self, lane):
        """x, y (batch_size, block_size), int64, the lane's next; the one after it is begun in the background."""
        x, y, self.states[lane] = self.ahead[lane].result()
        self.ahead[lane] = self.pool.submit(next, self.batches[lane])
        return x, y

    def _batches(self, corpus, lanes, lane):
        """Yields (x, y, the state to go on from), for ever."""
        state = self.states[lane]
        tokens = yield from self._cut(np.array(state["left"], np.int64), state["corpus"])
        while True:
            part, some = lane_of(corpus, lanes, lane), False
            if state["corpus"]:
                part.load_state_dict(state["corpus"])
            for texts in part.iter(batch_size=16):
                documents = [
                    self.encoder.encode_document(t)
                    for t in texts["text"]
                    if not held_out(t, self.val_share)
                ]
                tokens, some = np.concatenate((tokens, *documents)), True
                tokens = yield from self._cut(tokens, part.state_dict())
            if not some and not state["corpus"]:
                raise ValueError(
                    f"gradient_accumulation_steps={lanes}: the corpus has too few documents for so many"
                )
            state = {"corpus": {}}

    def _cut(self, tokens, at):
        """Yields (x, y, the state to go on from) as long as there are tokens for it, and returns the rest of them."""
        B, T = self.shape
        while len(tokens) > B * T:
            x, y, tokens = tokens[: B * T], tokens[1 : B * T + 1], tokens[B * T :]
            yield x.reshape(B, T), y.reshape(B, T), {"corpus": at, "left": tokens.tolist()}
        return tokens


def lane_of(corpus, lanes, lane):
    """The documents of one lane: whole files where there are enough of them, else every lanes-th document."""
    from datasets.distributed import split_dataset_by_node

    if corpus.num_shards >= lanes:
        return corpus.shard(lanes, lane)
    return split_dataset_by_node(corpus, rank=lane, world_size=lanes)
