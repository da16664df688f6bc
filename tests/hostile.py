"""
Files, options and prompts that mean no good, and random ones: each has to be refused in words, or to run.

While they are tried, whatever this process writes, starts or connects to is noted, and its memory is bounded.
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
from pathlib import Path

import numpy as np
import torch
from conftest import LOOPED, TRAIN, Run, build, prose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pretrained
from configurator import configure
from model import GPT, GPTConfig
from nanorecur import checkpoint
from nanorecur.dataset import load_meta, open_split, write_dataset
from nanorecur.objectives import parameter_groups

NUMBERS = itertools.count()
MEMORY = 2**30  # bytes that may be asked for beyond what the process has
ACTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
WRITES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.rmdir",
)
CHARS = {"tokenizer": "char", "chars": "".join(sorted({*prose(1, 3000), *prose(2, 3000)}))}


def play(folder, trials):
    """Yields "" or what went wrong, for each of the corpus, or for so many drawn from it."""
    folder = Path(folder, "hostile").resolve()
    for name in ("data", "out", "marks"):
        Path(folder, name).mkdir(parents=True)
    write_dataset(folder / "data", CHARS, {"train": [prose(1, 3000)], "val": [prose(2, 3000)]})
    good = {
        "model_args": vars(build(vocab_size=len(CHARS["chars"])).config),
        "iter_num": 3,
        "best_val_loss": 2.0,
        "model": build(vocab_size=len(CHARS["chars"])).state_dict(),
        "config": {},
        "tokenizer": CHARS,
        "format": 1,
    }
    torch.save(good, folder / "good.pt")
    attempts = [
        (kind.__name__, *case)
        for kind in (checkpoints, metas, tokens, configs, options, prompts)
        for case in kind(folder, good)
    ]
    attempts = (
        attempts if trials >= len(attempts) else random.Random(trials).sample(attempts, trials)
    )
    seen = watch(folder)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for kind, name, attempt in attempts:
        said = outcome(attempt)
        marks = os.listdir(folder / "marks")
        yield (
            ""
            if said == "" and not seen and not marks
            else f"{kind}, {name}: {said} {seen} {marks}"
        )
        seen.clear()


def watch(folder):
    """A list that fills with what this process does outside a folder."""
    seen = []

    def note(event, values):
        writing = (
            event == "open"
            and values[1] not in (None, "r", "rb")
            and isinstance(values[0], (str, bytes, Path))
        )
        if event in ACTS:
            seen.append(f"{event} {values}")
        elif writing or event in WRITES:
            path = Path(
                os.path.abspath(os.fsdecode(values[0]) if not isinstance(values[0], int) else "/")
            )
            inside = (
                path.is_relative_to(folder)
                or path == Path(os.devnull)
                or "__pycache__" in path.parts
            )
            seen.extend([] if inside else [f"{event} {values}"])

    sys.addaudithook(note)
    return seen


def outcome(attempt):
    """ "" for a refusal in words, or for an attempt that says it may succeed."""
    try:
        result = attempt()
    except ValueError as error:
        return "" if 0 < len(str(error)) < 1000 else f"says {str(error)[:200]!r}"
    except BaseException as error:  # whatever else it raises is a failure
        return f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(result, Run):
        return (
            ""
            if result.code == 2 and result.err.count("\n") == 1 and len(result.err) < 1000
            else f"exit code {result.code}, {result.err[-300:]}"
        )
    return "" if result == "fine" else "was taken"


# -----------------------------------------------------------------------------
# what is tried: each yields (name, attempt); an attempt raises ValueError, or returns a Run with exit code 2, or "fine"


class Payload:
    """Pickled, a call of os.mkdir."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "marks" / "executed"),)


