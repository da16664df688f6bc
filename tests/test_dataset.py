"""Token files: their order, their windows, what a prepare script writes, and what a damaged one is told."""

import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
from conftest import Run, prose

from nanorecur.dataset import (
    download,
    load_meta,
    make_tokenizer,
    open_split,
    permute,
    random_key,
    write_dataset,
)


def split(folder, block_size=16, name="train", vocab_size=256):
    return open_split(folder, name, load_meta(folder), block_size, vocab_size)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 255, 1000, 65537])
def test_permute_is_a_permutation_that_depends_on_its_key(n):
    order = permute(np.arange(n), n, key=1)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(
        permute(np.arange(n)[::-1], n, key=1), order[::-1]
    )  # place by place, without a state
    assert n < 7 or not np.array_equal(order, permute(np.arange(n), n, key=2))


def test_permute_looks_random():
    order = permute(np.arange(20000), 20000, key=5)
    assert abs(np.corrcoef(order, np.arange(20000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert np.mean(np.diff(order) == 1) < 0.001


def test_random_key_is_the_same_everywhere():
    assert random_key(1337, "train", 0) == 7332775478000334554
    assert (
        len(
            {
                random_key(seed, name, i)
                for seed in range(5)
                for name in ("a", "b")
                for i in range(100)
            }
        )
        == 1000
    )


def test_an_epoch_visits_every_window_once(corpus):
    data = split(corpus)
    n = data.n_windows
    first = data.shuffled(np.arange(n), seed=1)
    assert sorted(first) == list(range(0, n * 16, 16))
    second = data.shuffled(np.arange(n, 2 * n), seed=1)
    assert len(set(second % 16)) == 1 and len(set(second)) == n  # the same cut, moved by one offset
    assert (
        len({data.shuffled(np.array([n]), seed)[0] % 16 for seed in range(8)}) > 1
    )  # another one for each seed
    assert sorted((second - second.min()) // 16) == list(range(n))
    assert not np.array_equal(np.argsort(first), np.argsort(second))
    assert not np.array_equal(first, data.shuffled(np.arange(n), seed=2))


def test_windows_are_the_tokens_and_their_successors(corpus):
    data = split(corpus)
    text = make_tokenizer(load_meta(corpus)).encode(prose(1, 10000))
    x, y = data.windows(np.array([0, 160, 5]))
    for row, start in enumerate((0, 160, 5)):
        assert (
            x[row].tolist() == text[start : start + 16]
            and y[row].tolist() == text[start + 1 : start + 17]
        )
    x, y = data.windows(np.array([len(text) - 10]))  # over the end and on at the beginning
    assert x[0].tolist() == (text[-10:] + text)[:16] and y[0].tolist() == (text[-10:] + text)[1:17]


def test_spread_is_fixed_distinct_and_covers_the_split(corpus):
    data = split(corpus, name="val")
    starts = data.spread(20)
    assert len(set(starts)) == 20 and starts[0] == 0 and starts[-1] > 0.9 * data.n_tokens
    assert sorted(data.spread(data.n_windows)) == list(range(0, data.n_windows * 16, 16))
    data.windows(starts)  # none beyond the end


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_sliding_windows_score_every_token_once(corpus, stride):
    data = split(corpus, name="val")
    starts, fresh = data.sliding(stride)
    x, y = data.windows(starts, fresh)
    places = (starts[:, None] + 1 + np.arange(16))[y >= 0]
    assert sorted(places) == list(range(1, data.n_tokens))
    assert np.array_equal(y[y >= 0], data.tokens[places]) and (fresh[1:-1] == stride).all()
    assert np.array_equal(x, data.windows(starts)[0])


TEXT = "To be, or not to be: that is the question.\nÄ\x00é \U0001f600"


@pytest.mark.parametrize(
    "meta",
    [{"tokenizer": "bytes"}, {"tokenizer": "char", "chars": "".join(sorted(set(TEXT)))}],
    ids=lambda m: m["tokenizer"],
)
def test_tokenizers_round_trip(meta):
    tokenizer = make_tokenizer(meta)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and max(ids) < tokenizer.vocab_size


def test_tokenizers_on_strange_input():
    with pytest.raises(ValueError, match="'z' is not in the alphabet"):
        make_tokenizer({"tokenizer": "char", "chars": "abc"}).encode("abz")
    tokenizer = make_tokenizer({"tokenizer": "bytes"})
    assert tokenizer.decode([255, 65]) == "\ufffdA"
    assert tokenizer.encode(b"\xff\xc3A".decode("utf-8", "surrogateescape")) == [
        255,
        0xC3,
        65,
    ]  # as prompts are read


def test_what_is_written(tmp_path):
    meta = write_dataset(
        tmp_path, {"tokenizer": "bytes"}, {"train": ["ab", b"c\xff"], "val": ["é"]}
    )
    raw = (tmp_path / "train.bin").read_bytes()
    assert raw == np.array([97, 98, 99, 255], "<u2").tobytes()
    assert (
        meta
        == json.loads((tmp_path / "meta.json").read_text())
        == {
            "tokenizer": "bytes",
            "vocab_size": 256,
            "dtype": "uint16",
            "splits": {
                "train": {"tokens": 4, "bytes": 4, "sha256": hashlib.sha256(raw).hexdigest()},
                "val": {
                    "tokens": 2,
                    "bytes": 2,
                    "sha256": hashlib.sha256(b"\xc3\0\xa9\0").hexdigest(),
                },
            },
        }
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_large_alphabets_take_four_bytes(tmp_path):
    chars = "".join(map(chr, range(0x10000, 0x10000 + 2**16 + 1)))
    write_dataset(
        tmp_path, {"tokenizer": "char", "chars": chars}, {"train": [chars], "val": [chars]}
    )
    data = split(tmp_path, vocab_size=2**16 + 1)
    assert data.windows(np.array([2**16 - 16]))[1][0, -1] == 2**16


def test_dying_while_writing_leaves_nothing_that_looks_whole(tmp_path):
    write_dataset(tmp_path, {"tokenizer": "bytes"}, {"train": ["a" * 99], "val": ["b" * 99]})

    def dies():
        yield "c" * 50
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, {"tokenizer": "bytes"}, {"train": dies(), "val": ["d"]})
    with pytest.raises(ValueError, match="meta.json: missing or damaged .* run: python"):
        load_meta(tmp_path)


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "copy")


def test_damaged_files_are_named_with_the_command_that_mends_them(copy):
    path = copy / "train.bin"
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-2], b"", data + b"\0\0"):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError,
            match="train.bin: .* bytes where meta.json says .*; run: python .*prepare.py",
        ):
            split(copy)
    path.unlink()
    with pytest.raises(ValueError, match="train.bin: is missing; run: python"):
        split(copy)
    for text in ("", "{", "[]", '{"tokenizer": "char"}'):
        (copy / "meta.json").write_text(text)
        with pytest.raises(ValueError, match="meta.json: missing or damaged"):
            load_meta(copy)


