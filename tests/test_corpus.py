"""Documents: tokenized from local files, also after a kill, and streamed into training."""

import hashlib
import json
import math
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from conftest import (
    NOISY,
    ROOT,
    TRAIN,
    Run,
    assert_refused,
    assert_same,
    losses,
    torchrun,
    train,
)
from test_tokenizer import END, byte_level, write_folder

from nanorecur import checkpoint
from nanorecur import corpus as corpus_module
from nanorecur.corpus import Stream, open_corpus, open_stream, write_documents
from nanorecur.dataset import load_meta, write_dataset
from nanorecur.tokenizer import identity, make_tokenizer

BYTES = {"tokenizer": "bytes"}


@pytest.fixture(autouse=True)
def no_download_counter(monkeypatch):
    """datasets reports local files to the hub too, and waits for seconds without a network."""
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


def text_of(i):
    """Return the text of a document; one of them spells out the separator of GPT-2."""
    separator = "<|endoftext|>" if i == 7 else ""
    return f"Document {i}: " + "To be, or not to be"[: i % 19] + separator + "Ä"


DOCUMENTS = [text_of(i) for i in range(60)]


def expected(documents=DOCUMENTS, val_share=0.2):
    """Return the bytes of [train, val], by the rule that held_out states."""
    splits = [b"", b""]
    for text in documents:
        key = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
        splits[key < val_share * 2**64] += text.encode() + b"\0"
    return splits


def written(folder):
    paths = [folder / "train.bin", folder / "val.bin"]
    return [np.fromfile(path, "<u2").astype(np.uint8).tobytes() for path in paths]


def write_files(folder, kind="jsonl", documents=DOCUMENTS, n_files=3):
    """Write documents to files of that kind and return what --input_files takes."""
    if kind == "txt":
        for i, document in enumerate(documents):
            (folder / f"{i:03}.txt").write_text(document)
        return f"{folder}/*.txt"
    size = math.ceil(len(documents) / n_files)
    for i in range(n_files):
        part = documents[i * size : (i + 1) * size]
        if kind == "jsonl":
            lines = [json.dumps({"text": text, "n": 1}) + "\n" for text in part]
            (folder / f"{i}.jsonl").write_text("".join(lines))
        else:
            table = pyarrow.table({"text": part})
            pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=7)
    return f"{folder}/*.{kind}"


def open_local(files):
    return open_corpus(files, "", "", "")


@pytest.fixture
def corpus(tmp_path):
    return open_local(write_files(tmp_path))


def prepare(name, folder, files, *arguments):
    options = ["--tokenizer=bytes", "--val_share=0.2", *arguments]
    script = f"data/{name}/prepare.py"
    return Run(script, f"--input_files={files}", f"--out_dir={folder}", *options)


# -----------------------------------------------------------------------------
# documents into token files

CORPORA = [
    ("openwebtext", "jsonl"),
    ("openwebtext", "txt"),
    ("fineweb", "parquet"),
    ("fineweb_edu", "parquet"),
    ("wikipedia", "parquet"),
]


@pytest.mark.parametrize("name, kind", CORPORA)
def test_prepare_writes_the_documents_of_local_files_and_repeats_itself(tmp_path, name, kind):
    files = write_files(tmp_path, kind)
    for _ in range(2):
        run = prepare(name, tmp_path, files)
        assert run.code == 0, run.err
        assert written(tmp_path) == expected() and all(expected())
    assert not list(tmp_path.glob("*.part"))


