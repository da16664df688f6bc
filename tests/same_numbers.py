"""
Run an old commit and the working tree side by side and compare what they compute, bit for bit.

It is for a refactoring that must change no number. It needs nothing but the repository:

    python tests/same_numbers.py 2b02578                         # every case, minutes on one core
    python tests/same_numbers.py 2b02578 --cases=plain,looped    # some of them
    python tests/same_numbers.py 2b02578 --list                  # what they are
    python tests/same_numbers.py 2b02578 --new=../worktree       # another folder as the new tree

The old commit is checked out into a temporary worktree, and the files of the new tree are copied at
the start, so that it may be edited meanwhile. Each tree has a process of its own, which runs the
same command lines on the same made-up corpora, with one thread, on the CPU, in float32 and not
compiled unless a case says otherwise. What no command line shows is asked by the probes near the
end of this file, which run in that process and use only names that both trees have: GPT and
GPTConfig of model.py, generate of decode.py, load and export of pretrained.py.

Equal means: tensors under the same names in the same order, of the same shape, dtype and bits, and
other values of the same type and digits. Only the compiled run is compared to 1e-6: of a tensor's
largest value, of a number, or absolutely where that is below 1. Not compared are times, keys that
the new tree adds to log.jsonl or ckpt.pt, and options that one tree lacks; the last two are printed
as notes. The exit code is 1 if anything differs or a command fails.

Nothing is recorded, neither hashes nor numbers: bits depend on the processor and the libraries, so
that only two runs on one machine can be compared. pytest does not collect this file.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]

# -----------------------------------------------------------------------------
# the cases of training: options of train.py, those of a case after those of all

BASE = (
    "n_embd=32 n_head=4 block_size=16 batch_size=4 gradient_accumulation_steps=2 eval_iters=3 "
    "eval_interval=4 max_iters=8 lr_decay_iters=8 warmup_iters=2 learning_rate=1e-2 min_lr=1e-3 "
    "dataset=text device=cpu compile=False dtype=float32"
)
LOOP = "n_prelude=1 n_block=2 n_coda=1 n_loop=3 max_loops=8"
CORE = "n_block=2 n_loop=3 max_loops=8 bias=False"
LLAMA = "position=rope norm=rmsnorm mlp=swiglu bias=False"
STOP = "automatic_loop_exit=True automatic_loop_exit_threshold=0.3"
CASES = {
    "plain": "n_layer=2 dropout=0.1",
    "looped": f"{LOOP} input_injection=inject loop_sampling=poisson bptt_k=2 eval_loops=1,5",
    "groups": "n_layer=4 loop_groups=[[0,1],[3]] loop_counts=2,3 loop_sampling=uniform "
    "input_injection=add loop_embedding=learned eval_stride=8 eval_loops=1,4",
    "quickstart": f"{CORE} {LLAMA} input_injection=diagonal state_init=zero loop_norm=none "
    "loop_sampling=poisson bptt_k=2 optimizer=muon gradient_accumulation_steps=1",
    "noise": f"{LOOP} state_init=noise loop_noise_scale=1 dropout=0.2 loop_sampling=geometric",
    "mla": f"{LOOP} attention=mla position=rope loop_embedding=sinusoidal norm=weightless "
    "logit_softcap=15",
    "grouped_queries": f"{LOOP} {LLAMA} n_kv_head=2 qk_norm=head value_embedding=True",
    "huginn": f"{LOOP} {LLAMA} norm_place=sum qk_bias=True init=small loop_exit=final_norm "
    "embedding_scale=5.65 loop_norm=none norm_eps=1e-6 state_init=noise",
    "parcae": f"{LOOP} {LLAMA} mlp=relu2 mlp_scale=0.5 init=orthogonal loop_entry=rmsnorm "
    "loop_exit=linear qk_norm=rotated input_injection=diagonal state_init=noise loop_norm=none "
    "value_embedding=True norm_eps=1e-5",
    "ouro": f"{CORE} {LLAMA} norm_place=branch input_injection=passthrough final_norm=False "
    "exit_gate=state tie_weights=False",
    "residual": f"{LOOP} input_injection=residual norm_place=post qk_norm=width tie_weights=False "
    "lr_schedule=linear learning_rate=0.3",
    "baseline": f"{LOOP} use_model_baseline=True n_loop=1 mlp=relu2 save_interval=3",
    "shifted_labels": f"{LOOP} predict_ahead=True loop_sampling=uniform",
    "heads": "n_layer=2 n_ahead=3 loss_chunk=24",
    "separator": f"{LOOP} document_separator=5 position=rope mlp=gelu_tanh",
    "loops_per_row": f"{LOOP} loops_per_row=True loop_sampling=poisson bptt_k=1",
    "exit": f"{LOOP} exit_gate=state objective=exit loop_sampling=poisson {STOP} exit_rule=gate",
    "exit_gate": f"{LOOP} exit_gate=state objective=exit_gate",
    "deep": f"{LOOP} objective=deep loss_weighting=linear loss_chunk=24",
    "distill": f"{LOOP} objective=distill distill_weight=0.7",
    "confidence": f"{LOOP} exit_gate=mean_state objective=confidence {STOP}",
    "ema": f"{LOOP} ema_decay=0.9 spectral_clip_beta=0.5 recompute=loop dropout=0.1",
    "recompute_block": f"{LOOP} ema_decay=0.9 recompute=block dropout=0.1 spectral_clip_beta=0.4 "
    "spectral_clip_all=True spectral_clip_interval=2",
    "recompute_cheap": f"{LOOP} ema_decay=0.9 recompute=cheap spectral_clip_beta=0.4",
    "param_dtype": f"{LOOP} param_dtype=bfloat16 ema_decay=0.9 loss_chunk=24",
    "autocast": f"{LOOP} dtype=bfloat16 loop_sampling=poisson loss_chunk=24",
    "muon_wsd": f"{LOOP} optimizer=muon lr_schedule=wsd hold_iters=4 weight_decay_all=True",
    "loop_warmup": f"{LOOP} loop_warmup=sqrt loop_warmup_iters=6 lr_schedule=constant "
    "grad_clip=0.1",
    "task": f"{LOOP} dataset=task block_size=6 eval_loops=1 eval_interval=60 max_iters=120 "
    "spike_factor=1.1 max_skips=60",
    "stream": f"{LOOP} dataset=documents stream=True loop_sampling=poisson",
    "two_processes": f"{LOOP} exit_gate=state objective=exit loop_sampling=poisson bptt_k=2 "
    "dropout=0.1 ema_decay=0.9",
    "shard": f"{LOOP} shard=True loop_sampling=poisson bptt_k=2 dropout=0.1",
    "compiled": f"{CORE} compile=True learning_rate=1e-5 min_lr=1e-6 eval_interval=2 max_iters=4",
}
PROCESSES = {"two_processes": 2, "shard": 2}  # of torchrun
TOLERANCE = {"compiled": 1e-6}  # in place of equal bits
START = {  # the case begins with the disturbed checkpoint of a run with these options
    "exit": f"{LOOP} exit_gate=state",
    "exit_gate": LOOP,
    "confidence": f"{LOOP} exit_gate=mean_state",
}
EXITS = (  # how sample.py is run where something is looped
    "exit_rule=state automatic_loop_exit_threshold=0.3",
    "exit_rule=kl automatic_loop_exit_threshold=0.01 slots=shared",
    "exit_rule=entropy automatic_loop_exit_threshold=0.1 slots=last n_slot=2 min_loops=2",
    "exit_rule=argmax automatic_loop_exit_threshold=1 warm_start=True top_k=5",
    "exit_rule=gate automatic_loop_exit_threshold=0.6 slots=mod n_slot=2",
)
PROMPTS = {"text": "Ka lo min", "task": "1123=", "documents": "Document"}  # of each corpus
TIMES = {"ms", "tokens_per_second", "mfu"}  # keys of log.jsonl that are never equal
OWN = {"out_dir", "init_from", "max_iters"}  # options in which the runs of one case differ


# -----------------------------------------------------------------------------
# comparing


class Report:
    """A record of what was compared, printed line by line, and as a table at the end."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}  # of each case: groups, how many differ, seconds
        self.known: set[str] = set()  # notes, each printed once

    def compare(self, case: str, what: str, old: Any, new: Any, tolerance: float = 0.0) -> None:
        """Compare a group of values, and print whether it is equal, what differs, and notes."""
        notes: set[str] = set()
        self.add(case, what, list(differences(old, new, "", notes, tolerance)))
        for note in sorted(notes - self.known):
            print(f"    note: {note}")
        self.known |= notes

    def add(self, case: str, what: str, found: list[str]) -> None:
        """Count a group and print it with the differences that were found in it."""
        row = self.rows.setdefault(case, [0, 0, 0.0])
        row[0], row[1] = row[0] + 1, row[1] + bool(found)
        print(f"{case}: {what}: {f'{len(found)} DIFFER' if found else 'equal'}", flush=True)
        print("".join(f"    {line}\n" for line in found[:5]), end="")
        if len(found) > 5:
            print(f"    and {len(found) - 5} more")

    def table(self) -> str:
        """Return one line for each case, and their sums."""
        total = [sum(column) for column in zip((0, 0, 0.0), *self.rows.values())]
        lines = [f"{'case':<18}{'groups':>8}{'differ':>8}{'seconds':>9}"]
        for case, (groups, differ, seconds) in [*self.rows.items(), ("all", total)]:
            lines.append(f"{case:<18}{groups:>8}{differ:>8}{seconds:>9.0f}")
        return "\n".join(lines)


