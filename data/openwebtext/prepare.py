"""
OpenWebText in GPT-2's tokens (9B of them), each document followed by <|endoftext|>:

    python data/openwebtext/prepare.py [--input_files='texts/*.jsonl']

Writes train.bin, val.bin and meta.json. Run again after it was stopped, it goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import clear_errors, configure
from nanorecur.corpus import open_corpus, write_documents

input_files = (
    ""  # globs of local .parquet, .jsonl or .txt files in place of the hub, commas between them
)
repository = "Skylion007/openwebtext"  # on the Hugging Face hub
subset = "plain_text"
revision = (
    "refs/convert/parquet"  # the repository itself needs a script that datasets 4 no longer runs
)
tokenizer = "gpt2"  # one of tiktoken's encodings, or bytes
val_share = 0.0005  # of the documents, held out
out_dir = ""  # where to write; "" for beside this script
configure(globals())

with clear_errors():
    corpus = open_corpus(input_files, repository, subset, revision)
    write_documents(out_dir or Path(__file__).parent, {"tokenizer": tokenizer}, corpus, val_share)
