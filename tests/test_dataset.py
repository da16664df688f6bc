"""Token files: their order, windows and bytes, and the message about a damaged file."""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import sysconfig
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from conftest import Run, assert_refused, logged, prose, train
from test_tokenizer import END, byte_level, write_folder

from nanorecur import checkpoint
from nanorecur.dataset import (
    DATA,
    AnswerRow,
    Split,
    arrays_of,
    check_meta,
    download,
    load_meta,
    open_split,
    permute,
    random_key,
    window_of,
    write_answers,
    write_dataset,
    write_task,
)
from nanorecur.files import runs_here, sha256, write_atomically, write_part
from nanorecur.tokenizer import GPT2_SHA256, identity, make_tokenizer, tokenizer_of_folder
from pretrained import load

BYTES = {"tokenizer": "bytes"}
TEXT = "To be, or not to be: that is the question.\nÄ\x00é \U0001f600"


def split(folder, block_size=16, name="train", vocab_size=256):
    return open_split(folder, name, load_meta(folder), block_size, vocab_size)


# -----------------------------------------------------------------------------
# the order of training


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 255, 1000, 65537])
def test_permute_is_a_permutation_that_depends_on_its_key_and_on_no_state(n):
    order = permute(np.arange(n), n, key=1)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(permute(np.arange(n)[::-1], n, key=1), order[::-1])
    assert n < 7 or not np.array_equal(order, permute(np.arange(n), n, key=2))