def test_one_token_beyond_the_vocabulary_is_found(copy):
    data = np.fromfile(copy / "train.bin", "<u2")
    data[len(data) // 2] = 60000
    data.tofile(copy / "train.bin")
    with pytest.raises(ValueError, match="token id 60000 is beyond vocab_size=256"):
        split(copy)


def test_a_split_shorter_than_a_window(corpus):
    with pytest.raises(ValueError, match="block_size=1000000: .* has only"):
        split(corpus, block_size=1000000)


def test_download_refuses_what_is_not_the_file(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"hello")
    good = hashlib.sha256(b"hello").hexdigest()
    download(source.as_uri(), tmp_path / "to", 5, good)
    assert (tmp_path / "to").read_bytes() == b"hello"
    source.unlink()
    download(source.as_uri(), tmp_path / "to", 5, good)  # there already
    with pytest.raises(ValueError, match="could not download"):
        download(source.as_uri(), tmp_path / "other", 5, good)
    source.write_bytes(b"hellO")
    with pytest.raises(ValueError, match="not the expected file"):
        download(source.as_uri(), tmp_path / "other", 5, good)
    assert not (tmp_path / "other").exists()


def test_prepare_shakespeare_from_a_local_copy(tmp_path):
    (tmp_path / "play.txt").write_text(TEXT * 10)
    arguments = (f"--input_file={tmp_path / 'play.txt'}", f"--out_dir={tmp_path}")
    assert Run("data/shakespeare_char/prepare.py", *arguments).code == 0
    files = {name: (tmp_path / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    tokenizer, cut = make_tokenizer(load_meta(tmp_path)), int(0.9 * len(TEXT * 10))
    assert tokenizer.decode(np.frombuffer(files["train.bin"], "<u2")) == (TEXT * 10)[:cut]
    assert tokenizer.decode(np.frombuffer(files["val.bin"], "<u2")) == (TEXT * 10)[cut:]
    assert Run("data/shakespeare_char/prepare.py", *arguments).code == 0
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    for bad in (tmp_path / "nowhere.txt", tmp_path / "empty.txt"):
        (tmp_path / "empty.txt").write_text("")
        run = Run(
            "data/shakespeare_char/prepare.py", f"--input_file={bad}", f"--out_dir={tmp_path}"
        )
        assert run.code == 2 and bad.name in run.err and "Traceback" not in run.err


def test_prepare_pycode_splits_the_library_by_file(tmp_path, monkeypatch):
    import sysconfig

    library = tmp_path / "lib"
    for i in range(40):
        (library / "pkg").mkdir(parents=True, exist_ok=True)
        (library / "pkg" / f"m{i:02}.py").write_text(f"x = {i}\n")
    (library / "site-packages").mkdir()
    (library / "site-packages" / "other.py").write_text("installed later\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert Run("data/pycode/prepare.py", f"--out_dir={tmp_path}").code == 0
    val = bytes(np.fromfile(tmp_path / "val.bin", "<u2").astype(np.uint8))
    train = bytes(np.fromfile(tmp_path / "train.bin", "<u2").astype(np.uint8))
    assert val == b"x = 0\nx = 20\n" and train == b"".join(
        b"x = %d\n" % i for i in range(40) if i % 20
    )


@pytest.mark.skipif(sys.byteorder != "little", reason="compares raw bytes")
def test_nanogpts_files_are_read_as_they_are(tmp_path):
    """uint16 tokens without a header, as its prepare.py writes with numpy's tofile."""
    for name in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    info = {"tokens": 100, "bytes": 400, "sha256": ""}
    meta = {
        "tokenizer": "gpt2",
        "vocab_size": 50257,
        "dtype": "uint16",
        "splits": {"train": info, "val": info},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert split(tmp_path, vocab_size=50257).windows(np.array([10]))[0][0].tolist() == list(
        range(10, 26)
    )
