"""Large corpora: tokenized from local files, killed and gone on with, and streamed into training."""

import hashlib
import json
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from conftest import ROOT, TRAIN, Run
from test_train import NOISY, assert_same, losses, torchrun

from nanorecur import checkpoint
from nanorecur import corpus as corpus_module
from nanorecur.corpus import Stream, open_corpus, open_stream, write_documents
from nanorecur.dataset import load_meta, make_tokenizer

DOCUMENTS = [
    f"Document {i}: " + "To be, or not to be"[: i % 19] + "<|endoftext|>" * (i == 7) + "Ä"
    for i in range(60)
]
BYTES = {"tokenizer": "bytes"}


def expected(documents=DOCUMENTS, share=0.2):
    """The bytes of (train, val), by the rule that held_out states."""
    held_out = [
        int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < share * 2**64
        for text in documents
    ]
    return [
        b"".join(text.encode() + b"\0" for text, held in zip(documents, held_out) if held == val)
        for val in (False, True)
    ]


def written(folder):
    return [
        np.fromfile(folder / f"{split}.bin", "<u2").astype(np.uint8).tobytes()
        for split in ("train", "val")
    ]


def write_files(folder, kind="jsonl", documents=DOCUMENTS, parts=3):
    """The documents in files of this kind; returns what --input_files takes."""
    each = -(-len(documents) // parts)
    for i, document in enumerate(documents):
        if kind == "txt":
            (folder / f"{i:03}.txt").write_text(document)
    for i in range(parts):
        part = documents[i * each : (i + 1) * each]
        if kind == "jsonl":
            (folder / f"{i}.jsonl").write_text(
                "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in part)
            )
        if kind == "parquet":
            pyarrow.parquet.write_table(
                pyarrow.table({"text": part}), folder / f"{i}.parquet", row_group_size=7
            )
    return f"{folder}/*.{kind}"


@pytest.fixture
def corpus(tmp_path):
    return open_corpus(write_files(tmp_path), "", "", "")


# -----------------------------------------------------------------------------
# into files


CASES = [
    ("openwebtext", "jsonl"),
    ("openwebtext", "txt"),
    ("fineweb", "parquet"),
    ("fineweb_edu", "parquet"),
    ("wikipedia", "parquet"),
]


@pytest.mark.parametrize("name, kind", CASES)
def test_prepare_from_local_files(tmp_path, name, kind):
    files = write_files(tmp_path, kind)
    for _ in range(2):  # the second run writes the same
        run = Run(
            f"data/{name}/prepare.py",
            f"--input_files={files}",
            "--tokenizer=bytes",
            "--val_share=0.2",
            f"--out_dir={tmp_path}",
        )
        assert run.code == 0, run.err
        assert written(tmp_path) == expected() and all(expected())
    splits, val = load_meta(tmp_path)["splits"], expected()[1]
    assert splits["val"]["bytes"] == len(val) - val.count(0)  # separators are tokens without text
    assert (
        splits["val"]["sha256"] == hashlib.sha256((tmp_path / "val.bin").read_bytes()).hexdigest()
    )
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_killed_tokenization_goes_on_and_ends_the_same(tmp_path, monkeypatch, kind):
    """Killed at each of its writes to the journal in turn, before it and after it, with half a batch on the disk."""
    files, write, done = write_files(tmp_path, kind), corpus_module.write_atomically, []

    def dies(path, data):
        if len(done) % 2:  # every other time it dies before the journal is written
            done.append(0)
            raise KeyboardInterrupt
        write(path, data)
        done.append(json.loads(data)["documents"])
        if len(done) < 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "write_atomically", dies)
    for _ in range(11):
        with pytest.raises(KeyboardInterrupt):
            write_documents(tmp_path, BYTES, open_corpus(files, "", "", ""), 0.2, batch=4)
        with open(tmp_path / "train.bin.part", "ab") as file:
            file.write(b"half a batch")
        with pytest.raises(ValueError, match="missing or damaged"):
            load_meta(tmp_path)
    monkeypatch.setattr(corpus_module, "write_atomically", write)
    write_documents(tmp_path, BYTES, open_corpus(files, "", "", ""), 0.2, batch=4)
    assert done[::2] == [4, 8, 12, 16, 20, 24]  # nothing was done again that had been noted
    assert written(tmp_path) == expected()


