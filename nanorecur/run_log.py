"""
The log of a run: lines on the terminal, log.jsonl and sessions.jsonl in out_dir, Weights & Biases,
TensorBoard.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import uuid
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import clear_errors
from nanorecur import checkpoint, evaluation

FIRST_SILENCE = 10.0  # seconds without a line, after which one says that the run is alive


class RunLog:
    """Writes what a run reports; of several processes only the first writes."""

    def __init__(self, config: dict, iter_num: int, is_first: bool, writes: bool):
        """Cut log.jsonl back to iter_num, from where a run goes on. config: train.py's options.

        writes: False prints only, and leaves the run's folder as it is.
        """
        self.is_first, self.max_iters = is_first, config["max_iters"]
        self.folder = Path(config["out_dir"]) if writes else None
        self.bar = self.wandb = self.board = None
        self.last_line, self.silence = time.monotonic(), FIRST_SILENCE
        if is_first and writes:
            checkpoint.cut_log(self.folder / "log.jsonl", iter_num)
            if sys.stderr.isatty():
                self.bar = tqdm(total=self.max_iters, initial=iter_num, unit="step")
            if config["wandb_log"]:
                self.wandb = start_wandb(config)
            if config["tensorboard"]:
                self.board = start_tensorboard(self.folder, iter_num)

    # -------------------------------------------------------------------------
    # what is reported

    def session(self, entry: dict) -> None:
        """Append a line to sessions.jsonl, which says how the run was started each time."""
        if self.is_first and self.folder:
            self.append("sessions.jsonl", entry)

    def step(self, entry: dict) -> None:
        """Log a training step. entry: its means by name, and the keys that are read here."""
        means = {name: value for name, value in entry.items() if name not in OF_A_STEP}
        mfu = "n/a" if entry["mfu"] is None else f"{entry['mfu']:.1%}"
        left = (self.max_iters - entry["iter"] - 1) * entry["ms"] / 1e3
        text = f"iter {entry['iter']}: {in_words(means)}, norm {entry['grad_norm']:.2f}, "
        text += f"{entry['ms']:.1f} ms, {entry['tokens_per_second']:,.0f} tokens/s, mfu {mfu}, "
        text += f"loops {entry['loops']:.1f}, {entry['tokens'] / 1e6:.2f}M tokens, "
        self.write(entry, text + f"time {clock(entry['elapsed'])}, left {clock(left)}")

    def evaluation(self, entry: dict, counts: tuple) -> None:
        """Log an evaluation. entry: iter, what Evaluation.run returns, watch.

        counts: the model's loops.
        """
        lines = ["", f"step {entry['iter']}", evaluation.table(entry["eval"])]
        if "levels" in entry:
            with_exit = entry.get("levels_with_exit", [])
            lines += ["", evaluation.table_of_levels(entry["levels"], with_exit)]
        if entry["objective"]:
            lines.append(f"besides, on val: {in_words(entry['objective'])}")
        if entry["iter"]:  # before training all states agree
            warnings = evaluation.warnings_of(entry["watch"], counts)
            lines += [f"warning: {words}" for words in warnings]
        self.write(entry, "\n".join([*lines, ""]))

    def skip(self, entry: dict) -> None:
        """Log a step that is not made. entry: iter, skipped (steps in all), grad_norm."""
        text = f"iter {entry['iter']}: skipped, the norm of its gradient is "
        self.write(entry, text + f"{entry['grad_norm']:.3g} ({entry['skipped']} in all)")

    def alive(self, words: str) -> None:
        """Print a line after ten seconds of silence, then after twenty and so on."""
        silent = time.monotonic() - self.last_line
        if self.is_first and not self.bar and silent > self.silence:
            self.silence *= 2
            self.print(words)

    # -------------------------------------------------------------------------
    # where it goes

    def write(self, entry: dict, text: str) -> None:
        """Print a text and write an entry, which has the key "iter"."""
        if not self.is_first:
            return
        self.print(text)
        if self.folder:
            self.append("log.jsonl", entry)
        if self.wandb:
            self.wandb.log(scalars(entry))
        if self.board:
            for name, value in scalars(entry).items():
                self.board.add_scalar(name, value, entry["iter"])

    def append(self, name: str, entry: dict) -> None:
        with clear_errors(), open(self.folder / name, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def print(self, text: str) -> None:
        """Print a text above the progress bar, if there is one."""
        if not self.is_first:
            return
        self.last_line = time.monotonic()
        if self.bar:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def step_done(self) -> None:
        if self.bar:
            self.bar.update()

    def close(self, finished: bool, is_task: bool = False) -> None:
        """Close what is open. finished: all steps are made; what to do next is printed.

        is_task: the data are rows of a task, not text.
        """
        if self.bar:
            self.bar.close()
            self.bar = None
        if finished and self.folder:
            self.print(next_commands(self.folder, is_task))
        if self.wandb:
            self.wandb.finish()
        if self.board:
            self.board.close()


def next_commands(folder: Path, is_task: bool) -> str:
    """Return what one does with a finished run, as commands."""
    name = shlex.quote(str(folder))
    pictures = f"    python analyze.py {name}"
    if is_task:
        return f"{folder} is finished. Pictures of it:\n{pictures}"
    text = f"    python sample.py {name}"
    return f"{folder} is finished. Text from it, and pictures of it:\n{text}\n{pictures}"


# keys of a step's entry that are not means over its tokens
OF_A_STEP = {"iter", "lr", "ms", "tokens_per_second", "mfu", "loops", "grad_norm"}
OF_A_STEP |= {"tokens", "flops", "elapsed"}


def in_words(means: dict) -> str:
    return ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())


def clock(seconds: float) -> str:
    """Return seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# -----------------------------------------------------------------------------
