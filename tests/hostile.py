"""
Files, options and prompts that mean no good, and random ones: each is refused in words, or runs.

While they are tried, whatever this process writes, starts or connects to is noted, and its memory
is bounded.
"""

import copy
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import LOOPED, ROOT, TINY, TRAIN, Run, build, prose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pretrained
from configurator import configure
from model import GPT, TABLES, GPTConfig
from nanorecur import checkpoint
from nanorecur.dataset import load_meta, open_split, write_dataset
from nanorecur.optim import Optimizers

NUMBERS = itertools.count()
MEMORY = 2**30  # bytes that may be asked for beyond what the process has
ACTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITES += ("os.rmdir",)
CHARS = {"tokenizer": "char", "chars": "".join(sorted({*prose(1, 3000), *prose(2, 3000)}))}
CODE = "__import__('os').mkdir('marks/x')"


def play(folder, trials):
    """Yield "" or what went wrong, for each attempt, or for so many drawn from them."""
    folder = Path(folder, "hostile").resolve()
    for name in ("data", "out", "marks"):
        Path(folder, name).mkdir(parents=True)
    write_dataset(folder / "data", CHARS, {"train": [prose(1, 3000)], "val": [prose(2, 3000)]})
    good = good_checkpoint()
    torch.save(good, folder / "good.pt")
    attempts = []
    for kind in (checkpoints, metas, tokens, configs, options, prompts):
        attempts += [(kind.__name__, name, attempt) for name, attempt in kind(folder, good)]
    if trials < len(attempts):
        attempts = random.Random(trials).sample(attempts, trials)
    seen = watch(folder)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = n_pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for kind, name, attempt in attempts:
        said, marks = outcome(attempt), os.listdir(folder / "marks")
        quiet = said == "" and not seen and not marks
        yield "" if quiet else f"{kind}, {name}: {said} {seen} {marks}"
        seen.clear()


def good_model():
    """Return a model of the shape that conftest.TRAIN gives."""
    return build(n_block=1, n_loop=2, max_loops=6, vocab_size=len(CHARS["chars"]))


def good_checkpoint():
    model = good_model()
    return {
        "model_args": vars(model.config),
        "iter_num": 3,
        "best_val_loss": 2.0,
        "model": model.state_dict(),
        "config": {},
        "tokenizer": CHARS,
        "format": 1,
    }


def watch(folder):
    """Return a list that fills with what this process does outside a folder."""
    seen = []

    def note(event, values):
        if event in ACTS:
            seen.append(f"{event} {values}")
        opens_file = event == "open" and isinstance(values[0], (str, bytes, Path))
        if event in WRITES or (opens_file and values[1] not in (None, "r", "rb")):
            path = "/" if isinstance(values[0], int) else os.path.abspath(os.fsdecode(values[0]))
            path = Path(path)
            harmless = path == Path(os.devnull) or "__pycache__" in path.parts
            if not harmless and not path.is_relative_to(folder):
                seen.append(f"{event} {values}")

    sys.addaudithook(note)
    return seen


def outcome(attempt):
    """Return "" for a refusal in words, or for an attempt that says it may succeed."""
    try:
        result = attempt()
    except ValueError as error:
        return "" if 0 < len(str(error)) < 1000 else f"says {str(error)[:200]!r}"
    except BaseException as error:  # whatever else it raises is a failure
        return f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(result, Run):
        one_line = result.err.count("\n") == 1 and len(result.err) < 1000
        refused = result.code == 2 and one_line
        return "" if refused else f"exit code {result.code}, {result.err[-300:]}"
    return "" if result == "fine" else "was taken"


# -----------------------------------------------------------------------------
# what is tried: each kind yields (name, attempt). An attempt raises ValueError, or returns a Run
# with exit code 2, or "fine"


def file_name(name):
    return re.sub("[^a-z0-9]", "_", name.lower())