def differences(
    old: Any, new: Any, name: str, notes: set[str], tolerance: float = 0.0
) -> Iterator[str]:
    """Yield in words where nested dicts, lists and tensors differ; add to notes what may differ."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        yield from tensor_differences(old, new, name, tolerance)
    elif isinstance(old, dict) and isinstance(new, dict):
        for tree, present, missing in (("old", old, new), ("new", new, old)):
            for key in (key for key in present if key not in missing):
                line = f"{name}.{key} is only in the {tree} tree".lstrip(".")
                if may_lack(name, tree):
                    notes.add(re.sub(r"\.\d+\.", ".*.", line.replace("_prev", "")))
                else:
                    yield line
        orders = [key for key in old if key in new], [key for key in new if key in old]
        if any(isinstance(value, torch.Tensor) for value in old.values()):
            first = next((pair for pair in zip(*orders) if pair[0] != pair[1]), None)
            if first:
                yield f"{name}: another order, {first[0]} in the old tree, {first[1]} in the new"
        for key in orders[0]:
            path = f"{name}.{key}".lstrip(".")
            yield from differences(old[key], new[key], path, notes, tolerance)
    elif type(old) is type(new) and isinstance(old, (list, tuple)) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f"{name}.{i}", notes, tolerance)
    elif type(old) is not type(new) or repr(old) != repr(new):
        floats = isinstance(old, float) and isinstance(new, float)
        if not (
            tolerance and floats and math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance)
        ):
            yield f"{name}: {str(old)[:80]} in the old tree, {str(new)[:80]} in the new"


def may_lack(name: str, tree: str) -> bool:
    """Return whether a key of the dict of this name may be in one tree alone."""
    if name.endswith(("config", "model_args")):
        return True
    return tree == "new" and (
        name.startswith(("log.jsonl", "eval")) or name in ("ckpt.pt", "ckpt_prev.pt")
    )


def tensor_differences(
    old: torch.Tensor, new: torch.Tensor, name: str, tolerance: float
) -> Iterator[str]:
    """Yield at most one line: whether tensors differ in kind, in bits, or beyond the tolerance."""
    kinds = [f"{t.dtype} {tuple(t.shape)} requires_grad={t.requires_grad}" for t in (old, new)]
    if kinds[0] != kinds[1]:
        yield f"{name}: {kinds[0]} in the old tree, {kinds[1]} in the new"
        return
    a, b = (t.detach().contiguous().reshape(-1) for t in (old, new))
    if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        apart, most = (a.double() - b.double()).abs().max(), a.double().abs().max()
        if not (tolerance and apart <= tolerance * most):
            count = f"{int((a != b).sum())} of {len(a)} values"
            yield f"{name} {kinds[0]}: {count} differ, by up to {apart:.3g}, the largest {most:.3g}"


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run has written, without what is never equal."""
    run: dict[str, Any] = {}
    for file in ("ckpt_prev.pt", "ckpt.pt"):  # in the middle, at the end
        run[file] = ckpt = torch.load(folder / file, weights_only=True)
        storages = {tensor.untyped_storage().data_ptr() for tensor in ckpt["model"].values()}
        ckpt["number of storages"] = len(storages)  # less than tensors, where weights are tied
        ckpt["config"] = {k: v for k, v in ckpt["config"].items() if k not in OWN}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    run["log.jsonl"] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return run


