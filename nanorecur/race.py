"""
Whole runs beside nanoGPT's on one text: seconds of the process, from its start to its last line.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from configurator import require
from model import GPT
from nanorecur.dataset import load_meta, open_split
from nanorecur.measure import score

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data/shakespeare_char"
# the command of nanoGPT's README for a computer without a GPU
NANOGPT = "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
NANOGPT += "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
NANOGPT += "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"


def race(
    peer: str, arguments: list[str], folder: Path, threads: int
) -> dict[str, tuple[float, Path]]:
    """Run nanoGPT's command in its checkout, then train.py with arguments, both into folder.

    Returns {"nanoGPT": (seconds, checkpoint), "ours": ..}. threads: of the CPU, 0 for torch's
    choice. ValueError where the two do not read the same validation tokens.
    """
    theirs = Path(peer, "data/shakespeare_char/val.bin")
    matches = theirs.exists() and theirs.read_bytes() == Path(DATA, "val.bin").read_bytes()
    allowed = "a checkout of nanoGPT whose data/shakespeare_char is prepared from the same text"
    require("peer", peer, matches, allowed)
    runs = {"nanoGPT": (Path(peer), NANOGPT.split()), "ours": (ROOT, arguments)}
    ends = {}
    for name, (where, options) in runs.items():
        out = folder / name
        ends[name] = run([*options, f"--out_dir={out}"], where, threads), out / "ckpt.pt"
    return ends


def run(arguments: list[str], folder: Path, threads: int) -> float:
    """Run train.py of a folder and return its seconds; ValueError with its words if it fails."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "train.py", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        last_line = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"{folder}: {' '.join(command)}: {last_line[0]}")
    return seconds


def score_run(model: GPT) -> float:
    """Return the loss in nats per token over the whole validation split, each token once."""
    meta, block_size = load_meta(DATA), model.config.block_size
    split = open_split(DATA, "val", meta, block_size, meta["vocab_size"])
    x, y = map(torch.from_numpy, split.windows(*split.sliding(block_size)))
    ((loss, _),) = score(model.eval(), x, y, [None])
    return float(loss)