def test_meta_counts_text_without_separators_and_has_the_hashes(tmp_path):
    write_documents(tmp_path, BYTES, open_local(write_files(tmp_path)), 0.2)
    info, val = load_meta(tmp_path)["splits"]["val"], expected()[1]
    assert info["tokens"] == len(val) and info["bytes"] == len(val) - val.count(0)
    assert info["sha256"] == hashlib.sha256((tmp_path / "val.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_killed_tokenization_continues_and_ends_the_same(tmp_path, monkeypatch, kind):
    """Every other call is killed before, the others behind a write to the journal.

    Before the next call, half a batch of tokens that the journal does not know is on the disk.
    """
    write_dataset(tmp_path, BYTES, {"train": ["an earlier"], "val": ["corpus"]})
    files, write, noted = write_files(tmp_path, kind), corpus_module.write_atomically, []

    def noting(path, data):
        write(path, data)
        noted.append(json.loads(data)["documents"])

    def dies_before(path, data):
        raise KeyboardInterrupt

    def dies_behind(path, data):
        noting(path, data)
        raise KeyboardInterrupt

    for dies in [dies_behind, dies_before] * 5 + [dies_behind]:
        monkeypatch.setattr(corpus_module, "write_atomically", dies)
        with pytest.raises(KeyboardInterrupt):
            write_documents(tmp_path, BYTES, open_local(files), 0.2, batch=4)
        with open(tmp_path / "train.bin.part", "ab") as file:
            file.write(b"half a batch")
        with pytest.raises(ValueError, match="missing or damaged"):
            load_meta(tmp_path)
    assert noted == [4, 8, 12, 16, 20, 24]  # what was noted is not done again
    monkeypatch.setattr(corpus_module, "write_atomically", noting)
    write_documents(tmp_path, BYTES, open_local(files), 0.2, batch=4)
    assert noted == list(range(4, 61, 4)) and written(tmp_path) == expected()


@pytest.mark.parametrize("change", ["documents", "val_share", "lost"])
def test_an_interrupted_tokenization_of_something_else_starts_again(tmp_path, monkeypatch, change):
    write = corpus_module.write_atomically

    def dies_behind_20(path, data):
        write(path, data)
        if json.loads(data)["documents"] == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "write_atomically", dies_behind_20)
    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path, BYTES, open_local(write_files(tmp_path)), 0.2, batch=4)
    monkeypatch.setattr(corpus_module, "write_atomically", write)
    documents, val_share = DOCUMENTS, 0.2
    if change == "documents":
        documents = ["other", *DOCUMENTS[1:]]
    elif change == "val_share":
        val_share = 0.3
    else:
        (tmp_path / "train.bin.part").unlink()
    files = write_files(tmp_path, documents=documents)
    write_documents(tmp_path, BYTES, open_local(files), val_share, batch=4)
    assert written(tmp_path) == expected(documents, val_share)


