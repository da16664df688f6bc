"""Tokenizers: round trips, their identity whatever library they come from, and their files."""

import json
import shutil

import numpy as np
import pytest
import tiktoken
import torch
from conftest import Run, assert_refused, build
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nanorecur.dataset import load_meta, open_split, write_dataset
from nanorecur.tokenizer import (
    GPT2_SHA256,
    byte_alphabet,
    find_tokenizer,
    identity,
    make_tokenizer,
    same_tokenizer,
    tokenizer_fields,
    tokenizer_of_folder,
    with_identity,
)

BYTES = {"tokenizer": "bytes"}
TEXT = "To be, or not to be: that is the question.\nÄ\x00é \U0001f600"
CHARS = {"tokenizer": "char", "chars": "".join(sorted(set(TEXT)))}

# -----------------------------------------------------------------------------
# tiny tokenizers of each library

MERGES = [b"be", b" t", b"\xc3\xa9"]  # bytes, a space, two bytes of one character
END = "<|endoftext|>"


def tiktoken_encoding():
    """Return an encoding of tiktoken: all bytes, three pairs, the separator."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(MERGES)}
    end = {END: len(ranks)}
    return tiktoken.Encoding("tiny", pat_str=r".+|\n", mergeable_ranks=ranks, special_tokens=end)


def spelled(token):
    """Return bytes in GPT-2's alphabet."""
    char_of = {byte: char for char, byte in byte_alphabet().items()}
    return "".join(char_of[byte] for byte in token)


def byte_level(padding=0, swapped=False):
    """Return the same tokens as a byte-level BPE of the tokenizers package.

    padding: number of ids before the separator that no text has; swapped: exchange two ids.
    """
    vocab = {spelled(bytes([i])): i for i in range(256)}
    vocab |= {spelled(token): 256 + i for i, token in enumerate(MERGES)}
    vocab |= {f"unused {i}": len(vocab) + i for i in range(padding)}
    if swapped:
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    merges = [(spelled(token[:1]), spelled(token[1:])) for token in MERGES]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return backend


def sentencepiece():
    """Return a BPE as Llama has it: pieces with U+2581, bytes as <0xNN>."""
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "b", "e", "\u2581b"]
    pieces.append("\u2581be")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "b"), ("\u2581b", "e")]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return backend