# provenance


def session_of(
    config: dict, device: torch.device, processes: int, iter_num: int, changed: dict
) -> dict:
    """Return how a run was started: command, code, machine, time. config: train.py's options.

    changed: {option: (value in the checkpoint, value asked for)}.
    """
    return {
        "iter": iter_num,
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        **commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "host": socket.gethostname(),
        "processes": processes,
        "init_from": config["init_from"],
        "changed": changed,
    }


def commit() -> dict:
    """Return the commit of this repository and whether files differ from it; {} without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        number = subprocess.check_output([*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": number.decode().strip(), "dirty": bool(changes.strip())}


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or the device and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


# -----------------------------------------------------------------------------
# TensorBoard


def check_tensorboard(config: dict) -> None:
    """Raise ValueError where tensorboard is missing. config: train.py's options."""
    if not config["tensorboard"]:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        reason = "tensorboard is not installed; pip install tensorboard"
        raise ValueError(f"tensorboard=True: {reason}") from None


def start_tensorboard(folder: Path, iter_num: int) -> object:
    """Return a writer into folder/tensorboard; earlier events from iter_num on are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard", purge_step=iter_num)


# -----------------------------------------------------------------------------
# Weights & Biases


def check_wandb(config: dict) -> None:
    """Raise ValueError where wandb is missing or asks for a key. config: train.py's options."""
    if not config["wandb_log"]:
        return
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log=True: wandb is not installed; pip install wandb") from None
    if "online" != config["wandb_mode"] or os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        logged_in = wandb.login(prompt=False)
    except TypeError:  # an older wandb
        logged_in = wandb.api.api_key
    if not logged_in:
        raise ValueError("wandb_log=True: not logged in; wandb login, or --wandb_mode=offline")


def start_wandb(config: dict) -> object:
    """Begin a run of Weights & Biases, or go on with the one that wandb_id.txt names."""
    import wandb

    folder = Path(config["out_dir"])
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    wandb.init(
        project=config["wandb_project"],
        name=config["wandb_run_name"] or f"{folder.name} {shape(config)}",
        mode=config["wandb_mode"],
        config=config,
        dir=config["out_dir"],
        id=id_file.read_text().strip(),
        resume="allow",
    )
    wandb.define_metric("iter")
    wandb.define_metric("*", step_metric="iter")  # steps of a resumed run are logged again
    return wandb


def shape(config: dict) -> str:
    """Return blocks and loops of a model in a word, such as 1+2x4+1."""
    if not config["n_block"]:
        return f"{config['n_layer']} blocks"
    blocks = f"{config['n_prelude']}+{config['n_block']}x{config['n_loop']}+{config['n_coda']}"
    return f"{blocks} not looped" if config["use_model_baseline"] else blocks


def scalars(entry: dict) -> dict[str, float]:
    """Return an entry of log.jsonl as numbers with names: val/loss, val/loss@8, lr, watch/gain."""
    if "eval" not in entry:
        return {
            name if name in OF_A_STEP | {"skipped"} else f"train/{name}": value
            for name, value in entry.items()
            if value is not None
        }
    flat = {"iter": entry["iter"], "watch/gain": entry["watch"]["gain"]}
    for row in entry["eval"]:
        flat |= scalars_of_row(row, own=entry["eval"][0]["loops"])
    for name, value in entry["objective"].items():
        flat[f"val/{name.replace(' ', '_')}"] = value
    groups = entry["watch"]["groups"]
    for number, group in enumerate(groups):
        suffix = f"/{number}" if len(groups) > 1 else ""
        flat[f"watch/token_correlation{suffix}"] = group["token_correlation"]
        if group["change"]:
            flat[f"watch/last_change{suffix}"] = group["change"][-1]
    return flat


def scalars_of_row(row: dict, own: tuple) -> dict[str, float]:
    """Return the numbers of one row of an evaluation; own: the model's loops."""
    split = "train/eval_" if row["split"] == "train" else f"{row['split']}/"
    suffix = ""
    if row["loops"] != own:
        counts = dict.fromkeys(row["loops"])  # once, where all groups have the same
        suffix += "@" + ",".join(map(str, counts if len(counts) == 1 else row["loops"]))
    if row["shift"] != 1:
        suffix += f"+{row['shift']}"
    flat = {}
    for name in ("loss", "bits_per_token", "bits_per_byte", "accuracy", "exact"):
        if name in row:
            flat[f"{split}{name}{suffix}"] = row[name]
    for level, share in row.get("by_level", {}).items():
        flat[f"{split}exact{suffix}/level{level}"] = share
    return flat