def test_permute_looks_random():
    order = permute(np.arange(20000), 20000, key=5)
    assert abs(np.corrcoef(order, np.arange(20000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert np.mean(np.diff(order) == 1) < 0.001


def test_a_random_key_is_the_same_on_every_machine_and_another_for_other_parts():
    assert random_key(1337, "train", 0) == 7332775478000334554
    parts = [(seed, name, i) for seed in range(5) for name in ("a", "b") for i in range(100)]
    assert len({random_key(*part) for part in parts}) == 1000


def test_the_order_of_training_is_the_one_of_earlier_versions(corpus):
    """A run that an earlier version began must see the same windows when it is resumed."""
    data = split(corpus)
    starts = data.shuffled(np.array([0, 1, 3479, 3480, 9999]), seed=1337)
    assert data.n_windows == 3480 and starts.tolist() == [34624, 53920, 24208, 22408, 17284]


def test_the_first_epoch_visits_every_window_of_the_text_once(corpus):
    data = split(corpus)
    starts = data.shuffled(np.arange(data.n_windows), seed=1)
    assert sorted(starts) == list(range(0, data.n_windows * 16, 16))
    assert not np.array_equal(starts, data.shuffled(np.arange(data.n_windows), seed=2))


def test_a_later_epoch_visits_every_window_from_an_offset_of_its_own(corpus):
    data = split(corpus)
    n = data.n_windows
    first, second = data.shuffled(np.arange(2 * n), seed=1).reshape(2, n)
    assert len(set(second % 16)) == 1
    assert sorted((second - second.min()) // 16) == list(range(n))
    assert not np.array_equal(np.argsort(first), np.argsort(second))
    assert len({data.shuffled(np.array([n]), seed)[0] % 16 for seed in range(8)}) > 1


# -----------------------------------------------------------------------------
# windows


def test_windows_are_the_tokens_and_their_successors(corpus):
    data = split(corpus)
    ids = make_tokenizer(load_meta(corpus)).encode(prose(1, 10000))
    starts = [0, 160, 5]
    x, y = data.windows(np.array(starts))
    assert x.tolist() == [ids[start : start + 16] for start in starts]
    assert y.tolist() == [ids[start + 1 : start + 17] for start in starts]


def test_a_window_over_the_end_continues_at_the_beginning(corpus):
    data = split(corpus)
    ids = make_tokenizer(load_meta(corpus)).encode(prose(1, 10000))
    x, y = data.windows(np.array([len(ids) - 10]))
    assert x[0].tolist() == (ids[-10:] + ids)[:16] and y[0].tolist() == (ids[-10:] + ids)[1:17]


def test_spread_is_fixed_distinct_and_covers_the_split(corpus):
    data = split(corpus, name="val")
    starts = data.spread(20)
    assert len(set(starts)) == 20 and starts[0] == 0
    assert 0.9 * data.n_tokens < starts[-1] < data.n_tokens - 16
    assert sorted(data.spread(data.n_windows)) == list(range(0, data.n_windows * 16, 16))


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_sliding_windows_score_every_token_once(corpus, stride):
    data = split(corpus, name="val")
    starts, n_scored = data.sliding(stride)
    x, y = data.windows(starts, n_scored)
    places = (starts[:, None] + 1 + np.arange(16))[y >= 0]
    assert sorted(places) == list(range(1, data.n_tokens))
    assert np.array_equal(y[y >= 0], data.tokens[places]) and (n_scored[1:-1] == stride).all()
    assert np.array_equal(x, data.windows(starts)[0])


# -----------------------------------------------------------------------------
# writing


def test_the_files_hold_the_ids_and_meta_says_what_they_are(tmp_path, capsys):
    texts = {"train": ["ab", b"c\xff"], "val": ["é"]}
    meta = write_dataset(tmp_path, BYTES, texts)
    train, val = b"a\0b\0c\0\xff\0", b"\xc3\0\xa9\0"
    assert (tmp_path / "train.bin").read_bytes() == train
    assert (tmp_path / "val.bin").read_bytes() == val
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert meta == {
        "tokenizer": "bytes",
        "tokenizer_sha256": identity(make_tokenizer(BYTES)),
        "vocab_size": 256,
        "dtype": "uint16",
        "splits": {
            "train": {"tokens": 4, "bytes": 4, "sha256": hashlib.sha256(train).hexdigest()},
            "val": {"tokens": 2, "bytes": 2, "sha256": hashlib.sha256(val).hexdigest()},
        },
    }
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]
    assert "train.bin: 4 tokens" in capsys.readouterr().out


def test_more_than_65536_ids_take_four_bytes_each(tmp_path):
    chars = "".join(map(chr, range(0x10000, 0x10000 + 2**16 + 1)))
    meta = {"tokenizer": "char", "chars": chars}
    write_dataset(tmp_path, meta, {"train": [chars], "val": [chars]})
    data = split(tmp_path, vocab_size=2**16 + 1)
    assert data.windows(np.array([2**16 - 16]))[1][0, -1] == 2**16


def test_a_folder_that_is_not_there_is_made(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_dataset(folder, BYTES, {"train": ["a"], "val": ["b"]})
    assert load_meta(folder)["splits"]["train"]["tokens"] == 1


def test_documents_are_followed_by_the_separator(tmp_path):
    write_dataset(tmp_path, BYTES, {"train": ["ab", "c"], "val": ["d"]}, separate=True)
    assert (tmp_path / "train.bin").read_bytes() == b"a\0b\0\0\0c\0\0\0"


def test_dying_while_writing_leaves_nothing_that_looks_complete(tmp_path):
    write_dataset(tmp_path, BYTES, {"train": ["a" * 99], "val": ["b" * 99]})

    def dies():
        yield "c" * 50
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, BYTES, {"train": dies(), "val": ["d"]})
    with pytest.raises(ValueError, match="meta.json: missing or damaged .* run: python"):
        load_meta(tmp_path)


def test_a_task_whose_rows_have_several_lengths_is_refused(tmp_path):
    def make(level, rng):
        return "?" * level, "!"

    with pytest.raises(ValueError, match="must have one length each"):
        write_task(tmp_path, "?!", make, {"train": {1: 1}, "val": {2: 1}}, seed=1)


# -----------------------------------------------------------------------------
# files


def test_runs_here_are_the_folders_that_hold_a_checkpoint_newest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["b", "c", "a"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ckpt.pt").write_text("")
        os.utime(tmp_path / name / "ckpt.pt", (age, age))
    (tmp_path / "empty").mkdir()
    assert runs_here() == ["a", "c", "b"]


def test_a_write_that_fails_leaves_the_file_before_and_no_part(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(path, fails)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]
    assert sha256(path) == hashlib.sha256(b"before").hexdigest()


def test_torchs_error_for_a_full_disk_becomes_an_oserror(tmp_path):
    def fails(file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904

    with pytest.raises(OSError, match="file.part: cannot be written .*No space left"):
        write_part(tmp_path / "file", fails)
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# damaged files


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "copy")


@pytest.mark.parametrize("damage", ["a byte less", "a token less", "empty", "a token more"])
def test_a_split_of_another_size_is_named_with_the_command_that_repairs_it(copy, damage):
    path = copy / "train.bin"
    data = path.read_bytes()
    damaged = {
        "a byte less": data[:-1],
        "a token less": data[:-2],
        "empty": b"",
        "a token more": data + b"\0\0",
    }
    path.write_bytes(damaged[damage])
    words = r"train.bin: [\d,]+ bytes where meta.json says [\d,]+; run: python .*prepare.py"
    with pytest.raises(ValueError, match=words):
        split(copy)


def test_a_missing_split_is_named_with_the_command_that_repairs_it(copy):
    (copy / "train.bin").unlink()
    with pytest.raises(ValueError, match="train.bin: is missing; run: python .*prepare.py"):
        split(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tokenizer": "char"}', "[" * 10**5])
def test_a_damaged_meta_is_named_with_the_command_that_repairs_it(copy, text):
    (copy / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="meta.json: missing or damaged .*; run: python"):
        load_meta(copy)


TASK = {
    "tokenizer": "bytes",
    "vocab_size": 256,
    "dtype": "uint16",
    "splits": {"train": {"tokens": 6, "bytes": 6}, "val": {"tokens": 3, "bytes": 3}},
    "row": {"length": 3, "prompt": 2, "levels": {"train": [[1, 2]], "val": [[1, 1]]}},
}
WRONG_METAS = [  # the path of a value in meta.json, another value, the message
    (["dtype"], "int8", "dtype"),
    (["dtype"], [], "dtype"),
    (["vocab_size"], 0, "vocab_size"),
    (["vocab_size"], 2**20 + 1, "vocab_size"),
    (["vocab_size"], True, "vocab_size"),
    (["tokenizer"], "../x", "tokenizer"),
    (["splits", "train", "tokens"], -1, "tokens of train"),
    (["splits", "train", "tokens"], 6.0, "tokens of train"),
    (["splits", "val", "bytes"], 0, "bytes of val"),
    (["row", "prompt"], 3, "prompt and length of row"),
    (["row", "length"], 0, "prompt and length of row"),
    (["row", "levels", "train"], [[1, 1]], "levels of train"),
    (["row", "levels", "val"], [[1, 1.0]], "levels of val"),
    (["row", "levels", "val"], [[-1, 1]], "levels of val"),
]


@pytest.mark.parametrize("keys, value, message", WRONG_METAS)
def test_a_wrong_value_in_meta_is_named(keys, value, message):
    meta = json.loads(json.dumps(TASK))
    check_meta(meta)
    place = meta
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_meta(meta)


@pytest.mark.parametrize("name", ["mine.txt", "notes.md", "rows.jsonl", "a.parquet"])
def test_a_text_given_as_data_set_is_answered_with_the_command_that_prepares_it(name):
    stem = name.partition(".")[0]
    words = f"run: python data/text/prepare.py --input_files={name} --name={stem}$"
    with pytest.raises(ValueError, match=words):
        load_meta(DATA / name)


def test_a_folder_of_texts_is_answered_with_the_command_that_prepares_it(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    words = f"run: python data/text/prepare.py --input_files={tmp_path}$"
    with pytest.raises(ValueError, match=words):
        load_meta(tmp_path)


def test_a_data_set_that_is_not_there_is_answered_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.setattr("nanorecur.dataset.DATA", tmp_path)
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prepare.py").write_text("")
    nothing = "^dataset=foo: no such folder in data; prepared: none; .*prepare.py prepares a, b$"
    with pytest.raises(ValueError, match=nothing):
        load_meta(tmp_path / "foo")
    (tmp_path / "b" / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="prepared: b;"):
        load_meta(tmp_path / "foo")


def test_one_token_beyond_the_vocabulary_is_found(copy):
    data = np.fromfile(copy / "train.bin", "<u2")
    data[len(data) // 2] = 60000
    data.tofile(copy / "train.bin")
    with pytest.raises(ValueError, match="token id 60000 is beyond vocab_size=256"):
        split(copy)


def test_a_split_shorter_than_a_window_is_refused(corpus):
    with pytest.raises(ValueError, match="block_size=1000000: .* has only"):
        split(corpus, block_size=1000000)


# -----------------------------------------------------------------------------
# downloads and prepare scripts


def test_download_refuses_what_is_not_the_file(tmp_path):
    source, target, other = tmp_path / "source", tmp_path / "target", tmp_path / "other"
    source.write_bytes(b"hello")
    digest = hashlib.sha256(b"hello").hexdigest()
    download(source.as_uri(), target, 5, digest)
    assert target.read_bytes() == b"hello"
    source.write_bytes(b"hellO")
    with pytest.raises(ValueError, match="not the expected file of 5 bytes"):
        download(source.as_uri(), other, 5, digest)
    source.unlink()
    with pytest.raises(ValueError, match="could not download"):
        download(source.as_uri(), other, 5, digest)
    download(source.as_uri(), target, 5, digest)  # it is there already
    assert not other.exists()


def test_prepare_shakespeare_splits_a_local_text_and_repeats_itself(tmp_path):
    text = TEXT * 10
    (tmp_path / "play.txt").write_text(text)
    arguments = (f"--input_files={tmp_path / 'play.txt'}", f"--out_dir={tmp_path}")
    assert Run("data/shakespeare_char/prepare.py", *arguments).code == 0
    files = {name: (tmp_path / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    tokenizer = make_tokenizer(load_meta(tmp_path))
    cut = int(0.9 * len(text))
    assert tokenizer.decode(np.frombuffer(files["train.bin"], "<u2")) == text[:cut]
    assert tokenizer.decode(np.frombuffer(files["val.bin"], "<u2")) == text[cut:]
    assert Run("data/shakespeare_char/prepare.py", *arguments).code == 0
    assert files == {name: (tmp_path / name).read_bytes() for name in files}


@pytest.mark.parametrize("name", ["nowhere.txt", "empty.txt"])
def test_prepare_shakespeare_names_a_text_that_it_cannot_use(tmp_path, name):
    (tmp_path / "empty.txt").write_text("")
    arguments = (f"--input_files={tmp_path / name}", f"--out_dir={tmp_path}")
    run = Run("data/shakespeare_char/prepare.py", *arguments)
    assert run.code == 2 and name in run.err and run.err.count("\n") == 1


def test_prepare_pycode_splits_the_library_by_file(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    (library / "pkg").mkdir(parents=True)
    for i in range(40):
        (library / "pkg" / f"m{i:02}.py").write_text(f"x = {i}\n")
    (library / "site-packages").mkdir()
    (library / "site-packages" / "other.py").write_text("installed later\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert Run("data/pycode/prepare.py", f"--out_dir={tmp_path}").code == 0
    val = np.fromfile(tmp_path / "val.bin", "<u2").astype(np.uint8).tobytes()
    train = np.fromfile(tmp_path / "train.bin", "<u2").astype(np.uint8).tobytes()
    assert val == b"x = 0\nx = 20\n"
    assert train == b"".join(b"x = %d\n" % i for i in range(40) if i % 20)


@pytest.mark.skipif(sys.byteorder != "little", reason="compares raw bytes")
def test_nanogpts_files_are_read_as_they_are(tmp_path):
    """Its prepare.py writes uint16 tokens without a header, by numpy's tofile."""
    for name in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    info = {"tokens": 100, "bytes": 400, "sha256": ""}
    splits = {"train": info, "val": info}
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16", "splits": splits}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    x, _ = split(tmp_path, vocab_size=50257).windows(np.array([10]))
    assert x[0].tolist() == list(range(10, 26))


# -----------------------------------------------------------------------------
# shards of llm.c and modded-nanogpt


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """Write a header of 256 int32 and uint16 tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def tiny_gpt2(monkeypatch):
    """A replacement for GPT-2's encoding, which needs a network: tokens of three to seven bytes."""
    ranks = {("a" * (i % 5) + chr(0x4E00 + i)).encode(): i for i in range(300)}
    special = {"<|endoftext|>": 50256}
    small = tiktoken.Encoding("small", pat_str=".+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)
    return small


@pytest.fixture
def shards(tmp_path, tiny_gpt2):
    """A folder of three shards for training, one for validation; and the tokens of training."""
    tokens = np.random.default_rng(1).integers(0, 300, 1000)
    tokens[::50] = 50256
    for number, part in enumerate(np.split(tokens, [320, 333]), 1):
        write_shard(tmp_path / f"fineweb_train_{number:06}.bin", part)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens[:200])
    return tmp_path, tokens


def test_shards_are_the_file_that_they_make_together(shards):
    """Windows, their order and sliding windows, over the ends of files and of the split too."""
    folder, tokens = shards
    meta = load_meta(folder)
    data = open_split(folder, "train", meta, 16, meta["vocab_size"])
    n_bytes = meta["splits"]["train"]["bytes"]
    one = Split("train", tokens.astype("<u2"), n_bytes, 16, 50257)
    assert data.n_tokens == 1000 and data.n_windows == one.n_windows
    positions = np.arange(3 * data.n_windows)
    starts = data.shuffled(positions, seed=3)
    assert np.array_equal(starts, one.shuffled(positions, seed=3))
    starts = np.append(starts, [990, 999])
    for found, expected in zip(data.windows(starts), one.windows(starts)):
        assert np.array_equal(found, expected)
    assert np.array_equal(data.tokens[300:340], tokens[300:340])


def test_the_meta_of_shards_is_gpt2s_and_counts_text_without_separators(shards, tiny_gpt2):
    folder, tokens = shards
    meta = load_meta(folder)
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("gpt2", 50257, "uint16")
    assert meta["tokenizer_sha256"] == GPT2_SHA256
    text = [token for token in tokens[:200] if token != 50256]
    n_bytes = len(tiny_gpt2.decode_bytes(text))
    assert meta["splits"]["val"] == {"tokens": 200, "bytes": n_bytes}
    assert not (folder / "meta.json").exists()


def test_without_tiktokens_file_the_bytes_of_shards_are_not_known(shards, monkeypatch):
    def offline(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    splits = load_meta(shards[0])["splits"]
    assert math.isnan(splits["val"]["bytes"]) and splits["val"]["tokens"] == 200


WRONG_SHARDS = [
    (dict(magic=20240801), "is no shard of GPT-2 tokens"),  # Llama 3's
    (dict(version=7), "is no shard of GPT-2 tokens"),
    (dict(count=9), "1,044 bytes where its header says 1,042"),
    (dict(count=-1), "1,044 bytes where its header says"),
]


@pytest.mark.parametrize("change, message", WRONG_SHARDS)
def test_a_wrong_shard_is_named(shards, change, message):
    folder, _ = shards
    write_shard(folder / "fineweb_train_000002.bin", np.arange(10), **change)
    with pytest.raises(ValueError, match=f"fineweb_train_000002.bin: {message}"):
        load_meta(folder)


def test_a_shard_cut_in_its_header_is_named(shards):
    (shards[0] / "fineweb_train_000002.bin").write_bytes(b"\0" * 1000)
    with pytest.raises(ValueError, match="000002.bin: is no shard"):
        load_meta(shards[0])


def test_shards_without_validation_are_refused(shards):
    (shards[0] / "fineweb_val_000000.bin").unlink()
    with pytest.raises(ValueError, match=r"has no shards \*_val_\*.bin"):
        load_meta(shards[0])


def test_a_model_trains_on_shards(shards, tmp_path):
    run = train(shards[0], tmp_path / "out", "--max_iters=2", "--eval_interval=2")
    assert run.code == 0, run.err
    loss = logged(tmp_path / "out", "eval")[-1][1]
    ratio = 200 / load_meta(shards[0])["splits"]["val"]["bytes"]
    assert loss["bits_per_byte"] == pytest.approx(loss["bits_per_token"] * ratio)
    assert checkpoint.load(tmp_path / "out")["tokenizer"]["tokenizer"] == "gpt2"


# -----------------------------------------------------------------------------
# prompts and their answers


def write_pairs(path, count=40):
    """Write prompts and answers of many lengths as JSON lines and return them."""
    pairs = []
    for i in range(count):
        prompt = f"{i} {prose(i, 1 + i % 5)}"
        pairs.append((prompt, " " + prose(i + 100, 1 + i % 3) + "\u00e9" * (i % 2)))
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs


def prepare_pairs(folder, *arguments):
    """Write pairs into a.jsonl and prepare them; return (pairs, run)."""
    pairs = write_pairs(folder / "a.jsonl")
    out = f"--out_dir={folder / 'data'}"
    return pairs, Run("data/text/prepare.py", folder / "a.jsonl", out, *arguments)


def nats_of_answer(model, asked, answered):
    """Return the summed loss of an answer's ids behind those of its prompt."""
    ids = torch.tensor([asked + answered])
    targets = ids[:, 1:].clone()
    targets[:, : len(asked) - 1] = -1
    return model(ids[:, :-1], targets)[1].item() * len(answered)


@pytest.mark.parametrize("kind", ["bytes", "char", "hf"])
def test_the_loss_of_prompts_and_answers_is_that_of_the_answers_alone(tmp_path, kind):
    """Against each row by itself, unpadded; the separator is the last token of an answer."""
    name = kind
    if kind == "hf":
        name = f"hf:{write_folder(tmp_path / 'hf', byte_level(), END)}"
    pairs, run = prepare_pairs(tmp_path, f"--tokenizer={name}", "--val_share=0.3")
    assert run.code == 0, run.err
    meta = load_meta(tmp_path / "data")
    (window,) = re.findall(r"--block_size=(\d+) ", run.out)
    assert int(window) == window_of(meta["row"])
    options = (f"--block_size={window}", "--max_iters=4", "--eval_interval=4", "--eval_iters=3")
    trained = train(tmp_path / "data", tmp_path / "out", *options)
    assert trained.code == 0, trained.err
    model, tokenizer = load(tmp_path / "out"), make_tokenizer(meta)
    end = {"bytes": [0], "char": [], "hf": [259]}[kind]
    rows = (tmp_path / "data" / "val.bin").read_bytes()
    rows = np.frombuffer(rows, "<u2").reshape(12, int(window))
    total, n_targets, n_bytes, held_out = 0.0, 0, 0, 0
    for prompt, answer in pairs:
        asked = tokenizer.encode(prompt)
        if not (rows[:, : len(asked)] == asked).all(1).any():
            continue
        answered = tokenizer.encode(answer) + end
        total += nats_of_answer(model, asked, answered)
        n_targets += len(answered)
        n_bytes += len(answer.encode())
        held_out += 1
    assert held_out == 12
    scores = logged(tmp_path / "out", "eval")[-1][1]
    assert scores["split"] == "val"
    assert scores["loss"] == pytest.approx(total / n_targets, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)


def test_answers_to_one_prompt_are_in_one_split_and_each_pair_in_one(tmp_path):
    pairs = [(f"{min(i, 20)} is", f" {i}.") for i in range(60)]  # 40 answers to one prompt
    meta = write_answers(tmp_path, BYTES, pairs, 0.25)
    found = {}
    for name in ("train", "val"):
        part = split(tmp_path, meta["row"]["length"], name)
        x, _ = part.windows(np.arange(part.n_windows) * part.step)
        found[name] = {bytes(row.astype(np.uint8)).rstrip(b"\0").decode() for row in x}
    prompts = {name: {text.split(" is")[0] for text in texts} for name, texts in found.items()}
    assert not prompts["train"] & prompts["val"]
    assert len(prompts["val"]) == 5  # of 21
    assert found["train"] | found["val"] == {prompt + answer for prompt, answer in pairs}


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 9])
def test_every_id_of_a_large_vocabulary_can_be_a_target(size):
    """Of 65,536 ids uint16 holds the tokens, but no number besides them."""
    tokenizer = SimpleNamespace(vocab_size=size)
    rows = [AnswerRow([3, 5, size - 1], 1, 2), AnswerRow([4, size - 1], 1, 1)]
    tokens, targets = arrays_of(rows, 3, tokenizer)
    row = {"length": 3, "prompt": 1, "targets": True}
    part = Split("val", tokens.flatten(), 3, 3, size, row, targets=targets.flatten())
    x, y = part.windows(np.array([0, 3]))
    assert x.tolist() == [[3, 5], [4, 0]]
    assert y.tolist() == [[5, size - 1], [size - 1, -1]]


@pytest.mark.slow
@pytest.mark.parametrize("size, dtype", [(2**16, "uint16"), (2**16 + 9, "uint32")])
def test_answers_in_a_large_vocabulary_are_read_as_they_were_written(tmp_path, size, dtype):
    fields = tokenizer_of_folder(write_folder(tmp_path, byte_level(padding=size - 260), END))
    meta = write_answers(tmp_path, fields, [("be", " t"), ("b", "e\u00e9")], 0.5)
    assert meta["dtype"] == dtype
    for name in ("train", "val"):
        part = open_split(tmp_path, name, meta, meta["row"]["length"], size)
        _, y = part.windows(np.array([0]))
        assert y.max() == size - 1  # the separator
        assert (y >= 0).sum() == meta["row"]["n_targets"][name]


def test_rows_longer_than_block_size_are_left_out_and_counted(tmp_path):
    pairs, run = prepare_pairs(tmp_path, "--block_size=40", "--val_share=0.3")
    assert run.code == 0, run.err
    fits = [len((prompt + answer).encode()) <= 40 for prompt, answer in pairs]
    assert 10 < sum(fits) < 40
    n_left_out = sum(map(int, re.findall(r"(\d+) of \d+ rows are longer than 40", run.out)))
    meta = load_meta(tmp_path / "data")
    kept = [rows for ((_, rows),) in meta["row"]["levels"].values()]
    assert sum(kept) == sum(fits) == 40 - n_left_out
    assert meta["row"]["length"] == 40


WRONG_PAIRS = [
    ('{"prompt": "a"}\n', "must be an object with texts named prompt and answer"),
    ('{"prompt": "a", "answer": 3}\n', "line 1='{"),
    ('{"prompt": "a", "answer": "b"}\n{"text": "c"}\n', "line 2='{"),
    ('{"prompt": "a", "answer": "b"}\nnothing\n', "line 2='nothing': must be an object"),
    ('{"prompt": "a", "answer": "b"}\n', "val_share=0.05: must leave some of 1 different prompts"),
    ('{"prompt": "", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n', "must not be empty"),
    ('{"prompt": "a", "answer": ""}\n{"prompt": "c", "answer": "d"}\n', "must not be empty"),
]


@pytest.mark.parametrize("text, words", WRONG_PAIRS)
def test_lines_that_are_no_pairs_are_refused(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    run = Run("data/text/prepare.py", tmp_path / "a.jsonl", f"--out_dir={tmp_path / 'data'}")
    assert_refused(run, words)


def test_a_block_size_that_leaves_no_rows_or_has_no_prompts_is_refused(tmp_path):
    _, run = prepare_pairs(tmp_path, "--block_size=2")
    assert run.code == 2 and "block_size=2: must leave rows for train" in run.err
    (tmp_path / "a.txt").write_text("to be")
    run = Run("data/text/prepare.py", tmp_path / "a.txt", "--block_size=9", f"--out_dir={tmp_path}")
    assert_refused(run, "block_size=9: must be 0 without prompts and answers")