@pytest.mark.parametrize("change", ["documents", "share", "lost"])
def test_an_interrupted_tokenization_of_something_else_is_not_gone_on_with(
    tmp_path, monkeypatch, change
):
    monkeypatch.setattr(corpus_module, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_documents(
            tmp_path, BYTES, open_corpus(write_files(tmp_path), "", "", ""), 0.2, batch=4
        )
    monkeypatch.undo()
    (tmp_path / "journal.part").write_text(
        json.dumps(
            {"task": 0, "documents": 9, "sizes": {"train": [1, 1], "val": [1, 1]}, "corpus": {}}
        )
    )
    documents, share = (
        (["other", *DOCUMENTS[1:]], 0.2)
        if change == "documents"
        else (DOCUMENTS, 0.3 if change == "share" else 0.2)
    )
    if change == "lost":
        (tmp_path / "train.bin.part").unlink()
    write_documents(
        tmp_path,
        BYTES,
        open_corpus(write_files(tmp_path, documents=documents), "", "", ""),
        share,
        batch=4,
    )
    assert written(tmp_path) == expected(documents, share)


@pytest.fixture
def small_gpt2(monkeypatch):
    """A stand-in for GPT-2's table, which needs a network: bytes, one pair, and the separator."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    small = tiktoken.Encoding(
        "small", pat_str=r".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)


def test_gpt2_documents_end_with_the_end_of_text_token(tmp_path, small_gpt2):
    files = write_files(tmp_path, documents=["ab!", "<|endoftext|>"], parts=1)
    write_documents(tmp_path, {"tokenizer": "gpt2"}, open_corpus(files, "", "", ""), 0.5)
    bins = sorted(
        np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() for split in ("train", "val")
    )
    assert bins == [[*b"<|endoftext|>", 257], [256, 33, 257]]  # spelt out in a document it is text
    tokenizer = make_tokenizer({"tokenizer": "gpt2"})
    assert (
        tokenizer.decode(tokenizer.encode(b"\xffa".decode("utf-8", "surrogateescape"))) == "\ufffda"
    )
    assert (
        tokenizer.encode("ab<|endoftext|>") == [256, 257]
        and tokenizer.decode([256, 257]) == "ab<|endoftext|>"
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ("{}/*.nothing", "0 files; expected some"),
        ("{}/*.jsonl,{}/*.txt", "all .parquet, .jsonl or .txt"),
        ("{}/bad.parquet", "cannot be read"),
        ("{}/0.jsonl", "val_share=0.0: none of 20 documents goes to val.bin"),
        ("{}/no_text.jsonl", "cannot be read"),
        ("{}/empty.jsonl", "cannot be read"),
        ("", "HuggingFaceFW/fineweb: cannot be read .*offline.*; --input_files= takes local"),
    ],
)
def test_prepare_on_wrong_input(tmp_path, monkeypatch, given, said):
    if not given:
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")),
        )
    write_files(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(99))
    (tmp_path / "no_text.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    run = Run(
        "data/fineweb/prepare.py",
        f"--input_files={given.format(tmp_path, tmp_path)}",
        "--tokenizer=bytes",
        "--val_share=0",
        f"--out_dir={tmp_path}",
    )
    assert (
        run.code == 2 and re.search(said, run.err.splitlines()[-1]) and "Traceback" not in run.err
    ), run.err
    assert not (tmp_path / "meta.json").exists()


def test_a_corrupt_file_in_the_middle_stops_with_its_name_and_keeps_the_work(tmp_path):
    files = write_files(tmp_path, "parquet")
    good = (tmp_path / "2.parquet").read_bytes()
    (tmp_path / "2.parquet").write_bytes(good[: len(good) // 2])
    arguments = (
        f"--input_files={files}",
        "--tokenizer=bytes",
        "--val_share=0.2",
        f"--out_dir={tmp_path}",
    )
    run = Run("data/fineweb/prepare.py", *arguments)
    assert run.code == 2 and "Traceback" not in run.err and not (tmp_path / "meta.json").exists(), (
        run.err
    )
    assert "the same command goes on" in run.err.splitlines()[-1]
    (tmp_path / "2.parquet").write_bytes(good)
    assert Run("data/fineweb/prepare.py", *arguments).code == 0 and written(tmp_path) == expected()


def test_a_full_disk_stops_with_the_folder_and_keeps_the_work(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    files, write = write_files(tmp_path), corpus_module.write_atomically
    for allowed in (0, 3):
        writes = iter([write] * allowed + [full])
        monkeypatch.setattr(
            corpus_module,
            "write_atomically",
            lambda path, data, writes=writes: next(writes)(path, data),
        )
        with pytest.raises(ValueError, match=f"{tmp_path}: OSError: .*No space left.* goes on"):
            write_documents(tmp_path, BYTES, open_corpus(files, "", "", ""), 0.2, batch=4)
    monkeypatch.undo()
    assert json.loads((tmp_path / "journal.part").read_text())["documents"] == 12
    write_documents(tmp_path, BYTES, open_corpus(files, "", "", ""), 0.2, batch=4)
    assert written(tmp_path) == expected()


# -----------------------------------------------------------------------------
# into training

META = {**BYTES, "val_share": 0.2}


def take(stream, lanes, count):
    """The targets of the lanes' next batches, as bytes per lane."""
    rows = {lane: [stream.next(lane) for _ in range(count)] for lane in lanes}
    for x, y in (batch for batches in rows.values() for batch in batches):
        assert x.shape == y.shape == (2, 8) and np.array_equal(x.ravel()[1:], y.ravel()[:-1])
    return {
        lane: b"".join(x.astype(np.uint8).tobytes() for x, _ in batches)
        for lane, batches in rows.items()
    }


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_lanes_share_the_documents_without_overlap(corpus, lanes):
    """An epoch of every lane, packed without a gap, holds every training document once, and the next one begins again."""
    stream = Stream(corpus, META, lanes, range(lanes), (2, 8), {})
    train, seen = set(expected()[0].split(b"\0")[:-1]), []
    for lane in range(lanes):
        text, parts = take(stream, [lane], 3 * len(expected()[0]) // 16 // lanes + 4)[lane], []
        for part in text.split(b"\0"):
            if part in parts:
                break
            parts.append(part)
        assert text.startswith(
            b"\0".join(parts) + b"\0" + parts[0]
        )  # the second epoch follows on the first
        seen += parts
    assert len(seen) == len(train) and set(seen) == train


def test_a_process_with_some_of_the_lanes_makes_the_same_batches(corpus):
    whole = take(Stream(corpus, META, 4, range(4), (2, 8), {}), range(4), 5)
    for mine in ([0, 2], [1, 3]):
        assert take(Stream(corpus, META, 4, mine, (2, 8), {}), mine, 5) == {
            lane: whole[lane] for lane in mine
        }


@pytest.mark.parametrize("lanes", [2, 5])
def test_a_stream_goes_on_from_its_states(corpus, lanes):
    """At every one of the first thirty batches, over the end of the epoch, through a checkpoint's data types."""
    stream, rest = Stream(corpus, META, lanes, range(lanes), (2, 8), {}), {}
    states = []
    for _ in range(30):
        states.append(json.loads(json.dumps(stream.states)))
        stream.next(0)
    rest = take(stream, [0], 4)
    for i, state in enumerate(states):
        again = Stream(corpus, META, lanes, [0], (2, 8), {0: state["0"]})
        for _ in range(30 - i):
            again.next(0)
        assert take(again, [0], 4) == rest


def test_more_lanes_than_documents_are_refused(corpus):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=80: .* too few documents"):
        Stream(corpus, META, 80, [79], (2, 8), {}).next(79)


@pytest.fixture
def source(tmp_path):
    """A folder with a prepare.py that names a corpus, and the documents in local files."""
    folder = tmp_path / "source"
    folder.mkdir()
    text = (ROOT / "data" / "wikipedia" / "prepare.py").read_text()
    text = text.replace('tokenizer = "gpt2"', 'tokenizer = "bytes"')
    (folder / "prepare.py").write_text(re.sub("val_share = [0-9.]+", "val_share = 0.2", text))
    return folder, f"--input_files={write_files(tmp_path)}"


def test_the_validation_of_a_stream_is_what_prepare_holds_out(source):
    _, meta, validation = open_stream(source[0], source[1].removeprefix("--input_files="), 10**9)
    assert validation.astype(np.uint8).tobytes() == expected()[1]
    assert meta["splits"]["val"] == {
        "tokens": len(validation),
        "bytes": len(validation) - expected()[1].count(0),
    }


def stream(source, out_dir, *arguments):
    return Run(
        "train.py",
        "--stream",
        f"--dataset={source[0]}",
        source[1],
        f"--out_dir={out_dir}",
        *TRAIN,
        "--max_iters=12",
        *arguments,
    )


def test_a_streamed_run_goes_on_bit_for_bit_also_on_two_processes(source, tmp_path):
    whole, parts, two = tmp_path / "whole", tmp_path / "parts", tmp_path / "two"
    run = stream(source, whole, *NOISY)
    assert run.code == 0 and "streamed windows" in run.out, run.err
    for stop in (4, 8, 12):
        assert stream(source, parts, "--init_from=auto", f"--max_iters={stop}", *NOISY).code == 0
    a, b = checkpoint.load(whole), checkpoint.load(parts)
    for name in ("model", "optimizer", "iter_num"):
        assert_same(a[name], b[name], name)
    plain = tmp_path / "plain"
    assert stream(source, plain).code == 0
    run = torchrun(source[0], two, "--stream", source[1], "--max_iters=8")
    assert run.returncode == 0, run.stderr
    assert stream(source, two, "--init_from=resume").code == 0
    assert losses(two) == pytest.approx(losses(plain), rel=1e-6)
    refused = stream(source, two, "--init_from=resume", "--gradient_accumulation_steps=4")
    assert refused.code == 2 and "gradient_accumulation_steps=4: must be 2" in refused.err


def test_streaming_what_names_no_corpus(tmp_path):
    run = stream((ROOT / "data" / "pycode", "--input_files="), tmp_path / "out")
    assert run.code == 2 and run.err.count("\n") == 1 and "names no corpus" in run.err, run.err
