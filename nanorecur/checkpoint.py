"""
Checkpoints: out_dir/ckpt.pt, one dict with nanoGPT's keys, written atomically and verified on load.

The previous checkpoint stays as ckpt_prev.pt, and ckpt.json lists the sha256 of the last few: at
any moment of a save, one of the two files is complete and listed. Only tensors and plain values are
ever unpickled. The other functions here also protect a run: the lock on its folder, the repair of
its log when it is resumed, and the signals that ask it to save or to end.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from nanorecur.files import sha256, write_atomically, write_part

try:
    import fcntl
except ImportError:  # Windows: a second run in the same folder is not refused
    fcntl = None

NEWEST, PREVIOUS, MANIFEST, LOCK = "ckpt.pt", "ckpt_prev.pt", "ckpt.json", "lock"
FIELD_TYPES = {
    "model": dict,
    "model_args": dict,
    "optimizer": dict,
    "iter_num": int,
    "config": dict,
    "tokenizer": dict,
    "stream": dict,
    "health": dict,
    "spent": dict,
    "data": dict,
    "training_model": dict,
    "best_val_loss": (int, float, torch.Tensor),
}


# -----------------------------------------------------------------------------
# saving


def save(folder: str | Path, checkpoint: dict, keep_last: int = 2, keep: bool = False) -> None:
    """Write a checkpoint to folder/ckpt.pt and keep the newest keep_last checkpoints (at least 2).

    checkpoint: a dict with "iter_num" and "model". keep: keep it for good too, as the file that
    kept_path names. Raises ValueError where a weight is not finite
    and OSError where the file cannot be written; the older checkpoints are then as they were.
    """
    check_finite(checkpoint)
    folder = Path(folder)
    paths = [folder / name for name in file_names(keep_last)]
    part = write_part(folder / NEWEST, lambda file: torch.save(checkpoint, file))
    entry = {
        "sha256": sha256(part),
        "bytes": part.stat().st_size,
        "iter_num": checkpoint["iter_num"],
    }
    # The list is longer than keep_last: a save that dies below leaves an entry without a file.
    listed = read_manifest(folder)
    entries = [entry, *listed[: keep_last + 1]]
    entries += [old for old in listed[keep_last + 1 :] if kept_path(folder, old).exists()]
    write_atomically(folder / MANIFEST, json.dumps(entries, indent=1).encode())
    if keep:
        link_or_copy(part, kept_path(folder, entry))
    shift_names(paths)
    os.replace(part, folder / NEWEST)
    for path in older_than_previous(folder):
        if path not in paths:
            path.unlink()


def kept_path(folder: Path, entry: dict) -> Path:
    """Return the path under which a checkpoint is kept for good: ckpt_<step>.pt."""
    return folder / f"ckpt_{entry.get('iter_num')}.pt"


def link_or_copy(path: Path, target: Path) -> None:
    """Make target a hard link to path, or a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def file_names(keep_last: int) -> list[str]:
    """Return the names of the checkpoints to keep, newest first: ckpt.pt, ckpt_prev.pt, ..."""
    return [NEWEST, PREVIOUS, *(f"ckpt_prev{age}.pt" for age in range(2, keep_last))]


def shift_names(paths: list[Path]) -> None:
    """Give each checkpoint the name of the next older one; ckpt.pt keeps its own name besides."""
    newest, previous = paths[:2]
    if not newest.exists():
        return
    if previous.exists() and previous.samefile(newest):
        return  # a save that died before its last rename has done this already
    for age in range(len(paths) - 1, 1, -1):
        if paths[age - 1].exists():
            os.replace(paths[age - 1], paths[age])
    second_name = Path(f"{previous}.part")
    link_or_move(newest, second_name)
    os.replace(second_name, previous)


