"""
Checkpoints: out_dir/ckpt.pt, one dict with nanoGPT's keys, saved whole or not at all and verified when loaded.

The one before stays as ckpt_prev.pt, and ckpt.json lists the sha256 of the last few: at any moment of a save one of
the two files is whole and listed. Only tensors and plain values are ever unpickled. And what else keeps a run safe: the
lock on its folder, its log when it goes on, and the signals that ask it to save.
"""

import hashlib
import json
import math
import os
import re
import signal
import socket
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not kept apart
    fcntl = None

NEWEST, PREVIOUS, MANIFEST, LOCK = "ckpt.pt", "ckpt_prev.pt", "ckpt.json", "lock"
TYPES = {
    "model": dict,
    "model_args": dict,
    "optimizer": dict,
    "iter_num": int,
    "config": dict,
    "tokenizer": dict,
    "stream": dict,
    "health": dict,
    "training_model": dict,
    "best_val_loss": (int, float, torch.Tensor),
}


def save(folder, checkpoint, keep_last=2):
    """Write checkpoint (a dict with iter_num) to folder/ckpt.pt, and keep those before up to keep_last in all.

    OSError if it cannot, ValueError where weights are not finite; what is there is whole then as before.
    """
    check_finite(checkpoint)
    newest, previous, *_ = kept = [Path(folder) / name for name in names(keep_last)]
    part = write_part(newest, lambda file: torch.save(checkpoint, file))
    entry = {
        "sha256": sha256(part),
        "bytes": part.stat().st_size,
        "iter_num": checkpoint["iter_num"],
    }
    entries = [
        entry,
        *read_manifest(folder)[: keep_last + 1],
    ]  # more, for saves that died between here and the end
    write_whole(Path(folder) / MANIFEST, json.dumps(entries, indent=1).encode())
    if newest.exists() and not (
        previous.exists() and previous.samefile(newest)
    ):  # the same where a save died below
        for younger, older in reversed([*pairwise(kept[1:])]):
            if younger.exists():
                os.replace(younger, older)
        os.replace(link_or_move(newest, Path(f"{previous}.part")), previous)
    os.replace(part, newest)
    for path in older_than_previous(folder):
        if path not in kept:
            path.unlink()


def names(keep_last):
    """Newest first: ckpt.pt, ckpt_prev.pt, ckpt_prev2.pt, ..."""
    return [NEWEST, PREVIOUS, *(f"ckpt_prev{age}.pt" for age in range(2, keep_last))]


def older_than_previous(folder):
    """ckpt_prev2.pt and so on, as far as they are there."""
    found = [
        path
        for path in Path(folder).glob("ckpt_prev*.pt")
        if re.fullmatch(r"ckpt_prev\d{1,9}\.pt", path.name)
    ]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("ckpt_prev")))


def write_part(path, write):
    """Let write(file) fill path.part, down to the disk, and return its path; nothing is left where that fails."""
    part = Path(f"{path}.part")
    part.unlink(missing_ok=True)  # it may be a link to somewhere else
    try:
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(
            error, RuntimeError
        ):  # torch's writer, in which the disk's own error got lost
            raise OSError(f"{part}: cannot be written ({error.__context__ or error})") from None
        raise
    return part


def write_whole(path, data):
    """Bytes to a file: whoever reads it finds all of them or the file before."""
    os.replace(write_part(path, lambda file: file.write(data)), path)


def link_or_move(path, to):
    """A second name for the same file, or where the file system has no hard links, a new name."""
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:
        os.replace(path, to)
    return to


def load(source):
    """The checkpoint dict of a folder (its newest whole one) or of a file, on the CPU.

    A file that ckpt.json lists nowhere is taken only where there is no ckpt.json, as in nanoGPT's folders.
    Raises ValueError that names what is wrong with each file.
    """
    source, problems = Path(source), []
    folder = [source / NEWEST, source / PREVIOUS, *older_than_previous(source)]
    for path in folder if source.is_dir() else (source,):
        try:
            checkpoint = read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"{problem}; going back to {path}", file=sys.stderr)
        if source.is_dir() and "format" in checkpoint and not read_manifest(source):
            print(
                f"{source / MANIFEST}: missing or damaged, {path.name} could not be verified",
                file=sys.stderr,
            )
        return checkpoint
    raise ValueError("; ".join(problems))


