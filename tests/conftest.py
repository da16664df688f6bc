"""What several tests share: tiny models, a tiny corpus, and running scripts."""

import io
import os
import random
import runpy
import signal
import string
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
settings.register_profile("busy", deadline=None)  # other work on the machine is no failure
settings.load_profile("busy")
torch.set_num_threads(
    1
)  # tiny models, and other work on the machine: two would wait for each other

from model import GPT, GPTConfig
from nanorecur.dataset import write_dataset

TINY = dict(block_size=16, vocab_size=61, n_embd=32, n_head=4)
LOOPED = dict(**TINY, n_prelude=1, n_block=2, n_coda=1, n_loop=3, max_loops=8)


def build(seed=0, spread=0.0, **overrides):
    """A tiny model in eval mode. spread adds noise to every parameter, so that no zero or identity hides a mistake."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**(TINY if "n_layer" in overrides else LOOPED), **overrides})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model


def tokens(rows=2, length=9, seed=1):
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


def prose(seed, count):
    """Sentences of made-up words, always the same for a seed: frequent words are short, and commas are few."""
    draw, syllables = (
        random.Random(seed),
        ["ka", "lo", "min", "ter", "a", "sho", "re", "un", "di", "vel"],
    )
    words = [
        "".join(random.Random(rank).choices(syllables, k=1 + rank // 40)) for rank in range(200)
    ]
    chosen = [
        words[int(200 * draw.random() ** 3)] + draw.choice([""] * 9 + [","]) for _ in range(count)
    ]
    lines = (" ".join(chosen[i : i + 9]).capitalize() + "." for i in range(0, count, 9))
    return "\n".join(lines)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared folder of characters."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = {"train": prose(1, 10000), "val": prose(2, 3000)}
    chars = "".join(sorted(string.printable))
    write_dataset(
        folder,
        {"tokenizer": "char", "chars": chars},
        {name: [text] for name, text in texts.items()},
    )
    return folder


class Run:
    """A script run inside this process, as from the command line: its exit code and what it printed."""

    def __init__(self, script, *arguments, cwd=None):
        out, err, before = io.StringIO(), io.StringIO(), (sys.argv, os.getcwd())
        handlers = {
            number: signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        sys.argv, self.code = [script, *map(str, arguments)], 0
        os.chdir(cwd or ROOT)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            self.code = stop.code or 0
        finally:
            sys.argv = before[0]
            os.chdir(before[1])
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.out, self.err = out.getvalue(), err.getvalue()


TRAIN = (
    "--n_prelude=1 --n_block=1 --n_coda=1 --n_loop=2 --max_loops=6 --n_embd=32 --n_head=4 --block_size=16 --batch_size=4 "
    "--gradient_accumulation_steps=2 --eval_iters=3 --eval_interval=4 --max_iters=8 --warmup_iters=2 "
    "--lr_decay_iters=8 --learning_rate=1e-2 --min_lr=1e-3 --device=cpu --compile=False"
).split()


def train(corpus, out_dir, *arguments):
    """A tiny training run; later arguments win."""
    return Run("train.py", f"--dataset={corpus}", f"--out_dir={out_dir}", *TRAIN, *arguments)