def checkpoints(folder, good):
    def changed(**parts):
        return {**copy.deepcopy(good), **parts}

    def args(**fields):
        return changed(model_args={**good["model_args"], **fields})

    first = next(iter(good["model"]))
    spread = {"model": {**good["model"], first: torch.zeros(1).expand(10**6, 10**6)}}
    nan = {"model": {**good["model"], first: good["model"][first] * float("nan")}}
    laughs, deep = [0] * 10, []
    for _ in range(40):
        laughs, deep = [laughs] * 10, [deep]
    dicts = {
        "pickle inside": changed(config=Payload(folder)),
        "pickle as a weight": changed(model={first: Payload(folder)}),
        "NaN": changed(**nan),
        "Inf": changed(model={**good["model"], first: good["model"][first] / 0}),
        "stride 0": changed(**spread),
        "stride 0 in the optimizer": changed(
            optimizer={"adamw": {"state": {0: spread["model"][first]}}}
        ),
        "laughs": changed(config=laughs),
        "meta tensor": changed(model={first: torch.empty(10**6, 10**6, device="meta")}),
        "sparse": changed(
            model={
                **good["model"],
                first: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**9, 10**9)),
            }
        ),
        "../ names": changed(model={**good["model"], "../../x": torch.zeros(1)}),
        "number for a name": changed(model={5: torch.zeros(1)}),
        "a list": [1, 2],
        "nothing": {},
        "no args": {"model": good["model"]},
        "list of weights": changed(model=[1]),
        "text weights": changed(model={"a": "b"}),
        "args as text": changed(model_args="import os"),
        "iter_num": changed(iter_num="x"),
        "iter_num -1": changed(iter_num=-1),
        "tokenizer": changed(tokenizer="gpt2"),
        "half of the weights": changed(model=dict(list(good["model"].items())[:5])),
        "another shape": changed(model={**good["model"], first: torch.zeros(3, 3)}),
        "scalar": changed(model={**good["model"], first: torch.tensor(1.0)}),
        "unknown arg": args(n_expert=8),
        "code": args(norm="__import__('os').mkdir('marks/x')"),
        "None": args(n_head=None),
        "layers": args(n_layer=10**12),
        "blocks": args(n_block=10**9),
        "prelude": args(n_prelude=10**7),
        "width": args(n_embd=2**40, n_head=1),
        "vocabulary": args(vocab_size=10**15),
        "context": args(block_size=10**13),
        "rotary context": args(block_size=10**12, position="rope"),
        "hidden": args(n_hidden=10**12),
        "loops": args(max_loops=10**14, loop_embedding="learned"),
        "sinusoids": args(max_loops=10**12, loop_embedding="sinusoidal"),
        "groups": args(
            n_block=0, n_prelude=0, n_coda=0, n_layer=10**11, loop_groups=((0, 1),), n_loop=1
        ),
        "heads": args(n_ahead=10**9),
        "float size": args(n_embd=32.5),
        "bool size": args(n_loop=True),
        "negative": args(n_embd=-32),
        "huge int": args(n_embd=10**4000),
    }
    for name, content in dicts.items():
        path = folder / f"{re.sub('[^a-z0-9]', '_', name.lower())}.pt"
        torch.save(content, path)
        yield name, lambda path=path: pretrained.load(path)
    torch.save(
        changed(config={"out_dir": "/tmp/elsewhere", "code": "__import__('os').mkdir('marks/x')"}),
        folder / "config_in_it.pt",
    )
    yield (
        "a config in it is not read",
        lambda: "fine" if pretrained.load(folder / "config_in_it.pt") else "",
    )
    for name, data in files(folder, good).items():
        path = folder / f"{re.sub('[^a-z0-9]', '_', name)}.pt"
        path.write_bytes(data)
        yield name, lambda path=path: pretrained.load(path)
        yield f"{name}, by train.py", lambda path=path: run(folder, f"--init_from={path}")
    for name, content in {
        "optimizer": {"adamw": {"state": {}, "param_groups": [{"params": [0]}]}},
        "an optimizer of text": {"adamw": "x"},
        "moments": moments(good),
    }.items():
        yield f"resume: {name}", lambda content=content: resumed(folder, changed(optimizer=content))
    for name, text in {
        "a number": "5",
        "numbers": "[1, 2]",
        "deep": "[" * 10**5,
        "no text": "\0",
    }.items():
        yield f"manifest: {name}", lambda text=text: with_manifest(folder, good, text)


def files(folder, good):
    """Bytes that are no checkpoint."""
    buffer = io.BytesIO()
    torch.save({**good, "model": {"x": torch.zeros(2**26)}}, buffer)
    small, large = io.BytesIO(), zipfile.ZipFile(buffer)
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in large.infolist():
            file.writestr(entry.filename, large.read(entry))
    outside = io.BytesIO()
    with zipfile.ZipFile(outside, "w") as file:
        file.writestr("../../../tmp/escaped", b"x")
    return {
        "pickle": pickle.dumps(Payload(folder)),
        "old pickle": pickle.dumps(Payload(folder), 0),
        "bomb": small.getvalue(),
        "zip with ../": outside.getvalue(),
        "text": b"hello",
        "zeros": bytes(10**6),
        "pk": b"PK\3\4" + bytes(99),
    }


