"""
Download tiny Shakespeare and write it character by character:

    python data/shakespeare_char/prepare.py [--input_files=input.txt]

Writes train.bin (the first 90 % of the text), val.bin and meta.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import clear_errors, configure
from nanorecur.corpus import find_files
from nanorecur.dataset import download, write_dataset

input_files = ""  # comma-separated globs of local .txt files; "": the download
out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE, SHA256 = 1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
folder = Path(out_dir or Path(__file__).parent)

with clear_errors():
    if input_files:
        paths = find_files(input_files)
    else:
        paths = [folder / "input.txt"]
        download(URL, paths[0], SIZE, SHA256)
    text = "".join(Path(path).read_text(encoding="utf-8") for path in paths)
    if len(text) < 100:
        raise ValueError(f"{paths[0]}: {len(text)} characters are too few to split")
    cut = int(len(text) * 0.9)
    tokenizer = {"tokenizer": "char", "chars": "".join(sorted(set(text)))}
    write_dataset(folder, tokenizer, {"train": [text[:cut]], "val": [text[cut:]]})
