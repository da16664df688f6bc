"""What several tests share: tiny models and data, scripts run as a user runs them, their logs."""

import ast
import bisect
import io
import json
import os
import random
import runpy
import signal
import string
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # scripts keep what they timed there
sys.path.insert(0, str(ROOT))
settings.register_profile("busy", deadline=None)  # other work on the machine is no failure
settings.load_profile("busy")
torch.set_num_threads(1)  # the models are tiny: two threads would wait for each other

from model import GPT, GPTConfig
from nanorecur import hardware
from nanorecur.dataset import load_meta, open_split, write_dataset, write_task
from nanorecur.exit_rules import exit_evaluation, make_exit


def pytest_collection_modifyitems(items):
    """Begin with the test that takes longest, while other processes run the others."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def slow(*values):
    """Return a case of pytest.mark.parametrize that only pytest -m slow runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


# -----------------------------------------------------------------------------
# models

TINY = dict(block_size=16, vocab_size=61, n_embd=32, n_head=4)
LOOPED = dict(**TINY, n_prelude=1, n_block=2, n_coda=1, n_loop=3, max_loops=8)
ROPE = dict(position="rope")


def build(seed=0, spread=0.0, **overrides):
    """Return a tiny model in eval mode: looped, or a plain one where n_layer is given.

    spread: of noise on every parameter, so that no zero and no identity hides a mistake.
    """
    torch.manual_seed(seed)
    shape = TINY if "n_layer" in overrides else LOOPED
    model = GPT(GPTConfig(**{**shape, **overrides})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model


def tokens(rows=2, length=9, seed=1):
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


def few_ids(rows=2, length=9, seed=1):
    """Return tokens of 8 ids, so that document_separator=3 occurs among them."""
    return tokens(rows, length, seed) % 8


def halfway_rule(model, idx, rule="state", n_loop=6):
    """Return an exit rule whose threshold stops tokens after about half of the loops."""
    thresholds = torch.logspace(-4, 0.5, 80).tolist()
    if rule == "argmax":
        thresholds = [2.0, 1.0]
    if rule == "gate":
        thresholds = [1 / (1 + threshold) for threshold in thresholds]
    rules = [make_exit(model, rule, threshold) for threshold in thresholds]  # later, then sooner

    def loops_saved(exit_rule):
        return n_loop - exit_evaluation(model, idx, idx, exit_rule, n_loop)[1]

    found = bisect.bisect_left(rules, n_loop / 2 - 0.5, key=loops_saved)
    return rules[min(found, len(rules) - 1)]


# -----------------------------------------------------------------------------
# data


def prose(seed, count):
    """Return sentences of count made-up words, the same for the same seed.

    Frequent words are short, as in real text, and one word in ten has a comma.
    """
    draw = random.Random(seed)
    syllables = ["ka", "lo", "min", "ter", "a", "sho", "re", "un", "di", "vel"]
    words = []
    for rank in range(200):
        words.append("".join(random.Random(rank).choices(syllables, k=1 + rank // 40)))
    chosen = []
    for _ in range(count):
        word = words[int(200 * draw.random() ** 3)]
        chosen.append(word + draw.choice([""] * 9 + [","]))
    lines = (" ".join(chosen[i : i + 9]).capitalize() + "." for i in range(0, count, 9))
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def one_order_of_weights(request, monkeypatch):
    """Let decoding on this CPU not choose by the clock: another order rounds differently."""
    if request.module.__name__ != "test_hardware":
        monkeypatch.setattr(hardware, "fastest_layout", lambda order, dtype, rows: "plain")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared folder of characters."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = {"tokenizer": "char", "chars": "".join(sorted(string.printable))}
    write_dataset(folder, tokenizer, {"train": [prose(1, 10000)], "val": [prose(2, 3000)]})
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A prepared folder of rows such as 1abc=a. at level 1 and 2abc=b. at level 2, in digits."""

    def make(level, rng):
        a, b, c = (rng.choice("0123456789") for _ in range(3))
        return f"{level}{a}{b}{c}=", (a, b)[level - 1] + "."

    folder = tmp_path_factory.mktemp("task")
    levels = {1: 60, 2: 40}
    splits = {"train": levels, "val": levels, "hard": {2: 30}}
    write_task(folder, "0123456789=.", make, splits, seed=1)
    return folder


def split_of(corpus, name="val"):
    """Return a split of a prepared folder, in windows of 16 tokens."""
    meta = load_meta(corpus)
    return open_split(corpus, name, meta, 16, meta["vocab_size"])


def evaluated(corpus, name="val", count=12):
    """Return x and y (count, 16), the windows that an evaluation of so many windows scores."""
    split = split_of(corpus, name)
    return [torch.from_numpy(part) for part in split.windows(split.spread(count))]


# -----------------------------------------------------------------------------
# scripts


class Run:
    """A script run inside this process as from the command line: exit code and what it printed."""

    def __init__(self, script, *arguments, cwd=None):
        self.code = 0
        out, err = io.StringIO(), io.StringIO()
        argv, folder = sys.argv, os.getcwd()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        handlers = {number: signal.getsignal(number) for number in numbers}
        sys.argv = [script, *map(str, arguments)]
        os.chdir(cwd or ROOT)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            self.code = stop.code or 0
        finally:
            sys.argv = argv
            os.chdir(folder)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.out, self.err = out.getvalue(), err.getvalue()


def assert_refused(run, words):
    """Check that a run ended with exit code 2 and one line of error that has these words."""
    assert run.code == 2
    assert run.err.count("\n") == 1, run.err
    assert words in run.err


TRAIN = """
    --n_prelude=1 --n_block=1 --n_coda=1 --n_loop=2 --max_loops=6 --n_embd=32 --n_head=4
    --block_size=16 --batch_size=4 --gradient_accumulation_steps=2
    --eval_iters=3 --eval_interval=4 --max_iters=8 --warmup_iters=2 --lr_decay_iters=8
    --learning_rate=1e-2 --min_lr=1e-3 --device=cpu --compile=False
""".split()
NOISY = """
    --dropout=0.2 --loop_noise_scale=1 --state_init=noise --loop_sampling=poisson
    --loop_warmup_iters=5 --optimizer=muon --ema_decay=0.9 --spectral_clip_beta=0.5
    --recompute=loop
""".split()


def train(corpus, out_dir, *arguments):
    """Run train.py with a tiny model; later arguments win."""
    return Run("train.py", f"--dataset={corpus}", f"--out_dir={out_dir}", *TRAIN, *arguments)


@pytest.fixture(scope="session")
def plain_run(corpus, tmp_path_factory):
    """The out_dir of a tiny run, which tests only read, and the run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run = train(corpus, folder, "--eval_loops=1,2,4")
    assert run.code == 0, run.err
    return folder, run


def torchrun(corpus, out_dir, *arguments, script="train.py"):
    """Run train.py, or a script that wraps it, as two gloo processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), f"--dataset={corpus}", f"--out_dir={out_dir}", *TRAIN, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )


def started(corpus, out_dir, asked, *arguments, **environment):
    """Run train.py in a fresh Python and return the list of what is in the expression asked after.

    environment: further variables of the process.
    """
    script = "import runpy, sys; runpy.run_path('train.py', run_name='__main__'); "
    script += f"print(list({asked}))"
    command = [sys.executable, "-c", script, f"--dataset={corpus}", f"--out_dir={out_dir}"]
    command += [*TRAIN, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr
    return ast.literal_eval(run.stdout.splitlines()[-1])


# -----------------------------------------------------------------------------
# what a run leaves


def log(folder):
    """Return the entries of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder, name):
    """Return the values that a run's log has under a name, in order."""
    return [entry[name] for entry in log(folder) if name in entry]


def losses(folder):
    """Return {iteration: loss} of the training steps."""
    return {entry["iter"]: entry["loss"] for entry in log(folder) if "loss" in entry}


def val_losses(folder):
    """Return {iteration: validation loss} of the evaluations, at the model's own loops."""
    return {entry["iter"]: entry["eval"][1]["loss"] for entry in log(folder) if "eval" in entry}


def without_clock(folder):
    """Return the entries of a log without what depends on the time that a step took."""
    clock = ("ms", "tokens_per_second", "mfu", "elapsed")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in log(folder)]


def assert_same(a, b, where=""):
    """Compare nested dicts, lists and tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where