def moments(good):
    """An optimizer's state whose moments have another shape than the weights."""
    parts = parameter_groups(build(vocab_size=len(CHARS["chars"])))
    groups = [parts["embeddings"] + parts["vectors"], parts["matrices"]]
    numbers, state = iter(range(10**6)), []
    for group in groups:
        state.append(
            {
                "params": [next(numbers) for _ in group],
                "lr": 1e-3,
                "betas": (0.9, 0.95),
                "eps": 1e-8,
                "weight_decay": 0.1,
                "amsgrad": False,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": True,
            }
        )
    wrong = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(2, 2),
        "exp_avg_sq": torch.zeros(2, 2),
    }
    return {"adamw": {"state": {0: wrong}, "param_groups": state}}


def resumed(folder, ckpt):
    checkpoint.save(folder / "out", ckpt)
    return run(folder, "--init_from=resume", "--optimizer=adamw", out="out")


def with_manifest(folder, good, text):
    """A damaged list of hashes is as good as none: the checkpoint itself opens."""
    place = folder / "listed"
    place.mkdir(exist_ok=True)
    checkpoint.save(place, good)
    (place / "ckpt.json").write_text(text)
    return "fine" if checkpoint.load(place)["iter_num"] == 3 else "lost"


def run(folder, *options, data="data", out=""):
    """A start in a folder of its own, so that it is refused for what it is and not for what was there."""
    out = folder / (out or f"run{next(NUMBERS)}")
    return Run(
        "train.py",
        f"--dataset={folder / data}",
        f"--out_dir={out}",
        *TRAIN,
        "--max_iters=4",
        *options,
    )


def metas(folder, good):
    meta = json.loads((folder / "data" / "meta.json").read_text())
    train = meta["splits"]["train"]
    for name, text in {
        "not JSON": "{",
        "deep": "[" * 10**5,
        "a list": "[]",
        "a number": "5",
        "null": "null",
        "long": '{"a": "' + "x" * 10**7 + '"}',
        "not UTF-8": None,
        **{
            name: json.dumps({**meta, **parts})
            for name, parts in {
                "objects": {"dtype": "O"},
                "float": {"dtype": "float64"},
                "code": {"dtype": "__import__('os')"},
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
                "splits": {"splits": []},
                "no val": {"splits": {"train": train}},
                "train of text": {"splits": {"train": "x", "val": "x"}},
                "tokens of text": {"splits": {**meta["splits"], "train": {**train, "tokens": "9"}}},
                "tokens -1": {"splits": {**meta["splits"], "train": {**train, "tokens": -1}}},
                "giant": {"splits": {**meta["splits"], "train": {**train, "tokens": 10**30}}},
                "bytes": {"splits": {**meta["splits"], "val": {**train, "bytes": "x"}}},
                "no bytes": {
                    "splits": {**meta["splits"], "val": {"tokens": meta["splits"]["val"]["tokens"]}}
                },
                "bytes 0": {
                    "splits": {**meta["splits"], "val": {**meta["splits"]["val"], "bytes": 0}}
                },
                "row": {"row": 5},
                "row 0": {"row": {"length": 0, "prompt": 0, "levels": {}}},
                "row -17": {"row": {"length": -17, "prompt": 1, "levels": {}}},
                "row without levels": {"row": {"length": 17, "prompt": 4}},
                "levels of text": {
                    "row": {"length": 17, "prompt": 4, "levels": {"train": "x", "val": "x"}}
                },
                "giant level": {
                    "row": {
                        "length": 17,
                        "prompt": 4,
                        "levels": {"train": [[1, 10**12]], "val": [[1, 10**12]]},
                    }
                },
                "prompt": {
                    "row": {
                        "length": 17,
                        "prompt": 400,
                        "levels": {"train": [[1, 1]], "val": [[1, 1]]},
                    }
                },
            }.items()
        },
    }.items():
        yield (
            name,
            lambda text=text: with_data(
                folder, {"meta.json": b"\xff\xfe" if text is None else text.encode()}
            ),
        )
    yield (
        "a split outside",
        lambda: with_data(
            folder,
            {
                "meta.json": json.dumps(
                    {**meta, "splits": {**meta["splits"], "../../x": train}}
                ).encode()
            },
            fine=True,
        ),
    )


def with_data(folder, files, fine=False):
    """A start on the data with some of its files replaced."""
    place = folder / "wrong"
    place.mkdir(exist_ok=True)
    for name in ("meta.json", "train.bin", "val.bin"):
        (place / name).write_bytes(files.get(name, (folder / "data" / name).read_bytes()))
    result = run(folder, "--init_from=scratch", "--eval_only", data="wrong")
    return "fine" if fine and result.code == 0 else result