def write_folder(folder, backend, eos, config=()):
    """Write a Hugging Face folder's tokenizer files and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if eos:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    if config:
        (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


@pytest.fixture
def fields(tmp_path):
    return tokenizer_of_folder(write_folder(tmp_path / "hf", byte_level(), END))


@pytest.fixture
def tiny_gpt2(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiktoken_encoding())
    return make_tokenizer({"tokenizer": "gpt2"})


# -----------------------------------------------------------------------------
# text and ids


@pytest.mark.parametrize("meta", [BYTES, CHARS], ids=["bytes", "char"])
def test_tokenizers_round_trip(meta):
    tokenizer = make_tokenizer(meta)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("backend", [byte_level(), sentencepiece()], ids=["bytes", "pieces"])
def test_a_tokenizer_json_round_trips(tmp_path, backend):
    folder = write_folder(tmp_path, backend, "")
    tokenizer = make_tokenizer(tokenizer_of_folder(folder))
    text = " be" + TEXT
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocab_size == backend.get_vocab_size()
    continued = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert all(text.startswith(part.rstrip("\ufffd")) for part in continued)
    assert tokenizer.decode([10**6]) == ""  # an id without a token


def test_a_character_beyond_the_alphabet_is_named():
    tokenizer = make_tokenizer({"tokenizer": "char", "chars": "abc"})
    with pytest.raises(ValueError, match="'z' is not in the alphabet of this model: 'abc'"):
        tokenizer.encode("abz")


def test_bytes_that_are_no_text_go_through_the_byte_tokenizer():
    tokenizer = make_tokenizer(BYTES)
    assert tokenizer.decode([255, 65]) == "\ufffdA"
    prompt = b"\xff\xc3A".decode("utf-8", "surrogateescape")  # as prompts are read
    assert tokenizer.encode(prompt) == [255, 0xC3, 65]


def test_a_prompt_that_is_no_text_reaches_a_tokenizer_json_as_ufffd(fields):
    tokenizer = make_tokenizer(fields)
    prompt = b"\xffa".decode("utf-8", "surrogateescape")
    assert tokenizer.decode(tokenizer.encode(prompt)) == "\ufffda"


def test_special_tokens_are_one_id_in_a_prompt_and_text_in_a_document(fields, tiny_gpt2):
    for tokenizer in (make_tokenizer(fields), tiny_gpt2):
        assert tokenizer.encode(f"be{END}") == [256, 259]
        assert tokenizer.decode([256, 259]) == f"be{END}"
        document = tokenizer.encode_document(f"be{END}").tolist()
        assert document == [256, *END.encode(), 259]


def test_a_document_of_characters_has_no_separator():
    tokenizer = make_tokenizer({"tokenizer": "char", "chars": "abc"})
    assert tokenizer.encode_document("cab").tolist() == [2, 0, 1]


def test_documents_need_a_separator(tmp_path):
    tokenizer = make_tokenizer(tokenizer_of_folder(write_folder(tmp_path, byte_level(), "")))
    with pytest.raises(ValueError, match="no end-of-text token is known; an eos_token in"):
        tokenizer.encode_document("be")


# -----------------------------------------------------------------------------
# identity


def test_one_table_has_one_identity_whatever_library_reads_it(fields, tiny_gpt2):
    assert make_tokenizer(fields).encode(TEXT) == tiny_gpt2.encode(TEXT)
    assert identity(make_tokenizer(fields)) == identity(tiny_gpt2)


def test_ids_without_a_token_are_no_difference(tiny_gpt2, monkeypatch):
    before = identity(tiny_gpt2)
    monkeypatch.setattr(tiny_gpt2, "vocab_size", 300)
    assert identity(tiny_gpt2) == before


def test_another_order_of_ids_is_another_identity(tmp_path):
    folders = [
        write_folder(tmp_path / str(swapped), byte_level(swapped=swapped), END)
        for swapped in (False, True)
    ]
    a, b = (tokenizer_of_folder(folder) for folder in folders)
    assert a["tokenizer_sha256"] != b["tokenizer_sha256"] and not same_tokenizer(a, b)


class Table:
    """A tokenizer that has nothing but its table."""

    def __init__(self, table):
        self.table = table.copy


def test_identity_sees_where_a_token_ends_and_which_id_it_has():
    tables = [{0: b"ab", 1: b"c"}, {0: b"a", 1: b"bc"}, {0: b"ab", 2: b"c"}, {1: b"ab", 0: b"c"}]
    assert len({identity(Table(table)) for table in tables}) == 4
    assert identity(Table({1: b"c", 0: b"ab"})) == identity(Table(tables[0]))


def test_pieces_spell_bytes_and_spaces(tmp_path):
    tokenizer = make_tokenizer(tokenizer_of_folder(write_folder(tmp_path, sentencepiece(), "</s>")))
    table = tokenizer.table()
    assert table[1] == b"</s>" and table[2] == b"\0" and table[257] == b"\xff"
    assert table[258] == b" " and table[262] == b" be"


def test_the_alphabet_of_bytes_is_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {char: byte for byte, char in bytes_to_unicode().items()}


def test_bytes_and_characters_have_the_identity_of_their_table():
    ascii_chars = {"tokenizer": "char", "chars": "".join(map(chr, range(128)))}
    two = with_identity(BYTES), with_identity(ascii_chars)
    assert two[0]["tokenizer_sha256"] != two[1]["tokenizer_sha256"]
    other = {"tokenizer": "char", "chars": ascii_chars["chars"][::-1]}
    assert not same_tokenizer(two[1], with_identity(other))


def test_gpt2s_identity_is_the_constant_that_saves_a_download():
    try:
        tokenizer = make_tokenizer({"tokenizer": "gpt2"})
    except ValueError:
        pytest.skip("tiktoken's file of GPT-2 cannot be downloaded")
    assert identity(tokenizer) == GPT2_SHA256
    assert with_identity({"tokenizer": "gpt2"})["tokenizer_sha256"] == GPT2_SHA256


def named(name, sha256=""):
    return {"tokenizer": name, "tokenizer_sha256": sha256} if sha256 else {"tokenizer": name}


SAME = [
    (named("gpt2"), named("gpt2"), True),
    (named("gpt2"), named("bytes"), False),
    (named("gpt2", "1"), named("gpt2"), True),
    (named("gpt2", "1"), named("huggingface", "1"), True),
    (named("gpt2", "1"), named("gpt2", "2"), False),
    ({"tokenizer": "char", "chars": "ab"}, {"tokenizer": "char", "chars": "ba"}, False),
]


@pytest.mark.parametrize("a, b, expected", SAME)
def test_tokenizers_are_compared_by_identity_else_by_name(a, b, expected):
    assert same_tokenizer(a, b) == same_tokenizer(b, a) == expected


# -----------------------------------------------------------------------------
# files

EOS = [  # what tokenizer_config.json names, what config.json has
    (END, {}),
    ({"content": END}, {}),
    ("", {"eos_token_id": 259}),
    ("", {"eos_token_id": [259, 7]}),
]


@pytest.mark.parametrize("eos, config", EOS)
def test_the_separator_is_the_eos_token_of_the_files_beside(tmp_path, eos, config):
    folder = write_folder(tmp_path, byte_level(), eos, config)
    assert tokenizer_of_folder(folder)["separator"] == 259


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert tokenizer_of_folder(tmp_path) is None


DAMAGED = ["", "{", "[]", '{"model": 3}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_tokenizer_json_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: cannot be read"):
        tokenizer_of_folder(tmp_path)


@pytest.mark.parametrize("separator", [-1, 260, "a", 1.5])
def test_a_separator_that_is_no_id_is_refused(fields, separator):
    with pytest.raises(ValueError, match="^separator"):
        make_tokenizer({**fields, "separator": separator})


def test_a_prepared_folder_keeps_the_tokenizer_beside_its_tokens(tmp_path, fields):
    data = tmp_path / "data"
    meta = write_dataset(data, fields, {"train": ["be be"], "val": ["be"]}, separate=True)
    assert "tokenizer_json" not in json.loads((data / "meta.json").read_text())
    assert load_meta(data) == meta
    assert tokenizer_fields(meta) == fields
    train = open_split(data, "train", meta, 2, meta["vocab_size"])
    assert make_tokenizer(meta).decode(train.tokens) == f"be be{END}"
    (data / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="meta.json: missing or damaged"):
        load_meta(data)


def test_a_meta_of_an_earlier_version_gets_the_identity(tmp_path):
    write_dataset(tmp_path, BYTES, {"train": ["abc"], "val": ["d"]})
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["tokenizer_sha256"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert load_meta(tmp_path)["tokenizer_sha256"] == identity(make_tokenizer(BYTES))


def test_an_option_names_a_tokenizer_by_word_file_or_folder(tmp_path, fields):
    assert find_tokenizer("bytes") == BYTES
    assert find_tokenizer(str(tmp_path / "hf" / "tokenizer.json")) == fields
    assert find_tokenizer(f"hf:{tmp_path / 'hf'}") == fields
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must be a folder with a tokenizer.json"):
        find_tokenizer(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="nowhere.json: cannot be read"):
        find_tokenizer(str(tmp_path / "nowhere.json"))


def test_an_option_cannot_name_a_tokenizer_that_needs_more_than_its_name():
    with pytest.raises(ValueError, match="^tokenizer='char': must be bytes, a tiktoken"):
        find_tokenizer("char")


@pytest.mark.parametrize("name", ["", "a/b", None, 3, "x" * 100])
def test_a_name_that_is_no_tokenizers_is_refused(name):
    with pytest.raises(ValueError, match="^tokenizer='.*': must be char, bytes or a tiktoken"):
        make_tokenizer({"tokenizer": name})


def test_an_unknown_encoding_is_refused():
    with pytest.raises(ValueError, match="^tokenizer='gpt5': must be char, bytes or a tiktoken"):
        make_tokenizer({"tokenizer": "gpt5"})


def test_without_a_network_tiktokens_error_says_what_helps(monkeypatch):
    def offline(name):
        raise ConnectionError("a long\nstory")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    words = "cannot be downloaded .*TIKTOKEN_CACHE_DIR= .* --tokenizer=bytes"
    with pytest.raises(ValueError, match=words):
        make_tokenizer({"tokenizer": "gpt2"})


# -----------------------------------------------------------------------------
# a Hugging Face folder writes text


def test_ids_of_a_prompt_that_the_model_has_not_are_refused(tmp_path):
    model = build(n_layer=1)  # 61 ids
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config), "tokenizer": BYTES}
    torch.save(ckpt, tmp_path / "ckpt.pt")
    run = Run("sample.py", tmp_path, "--device=cpu", "--start=a")
    assert_refused(run, "its tokenizer is not of this model, id 97 is beyond vocab_size=61")


def test_sample_takes_the_tokenizer_of_a_hugging_face_folder(tmp_path, fields):
    """The exported Llama shape has no tokenizer of ours, the folder has tokenizer.json."""
    llama = dict(position="rope", norm="rmsnorm", mlp="swiglu", bias=False, tie_weights=False)
    model = build(n_layer=1, vocab_size=264, **llama)
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"model": model.state_dict(), "model_args": vars(model.config)}, run / "ckpt.pt")
    exported = tmp_path / "exported"
    done = Run("pretrained.py", "export", f"--out_dir={run}", f"--to={exported}")
    assert done.code == 0, done.err
    assert_refused(Run("sample.py", exported, "--device=cpu"), "names no tokenizer")
    shutil.copy(tmp_path / "hf" / "tokenizer.json", exported)
    options = ("--device=cpu", "--start=to be", "--num_samples=1", "--max_new_tokens=8", "--jsonl")
    written = Run("sample.py", exported, *options)
    assert written.code == 0, written.err
    line = json.loads(written.out)
    assert line["text"] == make_tokenizer(fields).decode(np.array(line["tokens"]))
