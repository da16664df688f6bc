"""
Losses of a model over a split at fixed loop counts, and how the states behave over the loops.

Every process scores its share of the same windows.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, shift_labels
from nanorecur.curriculum import loops_at
from nanorecur.dataset import Split
from nanorecur.exit_rules import (
    ExitRule,
    exit_evaluation,
    exit_logits,
    hidden_at_depths,
    make_exit,
)
from nanorecur.hardware import autocast
from nanorecur.objectives import Objective
from nanorecur.parallel import Processes


class Interrupted(Exception):
    """A signal asked the run to end while it evaluates, which can take long."""


class Evaluation:
    """Evaluates a model on splits. The config holds train.py's options."""

    def __init__(
        self,
        objective: Objective,
        splits: dict[str, Split],
        processes: Processes,
        device: torch.device,
        dtype: torch.dtype,
        config: dict,
        interrupted: Callable[[], bool],
    ):
        """objective: with the model that is scored, the moving average if there is one.

        interrupted: asked before every batch; where it returns True on any process, run() returns
        None.
        """
        self.model, self.objective, self.splits = objective.model, objective, splits
        self.processes, self.device, self.dtype = processes, device, dtype
        self.config, self.interrupted = config, interrupted
        self.has_details = objective.name != "next" or self.model.config.n_ahead > 1

    # -------------------------------------------------------------------------
    # which windows

    def windows(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Return (starts, n_scored): of each window its start, and how many last targets count."""
        if self.config["eval_stride"] and split.name != "train":
            return split.sliding(self.config["eval_stride"])
        most = self.config["eval_iters"] * self.config["batch_size"]
        starts = split.spread(min(most, split.n_windows))
        return starts, np.full(len(starts), split.block_size)

    def levels(self) -> Iterator[tuple[Split, int]]:
        """Yield (split, level) for each level of a task, of all splits but train."""
        for name, split in self.splits.items():
            if name != "train":
                for level in split.level_numbers():
                    yield split, level

    def windows_of_level(self, split: Split, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (starts, n_scored) of rows of one level of a task, evenly spaced."""
        rows = split.rows_of_level(level)
        most = self.config["eval_iters"] * self.config["batch_size"] // len(split.level_numbers())
        count = min(len(rows), max(self.config["batch_size"], most))
        starts = (rows.start + np.arange(count, dtype=np.int64) * len(rows) // count) * split.step
        return starts, np.full(count, split.block_size)

    def batches(
        self, split: Split, windows: tuple | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Yield (starts, x, y) of this process's windows; windows: those to use, or None.

        The last batches are padded with windows that have no targets, so that all processes run
        equally many batches of one shape. Raises Interrupted.
        """
        batch_size, n_processes = self.config["batch_size"], self.processes.world_size
        starts, n_scored = windows or self.windows(split)
        missing = -len(starts) % (batch_size * n_processes)
        starts = np.pad(starts, (0, missing), mode="wrap")
        n_scored = np.pad(n_scored, (0, missing))
        first = self.processes.rank * batch_size
        for begin in range(first, len(starts), n_processes * batch_size):
            if self.processes.agree(self.interrupted()):
                raise Interrupted
            batch = slice(begin, begin + batch_size)
            x, y = split.windows(starts[batch], n_scored[batch])
            yield starts[batch], to_device(x, self.device), to_device(y, self.device)

    # -------------------------------------------------------------------------
    # scores

    def run(self, eval_loops: tuple) -> dict | None:
        """Return an evaluation, or None if a signal came. eval_loops: further loop counts.

        eval: a dict per (split, loops, shift) with these keys and those of score(): train at the
        model's own loops, other splits at eval_loops too; with predict_ahead val at each shift.
        objective: what details() returns. levels and levels_with_exit: what score_levels() and
        score_levels_with_exit() return, if there is any.
        """
        model_config = self.model.config
        own = model_config.counts()
        counts = [own]
        for n in eval_loops:
            if own and (n,) * len(own) != own:
                counts.append((n,) * len(own))
        wanted = [(name, [own] if name == "train" else counts, 1) for name in self.splits]
        if model_config.predict_ahead:
            wanted += [("val", [own], shift) for shift in range(2, model_config.max_shift + 1)]
        try:
            rows = []
            for name, depths, shift in wanted:
                for loops, scores in zip(depths, self.score(self.splits[name], depths, shift)):
                    rows.append({"split": name, "loops": loops, "shift": shift, **scores})
            entry = {"eval": rows, "objective": self.details()}
            if self.config["loops_of_level"] or self.config["level_warmup_iters"]:
                entry["levels"] = self.score_levels(eval_loops)
                if self.config["automatic_loop_exit"]:
                    entry["levels_with_exit"] = self.score_levels_with_exit(eval_loops)
            return entry
        except Interrupted:
            return None

    def score_levels(self, eval_loops: tuple) -> list[dict]:
        """Return what each level of a task gets at its own loops and at each of eval_loops.

        A dict per (split, level, loops): loss, accuracy (over targets), exact (rows all right), and
        own: True at the loops that loops_of_level gives to the level, or else the model's own.
        """
        found = []
        for split, level in self.levels():
            own, depths = self.depths_of_level(level, eval_loops)
            windows = self.windows_of_level(split, level)
            scored = self.score(split, list(depths.values()), 1, windows)
            for n, scores in zip(depths, scored):
                entry = {"split": split.name, "level": level, "loops": n, "own": n == own}
                entry |= {key: scores[key] for key in ("loss", "accuracy", "exact")}
                found.append(entry)
        return found

    @torch.no_grad()
    def score_levels_with_exit(self, eval_loops: tuple) -> list[dict]:
        """Return what each level of a task gets where the model ends its loops by itself.

        A dict per (split, level): accuracy (over targets), exact (rows all right), loops (mean, of
        all groups together). What a token needs can come from far away, a few tokens in each loop,
        so that a token at rest may have to change again: a row stops as one, when all of its tokens
        that have a target would stop, and after the most loops that score_levels() has for its
        level.
        """
        found = []
        self.model.eval()
        for split, level in self.levels():
            _, depths = self.depths_of_level(level, eval_loops)
            settings = (self.rule(), depths[max(depths)], self.processes.sharded)
            totals = {}
            for _, x, y in self.batches(split, self.windows_of_level(split, level)):
                with autocast(self.device, self.dtype):
                    parts = self.processes.run(
                        self.model, score_rows_with_exit, self.model, x, y, *settings
                    )
                add(totals, parts)
            scores = means_of(totals, self.processes)
            found.append({"split": split.name, "level": level, **scores})
        self.model.train()
        return found

    def rule(self) -> ExitRule | None:
        """Return the rule that automatic_loop_exit stops by."""
        threshold = self.config["automatic_loop_exit_threshold"]
        return make_exit(self.model, self.config["exit_rule"], threshold)

    def depths_of_level(self, level: int, eval_loops: tuple) -> tuple[int, dict[int, tuple]]:
        """Return (a level's own loops, {loops: a count for each group} to score it at)."""
        pair, counts = self.config["loops_of_level"], self.model.config.counts()
        own = loops_at(pair, level) if pair else max(counts, default=1)
        if not counts:  # nothing is looped
            return own, {own: counts}
        depths = {n: (n,) * len(counts) for n in sorted({own, *eval_loops})}
        if not pair:
            depths[own] = counts
        return own, depths

    @torch.no_grad()
    def score(
        self, split: Split, depths: list[tuple], shift: int = 1, windows: tuple | None = None
    ) -> list[dict]:
        """Return the scores of a split at each depth: a dict for each of depths, in their order.

        depths: loop counts, one int per group. Scores are the loss (nats per token), bits per token
        and per byte, and accuracy; for a reasoning task also the share of rows whose whole answer
        is right, in all ("exact") and by level.
        """
        self.model.eval()
        windows = windows or self.windows(split)
        levels, rows_of = np.unique(split.levels(windows[0]), return_counts=True)
        scores, rows, level_of_row = [], [], []
        for starts, x, y in self.batches(split, windows):
            with autocast(self.device, self.dtype):
                batch_sums, row_is_right = self.processes.run(
                    self.model, score_batch, self.model, x, y, depths, shift
                )
            scores.append(batch_sums)
            rows.append(row_is_right)
            level_of_row.append(np.searchsorted(levels, split.levels(starts)))
        # one read for all batches: each would wait for the device
        sums = torch.stack(scores).cpu().double().sum(0)  # (depths, 3)
        level = torch.from_numpy(np.concatenate(level_of_row))
        exact = torch.zeros(len(depths), len(levels), dtype=torch.float64)  # right rows
        exact.index_add_(1, level, torch.cat(rows, dim=1).cpu().double())
        sums = torch.cat((sums, exact), dim=1)
        if self.processes.distributed:
            sums = self.processes.sum(sums.to(self.device)).cpu()
        self.model.train()
        found = []
        for one in sums:
            scores = self.scores_of(split, one[:3].tolist())
            if split.row:
                right = one[3:].numpy()
                scores["exact"] = right.sum() / rows_of.sum()
                scores["by_level"] = dict(zip(levels.tolist(), (right / rows_of).tolist()))
            found.append(scores)
        return found

    def scores_of(self, split: Split, sums: list[float]) -> dict:
        """Return the scores of a split with these sums of nats, right guesses and tokens."""
        nats, right, n_tokens = sums
        bits = nats / n_tokens / math.log(2)
        scores = {"loss": nats / n_tokens, "bits_per_token": bits, "accuracy": right / n_tokens}
        if not math.isnan(split.n_bytes):  # it is of other people's shards, without a tokenizer
            scores["bits_per_byte"] = bits * (split.n_tokens / split.n_bytes)
        return scores

    @torch.no_grad()
    def details(self) -> dict[str, float]:
        """Return what the objective logs, and loss and mean loops with exit, on validation."""
        totals = {}
        self.objective.eval()
        if self.has_details:
            for _, x, y in self.batches(self.splits["val"]):
                with autocast(self.device, self.dtype):
                    _, parts = self.processes.run(self.model, self.objective, x, y)
                add(totals, parts)
        if self.config["automatic_loop_exit"]:
            for _, x, y in self.batches(self.splits["val"]):
                add(totals, self.exit_sums(x, y))
        self.objective.train()
        return means_of(totals, self.processes) if totals else {}

    def exit_sums(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return {name: (sum, count)} of loss and loops of one batch with exit."""
        with autocast(self.device, self.dtype):
            loss, loops = self.processes.run(
                self.model, exit_evaluation, self.model, x, y, self.rule()
            )
        count = (y >= 0).sum().item()
        if count == 0:  # padding alone
            loss = loops = 0.0
        return {
            "loss with exit": torch.tensor([loss * count, count], device=self.device),
            "loops with exit": torch.tensor([loops * count, count], device=self.device),
        }

    # -------------------------------------------------------------------------
    # health

    @torch.no_grad()
    def report_states(self) -> dict:
        """Return how the states of each group behave on one batch of validation.

        groups: a dict per group. norm: mean norm of the state after each of n loops. change: how
        far each loop but the first moves the state, as a share of its norm. token_correlation: mean
        cosine between different tokens after the last loop.
        gain: loss at one loop minus loss at the model's own loops, in nats.
        Huginn's two failed runs had a token_correlation of 1, and no gain (2502.05171, 4.3).
        """
        split, batch_size = self.splits["val"], self.config["batch_size"]
        starts = split.spread(min(batch_size, split.n_windows))
        x, y = split.windows(np.resize(starts, batch_size))  # no new shape to compile
        x, y = to_device(x, self.device), to_device(y, self.device)
        self.model.eval()
        with autocast(self.device, self.dtype):
            groups = self.processes.run(self.model, self.model.loops_representation, x)
            loss_of_one = self.model(x, y, n_loop=1)[1]
            gain = (loss_of_one - self.model(x, y)[1]).item()
        self.model.train()
        report = []
        for states in groups:
            s = torch.stack(states).float()  # (n, B, T, C)
            norm = s.norm(dim=-1).mean((1, 2))
            move = s.diff(dim=0).norm(dim=-1).mean((1, 2))
            report.append(
                {
                    "norm": norm.tolist(),
                    "change": (move / norm[1:]).tolist(),
                    "token_correlation": token_correlation(s[-1]).mean().item(),
                }
            )
        return {"groups": report, "gain": gain}


def score_batch(
    model: GPT, x: Tensor, y: Tensor, depths: list[tuple], shift: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (nats, right guesses, tokens) at each depth (N, 3), and which rows (N, B) are right.

    x, y and shift are those of GPT.forward, depths loop counts, one int per group. A row is right
    if all its tokens are. Both results are on the model's device.
    """
    y = shift_labels(y, shift)
    counted = y >= 0
    n_tokens = counted.sum()
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no wider one
    sums, rows = [None] * len(depths), [None] * len(depths)
    for i, hidden in hidden_at_depths(model, x, depths, shift):
        logits = model.logits(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1)
        nats = torch.where(n_tokens > 0, loss.to(wide) * n_tokens, 0.0)  # all may be padding
        right = logits.argmax(-1) == y
        sums[i] = torch.stack((nats, right.sum().to(wide), n_tokens.to(wide)))
        rows[i] = rows_all_right(right, counted)
    return torch.stack(sums), torch.stack(rows)


def rows_all_right(right: Tensor, counted: Tensor) -> Tensor:
    """Return which rows (B,) are right in all tokens (B, T) that count, and have one that does."""
    return (right | ~counted).all(1) & counted.any(1)


def score_rows_with_exit(
    model: GPT, x: Tensor, y: Tensor, rule: ExitRule | None, n_loop: tuple, all_loops: bool
) -> dict[str, Tensor]:
    """Return {name: (sum, count)} of a batch whose rows end their loops as one.

    accuracy: of right targets; exact: of rows whose targets are all right; loops: of a row's loops.
    n_loop: the most, one int per group. all_loops: see exit_logits.
    """
    counted = y >= 0
    is_row = counted.any(1)  # others are padding
    logits, used = exit_logits(model, x, rule, n_loop, together=counted, all_loops=all_loops)
    right = logits.argmax(-1) == y
    row_is_right = rows_all_right(right, counted)
    sums = {
        "accuracy": (right.sum(), counted.sum()),
        "exact": (row_is_right.sum(), is_row.sum()),
        "loops": ((used[:, 0] * is_row).sum(), is_row.sum()),
    }
    return {name: torch.stack(pair).float() for name, pair in sums.items()}


def token_correlation(s: Tensor) -> Tensor:
    """Return the mean cosine between different tokens of states (.., T, C), shape (..)."""
    T = s.size(-2)
    mean = F.normalize(s, dim=-1).mean(dim=-2)  # as long as 1 where all tokens agree
    return (T * mean.square().sum(-1) - 1) / (T - 1)


def warnings_of(report: dict, counts: tuple) -> list[str]:
    """Return what is wrong with the states of a report, in words. counts: the model's loops."""
    warnings = []
    correlation = max((group["token_correlation"] for group in report["groups"]), default=0.0)
    if correlation > 0.999:
        words = f"the states of all tokens are nearly the same (correlation {correlation:.3f})"
        warnings.append(words)
    gain = abs(report["gain"])
    if max(counts, default=1) > 1 and gain < 1e-4:
        warnings.append(f"the state is not used: one loop gives the same loss within {gain:.0e}")
    return warnings


def table(rows: list[dict]) -> str:
    """Return the rows of an evaluation as a text table; * marks the model's own loops."""
    own, has_levels = rows[0]["loops"], "exact" in rows[0]
    has_shifts = any(row["shift"] != 1 for row in rows)
    head = f"{'split':<6}{'loops':>8}{'loss':>9}{'bits/token':>12}{'bits/byte':>11}{'accuracy':>10}"
    if has_levels:
        head += f"{'exact':>9}  exact by level"
    if has_shifts:
        head += "  tokens ahead"
    lines = [head]
    for row in rows:
        mark = "*" if row["loops"] == own else " "
        loops = mark + (",".join(map(str, row["loops"])) or "-")
        line = f"{row['split']:<6}{loops:>8}{row['loss']:>9.4f}{row['bits_per_token']:>12.4f}"
        bits_per_byte = f"{row['bits_per_byte']:.4f}" if "bits_per_byte" in row else "-"
        line += f"{bits_per_byte:>11}{row['accuracy']:>10.2%}"
        if has_levels:
            shares = (f"{level}:{share:.0%}" for level, share in row["by_level"].items())
            line += f"{row['exact']:>9.2%}  " + " ".join(shares)
        if has_shifts:
            line += f"{row['shift']:>14}"
        lines.append(line)
    return "\n".join(lines)


def table_of_levels(levels: list[dict], with_exit: list[dict]) -> str:
    """Return the accuracy of each level as a text table: at its own loops, at others, with exit.

    A rule stands before the levels beyond training. with_exit: of levels_with_exit, may be empty.
    """
    accuracy, own, split_of = {}, {}, {}
    for entry in levels:
        accuracy[entry["level"], entry["loops"]] = entry["accuracy"]
        split_of[entry["level"]] = entry["split"]
        if entry["own"]:
            own[entry["level"]] = entry["loops"]
    numbers = sorted(split_of)
    shared = [n for n in sorted({n for _, n in accuracy}) if all((k, n) in accuracy for k in own)]
    head = f"{'level':>5}{'loops':>7}{'right':>8}" + "".join(f"{f'at {n}':>8}" for n in shared)
    title = "positions that are right, by level, at its own loops and at others"
    if with_exit:
        title += "; where rows end their loops"
        head += f"{'ends at':>10}{'right':>8}"
    ends = {entry["level"]: entry for entry in with_exit}
    lines = [title, head]
    for before, level in zip([numbers[0], *numbers], numbers):
        if split_of[before] != split_of[level]:
            lines.append("-" * len(head))
        cells = [f"{accuracy[level, n]:>8.1%}" for n in [own[level], *shared]]
        if with_exit:
            cells.append(f"{ends[level]['loops']:>10.1f}{ends[level]['accuracy']:>8.1%}")
        lines.append(f"{level:>5}{own[level]:>7}" + "".join(cells))
    return "\n".join(lines)


def add(totals: dict, parts: dict) -> None:
    """Add {name: tensor (sum, count)} to the totals of the same names."""
    for name, part in parts.items():
        totals[name] = totals.get(name, 0) + part


def means_of(totals: dict, processes: Processes) -> dict[str, float]:
    """Return {name: mean over the targets of all processes} of {name: (sum, count)}."""
    sums = processes.sum(torch.stack(list(totals.values())))
    return {name: part / count for name, (part, count) in zip(totals, sums.tolist())}


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor; to a GPU it travels while the GPU computes."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