def tokens(folder, good):
    size = (folder / "data" / "train.bin").stat().st_size
    ids = np.full(size // 2, 60000, "<u2").tobytes()
    for name, data in {
        "empty": b"",
        "odd": bytes(size - 1),
        "longer": bytes(size + 2),
        "beyond": ids,
        "a byte": b"x",
        "pickle": pickle.dumps(Payload(folder)),
    }.items():
        yield name, lambda data=data: with_data(folder, {"train.bin": data})
        yield f"{name}, validation", lambda data=data: with_data(folder, {"val.bin": data})


def configs(folder, good):
    for name, data in {
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
    }.items():
        path = folder / f"{re.sub('[^a-z]', '_', name.lower())}.py"
        path.write_bytes(data)
        yield name, lambda path=path: run(folder, path)
    yield "a folder", lambda: run(folder, f"{folder}/data.py")
    yield "a name with ../", lambda: run(folder, "../../../etc/passwd")


def options(folder, good):
    for name in ("n_embd", "learning_rate", "eval_loops", "compile", "no_such_name"):
        for kind, text in {
            "x": "x" * 10**7,
            "digits": "9" * 10**7,
            "list": "1," * 5 * 10**6,
            "brackets": "[" * 10**7,
            "signs": "-" * 10**7,
            "code": "__import__('os').mkdir('marks/x')",
        }.items():
            yield f"{name} {kind}", lambda name=name, text=text: configured(f"--{name}={text}")
    yield "a long name", lambda: configured("--" + "x" * 10**7)
    yield "a long file", lambda: configured("x" * 10**7 + ".py")
    for text in (
        "--n_embd=1e12",
        "--n_embd=-32",
        "--block_size=1e15",
        "--dtype=" + "x" * 10**5,
        "--device=" + "y" * 10**5,
        "--init_from=" + "z" * 10**5,
        "--objective=" + "o" * 10**5,
    ):
        yield text[:20], lambda text=text: run(folder, text)


def configured(argument):
    """train.py's options without train.py."""
    script, sys.argv = Path(__file__).parents[1] / "train.py", ["train.py"]
    said, sys.stderr = sys.stderr, io.StringIO()
    try:
        configure(
            {"__file__": str(script), "__doc__": ""},
            (script.with_name("model.py"), "GPTConfig"),
            argv=[argument],
        )
    except SystemExit as stop:
        lines = sys.stderr.getvalue()
        return (
            "fine"
            if stop.code == 2 and lines.count("\n") == 1 and len(lines) < 1000
            else f"{stop.code}: {lines[:300]}"
        )
    finally:
        sys.stderr = said
    return ""


def prompts(folder, good):
    short = (
        "--max_new_tokens=3",
        "--num_samples=1",
        "--device=cpu",
        f"--out_dir={folder / 'good.pt'}",
    )
    for name, data in {
        "empty": b"",
        "not UTF-8": b"\xff\xfe",
        "NUL": b"\0" * 99,
        "another alphabet": "Ω".encode(),
        "pickle": pickle.dumps(Payload(folder)),
    }.items():
        yield name, lambda data=data: replaced(folder, data, short)
    for name, start in {
        "missing file": "FILE:nowhere",
        "a folder": f"FILE:{folder}",
        "a NUL in the name": "FILE:a\0b",
        "a long name": "FILE:" + "x" * 10**5,
    }.items():
        yield name, lambda start=start: Run("sample.py", *short, f"--start={start}")
    letters = prose(1, 300)
    yield (
        "ten MB",
        lambda: (
            "fine"
            if Run("sample.py", *short, f"--start={(letters * 10**4)[: 10**7]}").code in (0, 2)
            else "failed"
        ),
    )


def replaced(folder, data, short):
    (folder / "prompt.txt").write_bytes(data)
    return Run("sample.py", *short, f"--start=FILE:{folder / 'prompt.txt'}")


# -----------------------------------------------------------------------------
# at random

WHOLE = st.one_of(st.integers(-2, 9), st.sampled_from([16, 32, 48, 64]))
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.floats(),
    st.lists(st.integers(-1, 3), max_size=2),
)
GROUPS = st.lists(st.lists(st.integers(-1, 6), max_size=3), max_size=3)
FIELDS = GPTConfig.__dataclass_fields__
BY_TYPE = {
    int: WHOLE,
    float: st.floats(-1, 4),
    bool: st.booleans(),
    tuple: st.one_of(GROUPS, st.lists(WHOLE, max_size=3)),
    str: st.text(max_size=5),
}
LEGAL = {
    "norm": ["layernorm", "rmsnorm", "weightless"],
    "position": ["learned", "rope", "none"],
    "mlp": ["gelu", "swiglu", "relu2"],
    "attention": ["mha", "mla"],
    "input_injection": ["passthrough", "add", "inject", "residual", "diagonal"],
    "state_init": ["input", "zero", "noise"],
    "loop_norm": ["none", "rmsnorm"],
    "loop_embedding": ["none", "learned", "sinusoidal"],
    "loop_sampling": ["fixed", "uniform", "geometric", "poisson"],
    "exit_gate": ["none", "state", "mean_state"],
    "init": ["gpt2", "small", "orthogonal"],
    "norm_place": ["pre", "post", "branch", "sum"],
    "qk_norm": ["none", "head", "width", "rotated"],
}


