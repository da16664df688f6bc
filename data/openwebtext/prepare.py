"""
Write OpenWebText's 9B tokens (GPT-2's tokenizer, <|endoftext|> after each document):

    python data/openwebtext/prepare.py [--input_files='texts/*.jsonl']

Writes train.bin, val.bin and meta.json. Started again after it was stopped, it continues.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import clear_errors, configure
from nanorecur.corpus import open_corpus, write_documents
from nanorecur.tokenizer import find_tokenizer

input_files = ""  # comma-separated globs of local .parquet, .jsonl, .txt or .md files; "": the hub
repository = "Skylion007/openwebtext"  # name on the Hugging Face hub
subset = "plain_text"  # configuration of the repository
revision = "refs/convert/parquet"  # main needs a script, which datasets 4 refuses
tokenizer = "gpt2"  # a tiktoken encoding, bytes, a tokenizer.json, or hf:<folder or name>
val_share = 0.0005  # share of the documents held out for validation
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

with clear_errors():
    fields = find_tokenizer(tokenizer)
    corpus = open_corpus(input_files, repository, subset, revision)
    write_documents(out_dir or Path(__file__).parent, fields, corpus, val_share)
