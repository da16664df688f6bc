"""
Write FineWeb-Edu's sample of 10B tokens (GPT-2's tokenizer, <|endoftext|> after each document):

    python data/fineweb_edu/prepare.py [--input_files='sample/*.parquet']

Writes train.bin, val.bin and meta.json. Started again after it was stopped, it continues.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import clear_errors, configure
from nanorecur.corpus import open_corpus, write_documents
from nanorecur.tokenizer import find_tokenizer

input_files = ""  # comma-separated globs of local .parquet, .jsonl, .txt or .md files; "": the hub
repository = "HuggingFaceFW/fineweb-edu"  # name on the Hugging Face hub
subset = "sample-10BT"  # configuration of the repository
revision = "main"  # revision of the repository
tokenizer = "gpt2"  # a tiktoken encoding, bytes, a tokenizer.json, or hf:<folder or name>
val_share = 0.0005  # share of the documents held out for validation
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

with clear_errors():
    fields = find_tokenizer(tokenizer)
    corpus = open_corpus(input_files, repository, subset, revision)
    write_documents(out_dir or Path(__file__).parent, fields, corpus, val_share)
