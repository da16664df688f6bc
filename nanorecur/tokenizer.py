"""
Tokenizers: characters, bytes, tiktoken's encodings, and tokenizer.json files of Hugging Face.

What a tokenizer is made from is a dict, the tokenizer's fields: meta.json holds them, and so does a
checkpoint. Two tokenizers are the same one where their tables from ids to bytes are (identity),
whatever library they come from.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from configurator import require

FIELDS = ("tokenizer", "chars", "tokenizer_json", "separator", "tokenizer_sha256")
ENCODING_NAME = "[A-Za-z0-9_-]{1,99}"  # of tiktoken
GPT2_SHA256 = "f1573bd1679edbb0d65b9edd171f5d26199d5d84cb6f4ee1819e1f77ccaab9ec"


# -----------------------------------------------------------------------------
# each has vocab_size; encode(text), a list of ids; encode_document(text), an array of ids with the
# separator at its end where it has one; decode(ids); table(), the bytes of each id that has a token


class CharTokenizer:
    """A tokenizer with one id per character of a fixed alphabet. It has no separator."""

    def __init__(self, fields: dict):
        self.chars = fields["chars"]
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.vocab_size = len(self.chars)

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            shown = "".join(unknown[:10])
            raise ValueError(f"{shown!r} is not in the alphabet of this model: {self.chars!r}")
        return [self.ids[char] for char in text]

    def encode_document(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def table(self) -> dict[int, bytes]:
        return {i: char.encode("utf-8", "surrogatepass") for i, char in enumerate(self.chars)}


class ByteTokenizer:
    """A tokenizer whose ids are the bytes of UTF-8; invalid bytes decode to U+FFFD."""

    vocab_size = 256

    def __init__(self, fields: dict):
        pass

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_document(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode() + b"\0", np.uint8)  # the separator is NUL

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def table(self) -> dict[int, bytes]:
        return {i: bytes([i]) for i in range(256)}


class TiktokenTokenizer:
    """A tiktoken encoding by its name, such as gpt2.

    <|endoftext|> is one token in a prompt (encode) and plain text in a document (encode_document).
    """

    def __init__(self, fields: dict):
        import tiktoken

        name = fields["tokenizer"]
        known = name in tiktoken.list_encoding_names()
        require("tokenizer", name, known, "char, bytes or a tiktoken encoding")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are of this type
            cure = "TIKTOKEN_CACHE_DIR= names a folder that has it; --tokenizer=bytes needs no file"
            reason = f"its file cannot be downloaded ({type(error).__name__})"
            raise ValueError(f"tokenizer={name!r}: {reason}; {cure}") from None
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def encode_document(self, text: str) -> np.ndarray:
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        return np.append(ids, self.encoding.eot_token)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(ids)

    def table(self) -> dict[int, bytes]:
        table = {}
        for i in range(self.vocab_size):
            try:
                table[i] = self.encoding.decode_single_token_bytes(i)
            except KeyError:  # some encodings have ids without a token
                continue
        return table


class HuggingFaceTokenizer:
    """The tokenizer in the text of a tokenizer.json, fields["tokenizer_json"].

    Its special tokens are one token each in a prompt (encode) and plain text in a document
    (encode_document), whose end is the token fields["separator"]. None is added to a prompt.
    """

    def __init__(self, fields: dict):
        from tokenizers import Tokenizer as Backend

        self.json = fields["tokenizer_json"]
        try:
            self.of_prompts = Backend.from_str(self.json)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"tokenizer.json: cannot be read ({str(error)[:80]})") from None
        self.separator = fields.get("separator")
        self.vocab_size = 1 + max(self.of_prompts.get_vocab().values(), default=0)
        if self.separator is not None and not 0 <= self.separator < self.vocab_size:
            raise ValueError(f"separator={self.separator}: must be an id of tokenizer.json")

    def encode(self, text: str) -> list[int]:
        return self.of_prompts.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_document(self, text: str) -> np.ndarray:
        if self.separator is None:
            raise ValueError(
                "tokenizer.json: no end-of-text token is known; an eos_token in"
                " tokenizer_config.json beside it names one"
            )
        text = without_surrogates(text)
        ids = self.of_documents.encode(text, add_special_tokens=False).ids
        return np.append(np.array(ids, np.int64), self.separator)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, wherever they stand: a space that begins it is kept."""
        parts = [self.bytes_of_ids.get(int(i), b"") for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")

    def table(self) -> dict[int, bytes]:
        return self.bytes_of_ids

    @cached_property
    def of_documents(self):
        backend = type(self.of_prompts).from_str(self.json)
        backend.encode_special_tokens = True  # as if they were ordinary text
        return backend

    @cached_property
    def bytes_of_ids(self) -> dict[int, bytes]:
        content = json.loads(self.json)
        alphabet = byte_alphabet() if is_byte_level(content) else {}
        table = {}
        for piece, i in self.of_prompts.get_vocab().items():
            table[i] = bytes_of_piece(piece, alphabet)
        for token in content.get("added_tokens") or ():  # these are spelled as they are
            table[token["id"]] = token["content"].encode()
        return table


Tokenizer = CharTokenizer | ByteTokenizer | TiktokenTokenizer | HuggingFaceTokenizer


def without_surrogates(text: str) -> str:
    """Return text with U+FFFD in place of what is no character, such as a byte of a binary file."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_byte_level(tokenizer_json: dict) -> bool:
    """Return True where the pieces of a tokenizer.json spell bytes in GPT-2's alphabet."""
    for name in ("decoder", "pre_tokenizer"):
        part = tokenizer_json.get(name) or {}
        parts = [part, *part.get("decoders", ()), *part.get("pretokenizers", ())]  # a sequence
        if any(one.get("type") == "ByteLevel" for one in parts):
            return True
    return False


def byte_alphabet() -> dict[str, int]:
    """Return {character: byte} of GPT-2's alphabet, in which every byte is a visible character.

    Visible characters of Latin-1 stand for themselves, the other bytes for U+0100 and on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): b for i, b in enumerate(others)}


def bytes_of_piece(piece: str, alphabet: dict[str, int]) -> bytes:
    """Return the bytes of a piece of a vocabulary.

    alphabet: of a byte-level one. {}: as in SentencePiece, a space is U+2581 and a byte <0xNN>.
    """
    if alphabet:
        if set(piece) <= set(alphabet):
            return bytes(alphabet[char] for char in piece)
        return piece.encode()
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    if byte:
        return bytes.fromhex(byte[1])
    return piece.replace("\u2581", " ").encode()


# -----------------------------------------------------------------------------
# fields


def make_tokenizer(fields: dict) -> Tokenizer:
    """Return the tokenizer of meta.json or of a checkpoint's "tokenizer".

    fields["tokenizer"]: "char" (then "chars" is the alphabet), "bytes", "huggingface" (then
    "tokenizer_json" is the text of the file and "separator" an id) or a tiktoken encoding.
    Raises ValueError where they are not well formed or the encoding's file cannot be had.
    """
    check_tokenizer(fields)
    classes = {"char": CharTokenizer, "bytes": ByteTokenizer, "huggingface": HuggingFaceTokenizer}
    return classes.get(fields["tokenizer"], TiktokenTokenizer)(fields)


def check_tokenizer(fields: dict) -> None:
    """Raise ValueError where the tokenizer's name, or what belongs to it, is not well formed."""
    name = fields.get("tokenizer")
    if not (isinstance(name, str) and re.fullmatch(ENCODING_NAME, name)):
        shown = str(name)[:60]
        raise ValueError(f"tokenizer={shown!r}: must be char, bytes or a tiktoken encoding's name")
    if name == "char" and not isinstance(fields.get("chars"), str):
        raise ValueError("chars: must be the alphabet, as one text")
    if name == "huggingface" and not isinstance(fields.get("tokenizer_json"), str):
        raise ValueError("tokenizer_json: must be the text of a tokenizer.json")
    if not isinstance(fields.get("separator", 0), int):
        raise ValueError("separator: must be an id")
    if not isinstance(fields.get("tokenizer_sha256", ""), str):
        raise ValueError("tokenizer_sha256: must be text")


def tokenizer_fields(meta: dict) -> dict:
    """Return those entries of meta that a checkpoint keeps: all that make_tokenizer needs."""
    return {name: meta[name] for name in FIELDS if name in meta}


def with_identity(fields: dict) -> dict:
    """Return fields with their tokenizer_sha256, if it takes no download to know it."""
    if "tokenizer_sha256" in fields:
        return fields
    if fields["tokenizer"] == "gpt2":
        return {**fields, "tokenizer_sha256": GPT2_SHA256}
    if fields["tokenizer"] in ("char", "bytes", "huggingface"):
        return {**fields, "tokenizer_sha256": identity(make_tokenizer(fields))}
    return fields


def identity(tokenizer: Tokenizer) -> str:
    """Return the sha256, in hex, of a tokenizer's table from ids to bytes.

    Special tokens count with their text. Ids without a token are left out, so that a padded
    vocabulary makes no difference.
    """
    digest = hashlib.sha256()
    for i, token in sorted(tokenizer.table().items()):
        digest.update(f"{i} {len(token)} ".encode() + token)
    return digest.hexdigest()


def same_tokenizer(a: dict, b: dict) -> bool:
    """Return True where two tokenizers' fields are of the same one: by identity, else by name."""
    key = "tokenizer_sha256"
    if key in a and key in b:
        return a[key] == b[key]
    return all(a.get(name) == b.get(name) for name in ("tokenizer", "chars", "tokenizer_json"))


# -----------------------------------------------------------------------------
# finding


def find_tokenizer(name: str) -> dict:
    """Return the fields of the tokenizer that an option names.

    name: "bytes", a tiktoken encoding, the path of a tokenizer.json, or hf:<folder, or name on the
    hub>. Raises ValueError where there is none.
    """
    allowed = "bytes, a tiktoken encoding, a tokenizer.json, or hf:<folder or name>"
    require("tokenizer", name, name not in ("char", "huggingface"), allowed)
    if name.endswith(".json"):
        return read_tokenizer(Path(name))
    if not name.startswith("hf:"):
        return {"tokenizer": name}
    folder = Path(name.removeprefix("hf:"))
    fields = tokenizer_of_folder(folder if folder.is_dir() else download_tokenizer(str(folder)))
    require("tokenizer", name, fields is not None, "a folder with a tokenizer.json")
    return fields


def download_tokenizer(name: str) -> Path:
    """Download the tokenizer of a model of the hub and return its folder."""
    from huggingface_hub import snapshot_download

    files = ["tokenizer.json", "tokenizer_config.json", "config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub and the network raise errors of many types
        reason = f"{type(error).__name__}: {str(error).strip()[:120]}"
        raise ValueError(f"hf:{name}: cannot be downloaded ({reason})") from None


def tokenizer_of_folder(folder: str | Path) -> dict | None:
    """Return the fields of the tokenizer in a Hugging Face folder, or None where it has none.

    Raises ValueError where its tokenizer.json is damaged.
    """
    path = Path(folder, "tokenizer.json")
    return read_tokenizer(path) if path.exists() else None


def read_tokenizer(path: Path) -> dict:
    """Return the fields of a tokenizer.json; its separator is the eos token of the files beside it.

    Raises ValueError where it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        fields = {"tokenizer": "huggingface", "tokenizer_json": text}
        ids = make_tokenizer(fields).of_prompts.get_vocab()
        eos = read_json(path.with_name("tokenizer_config.json")).get("eos_token")
        if isinstance(eos, dict):  # an AddedToken
            eos = eos.get("content")
        if eos is None:
            eos = read_json(path.with_name("config.json")).get("eos_token_id")
        if isinstance(eos, list) and eos:
            eos = eos[0]
        eos = ids.get(eos) if isinstance(eos, str) else eos
        if eos is not None:
            fields["separator"] = eos
        return with_identity(fields)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error)[:100] if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