@pytest.fixture
def small_gpt2(monkeypatch):
    """A replacement for GPT-2's encoding, which needs a network: bytes, one pair, the separator."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    special = {"<|endoftext|>": 257}
    small = tiktoken.Encoding("small", pat_str=r".+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)


def test_gpt2_documents_end_with_the_separator_and_can_spell_it_out(tmp_path, small_gpt2):
    files = write_files(tmp_path, documents=["ab!", "<|endoftext|>"], n_files=1)
    write_documents(tmp_path, {"tokenizer": "gpt2"}, open_local(files), 0.5)
    paths = [tmp_path / "train.bin", tmp_path / "val.bin"]
    ids = sorted(np.fromfile(path, "<u2").tolist() for path in paths)
    assert ids == [[*b"<|endoftext|>", 257], [256, 33, 257]]


def test_the_separator_in_a_prompt_is_one_token(small_gpt2):
    tokenizer = make_tokenizer({"tokenizer": "gpt2"})
    assert tokenizer.encode("ab<|endoftext|>") == [256, 257]
    assert tokenizer.decode([256, 257]) == "ab<|endoftext|>"
    prompt = b"\xffa".decode("utf-8", "surrogateescape")  # bytes that are no text
    assert tokenizer.decode(tokenizer.encode(prompt)) == "\ufffda"


WRONG_FILES = [
    ("*.nothing", "no file has such a name"),
    ("*.jsonl,{folder}/*.txt", "all of one format, not 4 files with"),
    ("bad.parquet", "bad.parquet: cannot be read"),
    ("0.jsonl", "val_share=0.0: must leave .* both splits; none of 20 goes to val.bin"),
    ("no_text.jsonl", "cannot be read .*no column named text"),
    ("empty.jsonl", "cannot be read"),
]


@pytest.mark.parametrize("files, message", WRONG_FILES)
def test_prepare_names_files_that_it_cannot_use(tmp_path, files, message):
    write_files(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(99))
    folder = tmp_path / "wrong"
    if files in ("no_text.jsonl", "empty.jsonl"):
        (tmp_path / files).write_text('{"body": "a"}\n' if files == "no_text.jsonl" else "")
    files = f"{tmp_path}/{files.format(folder=tmp_path)}"
    run = prepare("fineweb", folder, files, "--val_share=0")
    last_line = run.err.splitlines()[-1]
    assert run.code == 2 and re.search(message, last_line) and "Traceback" not in run.err, run.err
    assert not (folder / "meta.json").exists()


def test_prepare_without_a_network_says_how_to_use_local_files(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    run = prepare("fineweb", tmp_path, "")
    words = "HuggingFaceFW/fineweb: cannot be read .*offline.*; --input_files= takes local"
    assert run.code == 2 and run.err.count("\n") == 1 and re.search(words, run.err), run.err


def test_a_corrupt_file_stops_with_its_folder_and_keeps_the_work(tmp_path):
    files = write_files(tmp_path, "parquet")
    good = (tmp_path / "2.parquet").read_bytes()
    (tmp_path / "2.parquet").write_bytes(good[: len(good) // 2])
    run = prepare("fineweb", tmp_path, files)
    assert run.code == 2 and "Traceback" not in run.err, run.err
    last_line = run.err.splitlines()[-1]
    assert str(tmp_path) in last_line and "the same command goes on" in last_line
    assert not (tmp_path / "meta.json").exists()
    (tmp_path / "2.parquet").write_bytes(good)
    assert prepare("fineweb", tmp_path, files).code == 0 and written(tmp_path) == expected()


def test_a_full_disk_stops_with_the_folder_and_keeps_the_work(tmp_path, monkeypatch):
    files, write = write_files(tmp_path), corpus_module.write_atomically
    for n_allowed in (0, 3):
        left = iter(range(n_allowed))

        def write_until_full(path, data, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            write(path, data)

        monkeypatch.setattr(corpus_module, "write_atomically", write_until_full)
        with pytest.raises(ValueError, match=f"{tmp_path}: OSError: .*No space left.* goes on"):
            write_documents(tmp_path, BYTES, open_local(files), 0.2, batch=4)
    monkeypatch.undo()
    assert json.loads((tmp_path / "journal.part").read_text())["documents"] == 12
    write_documents(tmp_path, BYTES, open_local(files), 0.2, batch=4)
    assert written(tmp_path) == expected()


# -----------------------------------------------------------------------------
# documents into training

META = {**BYTES, "val_share": 0.2}
SHAPE = (2, 8)  # batch_size, block_size


def take(stream, lanes, count):
    """Return {lane: bytes of its next count inputs}, and check that targets are one token ahead."""
    taken = {}
    for lane in lanes:
        inputs = b""
        for _ in range(count):
            x, y = stream.next(lane)
            assert x.shape == y.shape == SHAPE
            assert np.array_equal(x.ravel()[1:], y.ravel()[:-1])
            inputs += x.astype(np.uint8).tobytes()
        taken[lane] = inputs
    return taken


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_lanes_share_the_documents_without_overlap(corpus, lanes):
    """The lanes' epochs hold every training document once, and a second epoch follows the first."""
    stream = Stream(corpus, META, lanes, range(lanes), SHAPE, {})
    train, seen = expected()[0], []
    for lane in range(lanes):
        text = take(stream, [lane], 3 * len(train) // 16 // lanes + 4)[lane]
        documents = []
        for document in text.split(b"\0"):
            if document in documents:
                break  # the second epoch
            documents.append(document)
        assert text.startswith(b"\0".join(documents) + b"\0" + documents[0])
        seen += documents
    assert sorted(seen) == sorted(train.split(b"\0")[:-1])


def test_a_process_with_some_of_the_lanes_makes_the_same_batches(corpus):
    alone = take(Stream(corpus, META, 4, range(4), SHAPE, {}), range(4), 5)
    for own in ([0, 2], [1, 3]):
        shared = take(Stream(corpus, META, 4, own, SHAPE, {}), own, 5)
        assert shared == {lane: alone[lane] for lane in own}


@pytest.mark.parametrize("lanes", [2, 5])
def test_a_stream_resumes_from_its_states(corpus, lanes):
    """At each of the first thirty batches, more than an epoch, from states saved as JSON."""
    stream = Stream(corpus, META, lanes, range(lanes), SHAPE, {})
    states = []
    for _ in range(30):
        states.append(json.loads(json.dumps(stream.states)))
        stream.next(0)
    undisturbed = take(stream, [0], 4)
    for i, state in enumerate(states):
        resumed = Stream(corpus, META, lanes, [0], SHAPE, {0: state["0"]})
        for _ in range(30 - i):
            resumed.next(0)
        assert take(resumed, [0], 4) == undisturbed


def test_more_lanes_than_documents_are_refused(corpus):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=80: .* too few documents"):
        Stream(corpus, META, 80, [79], SHAPE, {}).next(79)


@pytest.fixture
def source(tmp_path):
    """A folder with a prepare.py that names a corpus, and the files with its documents."""
    folder = tmp_path / "source"
    folder.mkdir()
    text = (ROOT / "data" / "wikipedia" / "prepare.py").read_text()
    text = text.replace('tokenizer = "gpt2"', 'tokenizer = "bytes"')
    (folder / "prepare.py").write_text(re.sub("val_share = [0-9.]+", "val_share = 0.2", text))
    return folder, write_files(tmp_path)


def test_the_validation_of_a_stream_is_what_prepare_holds_out(source):
    _, meta, validation = open_stream(*source, n_held_out=10**9)
    val = expected()[1]
    assert validation.astype(np.uint8).tobytes() == val
    assert meta["splits"]["val"] == {"tokens": len(val), "bytes": len(val) - val.count(0)}
    _, _, beginning = open_stream(*source, n_held_out=30)
    assert 30 <= len(beginning) < len(validation)
    assert np.array_equal(beginning, validation[: len(beginning)])


def train_stream(folder, files, out_dir, *arguments):
    data = ["--stream", f"--dataset={folder}", f"--input_files={files}"]
    return Run("train.py", *data, f"--out_dir={out_dir}", *TRAIN, "--max_iters=12", *arguments)


def test_a_streamed_run_resumes_bit_for_bit(source, tmp_path):
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    run = train_stream(*source, undisturbed, *NOISY)
    assert run.code == 0 and "streamed windows" in run.out, run.err
    for stop in (4, 8, 12):
        options = ("--init_from=auto", f"--max_iters={stop}", *NOISY)
        assert train_stream(*source, resumed, *options).code == 0
    a, b = checkpoint.load(undisturbed), checkpoint.load(resumed)
    for name in ("model", "optimizer", "iter_num"):
        assert_same(a[name], b[name], name)


@pytest.mark.slow
def test_a_streamed_run_on_two_processes_has_the_losses_of_one(source, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_stream(*source, one).code == 0
    folder, files = source
    run = torchrun(folder, two, "--stream", f"--input_files={files}", "--max_iters=8")
    assert run.returncode == 0, run.stderr
    assert train_stream(*source, two, "--init_from=resume").code == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    options = ("--init_from=resume", "--gradient_accumulation_steps=4")
    refused = train_stream(*source, two, *options)
    assert_refused(refused, "gradient_accumulation_steps: 2 in the checkpoint, 4 asked for")


def test_a_folder_that_names_no_corpus_cannot_be_streamed(tmp_path):
    run = train_stream(ROOT / "data" / "pycode", "", tmp_path / "out")
    names = "fineweb, fineweb_edu, openwebtext, wikipedia"
    assert_refused(run, f"names no corpus to stream; these do: {names}\n")


def test_a_small_corpus_is_streamed_with_a_larger_val_share(source):
    """The error for a share that holds out nothing names one that holds out something."""
    with pytest.raises(ValueError, match="^val_share=1e-09: holds out none") as caught:
        open_stream(*source, n_held_out=10**9, val_share=1e-9)
    share = float(re.search(r"--val_share=([\d.]+) ", str(caught.value))[1])
    _, meta, validation = open_stream(*source, n_held_out=10**9, val_share=share)
    assert meta["val_share"] == share
    assert validation.astype(np.uint8).tobytes() == expected(val_share=share)[1] != b""


def test_the_meta_of_a_stream_has_the_identity_of_its_tokenizer(source):
    _, meta, _ = open_stream(*source, n_held_out=30)
    assert meta["tokenizer_sha256"] == identity(make_tokenizer(BYTES))


# -----------------------------------------------------------------------------
# one's own text


def prepare_text(files, folder, *arguments, **options):
    script = "data/text/prepare.py"
    return Run(script, f"--input_files={files}", f"--out_dir={folder}", *arguments, **options)


def read(folder, split):
    """Return the text of a split, separators included."""
    meta = load_meta(folder)
    ids = np.fromfile(folder / f"{split}.bin", meta["dtype"])
    return make_tokenizer(meta).decode(ids.tolist())


def test_of_few_texts_the_end_of_each_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)
    (tmp_path / "b.md").write_text("c" * 180 + "d" * 20)
    folder = tmp_path / "new" / "mine"
    run = prepare_text(tmp_path, folder, "--val_share=0.1")
    assert run.code == 0, run.err
    assert read(folder, "train") == "a" * 90 + "\0" + "c" * 180 + "\0"
    assert read(folder, "val") == "b" * 10 + "\0" + "d" * 20 + "\0"
    command = f"python train.py config/quickstart.py --dataset={folder} --out_dir=out-mine"
    assert "train.bin: 272 tokens" in run.out and run.out.endswith(command + "\n")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_of_many_texts_some_are_held_out_whole(tmp_path, kind):
    documents = [f"{i} " + "x" * (i % 7) for i in range(200)]
    files = write_files(tmp_path, kind, documents)
    run = prepare_text(files, tmp_path / "mine", "--val_share=0.1")
    assert run.code == 0, run.err
    assert written(tmp_path / "mine") == expected(documents, 0.1)


def test_text_in_characters_has_the_alphabet_of_all_files(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 20)
    (tmp_path / "b.txt").write_text("xyzé" * 20)
    run = prepare_text(tmp_path / "*.txt", tmp_path / "mine", "--tokenizer=char")
    assert run.code == 0, run.err
    assert load_meta(tmp_path / "mine")["chars"] == "abcxyzé"
    assert read(tmp_path / "mine", "train") == "abc" * 19 + "xyzé" * 19


def test_text_in_the_tokens_of_a_tokenizer_json(tmp_path):
    write_folder(tmp_path / "hf", byte_level(), END)
    (tmp_path / "a.txt").write_text("to be " * 20)
    files, names = tmp_path / "a.txt", [f"hf:{tmp_path / 'hf'}", tmp_path / "hf" / "tokenizer.json"]
    for name in names:
        run = prepare_text(files, tmp_path / "mine", f"--tokenizer={name}")
        assert run.code == 0, run.err
        assert read(tmp_path / "mine", "train") == "to be " * 19 + END
        assert read(tmp_path / "mine", "val") == "to be " + END


def test_a_prepared_text_trains(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 99)
    assert prepare_text(tmp_path / "a.txt", tmp_path / "mine").code == 0
    run = train(tmp_path / "mine", tmp_path / "out", "--max_iters=2", "--eval_interval=2")
    assert run.code == 0, run.err


WRONG_TEXT = [
    (["--input_files="], "input_files='': must be your files"),
    (["--input_files=nowhere/*.txt"], "input_files=nowhere/*.txt: no file has such a name"),
    (["--name=pycode"], "name='pycode': must be one word, and not that of another data set"),
    (["--name=../x"], "name='../x': must be one word"),
    (["--name="], "name='': must be one word"),
    (["--val_share=0"], "val_share=0.0: must be from 0.0001 to 0.9"),
    (["--tokenizer=gpt5"], "tokenizer='gpt5': must be char, bytes or a tiktoken encoding"),
    (["--tokenizer=hf:."], "tokenizer='hf:.': must be a folder with a tokenizer.json"),
]


@pytest.mark.parametrize("arguments, message", WRONG_TEXT)
def test_text_that_cannot_be_prepared_is_refused_in_one_line(tmp_path, arguments, message):
    (tmp_path / "a.txt").write_text("to be")
    run = prepare_text(tmp_path / "a.txt", tmp_path / "mine", *arguments, cwd=tmp_path)
    assert_refused(run, message)
    assert not list(tmp_path.glob("mine/*.bin"))


def test_the_files_of_a_text_can_be_the_bare_argument(tmp_path):
    (tmp_path / "a.txt").write_text("to be" * 20)
    run = Run("data/text/prepare.py", tmp_path / "a.txt", f"--out_dir={tmp_path / 'mine'}")
    assert run.code == 0, run.err