def read_export(folder: Path) -> dict[str, Any]:
    """Return the tensors and the config.json of an exported folder."""
    from safetensors.torch import load_file

    given = json.loads((folder / "config.json").read_text())
    name = "config" if given["model_type"] == "nanorecur" else "config.json"  # ours: see may_lack
    return {"model.safetensors": load_file(folder / "model.safetensors"), name: given}


def read_pictures(folder: Path) -> dict[str, Any]:
    """Return the numbers beside the pictures of analyze.py, by the names of its files."""
    files: dict[str, Any] = {path.name: None for path in sorted(folder.iterdir())}
    for name in files:
        if name.endswith(".csv"):
            files[name] = (folder / name).read_text().splitlines()
        elif name.endswith(".npz"):
            arrays = np.load(folder / name).items()
            texts = {key: array.tolist() for key, array in arrays if array.dtype.kind == "U"}
            numbers = {k: torch.from_numpy(array) for k, array in arrays if k not in texts}
            files[name] = {**texts, **numbers}
    return files


# -----------------------------------------------------------------------------
# the two trees


class Failed(Exception):
    """A command that ended with an error in one of the trees."""


class Tree:
    """A checkout, and a process in it that runs its scripts and the probes of this file."""

    def __init__(self, name: str, folder: Path, scratch: Path) -> None:
        self.name, self.folder, self.scratch = name, folder, scratch
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        settings = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1")
        settings |= dict(PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1", CUDA_VISIBLE_DEVICES="")
        settings |= dict(TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_CACHE_DIR=str(scratch))
        settings |= dict(HF_HOME=str(scratch), MPLCONFIGDIR=str(scratch))
        self.environment = {**inherited, **settings}
        self.process: subprocess.Popen | None = None

    def ask(self, **request: Any) -> str:
        """Hand a request to the process and return what it printed; raise Failed for an error."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, str(Path(__file__).resolve()), "--probe"]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.process = subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"code": 1, "err": "it died"}')
        if answer["code"]:
            what = request.get("script", request.get("probe"))
            raise Failed(f"{self.name} tree: {what}: {answer['err'].strip()[-800:]}")
        return answer["out"]

    def run(self, script: str, *arguments: str, processes: int = 1) -> str:
        """Run a script of this tree as from the command line and return what it printed."""
        if processes == 1:
            return self.ask(script=script, arguments=arguments)
        launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
        command = [sys.executable, *launch, script, *arguments]
        pipes = dict(capture_output=True, text=True, timeout=300)
        done = subprocess.run(command, cwd=self.folder, env=self.environment, **pipes)
        if done.returncode:
            raise Failed(f"{self.name} tree: {script}: {done.stderr.strip()[-800:]}")
        return done.stdout

    def probe(self, name: str, **options: Any) -> Any:
        """Return the result of one of the probes below, computed in this tree."""
        path = self.scratch / f"probe_{self.name}.pt"
        self.ask(probe=name, options=options, path=path)
        return torch.load(path, weights_only=True)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a folder, for as long as the context lasts."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def copy_files(source: Path, folder: Path) -> Path:
    """Copy the files of a checkout, tracked or new but not ignored, to a folder and return it."""
    listed = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others"]
    names = subprocess.run([*listed, "--exclude-standard"], check=True, capture_output=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (source / name).is_file():  # a tracked one may be deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folder / name)
    return folder


# -----------------------------------------------------------------------------
# made-up corpora


def write_corpora(folder: Path) -> None:
    """Write a text, a task with a hard split, and documents to stream, each to a folder."""
    draw = random.Random(1)
    syllables = ["ka", "lo", "min", "ter", "a", "sho", "re", "un", "di", "vel"]
    words = ["".join(draw.choices(syllables, k=1 + rank // 40)) for rank in range(200)]

    def prose(count: int) -> str:
        chosen = [words[int(200 * draw.random() ** 3)] for _ in range(count)]
        lines = (" ".join(chosen[i : i + 9]).capitalize() for i in range(0, count, 9))
        return ".\n".join(lines)

    chars = "".join(sorted(string.printable))
    write_tokens(folder / "text", chars, {"train": prose(6000), "val": prose(400)})
    levels = {"train": {1: 60, 2: 40}, "val": {1: 30, 2: 20}, "hard": {2: 30}}
    rows = dict.fromkeys(levels, "")
    for split in levels:
        for level in (level for level, count in levels[split].items() for _ in range(count)):
            digits = "".join(draw.choices("0123456789", k=3))
            rows[split] += f"{level}{digits}={digits[level - 1]}."  # level 1: the first digit
    pairs = {split: [list(pair) for pair in levels[split].items()] for split in levels}
    row = {"length": 7, "prompt": 5, "levels": pairs}
    write_tokens(folder / "task", "0123456789=.", rows, row=row)
    (folder / "documents").mkdir()
    for part in range(3):
        lines = [json.dumps({"text": f"Document {i}: {prose(40)}"}) for i in range(part, 60, 3)]
        (folder / "documents" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    knobs = dict(repository="none", subset="", revision="", tokenizer="bytes", val_share=0.2)
    script = "".join(f"{name} = {value!r}\n" for name, value in knobs.items())
    (folder / "documents" / "prepare.py").write_text(script)


def write_tokens(folder: Path, chars: str, splits: dict[str, str], **more: Any) -> None:
    """Write texts as a prepared folder of characters: a .bin for each split, and meta.json."""
    folder.mkdir()
    sizes = {}
    for split, text in splits.items():
        raw = np.array([chars.index(char) for char in text], "<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(raw)
        digest = hashlib.sha256(raw).hexdigest()
        sizes[split] = {"tokens": len(text), "bytes": len(text), "sha256": digest}
    meta = dict(tokenizer="char", chars=chars, **more, vocab_size=len(chars), dtype="uint16")
    (folder / "meta.json").write_text(json.dumps({**meta, "splits": sizes}))


# -----------------------------------------------------------------------------
# comparing the trees


class Trees(NamedTuple):
    """The arguments of every case."""

    report: Report
    old: Tree
    new: Tree
    corpora: Path
    folder: Path  # of the case

    def results(self, function: Callable[[Tree], Any]) -> tuple[Any, Any]:
        """Return function(tree) of the old and of the new tree."""
        return function(self.old), function(self.new)


def command_line(options: str, corpora: Path) -> list[str]:
    """Return the arguments of train.py for a case's options."""
    chosen = dict(word.split("=", 1) for word in f"{BASE} {options}".split())
    chosen["dataset"] = str(corpora / chosen["dataset"])
    if "stream" in chosen:
        chosen["input_files"] = f"{chosen['dataset']}/*.jsonl"
    return [f"--{name}={value}" for name, value in chosen.items()]


def compare_training(name: str, trees: Trees) -> None:
    """Compare runs of a case of training, and what is made of its model and its checkpoint."""
    report, old, new, corpora, folder = trees
    processes, tolerance = PROCESSES.get(name, 1), TOLERANCE.get(name, 0.0)
    options = command_line(CASES[name], corpora)
    if name in START:
        first = command_line(START[name], corpora)
        old.run("train.py", *first, f"--out_dir={folder / 'start'}", "--max_iters=2")
        disturb(folder / "start")
        options.append(f"--init_from={folder / 'start'}")

    def train(tree: Tree, out: str, *more: str) -> None:
        command = ("train.py", *options, f"--out_dir={folder / out}", *more)
        tree.run(*command, processes=processes)

    train(old, "old")
    config = json.loads((folder / "old" / "config.json").read_text())
    untrained = trees.results(lambda tree: tree.probe("model", config=config))
    for what in untrained[0]:
        report.compare(name, what, untrained[0][what], untrained[1][what])
    train(new, "new")
    undisturbed = read_run(folder / "old")
    report.compare(name, "training", undisturbed, read_run(folder / "new"), tolerance)
    if tolerance:
        return
    if processes == 1:
        for tree, out in ((new, "stopped"), (old, "earlier")):
            train(tree, out, f"--max_iters={config['eval_interval']}")
    else:  # torchrun takes long to start: the same from the checkpoint in the middle
        for source, out in (("new", "stopped"), ("old", "earlier")):
            last = shutil.ignore_patterns("ckpt.pt")
            shutil.copytree(folder / source, folder / out, ignore=last)
    for out, what in (("stopped", "stopped and"), ("earlier", "old tree's checkpoint")):
        train(new, out, "--init_from=auto")
        report.compare(name, f"{what} gone on with", undisturbed, read_run(folder / out))
    if processes == 1:
        compare_uses(name, trees, options, config)


def compare_uses(name: str, trees: Trees, options: list[str], config: dict[str, Any]) -> None:
    """Compare losses, tokens and files that both trees make of the old tree's checkpoint."""
    report, folder = trees.report, trees.folder
    disturb(folder / "old")
    out_dir = f"--out_dir={folder / 'old'}"
    again = ["train.py", *options, out_dir, "--init_from=resume", "--eval_only=True"]
    lines = trees.results(lambda tree: tree.run(*again).splitlines()[-1])
    report.compare(name, "--eval_only", *({"eval": json.loads(line)} for line in lines))

    asked = dict(folder=folder / "old", config=config)
    report.compare(name, "generate", *trees.results(lambda tree: tree.probe("generate", **asked)))

    start = PROMPTS[Path(config["dataset"]).name]
    sample = ["sample.py", out_dir, f"--start={start}", "--jsonl", "--device=cpu"]
    sample += [f"--dtype={config['dtype']}", "--num_samples=2", "--max_new_tokens=30"]
    for way in EXITS if is_looped(config) else ("",):
        if "gate" in way and config["exit_gate"] == "none":
            continue
        exits = f"automatic_loop_exit=True n_loop=6 {way}" if way else ""
        if "gate" in way and config["exit_gate"] == "mean_state":
            exits += " max_new_tokens=6"  # the text has to fit into the window
        command = (*sample, *(f"--{option}" for option in exits.split()))
        texts = trees.results(lambda tree, command=command: tree.run(*command).splitlines())
        rows = [[json.loads(line) for line in text] for text in texts]
        report.compare(name, f"sample.py {way.partition(' ')[0]}".rstrip(), *rows)

    def export(tree: Tree) -> dict[str, Any]:
        tree.run("pretrained.py", "export", out_dir, f"--to={folder / f'{tree.name}_export'}")
        return read_export(folder / f"{tree.name}_export")

    report.compare(name, "pretrained.py export", *trees.results(export))


def disturb(folder: Path) -> None:
    """Add noise to the weights of a run's last checkpoint; a few steps leave all tokens alike."""
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    draw = torch.Generator().manual_seed(3)
    for tensor in {t.untyped_storage().data_ptr(): t for t in ckpt["model"].values()}.values():
        tensor.detach().add_(0.2 * torch.randn(tensor.shape, generator=draw))
    torch.save(ckpt, folder / "ckpt.pt")
    (folder / "ckpt.json").unlink()  # it holds the old file's hash


def is_looped(config: dict[str, Any]) -> bool:
    """Return whether something is looped in a model of these options."""
    return not config["use_model_baseline"] and bool(config["n_block"] or config["loop_groups"])


def compare_analysis(name: str, trees: Trees) -> None:
    """Compare the numbers of analyze.py on two runs of the old tree."""
    for run in ("exit", "groups"):
        options = command_line(CASES[run], trees.corpora)
        trees.old.run("train.py", *options, f"--out_dir={trees.folder / run}")
        disturb(trees.folder / run)
    runs = ",".join(str(trees.folder / run) for run in ("exit", "groups"))
    given = (f"--compare={runs}", "--windows=8", "--maps=0,2", "--device=cpu")

    def analyze(tree: Tree) -> dict[str, Any]:
        tree.run("analyze.py", *given, f"--to={trees.folder / tree.name}")
        return read_pictures(trees.folder / tree.name)

    trees.report.compare(name, "analyze.py", *trees.results(analyze))


def compare_functions(name: str, trees: Trees) -> None:
    """Compare spectral_clip, sample_loops and flops_per_token by themselves."""
    for what in ("spectral_clip", "sample_loops", "flops_per_token"):
        trees.report.compare(name, what, *trees.results(lambda tree, what=what: tree.probe(what)))


def compare_families(name: str, trees: Trees) -> None:
    """Compare what both trees read from other people's formats, fold into a loop, and export."""
    plain = {
        "as it is": ({}, [None]),
        "cut": ({"layers": [0, 2, 3]}, [None]),
        "folded": ({"n_prelude": 1, "n_block": 1, "n_coda": 1, "n_loop": 3}, [None, 1, 5]),
        "grouped": ({"loop_groups": [[1, 2]], "input_injection": "diagonal"}, [1, 4]),
    }
    looped = {"as it is": ({}, [None, 1, 3]), "with a head": ({"n_ahead": 2}, [None])}
    for make, ways in ((write_plain, plain), (write_looped, looped)):
        for source in make(trees.folder):

            def load(tree: Tree, source: Path = source, ways: dict = ways) -> dict[str, Any]:
                to = trees.folder / f"{source.name}_{tree.name}"
                loaded = tree.probe("pretrained", source=source, to=to, ways=ways)
                return {"load": loaded, **read_export(to)}

            trees.report.compare(name, source.name, *trees.results(load))


OTHERS = {
    "functions": compare_functions,
    "families": compare_families,
    "analysis": compare_analysis,
}


# -----------------------------------------------------------------------------
# other people's formats, tiny


def write_plain(folder: Path) -> Iterator[Path]:
    """Yield folders of random models of the transformers library."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gpt2 = dict(vocab_size=61, n_positions=32, n_embd=32, n_head=4, n_layer=4)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=64, rope_theta=500.0)
    models = {
        "gpt2": ("GPT2", "LMHeadModel", gpt2),
        "gpt2_gelu": ("GPT2", "LMHeadModel", dict(gpt2, activation_function="gelu", n_inner=40)),
        "llama": ("Llama", "ForCausalLM", sizes),
        "llama3": ("Llama", "ForCausalLM", dict(sizes, rope_parameters=rope)),
        "qwen3": ("Qwen3", "ForCausalLM", dict(sizes, head_dim=16, tie_word_embeddings=True)),
        "olmo2": ("Olmo2", "ForCausalLM", dict(sizes, rms_norm_eps=1e-4)),
    }
    for name, (kind, ending, options) in models.items():
        ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**options, **ids)
        model = getattr(transformers, f"{kind}{ending}")(config)
        with torch.no_grad():
            for p in model.parameters():  # norms and biases too
                p.add_(0.2 * torch.randn_like(p))
        model.save_pretrained(folder / name)
        yield folder / name


BLOCK = "transformer.{prelude,core_block,coda}.{0,1}"
LAYER = "model.layers.{0,1}"
NANO = "transformer.{prelude.0,recur.0,recur.1,coda.0}"
TENSORS = {  # names, of which those in braces stand for several as in a shell, and shapes
    "huginn": f"transformer.wte.weight=96,64 transformer.adapter.weight=64,128 "
    f"transformer.ln_f.weight=64 {BLOCK}.norm_{{1,2,3,4}}.weight=64 {BLOCK}.attn.qk_bias=2,1,2,32 "
    f"{BLOCK}.attn.Wqkv.weight=192,64 {BLOCK}.attn.proj.weight=64,64 "
    f"{BLOCK}.mlp.fc.weight=192,64 {BLOCK}.mlp.proj.weight=64,96",
    "parcae": "transformer.wte.weight=96,64 transformer.adapter.{A_log,dt_bias}=64 "
    "transformer.{adapter.B,C.weight}=64,64 transformer.{ln_prelude,ln_f}.weight=64 "
    f"{BLOCK}.norm_{{1,2}}.weight=64 {BLOCK}.attn.c_{{q,k,v,proj}}.weight=64,64 "
    f"{BLOCK}.mlp.fc.weight=96,64 {BLOCK}.mlp.proj.weight=64,96 "
    "transformer.{prelude,core_block,coda}.1.attn.ve_gate.weight=2,32 "
    "value_embeds.{1,3,5}.weight=96,64",
    "ouro": "{model.embed_tokens,lm_head}.weight=96,64 model.norm.weight=64 "
    "model.early_exit_gate.weight=1,64 model.early_exit_gate.bias=1 "
    f"{LAYER}.self_attn.{{q,k,v,o}}_proj.weight=64,64 {LAYER}.mlp.{{gate,up}}_proj.weight=96,64 "
    f"{LAYER}.mlp.down_proj.weight=64,96 "
    f"{LAYER}.{{input,post_attention}}_layernorm{{,_2}}.weight=64",
    "nanoloop": "transformer.wte.weight=96,64 transformer.wpe.weight=16,64 inject.weight=64,128 "
    f"{{transformer.ln_f,norm_recur}}.weight=64 {NANO}.ln_{{1,2}}.weight=64 "
    f"{NANO}.attn.c_attn.weight=192,64 {NANO}.attn.c_proj.weight=64,64 "
    f"{NANO}.mlp.c_fc.weight=256,64 {NANO}.mlp.c_proj.weight=64,256",
}
SIZES = {"n_embd": 64, "block_size": 64, "vocab_size": 96, "intermediate_size": 96}
SIZES |= {f"n_layers_in_{part}": 2 for part in ("prelude", "recurrent_block", "coda")}
SIZES |= {"num_attention_heads": 2, "mean_recurrence": 4, "state_init": "like-init"}
CONFIGS = {
    "huginn": dict(model_type="huginn_raven", qk_bias=True, **SIZES),
    "parcae": dict(_class_name="ParcaeConfig", **SIZES),
    "ouro": dict(
        model_type="ouro", vocab_size=96, hidden_size=64, intermediate_size=96, head_dim=32
    )
    | dict(num_hidden_layers=2, num_attention_heads=2, total_ut_steps=3, rope_theta=1e6)
    | dict(max_position_embeddings=64),
}
NANO_ARGS = dict(block_size=16, vocab_size=96, n_prelude=1, n_block=2, n_coda=1, n_loop=3, n_head=4)
NANO_ARGS |= dict(n_embd=64, dropout=0.0, bias=False, bptt_k=None)


def write_looped(folder: Path) -> Iterator[Path]:
    """Yield folders of models under the released names of Huginn, Parcae, Ouro and nanoLOOP."""
    from safetensors.torch import save_file

    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(filled(TENSORS[name]), folder / name / "model.safetensors")
        yield folder / name
    for injection in ("inject", "inject_random"):
        (folder / injection).mkdir()
        weights, args = filled(TENSORS["nanoloop"]), {**NANO_ARGS, "input_injection": injection}
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        torch.save({"model": weights, "model_args": args}, folder / injection / "ckpt.pt")
        yield folder / injection


def filled(tensors: str) -> dict[str, torch.Tensor]:
    """Return tensors of these names and shapes: small values, all different, norms around 1."""
    shapes = {}
    for pattern, _, shape in (word.partition("=") for word in tensors.split()):
        parts = [part.split(",") for part in re.split("[{}]", pattern)]
        names = map("".join, itertools.product(*parts))
        shapes |= dict.fromkeys(names, tuple(map(int, shape.split(","))))
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        places = torch.arange(math.prod(shape), dtype=torch.float64)
        values = 0.1 * torch.sin(0.37 * places + 1.3 * i) + ("norm" in name or "ln_" in name)
        weights[name] = values.float().view(shape)
    return weights


# -----------------------------------------------------------------------------
# probes: they run in the process of a tree, where "model" and the others are that tree's


def probe_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return an untrained model's weights, and what it computes of some tokens."""
    from model import GPT, GPTConfig

    names = {field.name for field in fields(GPTConfig)}
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**{name: value for name, value in config.items() if name in names}))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw, shape = torch.Generator().manual_seed(1), (3, config["block_size"])
    with torch.no_grad():
        for p in model.parameters():  # no zero or identity hides a mistake
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    idx, targets = (torch.randint(config["vocab_size"], shape, generator=draw) for _ in range(2))
    computed: dict[str, Any] = {}
    for n in (None, 1, 5) if is_looped(config) else (None,):
        model.eval()
        with torch.no_grad():
            computed[f"{n} loops"] = model(idx, targets, n_loop=n)
            computed[f"{n} loops, last position"] = model(idx, n_loop=n)[0]
        computed[f"states of {n} loops"] = model.loops_representation(idx, n)
        computed[f"FLOPs of {n} loops"] = [model.flops_per_token(n, k) for k in (None, 0, 1)]
        torch.manual_seed(7)
        model.train()(idx, targets, n_loop=n)[1].backward()
    computed["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    return {
        "names, order and weights at step 0": {"parameters": parameters, "state": state},
        "logits, states, gradients, FLOPs": computed,
    }