class Payload:
    """Pickled, a call of os.mkdir."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "marks" / "executed"),)


def checkpoints(folder, good):
    contents = wrong_parts(folder, good) | wrong_model_args(good)
    for name, content in contents.items():
        path = folder / f"{file_name(name)}.pt"
        torch.save(content, path)
        yield name, partial(pretrained.load, path)
    config = {"out_dir": "/tmp/elsewhere", "code": CODE}
    torch.save({**good, "config": config}, folder / "config_in_it.pt")
    yield "a config in it is not read", lambda: loaded(folder / "config_in_it.pt")
    for name, data in no_checkpoints(folder, good).items():
        path = folder / f"{file_name(name)}.pt"
        path.write_bytes(data)
        yield name, partial(pretrained.load, path)
        yield f"{name}, by train.py", partial(run, folder, f"--init_from={path}")
    wrong_optimizers = {
        "optimizer": {"adamw": {"state": {}, "param_groups": [{"params": [0]}]}},
        "an optimizer of text": {"adamw": "x"},
        "moments": moments_of_another_shape(),
    }
    for name, state in wrong_optimizers.items():
        yield f"resume: {name}", partial(resumed, folder, {**good, "optimizer": state})
    manifests = {"a number": "5", "numbers": "[1, 2]", "deep": "[" * 10**5, "no text": "\0"}
    for name, text in manifests.items():
        yield f"manifest: {name}", partial(with_manifest, folder, good, text)


def wrong_parts(folder, good):
    """Return checkpoints whose parts are not what they should be, by name."""
    weights = good["model"]
    first = next(iter(weights))
    laughs = [0] * 10
    for _ in range(40):  # 10**41 entries in a few kB
        laughs = [laughs] * 10
    spread = torch.zeros(1).expand(10**6, 10**6)  # a tensor larger than its data
    giant = (10**9, 10**9)
    sparse = torch.sparse_coo_tensor([[0], [0]], [1.0], giant, check_invariants=True)
    wrong_weights = {
        "pickle as a weight": {first: Payload(folder)},
        "NaN": {**weights, first: weights[first] * float("nan")},
        "Inf": {**weights, first: weights[first] / 0},
        "stride 0": {**weights, first: spread},
        "meta tensor": {first: torch.empty(10**6, 10**6, device="meta")},
        "sparse": {**weights, first: sparse},
        "../ names": {**weights, "../../x": torch.zeros(1)},
        "number for a name": {5: torch.zeros(1)},
        "list of weights": [1],
        "text weights": {"a": "b"},
        "half of the weights": dict(list(weights.items())[:5]),
        "another shape": {**weights, first: torch.zeros(3, 3)},
        "scalar": {**weights, first: torch.tensor(1.0)},
    }
    others = {
        "pickle inside": dict(config=Payload(folder)),
        "stride 0 in the optimizer": dict(optimizer={"adamw": {"state": {0: spread}}}),
        "laughs": dict(config=laughs),
        "args as text": dict(model_args="import os"),
        "iter_num": dict(iter_num="x"),
        "iter_num -1": dict(iter_num=-1),
        "tokenizer": dict(tokenizer="gpt2"),
    }
    contents = {name: {**copy.deepcopy(good), "model": w} for name, w in wrong_weights.items()}
    contents |= {name: {**copy.deepcopy(good), **parts} for name, parts in others.items()}
    contents |= {"a list": [1, 2], "nothing": {}, "no args": {"model": weights}}
    return contents


def wrong_model_args(good):
    """Return checkpoints whose model_args describe no model, or a giant one, by name."""
    no_core = dict(n_block=0, n_prelude=0, n_coda=0, n_loop=1)
    wrong = {
        "unknown arg": dict(n_expert=8),
        "code": dict(norm=CODE),
        "None": dict(n_head=None),
        "layers": dict(n_layer=10**12),
        "blocks": dict(n_block=10**9),
        "prelude": dict(n_prelude=10**7),
        "width": dict(n_embd=2**40, n_head=1),
        "vocabulary": dict(vocab_size=10**15),
        "context": dict(block_size=10**13),
        "rotary context": dict(block_size=10**12, position="rope"),
        "hidden": dict(n_hidden=10**12),
        "loops": dict(max_loops=10**14, loop_embedding="learned"),
        "sinusoids": dict(max_loops=10**12, loop_embedding="sinusoidal"),
        "groups": dict(**no_core, n_layer=10**11, loop_groups=((0, 1),)),
        "heads": dict(n_ahead=10**9),
        "float size": dict(n_embd=32.5),
        "bool size": dict(n_loop=True),
        "negative": dict(n_embd=-32),
        "huge int": dict(n_embd=10**4000),
    }
    args = good["model_args"]
    return {name: {**good, "model_args": {**args, **parts}} for name, parts in wrong.items()}


def no_checkpoints(folder, good):
    """Return bytes that are no checkpoint, by name."""
    large, bomb, outside = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({**good, "model": {"x": torch.zeros(2**26)}}, large)
    with zipfile.ZipFile(large) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in source.infolist():
            file.writestr(entry.filename, source.read(entry))
    with zipfile.ZipFile(outside, "w") as file:
        file.writestr("../../../tmp/escaped", b"x")
    return {
        "pickle": pickle.dumps(Payload(folder)),
        "old pickle": pickle.dumps(Payload(folder), 0),
        "bomb": bomb.getvalue(),
        "zip with ../": outside.getvalue(),
        "text": b"hello",
        "zeros": bytes(10**6),
        "pk": b"PK\3\4" + bytes(99),
    }


def moments_of_another_shape():
    """Return an optimizer's state whose first moments have another shape than the weights."""
    options = dict(optimizer="adamw", learning_rate=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    state = Optimizers(good_model(), {**options, "weight_decay_all": False}).state_dict()
    names = ("exp_avg", "exp_avg_sq")
    moments = {"step": torch.tensor(1.0), **{name: torch.zeros(2, 2) for name in names}}
    state["adamw"]["state"] = {0: moments}
    return state


def loaded(path):
    return "fine" if pretrained.load(path) else ""


def resumed(folder, ckpt):
    checkpoint.save(folder / "out", ckpt)
    return run(folder, "--init_from=resume", "--optimizer=adamw", out="out")


def with_manifest(folder, good, text):
    """Load a good checkpoint whose list of hashes is damaged, which is as good as none."""
    place = folder / "listed"
    place.mkdir(exist_ok=True)
    checkpoint.save(place, good)
    (place / "ckpt.json").write_text(text)
    return "fine" if checkpoint.load(place)["iter_num"] == 3 else "lost"


def run(folder, *arguments, data="data", out=""):
    """Run train.py in an out_dir of its own, so that no other run's files are what it refuses."""
    out = folder / (out or f"run{next(NUMBERS)}")
    sources = (f"--dataset={folder / data}", f"--out_dir={out}")
    return Run("train.py", *sources, *TRAIN, "--max_iters=4", *arguments)


# -----------------------------------------------------------------------------
# data


def metas(folder, good):
    meta = json.loads((folder / "data" / "meta.json").read_text())
    texts = {
        "not JSON": b"{",
        "deep": b"[" * 10**5,
        "a list": b"[]",
        "a number": b"5",
        "null": b"null",
        "long": b'{"a": "' + b"x" * 10**7 + b'"}',
        "not UTF-8": b"\xff\xfe",
    }
    wrong = wrong_fields() | wrong_splits(meta["splits"]) | wrong_row_data()
    texts |= {name: json.dumps({**meta, **parts}).encode() for name, parts in wrong.items()}
    for name, text in texts.items():
        yield name, partial(with_data, folder, {"meta.json": text})
    splits = {**meta["splits"], "../../x": meta["splits"]["train"]}
    text = json.dumps({**meta, "splits": splits}).encode()
    yield "a split outside", partial(with_data, folder, {"meta.json": text}, fine=True)


def wrong_fields():
    return {
        "objects": {"dtype": "O"},
        "float": {"dtype": "float64"},
        "code": {"dtype": CODE},
        "dtype 5": {"dtype": 5},
        "uint32": {"dtype": "uint32"},
        "no vocabulary": {"vocab_size": None},
        "vocabulary of text": {"vocab_size": "65"},
        "giant vocabulary": {"vocab_size": 10**15},
        "vocabulary -1": {"vocab_size": -1},
        "half": {"vocab_size": 0.5},
        "True": {"vocab_size": True},
        "tokenizer 5": {"tokenizer": 5},
        "tokenizer of a path": {"tokenizer": "../../etc/passwd"},
        "no chars": {"chars": None},
        "chars of numbers": {"chars": [1, 2]},
    }


def wrong_splits(splits):
    train, val = splits["train"], splits["val"]
    wrong = {
        "splits": [],
        "no val": {"train": train},
        "train of text": {"train": "x", "val": "x"},
        "tokens of text": {"train": {**train, "tokens": "9"}, "val": val},
        "tokens -1": {"train": {**train, "tokens": -1}, "val": val},
        "giant": {"train": {**train, "tokens": 10**30}, "val": val},
        "bytes": {"train": train, "val": {**val, "bytes": "x"}},
        "no bytes": {"train": train, "val": {"tokens": val["tokens"]}},
        "bytes 0": {"train": train, "val": {**val, "bytes": 0}},
    }
    return {name: {"splits": parts} for name, parts in wrong.items()}


def wrong_row_data():
    one_row = {"train": [[1, 1]], "val": [[1, 1]]}
    many_rows = {"train": [[1, 10**12]], "val": [[1, 10**12]]}
    wrong = {
        "row": 5,
        "row 0": {"length": 0, "prompt": 0, "levels": {}},
        "row -17": {"length": -17, "prompt": 1, "levels": {}},
        "row without levels": {"length": 17, "prompt": 4},
        "levels of text": {"length": 17, "prompt": 4, "levels": {"train": "x", "val": "x"}},
        "giant level": {"length": 17, "prompt": 4, "levels": many_rows},
        "prompt": {"length": 17, "prompt": 400, "levels": one_row},
    }
    return {name: {"row": row} for name, row in wrong.items()}


def with_data(folder, files, fine=False):
    """Run train.py on the data with some of its files replaced. fine: it may succeed."""
    place = folder / "wrong"
    place.mkdir(exist_ok=True)
    for name in ("meta.json", "train.bin", "val.bin"):
        good = (folder / "data" / name).read_bytes()
        (place / name).write_bytes(files.get(name, good))
    result = run(folder, "--init_from=scratch", "--eval_only", data="wrong")
    return "fine" if fine and result.code == 0 else result


def tokens(folder, good):
    size = (folder / "data" / "train.bin").stat().st_size
    contents = {
        "empty": b"",
        "odd": bytes(size - 1),
        "longer": bytes(size + 2),
        "beyond": np.full(size // 2, 60000, "<u2").tobytes(),
        "a byte": b"x",
        "pickle": pickle.dumps(Payload(folder)),
    }
    for name, data in contents.items():
        yield name, partial(with_data, folder, {"train.bin": data})
        yield f"{name}, validation", partial(with_data, folder, {"val.bin": data})


# -----------------------------------------------------------------------------
# configs, options, prompts


def configs(folder, good):
    contents = {
        "unknown key": b"n_expert = 8",
        "wrong type": b"n_embd = '32'",
        "None": b"n_embd = None",
        "a function": b"def n_embd(): pass",
        "not UTF-8": b"x = '\xff'",
        "NUL": b"n_embd = 3\0",
        "not Python": b"n_embd ==",
        "giant": b"n_embd = 10 ** 4000",
        "float": b"n_embd = 3.5",
        "nan": b"learning_rate = float('nan')",
        "raises": b"1 / 0",
        "ten MB": b"n_embd = " + b"9" * 10**7,
        "dunder": b"n_embd = __file__",
        "set": b"eval_loops = {1, 2}",
        "own object": b"class n_embd: pass",
    }
    for name, data in contents.items():
        path = folder / f"{file_name(name)}.py"
        path.write_bytes(data)
        yield name, partial(run, folder, path)
    yield "a folder", partial(run, folder, f"{folder}/data.py")
    yield "a name with ../", partial(run, folder, "../../../etc/passwd")


def options(folder, good):
    texts = {
        "x": "x" * 10**7,
        "digits": "9" * 10**7,
        "list": "1," * 5 * 10**6,
        "brackets": "[" * 10**7,
        "signs": "-" * 10**7,
        "code": CODE,
    }
    for name in ("n_embd", "learning_rate", "eval_loops", "compile", "no_such_name"):
        for kind, text in texts.items():
            yield f"{name} {kind}", partial(configured, f"--{name}={text}")
    yield "a long name", partial(configured, "--" + "x" * 10**7)
    yield "a long file", partial(configured, "x" * 10**7 + ".py")
    for argument in ("--n_embd=1e12", "--n_embd=-32", "--block_size=1e15"):
        yield argument, partial(run, folder, argument)
    for name in ("dtype", "device", "init_from", "objective"):
        yield f"a long {name}", partial(run, folder, f"--{name}=" + "x" * 10**5)


def configured(argument):
    """Read an argument as train.py does, without train.py."""
    scope = {"__file__": str(ROOT / "train.py"), "__doc__": ""}
    argv, stderr = sys.argv, sys.stderr
    sys.argv, sys.stderr = ["train.py"], io.StringIO()
    try:
        configure(scope, (ROOT / "model.py", "GPTConfig"), argv=[argument])
        return ""
    except SystemExit as stop:
        said = sys.stderr.getvalue()
        refused = stop.code == 2 and said.count("\n") == 1 and len(said) < 1000
        return "fine" if refused else f"{stop.code}: {said[:300]}"
    finally:
        sys.argv, sys.stderr = argv, stderr


def prompts(folder, good):
    contents = {
        "empty": b"",
        "not UTF-8": b"\xff\xfe",
        "NUL": b"\0" * 99,
        "another alphabet": "Ω".encode(),
        "pickle": pickle.dumps(Payload(folder)),
    }
    for name, data in contents.items():
        yield name, partial(sample_from_file, folder, data)
    starts = {
        "missing file": "FILE:nowhere",
        "a folder": f"FILE:{folder}",
        "a NUL in the name": "FILE:a\0b",
        "a long name": "FILE:" + "x" * 10**5,
    }
    for name, start in starts.items():
        yield name, partial(sample, folder, start)
    yield "ten MB", partial(sample, folder, (prose(1, 300) * 10**4)[: 10**7])


def sample(folder, start):
    short = ("--max_new_tokens=3", "--num_samples=1", "--device=cpu")
    return Run("sample.py", *short, f"--out_dir={folder / 'good.pt'}", f"--start={start}")


def sample_from_file(folder, data):
    (folder / "prompt.txt").write_bytes(data)
    return sample(folder, f"FILE:{folder / 'prompt.txt'}")


# -----------------------------------------------------------------------------
# at random

SMALL_INT = st.one_of(st.integers(-2, 9), st.sampled_from([16, 32, 48, 64]))
SHORT_LIST = st.lists(st.integers(-1, 3), max_size=2)
ODD = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), SHORT_LIST)
GROUPS = st.lists(st.lists(st.integers(-1, 6), max_size=3), max_size=3)
FIELDS = GPTConfig.__dataclass_fields__
BY_TYPE = {
    int: SMALL_INT,
    float: st.floats(-1, 4),
    bool: st.booleans(),
    tuple: st.one_of(GROUPS, st.lists(SMALL_INT, max_size=3)),
    str: st.text(max_size=5),
}


