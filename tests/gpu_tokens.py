"""
Write random tokens of GPT-2's vocabulary, on which training is timed without a corpus:

    python tests/gpu_tokens.py FOLDER --n_tokens=50000000
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import check_ranges, clear_errors, configure, require
from nanorecur.files import sha256

out_dir = ""  # folder to write; the first bare argument
n_tokens = 50_000_000  # of training; validation has a hundredth
configure(globals(), positional="out_dir")
VOCAB_SIZE = 50257

with clear_errors():
    require("out_dir", out_dir, out_dir != "", "a folder")
    check_ranges(globals(), {"n_tokens": (10_000, 10**9)})
folder, generator, splits = Path(out_dir), np.random.default_rng(0), {}
folder.mkdir(parents=True, exist_ok=True)
for split, count in {"train": n_tokens, "val": n_tokens // 100}.items():
    path = folder / f"{split}.bin"
    generator.integers(VOCAB_SIZE, size=count, dtype="<u2").tofile(path)
    splits[split] = {"tokens": count, "bytes": 4 * count, "sha256": sha256(path)}
meta = {"tokenizer": "gpt2", "vocab_size": VOCAB_SIZE, "dtype": "uint16", "splits": splits}
(folder / "meta.json").write_text(json.dumps(meta))