def fuzz(folder, trials):
    """Yields "" or the first that went wrong, for each of four kinds, trials examples of each, and trials times ""."""
    for attempt in (fuzz_config, fuzz_groups, fuzz_meta, fuzz_options):
        tried = []
        check = settings(
            max_examples=trials,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(attempt(Path(folder), tried))
        try:
            check()
        except Exception as error:
            yield f"{attempt.__name__}: {type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
        yield from [""] * len(tried)


def clear(make):
    """What make() returns, or None where it is refused in words."""
    try:
        return make()
    except ValueError as error:
        assert 0 < len(str(error)) < 2000
        return None


def runs(config):
    """A forward and a backward pass."""
    small = (
        config.n_embd,
        config.n_physical,
        config.vocab_size,
        config.n_hidden,
        config.n_ahead,
        config.head_size,
        config.n_latent,
    )
    if max(small) > 64 or config.block_size > 64:
        return
    model, idx = GPT(config), torch.zeros(2, min(4, config.block_size), dtype=torch.long)
    logits, loss = model(idx, idx)
    loss.backward()
    assert logits.shape == (*idx.shape, config.vocab_size) and torch.isfinite(loss)


def fuzz_config(folder, tried):
    field = st.sampled_from(sorted(FIELDS)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.one_of(
                st.sampled_from(LEGAL.get(name, [None])),
                BY_TYPE[FIELDS[name].type],
                BY_TYPE[FIELDS[name].type],
                ODD,
            ),
        )
    )

    @given(st.lists(field, max_size=4).map(dict))
    def check(fields):
        tried.append(1)
        config = clear(lambda: GPTConfig(**{**LOOPED, **fields}))
        if config:
            runs(config)

    return check


def fuzz_groups(folder, tried):
    @given(GROUPS, st.lists(st.integers(0, 4), max_size=3), st.integers(1, 6))
    def check(groups, counts, n_layer):
        tried.append(1)
        config = clear(
            lambda: GPTConfig(
                block_size=16,
                vocab_size=61,
                n_embd=32,
                n_head=4,
                n_layer=n_layer,
                loop_groups=groups,
                loop_counts=counts,
            )
        )
        if config:
            runs(config)

    return check


def fuzz_meta(folder, tried):
    place = folder / "fuzzed"
    place.mkdir(exist_ok=True)
    write_dataset(place, CHARS, {"train": [prose(1, 300)], "val": [prose(2, 300)]})
    whole = json.loads((place / "meta.json").read_text())
    value = st.one_of(
        ODD,
        st.integers(),
        st.dictionaries(
            st.sampled_from(["tokens", "bytes", "train", "val", "length", "prompt", "levels"]),
            ODD,
            max_size=3,
        ),
    )
    keys = st.sampled_from([*whole, "row"])

    @given(
        st.dictionaries(keys, value, max_size=2),
        st.dictionaries(
            st.sampled_from(["tokens", "bytes"]), st.one_of(ODD, st.integers()), max_size=1
        ),
    )
    def check(parts, sizes):
        tried.append(1)
        meta = {
            **whole,
            "splits": {**whole["splits"], "train": {**whole["splits"]["train"], **sizes}},
            **parts,
        }
        (place / "meta.json").write_text(json.dumps(meta))
        split = clear(
            lambda: open_split(place, "train", meta := load_meta(place), 16, meta["vocab_size"])
        )
        if split:
            x, y = split.windows(split.shuffled(np.arange(4), 1))
            assert x.shape == y.shape == (4, 16)
            split.levels(split.spread(2))

    return check


def fuzz_options(folder, tried):
    @given(
        st.sampled_from(["n_embd", "learning_rate", "loop_groups", "compile", "dataset", "x"]),
        st.one_of(
            st.text(max_size=20),
            st.integers().map(str),
            st.floats().map(str),
            st.lists(st.integers(), max_size=4).map(str),
            st.from_regex(r"[\[\](),0-9.e-]{1,12}"),
        ),
    )
    def check(name, text):
        tried.append(1)
        assert configured(f"--{name}={text}") in ("", "fine")

    return check