def probe_generate(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what generate() makes of a checkpoint, in several ways, beyond its window."""
    from decode import generate
    from pretrained import load

    ways: dict[str, dict[str, Any]] = {
        "greedy": dict(temperature=0),
        "top_k": dict(top_k=5),
        "top_p and others": dict(temperature=0.7, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        "slide": dict(top_k=5, slide=1),
    }
    if is_looped(config):
        ways |= {slots: dict(slots=slots, n_slot=2) for slots in ("mod", "last", "shared")}
        ways |= {
            "first+shared": dict(slots="first+shared", n_loop=5),
            "warm_start": dict(warm_start=True, top_k=5),
            "drafts": dict(draft_tokens=3, draft_loops=1, top_k=5),
            "greedy drafts": dict(draft_tokens=2, draft_loops=1, temperature=0),
        }
    if config["n_ahead"] > 1:
        ways["heads"] = dict(draft_tokens=config["n_ahead"] - 1, top_k=5)
    length = min(10, config["block_size"])
    draw = torch.Generator().manual_seed(1)
    idx = torch.randint(config["vocab_size"], (3, length), generator=draw)
    lengths, model = torch.tensor([length, length // 2, length - 2]), load(folder)

    def continued(way: dict[str, Any]) -> Any:
        generator = torch.Generator().manual_seed(2)
        return generate(model, idx, 24, lengths=lengths, generator=generator, **way)

    return {name: continued(way) for name, way in ways.items()}


def probe_pretrained(source: str, to: str, ways: dict[str, list]) -> dict[str, Any]:
    """Return weights and logits of a source, loaded in several ways, and export it."""
    from pretrained import export, load

    export(load(source), to, {"tokenizer": "bytes"})
    idx = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(1))
    results = {}
    for name, (options, depths) in ways.items():
        model = load(source, **options)
        with torch.no_grad():
            logits = {n: model(idx, idx, n_loop=n)[0] for n in depths}
        results[name] = {"weights": dict(model.state_dict()), "logits": logits}
    return results


def probe_spectral_clip() -> list[torch.Tensor]:
    """Return clipped matrices of several shapes and types."""
    clip, draw = find("spectral_clip"), torch.Generator().manual_seed(1)
    matrices = [torch.randn(s, generator=draw) for s in ((8, 8), (4, 16), (16, 4), (3, 5, 7))]
    matrices += [matrix.bfloat16() for matrix in matrices]
    return [clip(matrix, beta) for matrix in matrices for beta in (0.5, 2.0)]


def probe_sample_loops() -> list[list]:
    """Return draws of every kind of sampled depth."""
    from model import GPTConfig

    sample, results = find("sample_loops"), []
    for kind in ("fixed", "uniform", "geometric", "poisson"):
        for looped in (dict(n_block=1), dict(n_layer=4, loop_groups=((0, 1), (3,)))):
            config = GPTConfig(n_loop=4, max_loops=9, loop_sampling=kind, **looped)
            draw = torch.Generator().manual_seed(1)
            results.append([list(sample(config, draw)) for _ in range(100)])
    return results


def probe_flops_per_token() -> list[int]:
    """Return the FLOPs of larger models, without weights, at several depths and truncations."""
    from model import GPT, GPTConfig

    core, results = dict(n_prelude=2, n_block=4, n_coda=2, n_loop=4), []
    for options in (
        core,
        dict(core, attention="mla", position="rope", bptt_k=2, loop_exit="linear"),
        dict(core, n_kv_head=4, mlp="swiglu", n_hidden=2048, input_injection="diagonal"),
        dict(n_layer=6, loop_groups=((0, 1), (3,)), loop_counts=(2, 3), value_embedding=True),
    ):
        with torch.device("meta"):
            model = GPT(GPTConfig(**options))
        results += [model.flops_per_token(n, k) for n in (None, 1, 16) for k in (None, 0, 1, 3)]
    return results


def find(name: str) -> Any:
    """Return the function of this name, from whichever module of the tree defines it."""
    for path in ("model.py", *sorted(map(str, Path().glob("nanorecur/*.py")))):
        if f"\ndef {name}(" in Path(path).read_text():
            return getattr(importlib.import_module(path[:-3].replace("/", ".")), name)
    raise LookupError(f"neither model.py nor a module of nanorecur defines {name}")


def serve() -> None:
    """Run scripts and probes of the tree in the working directory, as stdin asks for them."""
    sys.path[0] = os.getcwd()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing else is printed among the answers
    for line in sys.stdin:
        request, code, out, err = json.loads(line), 0, io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                if "script" in request:
                    sys.argv = [request["script"], *request["arguments"]]
                    runpy.run_path(request["script"], run_name="__main__")
                else:
                    result = globals()[f"probe_{request['probe']}"](**request["options"])
                    torch.save(result, request["path"])
        except SystemExit as stop:
            code = stop.code or 0
            err.write(f"exit code {code}")
        except Exception:
            code = 1
            err.write(traceback.format_exc())
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}))
        answers.write("\n")
        answers.flush()


# -----------------------------------------------------------------------------


def main() -> None:
    """Compare the trees in the cases that the command line names."""
    parser = argparse.ArgumentParser(description="Compare the numbers of two trees; see the file.")
    parser.add_argument("commit", help="the old tree")
    parser.add_argument("--new", type=Path, default=ROOT, help="the folder of the new tree")
    parser.add_argument("--cases", default=",".join([*OTHERS, *CASES]), help="names with commas")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    given = parser.parse_args()
    chosen = given.cases.split(",")
    if unknown := set(chosen) - {*OTHERS, *CASES}:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}; --list prints them all")
    if given.list:
        for name in chosen:
            print(f"{name:<18}{CASES[name] if name in CASES else OTHERS[name].__doc__}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the worktree is removed
    report = Report()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same_numbers_")))
        checkout = stack.enter_context(worktree(given.commit, scratch / "old"))
        old = Tree("old", checkout, scratch)
        new = Tree("new", copy_files(given.new, scratch / "new"), scratch)
        stack.callback(old.close)
        stack.callback(new.close)
        write_corpora(scratch)
        for name in chosen:
            began, folder = time.perf_counter(), scratch / f"case_{name}"
            folder.mkdir()
            compare = OTHERS.get(name, compare_training)
            try:
                compare(name, Trees(report, old, new, scratch, folder))
            except (Failed, OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
                report.add(name, "stopped", [f"{type(error).__name__}: {error}"])
            report.rows[name][2] = time.perf_counter() - began
            shutil.rmtree(folder)
    print(f"\n{report.table()}")
    sys.exit(any(differ for _, differ, _ in report.rows.values()))


if __name__ == "__main__":
    if sys.argv[1:] == ["--probe"]:
        serve()
    else:
        main()