def link_or_move(path: Path, target: Path) -> None:
    """Make target a hard link to path, or rename path where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        os.replace(path, target)


def older_than_previous(folder: str | Path) -> list[Path]:
    """Return the paths of ckpt_prev2.pt, ckpt_prev3.pt, ... that exist, newest first."""
    ages = {}
    for path in Path(folder).glob("ckpt_prev*.pt"):
        match = re.fullmatch(r"ckpt_prev(\d{1,9})\.pt", path.name)
        if match:
            ages[path] = int(match[1])
    return sorted(ages, key=ages.get)


# -----------------------------------------------------------------------------
# loading


def load(source: str | Path) -> dict:
    """Return the checkpoint in a file, or the newest undamaged one of a folder, on the CPU.

    A damaged file of a folder is named on stderr. Where ckpt.json exists, a file that it does not
    list counts as damaged; nanoGPT's folders have no ckpt.json.
    Raises ValueError that names every file and what is wrong with it.
    """
    source = Path(source)
    if not source.is_dir():
        return read(source)
    problems = []
    for path in [source / NEWEST, source / PREVIOUS, *older_than_previous(source)]:
        try:
            checkpoint = read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"{problem}; going back to {path}", file=sys.stderr)
        if "format" in checkpoint and not read_manifest(source):
            message = f"missing or damaged, {path.name} could not be verified"
            print(f"{source / MANIFEST}: {message}", file=sys.stderr)
        return checkpoint
    raise ValueError("; ".join(problems))


def exists(folder: str | Path) -> bool:
    """Return True where a run has left a checkpoint, damaged or not."""
    return (Path(folder) / NEWEST).exists() or (Path(folder) / PREVIOUS).exists()


def read(path: Path) -> dict:
    """Return the checkpoint in one file, verified against the ckpt.json beside it, on the CPU.

    Raises ValueError where there is no file, or where it is damaged or not a checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    listed = [entry["sha256"] for entry in read_manifest(path.parent)]
    if listed and sha256(path) not in listed:
        raise ValueError(f"{path}: damaged, its sha256 is not in {MANIFEST}")
    try:
        check_zip(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_contents(checkpoint)
    except Exception as error:  # torch raises many types for a file that it cannot read
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        raise ValueError(f"{path}: not a checkpoint ({type(error).__name__}: {reason})") from None
    return checkpoint


def read_manifest(folder: str | Path) -> list[dict]:
    """Return the entries of ckpt.json, dicts of sha256, bytes and iter_num, newest first.

    The list is empty where the file is missing or damaged.
    """
    try:
        entries = json.loads((Path(folder) / MANIFEST).read_text())
        return [entry for entry in entries if isinstance(entry["sha256"], str)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state dict into an optimizer. Raises ValueError where it does not fit."""
    try:
        optimizer.load_state_dict(state)
        fits = moments_fit(optimizer)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the optimizer's state cannot be read ({reason})") from None
    if not fits:
        raise ValueError("the optimizer's state does not fit the model")


def moments_fit(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if every tensor of the state is a scalar or has its parameter's shape.

    Muon's second_moment has one value for each row.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, tensor in optimizer.state.get(parameter, {}).items():
                by_row = name == "second_moment"
                shape = parameter.shape[:1] if by_row else parameter.shape
                if tensor.dim() > 0 and tensor.shape != shape:
                    return False
    return True


# -----------------------------------------------------------------------------
# checking: a checkpoint can come from anywhere, and must not take more memory than its file's size


def check_zip(path: Path) -> None:
    """Raise ValueError for a compressed file, and BadZipFile for torch's format before 1.6."""
    with zipfile.ZipFile(path) as file:
        unpacked = sum(entry.file_size for entry in file.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it unpacks to {unpacked:,} bytes, more than its size")


def check_contents(checkpoint: dict) -> None:
    """Raise ValueError that names the first field which train.py would not write."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, not a dict")
    for name in ("model", "model_args"):
        if name not in checkpoint:
            raise ValueError(f"it has no {name}")
    for name, kind in FIELD_TYPES.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise ValueError(f"{name} is of type {type(checkpoint[name]).__name__}")
    if checkpoint.get("iter_num", 0) < 0:
        raise ValueError(f"iter_num is {checkpoint['iter_num']}, less than 0")
    for name, tensor in named_tensors(checkpoint):
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than its data")
    for name, tensor in checkpoint["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{str(name)[:60]} in model is of type {type(tensor).__name__}")
    check_finite(checkpoint)


def check_finite(checkpoint: dict) -> None:
    """Raise ValueError that names the first weight with a NaN or Inf."""
    weights = {name: checkpoint.get(name) for name in ("model", "training_model")}
    for name, tensor in named_tensors(weights):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or Inf")


def named_tensors(
    part: object, name: str = "", seen: set | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (dotted name, tensor) of nested dicts and lists; an object that recurs counts once."""
    seen = set() if seen is None else seen
    if id(part) in seen:  # a file can hold a list that contains itself
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        yield name, part
    children = {}
    if isinstance(part, dict):
        children = part
    elif isinstance(part, (list, tuple)):
        children = dict(enumerate(part))
    for key, value in children.items():
        child = str(key)[:60]
        yield from named_tensors(value, f"{name}.{child}" if name else child, seen)


# -----------------------------------------------------------------------------
# a run's folder


def lock(folder: str | Path) -> TextIO:
    """Claim a folder for this process and return the open lock file.

    The claim ends when the file is closed or the process ends, even by SIGKILL.
    Raises ValueError where another run has claimed the folder.
    """
    no_links = os.O_NOFOLLOW if fcntl else 0  # the lock file may be a link to a file elsewhere
    descriptor = os.open(Path(folder, LOCK), os.O_RDWR | os.O_CREAT | no_links, 0o644)
    file = open(descriptor, "r+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read(200).strip()
        raise ValueError(f"out_dir={folder}: another run is at work there ({owner})") from None
    except OSError as error:  # a file system without locks
        message = f"cannot be locked ({error.strerror}); make sure that no other run uses it"
        print(f"{folder}: {message}", file=sys.stderr)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def cut_log(path: str | Path, iter_num: int) -> None:
    """Remove the lines of log.jsonl that a run resumed at iter_num will write again.

    A line that a kill left incomplete is removed too.
    """
    lines = []
    if Path(path).exists():
        lines = Path(path).read_text(errors="replace").splitlines()
    kept = [f"{line}\n" for line in lines if iteration(line) < iter_num]
    write_atomically(path, "".join(kept).encode())


def is_finished(folder: str | Path, iter_num: int, max_iters: int) -> bool:
    """Return True where a run as of step iter_num has made all steps and its last evaluation."""
    path = Path(folder, "log.jsonl")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    last = max((iteration(line) for line in lines if '"eval"' in line), default=-1)
    return iter_num >= max_iters and last >= max_iters


def iteration(line: str) -> float:
    """Return the "iter" of a line of log.jsonl, infinity where it has none."""
    try:
        return json.loads(line)["iter"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def listen() -> set[int]:
    """Handle SIGTERM, SIGINT and SIGUSR1 from now on and return the set of signals received.

    The set grows as signals arrive. A second SIGINT ends the process at once.
    """
    received = set()

    def handle(number, frame):
        received.add(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), handle)
    return received