def fuzz(folder, trials):
    """Yield "" for each example tried, and what failed first of each kind; trials: of each kind."""
    for attempt in (fuzz_config, fuzz_groups, fuzz_meta, fuzz_options):
        tried = []
        run_examples = settings(
            max_examples=trials,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(attempt(Path(folder), tried))
        try:
            run_examples()
        except Exception as error:
            notes = getattr(error, "__notes__", "")
            yield f"{attempt.__name__}: {type(error).__name__}: {error} {notes}"
        yield from [""] * len(tried)


def unless_refused(make, *arguments, **options):
    """Return what make returns, or None where it refuses in words."""
    try:
        return make(*arguments, **options)
    except ValueError as error:
        assert 0 < len(str(error)) < 2000
        return None


def run_if_small(config):
    """Run a forward and a backward pass of a small model."""
    sizes = (config.n_embd, config.n_hidden, config.head_size, config.n_latent)
    sizes += (config.n_physical, config.vocab_size, config.n_ahead, config.block_size)
    if max(sizes) > 64:
        return
    model, idx = GPT(config), torch.zeros(2, min(4, config.block_size), dtype=torch.long)
    logits, loss = model(idx, idx)
    loss.backward()
    assert logits.shape == (*idx.shape, config.vocab_size)
    assert torch.isfinite(loss)


def any_field():
    """Return a strategy of (name, value): a legal value of its table, of its type, or odd."""

    def value_of(name):
        of_type = BY_TYPE[FIELDS[name].type]
        legal = st.sampled_from(sorted(TABLES[name])) if name in TABLES else of_type
        return st.tuples(st.just(name), st.one_of(legal, of_type, ODD))

    return st.sampled_from(sorted(FIELDS)).flatmap(value_of)


def fuzz_config(folder, tried):
    @given(st.lists(any_field(), max_size=4).map(dict))
    def check(fields):
        tried.append(1)
        config = unless_refused(GPTConfig, **{**LOOPED, **fields})
        if config:
            run_if_small(config)

    return check


def fuzz_groups(folder, tried):
    @given(GROUPS, st.lists(st.integers(0, 4), max_size=3), st.integers(1, 6))
    def check(groups, counts, n_layer):
        tried.append(1)
        looped = dict(n_layer=n_layer, loop_groups=groups, loop_counts=counts)
        config = unless_refused(GPTConfig, **TINY, **looped)
        if config:
            run_if_small(config)

    return check


def fuzz_meta(folder, tried):
    place = folder / "fuzzed"
    place.mkdir(exist_ok=True)
    write_dataset(place, CHARS, {"train": [prose(1, 300)], "val": [prose(2, 300)]})
    good = json.loads((place / "meta.json").read_text())
    names = st.sampled_from(["tokens", "bytes", "train", "val", "length", "prompt", "levels"])
    value = st.one_of(ODD, st.integers(), st.dictionaries(names, ODD, max_size=3))
    parts = st.dictionaries(st.sampled_from([*good, "row"]), value, max_size=2)
    size = st.one_of(ODD, st.integers())
    sizes = st.dictionaries(st.sampled_from(["tokens", "bytes"]), size, max_size=1)

    def opened():
        meta = load_meta(place)
        return open_split(place, "train", meta, 16, meta["vocab_size"])

    @given(parts, sizes)
    def check(parts, sizes):
        tried.append(1)
        train = {**good["splits"]["train"], **sizes}
        meta = {**good, "splits": {**good["splits"], "train": train}, **parts}
        (place / "meta.json").write_text(json.dumps(meta))
        split = unless_refused(opened)
        if split:
            x, y = split.windows(split.shuffled(np.arange(4), 1))
            assert x.shape == y.shape == (4, 16)
            split.levels(split.spread(2))

    return check


def fuzz_options(folder, tried):
    names = ["n_embd", "learning_rate", "loop_groups", "compile", "dataset", "x"]
    numbers = st.one_of(st.integers(), st.floats(), st.lists(st.integers(), max_size=4)).map(str)
    like_numbers = st.from_regex(r"[\[\](),0-9.e-]{1,12}")

    @given(st.sampled_from(names), st.one_of(st.text(max_size=20), numbers, like_numbers))
    def check(name, text):
        tried.append(1)
        assert configured(f"--{name}={text}") in ("", "fine")

    return check