def exists(folder):
    """Whether a run has left a checkpoint here, whole or not."""
    return (Path(folder) / NEWEST).exists() or (Path(folder) / PREVIOUS).exists()


def read(path):
    """One checkpoint file, verified against the manifest beside it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    listed = [entry["sha256"] for entry in read_manifest(path.parent)]
    if listed and sha256(path) not in listed:
        raise ValueError(f"{path}: damaged, its sha256 is not in {MANIFEST}")
    try:
        check_zip(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check(checkpoint)
    except (
        Exception
    ) as error:  # torch raises many types for a file it cannot read; all mean the same here
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        raise ValueError(f"{path}: not a checkpoint ({type(error).__name__}: {reason})") from None
    return checkpoint


def read_manifest(folder):
    """[{sha256, bytes, iter_num}, ...], newest first; [] where there is none or it is damaged."""
    try:
        entries = json.loads((Path(folder) / MANIFEST).read_text())
        return [entry for entry in entries if isinstance(entry["sha256"], str)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -----------------------------------------------------------------------------
# what a checkpoint may be: it can come from anywhere, and must cost no more memory than its size


def check_zip(path):
    """ValueError for a file of another form than torch writes since 1.6, or compressed, which could fill the memory."""
    with zipfile.ZipFile(path) as file:
        if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
            raise ValueError("it holds more than its size")


def check(checkpoint):
    """ValueError where a checkpoint is not what a run writes."""
    checkpoint["model"], checkpoint["model_args"]
    for name, kind in TYPES.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise ValueError(f"{name} is a {type(checkpoint[name]).__name__}")
    if checkpoint.get("iter_num", 0) < 0:
        raise ValueError(f"iter_num is {checkpoint['iter_num']}")
    for name, tensor in tensors(checkpoint):
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than its data")
    for name, tensor in checkpoint["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{str(name)[:60]} in model is a {type(tensor).__name__}")
    check_finite(checkpoint)


def check_finite(checkpoint):
    """ValueError that names the first weight which is NaN or Inf."""
    for name, tensor in tensors(
        {part: checkpoint.get(part) for part in ("model", "training_model")}
    ):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or Inf")


def restore(optimizer, state):
    """optimizer.load_state_dict(state), after a look at it. ValueError where it is not this optimizer's."""
    try:
        optimizer.load_state_dict(state)
        own = [p for group in optimizer.param_groups for p in group["params"]]
        fit = all(
            t.dim() == 0 or t.shape == p.shape
            for p in own
            for t in optimizer.state.get(p, {}).values()
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the optimizer's state cannot be read ({type(error).__name__}: {error})"
        ) from None
    if not fit:
        raise ValueError("the optimizer's state does not fit the model")


def tensors(part, name="", seen=None):
    """(name, tensor) of everything in nested dicts and lists, what stands there several times once."""
    seen = {} if seen is None else seen
    if id(part) in seen:
        return
    seen[id(part)] = part
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, (dict, list, tuple)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from tensors(value, f"{name}.{str(key)[:60]}" if name else str(key)[:60], seen)


# -----------------------------------------------------------------------------
# a run's folder


def lock(folder):
    """Claim a folder until the file that is returned is closed or this process ends, however that is.

    ValueError where another run has claimed it.
    """
    here = os.O_NOFOLLOW if fcntl else 0  # no link to somewhere else
    file = open(os.open(Path(folder, LOCK), os.O_RDWR | os.O_CREAT | here, 0o644), "r+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"out_dir={folder}: another run is at work there ({file.read(200).strip()})"
        ) from None
    except OSError as error:  # a file system without locks
        print(
            f"{folder}: cannot be locked ({error.strerror}); see that no other run uses it",
            file=sys.stderr,
        )
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def cut_log(path, iter_num):
    """Drop the lines of log.jsonl from iter_num on, which are about to be written again, and one that a kill tore."""
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    write_whole(path, "".join(f"{line}\n" for line in lines if iteration(line) < iter_num).encode())


def iteration(line):
    try:
        return json.loads(line)["iter"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def listen():
    """A set in which SIGTERM, SIGINT and SIGUSR1 are noted from now on; a second SIGINT ends the process at once."""
    asked = set()

    def note(number, frame):
        asked.add(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for name in {"SIGTERM", "SIGINT", "SIGUSR1"} & set(
        signal.Signals.__members__
    ):  # Windows has no SIGUSR1
        signal.signal(signal.Signals[name], note)
    return asked
