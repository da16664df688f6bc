"""
Every figure that a run prints or logs, computed again from its checkpoints and its data.

Runs save at every step. Here are losses in float64, written a second time from what the model
gives, and FLOPs as torch counts them; where a run computes in bfloat16, logits are in bfloat16 too,
and float64 begins behind them. The order of the data is taken from the loaders, which have tests
of their own.
"""

import functools
import hashlib
import itertools
import json
import math
import re
import time

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, Run, log, prose
from forked import end, start_two, tail
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pretrained
from model import GPT, GPTConfig, sample_loops
from nanorecur import checkpoint
from nanorecur.dataset import load_meta, open_split, random_key, write_dataset
from nanorecur.evaluation import Evaluation
from nanorecur.hardware import autocast, peak_flops
from nanorecur.optim import SpectralClip
from nanorecur.tokenizer import make_tokenizer

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
EXACT, NEAR = 2e-6, 2e-3  # relative, in float32 and in bfloat16
SHORT = """
    --max_iters=4 --eval_interval=4 --eval_iters=2 --warmup_iters=1 --lr_decay_iters=4
    --keep_every=1
""".split()


def approx(value, rel=EXACT, smallest=0.0):
    return pytest.approx(value, rel=rel, abs=smallest)


# -----------------------------------------------------------------------------
# losses of single targets, float64


def ahead(labels, shift):
    """Return labels (B, T) moved so that each is shift (an int or (B,)) ahead; -1 at the end."""
    moved = torch.full_like(labels, -1)
    for row, k in enumerate(torch.as_tensor(shift).expand(len(labels)).tolist()):
        moved[row, : labels.size(1) - k + 1] = labels[row, k - 1 :]
    return moved


def nats(logits, labels):
    """Return the losses (N,) of logits (B, T, V) where labels (B, T) are not -1."""
    known = labels >= 0
    logits, labels = logits[known].double(), labels[known]
    return logits.logsumexp(-1) - logits[torch.arange(len(labels)), labels]


def every_loop(model, x, n_loop, shift):
    """Return two lists: the states after each loop of the last group, and the logits."""
    before, (loop, n, _), after = model.around_group(n_loop)
    s, ctx = model.embed(x, shift=shift)
    for stage in before:
        s = stage(s, ctx)
    states, logits = list(loop.states(s, ctx, n)), []
    for state in states:
        h = loop.exit(state)
        for stage in after:
            h = stage(h, ctx)
        logits.append(model.logits(model.transformer.ln_f(h[:, -x.size(1) :])))
    return [state[:, -x.size(1) :] for state in states], logits


def stop_probabilities(model, states, labels):
    """Return the gate's probabilities (N,) of stopping after each loop, a list."""
    return [model.exit_gate(s).double().sigmoid()[..., 0][labels >= 0] for s in states]


def by_loop(losses):
    """Return losses after each loop under the names that they are logged by."""
    named = {"loss": losses[-1]}
    for number, loss in enumerate(losses[:-1], 1):
        named[f"exit{number}"] = loss
    return named


def binary(p, wanted):
    return -(wanted * p.log() + (1 - wanted) * (1 - p).log())


# -----------------------------------------------------------------------------
# objectives: (sum that is minimised, {name: figure of every target (N,)})


def of_next(model, config, x, labels, n_loop, shift):
    h = model.hidden(x, n_loop, shift=shift)
    figures = {"loss": nats(model.logits(h), labels)}
    minimised = figures["loss"].sum()
    for number, head in enumerate(model.ahead, 2):
        further = nats(model.logits(head(h)), ahead(labels, number))
        figures[f"head{number}"] = further
        minimised = minimised + config["ahead_weight"] / len(model.ahead) * further.sum()
    return minimised, figures


def of_deep(model, config, x, labels, n_loop, shift):
    losses = [nats(part, labels) for part in every_loop(model, x, n_loop, shift)[1]]
    weights = [1.0] * len(losses)
    if config["loss_weighting"] == "linear":
        weights = range(1, len(losses) + 1)
    weighted = sum(weight * loss.sum() for weight, loss in zip(weights, losses))
    return weighted / sum(weights), by_loop(losses)


def of_distill(model, config, x, labels, n_loop, shift):
    logits = every_loop(model, x, n_loop, shift)[1]
    *others, last = (part[labels >= 0].double().log_softmax(-1) for part in logits)
    teacher, loss = last.detach(), nats(logits[-1], labels)
    divergence = sum((teacher.exp() * (teacher - q)).sum(-1) for q in others) / len(others)
    minimised = loss.sum() + config["distill_weight"] * divergence.sum()
    return minimised, {"loss": loss, "divergence": divergence}


def of_exit(model, config, x, labels, n_loop, shift):
    states, logits = every_loop(model, x, n_loop, shift)
    losses = [nats(part, labels) for part in logits]
    left, expected, entropy, loops = 1.0, 0.0, 0.0, 0.0
    for number, p in enumerate(stop_probabilities(model, states, labels), 1):
        p = left * p if number < len(states) else left
        left = left - p
        expected = expected + p * losses[number - 1]
        entropy = entropy - p * p.log()
        loops = loops + p * number
    minimised = (expected - config["entropy_weight"] * entropy).sum()
    figures = {"expected": expected, "entropy": entropy, "expected_loops": loops}
    return minimised, by_loop(losses) | figures


def of_exit_gate(model, config, x, labels, n_loop, shift):
    with torch.no_grad():
        states, logits = every_loop(model, x, n_loop, shift)
        losses = [nats(part, labels) for part in logits]
    gate = 0.0
    stops = stop_probabilities(model, states, labels)
    for before, loss, stop in zip(losses, losses[1:], stops[1:]):
        go_on = torch.sigmoid(50 * ((before - loss).clamp(min=0) - 0.005))
        gate = gate + binary(1 - stop, go_on) / len(states)
    return gate.sum(), {**by_loop(losses), "gate": gate}


def of_confidence(model, config, x, labels, n_loop, shift):
    states, logits = every_loop(model, x, n_loop, shift)
    loss, gate = nats(logits[-1], labels), 0.0
    likeliest = [part.argmax(-1)[labels >= 0] for part in logits]
    stops = stop_probabilities(model, [s.detach() for s in states], labels)
    for stop, token in zip(stops[:-1], likeliest):
        gate = gate + binary(stop, (token == likeliest[-1]).double()) / (len(states) - 1)
    return (loss + gate).sum(), {"loss": loss, "gate": gate}


OBJECTIVES = {
    "next": of_next,
    "deep": of_deep,
    "distill": of_distill,
    "exit": of_exit,
    "exit_gate": of_exit_gate,
    "confidence": of_confidence,
}


# -----------------------------------------------------------------------------
# early exit, token by token


class Memory:
    """A cache of one token after another: keys of a loop, or of the last that a token made."""

    def __init__(self):
        self.tokens = []  # of each token a list of loops, of each a list of keys and values
        self.used = []  # loops of the tokens before

    def begin_token(self):
        self.tokens.append([])

    def begin_loop(self):
        self.tokens[-1].append([])

    def extend(self, *new):
        loops = self.tokens[-1]
        loops[-1].append(new)
        loop, call = len(loops) - 1, len(loops[-1]) - 1
        seen = [made[min(loop, len(made) - 1)][call] for made in self.tokens]
        return [torch.cat(parts, dim=2) for parts in zip(*seen)]


def exit_by_token(model, row, threshold, n_loop=None, n_prompt=0):
    """Return logits (1, T, V) of a row (1, T) and loops (1, T): tokens stop at changes < threshold.

    The first n_prompt tokens never do.
    """
    before, (loop, n, _), after = model.around_group(n_loop)
    x, ctx = model.embed(row)
    for stage in before:
        x = stage(x, ctx)
    memory, final, used = Memory(), [], []
    for i in range(row.size(1)):
        look = torch.ones(1, i + 1, dtype=torch.bool)
        of_token = ctx._replace(position=ctx.position[[i]], mask=look, cache=memory)
        e, s = loop.begin(x[:, [i]], of_token, n)
        memory.begin_token()
        for number in range(n):
            memory.begin_loop()
            last, s = s, loop.step(s, e, number, of_token)
            if i >= n_prompt and (s - last).norm() / s.norm() < threshold:
                break
        final.append(s)
        used.append(number + 1)
    x = loop.exit(torch.cat(final, dim=1))
    for stage in after:
        x = stage(x, ctx)
    return model.logits(model.transformer.ln_f(x)), torch.tensor([used], dtype=torch.double)


# -----------------------------------------------------------------------------
# data


class Data:
    """Windows of a prepared folder, as training and evaluation read them."""

    def __init__(self, folder, config):
        self.meta, self.config = load_meta(folder), config
        self.row, T = self.meta.get("row"), config["block_size"]
        self.names = [name for name in ("train", "val", "hard") if name in self.meta["splits"]]
        self.tokens = {}
        for name in self.names:
            self.tokens[name] = np.fromfile(folder / f"{name}.bin", "<u2").astype(np.int64)
        self.order = open_split(folder, "train", self.meta, T, self.meta["vocab_size"])
        self.step = T + 1 if self.row else T
        self.n_windows = len(self.order.tokens) // self.step

    def sizes(self, name):
        sizes = self.meta["splits"][name]
        return sizes["tokens"], sizes["bytes"]

    def cut(self, name, starts, n_scored=None):
        """Return x, y (N, T) of windows; -1 in prompts and before the last n_scored targets."""
        T = self.config["block_size"]
        places = np.array(starts)[:, None] + range(T + 1)
        windows = torch.from_numpy(self.tokens[name].take(places, mode="wrap"))
        x, y = windows[:, :-1], windows[:, 1:].clone()
        if self.row:
            y[:, : self.row["prompt"] - 1] = -1
        for target, count in zip(y, n_scored or []):
            target[: T - count] = -1
        return x, y

    def batch(self, it, number):
        """Return x, y of micro-step number of step it."""
        B, n = self.config["batch_size"], self.config["gradient_accumulation_steps"]
        first = (it * n + number) * B
        places = np.arange(first, first + B)
        return self.cut("train", self.order.shuffled(places, self.config["seed"]))

    def spread(self, name, most):
        """Return the starts of windows of an evaluation, evenly spread."""
        n = (len(self.tokens[name]) - (0 if self.row else 1)) // self.step
        count = min(most, n)
        return [i * n // count * self.step for i in range(count)]

    def scored(self, name):
        """Return x, y of all windows of an evaluation, and their starts."""
        stride, T = self.config["eval_stride"], self.config["block_size"]
        if stride and name != "train":
            last = len(self.tokens[name]) - 1 - T
            starts, end_of_scored, counts = [*range(0, last, stride), last], 0, []
            for start in starts:
                counts.append(start + T - end_of_scored)
                end_of_scored = start + T
            return (*self.cut(name, starts, counts), starts)
        starts = self.spread(name, self.config["eval_iters"] * self.config["batch_size"])
        return (*self.cut(name, starts), starts)

    def levels(self, name, starts):
        """Return the level of each row."""
        counts = self.row["levels"][name]
        levels = [level for level, count in counts for _ in range(count)]
        return [levels[start // self.step] for start in starts]


class StreamedData(Data):
    """Documents of bytes that end with a zero; each lane has every second one."""

    def __init__(self, documents, config):
        self.config, self.row, self.names = config, None, ["val"]
        self.step, self.n_windows = config["block_size"], 0
        lanes, kept = [[], []], []
        for i, text in enumerate(documents):
            held_out = int(hashlib.sha256(text).hexdigest()[:16], 16) < 0.2 * 2**64
            (kept if held_out else lanes[i % 2]).append(text)
        self.lanes = [np.frombuffer(b"\0".join(lane), np.uint8).astype(np.int64) for lane in lanes]
        wanted = config["eval_iters"] * config["batch_size"] * self.step + 1
        ends = itertools.accumulate(len(text) + 1 for text in kept)
        self.n_documents = 1 + sum(end_of_text < wanted for end_of_text in ends)
        text = b"".join(text + b"\0" for text in kept[: self.n_documents])
        self.tokens = {"val": np.frombuffer(text, np.uint8).astype(np.int64)}

    def sizes(self, name):
        n_tokens = len(self.tokens["val"])
        return n_tokens, n_tokens - self.n_documents

    def batch(self, it, number):
        B, T = self.config["batch_size"], self.config["block_size"]
        part = torch.from_numpy(self.lanes[number][it * B * T :][: B * T + 1])
        return part[:-1].view(B, T), part[1:].view(B, T)


# -----------------------------------------------------------------------------
# a run, computed again


def in_float64(model):
    """Return the model in float64; its norms keep the epsilon of float32."""
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm) and module.eps is None:
            module.eps = torch.finfo(torch.float32).eps
    return model.double()


class Again:
    """The figures of a run, from its folder and its data."""

    def __init__(self, folder, data_of):
        """data_of: a function of the run's config that returns a Data."""
        self.config = json.loads((folder / "config.json").read_text())
        self.data = data_of(self.config)
        paths = [folder / f"ckpt_{i + 1}.pt" for i in range(self.config["max_iters"])]
        self.checkpoints = [None, *(torch.load(path, weights_only=True) for path in paths)]
        self.dtype = getattr(torch, self.config["dtype"].replace("auto", "float32"))
        self.objective = self.config["objective"]
        if self.config["use_model_baseline"]:
            self.objective = "next"
        own = self.dtype == torch.float32 and self.config["param_dtype"] == "float32"
        self.near = {"grad_norm": EXACT if own else NEAR, "states": EXACT if own else NEAR}
        near = EXACT
        if self.config["exit_gate"] != "none":
            near = NEAR  # products with the gate's vector are not counted
        if self.config["predict_ahead"]:
            near = 2 / self.config["block_size"]  # nor is the token before each window
        self.near["flops"] = self.near["mfu"] = near
        self.counted = {}  # FLOPs of a window, by loops

    # -------------------------------------------------------------------------
    # weights

    @functools.cached_property
    def model_config(self):
        return GPTConfig(**{name: self.config[name] for name in GPTConfig.__dataclass_fields__})

    def fresh(self):
        torch.manual_seed(self.config["seed"])
        return GPT(self.model_config)

    def in_training(self, it):
        """Return the model that computes in step it."""
        model = self.fresh()
        if it:
            ckpt = self.checkpoints[it]
            model.load_state_dict(ckpt.get("training_model", ckpt["model"]))
        for p in model.parameters():
            if self.config["param_dtype"] == "bfloat16":
                p.data = p.data.bfloat16()
        trains_gate = self.objective in ("exit", "exit_gate", "confidence")
        for p in model.exit_gate.parameters():
            p.requires_grad_(trains_gate)
        exact = self.dtype == torch.float32 and self.config["param_dtype"] == "float32"
        return in_float64(model) if exact else model

    def average(self, it):
        """Return {name: weight} before step it: the moving average in float64."""
        average = {}
        for ckpt in self.checkpoints[1 : it + 1]:
            for name, weight in ckpt["training_model"].items():
                before = average.get(name, weight.double())
                average[name] = before + (1 - self.config["ema_decay"]) * (weight - before)
        return average

    def evaluated(self, it):
        """Return the model that is evaluated before step it: the average, if there is one."""
        model = self.fresh()
        if self.dtype == torch.float32:
            model = in_float64(model)
        if it:
            averages = self.config["ema_decay"] > 0
            model.load_state_dict(self.average(it) if averages else self.checkpoints[it]["model"])
        return model.eval()

    def compare(self, got, want, where):
        """Check that two dicts of figures are equal within rounding."""
        assert got.keys() == want.keys(), where
        for name, value in want.items():
            near = approx(value, self.near.get(name, EXACT), smallest=1e-7)
            assert got[name] == near, f"{where}: {name}"

    # -------------------------------------------------------------------------
    # steps

    def rate(self, it):
        """Return the learning rate of step it: one step of warm-up, then a cosine."""
        most, least, end_of_decay = (
            self.config[name] for name in ("learning_rate", "min_lr", "lr_decay_iters")
        )
        if it == 0:
            return most / 2
        return least + (most - least) * (1 + math.cos(math.pi * (it - 1) / (end_of_decay - 1))) / 2

    def loops(self, it):
        """Return the loop counts of step it, or of each of its rows."""
        model_config, warmup = self.model_config, self.config["loop_warmup_iters"]
        share = min(1, (it + 1) / warmup) if warmup else 1
        means = [math.ceil(share * n) for n in model_config.counts()]
        generator = torch.Generator().manual_seed(random_key(self.config["seed"], "loops", it))
        draws = self.n_rows if self.config["loops_per_row"] else 1
        if it / self.config["max_iters"] < self.config["loop_start"]:
            return draws * [tuple(1 for _ in means)]
        return [sample_loops(model_config, generator, means) for _ in range(draws)]

    @property
    def n_rows(self):
        return self.config["gradient_accumulation_steps"] * self.config["batch_size"]

    def shifts(self, it):
        """Return how far ahead each row of step it predicts."""
        generator = torch.Generator().manual_seed(random_key(self.config["seed"], "shift", it))
        shifts = torch.empty(self.n_rows).geometric_(
            self.config["label_shift_prob"], generator=generator
        )
        return shifts.clamp(max=self.config["max_shift"]).long()

    def batches(self, it):
        """Yield (x, labels, n_loop, shift) of step it; of rows with their own loops one by one."""
        loops, shifts = self.loops(it), self.shifts(it)
        B = self.config["batch_size"]
        for number in range(self.config["gradient_accumulation_steps"]):
            x, y = self.data.batch(it, number)
            shift = shifts[number * B :][:B] if self.config["predict_ahead"] else 1
            labels = ahead(y, shift)
            if len(loops) == 1:
                yield x, labels, loops[0], shift
                continue
            for row in range(B):
                yield x[[row]], labels[[row]], loops[number * B + row], 1

    def parts(self, model, x, labels, n_loop, shift):
        with autocast(CPU, self.dtype):
            return OBJECTIVES[self.objective](model, self.config, x, labels, n_loop, shift)

    def step(self, it):
        """Return {name: mean over the targets} of step it, and the norm of its gradient."""
        model, batches = self.in_training(it), list(self.batches(it))
        n_targets = sum(int((labels >= 0).sum()) for _, labels, _, _ in batches)
        figures, gradients = {}, {}
        for batch in batches:
            minimised, parts = self.parts(model, *batch)
            (minimised / n_targets).backward()
            for name, values in parts.items():
                figures.setdefault(name, []).append(values.detach())
            for name, p in model.named_parameters():
                if p.grad is not None:
                    gradients[name] = gradients.get(name, 0.0) + p.grad.double()
            model.zero_grad()
        means = {name: torch.cat(values).mean().item() for name, values in figures.items()}
        norm = math.sqrt(sum(grad.square().sum().item() for grad in gradients.values()))
        return means, norm

    def flops(self, it):
        """Return the FLOPs of step it: those of a window, as torch counts them, times windows."""
        loops = self.loops(it)
        for n_loop in set(loops) - set(self.counted):
            model = self.in_training(0)
            x = torch.zeros(1, self.config["block_size"], dtype=torch.long)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                self.parts(model, x, x, n_loop, 1)[0].backward()
            self.counted[n_loop] = counter.get_total_flops()
        return sum(self.counted[n_loop] for n_loop in loops) / len(loops) * self.n_rows

    # -------------------------------------------------------------------------
    # evaluations

    @torch.no_grad()
    def score(self, it, name, n_loop, shift):
        """Return the figures of a row of the table, and whether rounding decides what is right."""
        model, (x, y, starts) = self.evaluated(it), self.data.scored(name)
        labels, logits = ahead(y, shift), []
        with autocast(CPU, self.dtype):
            for part in x.split(self.config["batch_size"]):
                logits.append(model(part, part, n_loop=n_loop, shift=shift)[0])
        logits = torch.cat(logits)
        loss = nats(logits, labels).mean().item()
        n_tokens, n_bytes = self.data.sizes(name)
        right, known = logits.argmax(-1) == labels, labels >= 0
        scores = {
            "loss": loss,
            "bits_per_token": loss / math.log(2),
            "bits_per_byte": loss / math.log(2) * n_tokens / n_bytes,
            "accuracy": right[known].double().mean().item(),
        }
        if self.data.row:
            exact = (right | ~known).all(1).double()
            scores["exact"] = exact.mean().item()
            levels = torch.tensor(self.data.levels(name, starts))
            of_level = {str(level): exact[levels == level] for level in levels.unique().tolist()}
            scores["by_level"] = {level: rows.mean().item() for level, rows in of_level.items()}
        first, second = logits[known].topk(2).values.unbind(-1)
        return scores, logits.dtype == torch.double and (first - second).min() < 1e-6

    @torch.no_grad()
    def details(self, it):
        """Return the objective's figures on validation, and those with early exit."""
        (x, y, _), B = self.data.scored("val"), self.config["batch_size"]
        figures = {}
        model = self.evaluated(it)
        if self.objective != "next" or self.config["n_ahead"] > 1:
            for part, labels in zip(x.split(B), y.split(B)):
                for name, values in self.parts(model, part, labels, None, 1)[1].items():
                    figures.setdefault(name, []).append(values)
        if self.config["automatic_loop_exit"]:
            threshold = self.config["automatic_loop_exit_threshold"]
            for row, labels in zip(x.split(1), y.split(1)):
                logits, loops = exit_by_token(model, row, threshold)
                figures.setdefault("loss with exit", []).append(nats(logits, labels))
                figures.setdefault("loops with exit", []).append(loops[labels >= 0])
        return {name: torch.cat(values).mean().item() for name, values in figures.items()}

    @torch.no_grad()
    def watch(self, it):
        """Return the report on the states of the first windows of validation."""
        model, B = self.evaluated(it), self.config["batch_size"]
        x, y = self.data.cut("val", self.data.spread("val", B))
        report = []
        with autocast(CPU, self.dtype):
            groups = model.loops_representation(x)
            losses = [nats(model(x, y, n_loop=n)[0], y).mean().item() for n in (1, None)]
        for states in groups:
            s = torch.stack(states).double()
            norm = s.norm(dim=-1)
            moved = (s[1:] - s[:-1]).norm(dim=-1).mean((1, 2))
            unit = s[-1] / norm[-1].unsqueeze(-1)
            cosines = unit @ unit.mT
            T = s.size(2)
            others = (cosines.sum((1, 2)) - T) / (T * (T - 1))
            norm = norm.mean((1, 2))
            names = ("norm", "change", "token_correlation")
            report.append(
                dict(zip(names, (norm.tolist(), (moved / norm[1:]).tolist(), others.mean().item())))
            )
        return report, losses[0] - losses[1]


# -----------------------------------------------------------------------------
# what is printed

NUMBER = r"(?<!\w)-?[\d,]*\d(?:\.\d+)?"


def assert_printed(text, words, values):
    """Check a text: the words, with a # for each number, which is a value rounded to its digits."""
    assert re.sub(NUMBER, "#", text) == words
    for number, value in zip(re.findall(NUMBER, text), values, strict=True):
        number = number.replace(",", "")
        half = 0.5 * 10.0 ** -len(number.partition(".")[2])
        assert abs(float(number) - value) <= half + EXACT * abs(value), (text, number, value)


def named(figures):
    """Return words for figures with names, as assert_printed takes them."""
    return ", ".join(f"{name} #" for name in figures)


def on_a_clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return [*divmod(minutes, 60), seconds]


def rest_of_line(out, beginning):
    """Return what follows on the only line that begins so."""
    (line,) = re.findall(rf"^{re.escape(beginning)}(.*)$", out, re.M)
    return line


# -----------------------------------------------------------------------------
# a run against itself, computed again


def check_first_line(again, out, n_processes):
    model = again.fresh()
    n_parameters = sum(p.numel() for p in model.parameters())
    n_positions = sum(p.numel() for p in model.transformer.wpe.parameters())
    T = again.config["block_size"]
    windows, counts = ("#", [again.data.n_windows]) if again.data.n_windows else ("streamed", [])
    words = f"#M parameters, # tokens per step, {windows} windows of # tokens, on # x cpu in "
    sizes = [(n_parameters - n_positions) / 1e6, again.n_rows * T, *counts, T, n_processes]
    assert_printed(out.splitlines()[0], f"{words}{again.dtype}", sizes)


def pace(again, entry, before, flops, peak):
    """Return the figures that hang on the clock. before: iter, flops, elapsed of the last entry."""
    seconds = entry["elapsed"] - before["elapsed"]
    seconds_per_step = seconds / (entry["iter"] - before["iter"])
    return {
        "elapsed": entry["elapsed"],
        "ms": 1e3 * seconds_per_step,
        "tokens_per_second": again.n_rows * again.config["block_size"] / seconds_per_step,
        "mfu": (flops - before["flops"]) / seconds / peak,
    }


def check_step_line(line, entry, names, steps_left):
    """Compare the line of a step with its entry. names: of the objective's figures."""
    words = f"{named(names)}, norm #, # ms, # tokens/s, mfu #%, loops #, #M tokens, "
    shown = [*(entry[name] for name in names), entry["grad_norm"], entry["ms"]]
    shown += [entry["tokens_per_second"], 100 * entry["mfu"], entry["loops"]]
    left = steps_left * entry["ms"] / 1e3
    shown += [entry["tokens"] / 1e6, *on_a_clock(entry["elapsed"]), *on_a_clock(left)]
    assert_printed(line, words + "time #:#:#, left #:#:#", shown)


def check_checkpoint(again, it, flops):
    """Check what the checkpoint behind step it says of it."""
    ckpt = again.checkpoints[it + 1]
    assert ckpt["iter_num"] == it + 1
    assert ckpt["spent"]["tokens"] == (it + 1) * again.n_rows * again.config["block_size"]
    assert ckpt["spent"]["flops"] == approx(flops, again.near["flops"])
    for group in ckpt["optimizer"]["adamw"]["param_groups"]:
        assert group["lr"] == approx(again.rate(it))
    if again.config["ema_decay"]:
        for name, weight in again.average(it + 1).items():
            torch.testing.assert_close(ckpt["model"][name], weight.float(), msg=name)


def check_steps(again, entries, out, peak, wall):
    """Compare all entries and lines of steps. peak: FLOP/s of all processes. wall: of the run."""
    steps, logged = again.config["max_iters"], {e["iter"]: e for e in entries if "lr" in e}
    wanted = {*range(0, steps, again.config["log_interval"]), steps - 1}
    assert list(logged) == sorted(wanted)
    flops, before = 0, {"iter": -1, "flops": 0, "elapsed": 0.0}
    for it in range(steps):
        flops += again.flops(it)
        check_checkpoint(again, it, flops)
        if it not in logged:
            continue
        means, norm = again.step(it)
        counts = [n for of_draw in again.loops(it) for n in of_draw]
        want = {"iter": it, **means, "grad_norm": norm, "lr": again.rate(it), "flops": flops}
        want["loops"] = sum(counts) / max(1, len(counts))
        want["tokens"] = (it + 1) * again.n_rows * again.config["block_size"]
        want |= pace(again, logged[it], before, flops, peak)
        again.compare(logged[it], want, f"step {it}")
        assert before["elapsed"] < want["elapsed"] < wall
        rest = rest_of_line(out, f"iter {it}: ")
        check_step_line(rest, logged[it], list(means), steps - it - 1)
        before = {name: want[name] for name in before}


def wanted_rows(again):
    """Return (split, loops, shift) of the table's rows."""
    own = list(again.model_config.counts())
    others = [[n] * len(own) for n in again.config["eval_loops"]]
    rows = []
    for name in again.data.names:
        rows.append((name, own, 1))
        if name != "train":
            rows += [(name, loops, 1) for loops in others if loops != own]
    if again.config["predict_ahead"]:
        rows += [("val", own, shift) for shift in range(2, again.config["max_shift"] + 1)]
    return rows


SHARES = ("accuracy", "exact", "by_level")  # of what is right


def check_row(again, it, row, line):
    """Compare a row of the table, and its line."""
    name, loops, shift = row.pop("split"), tuple(row.pop("loops")), row.pop("shift")
    scores, near_tie = again.score(it, name, loops, shift)
    if near_tie:
        scores |= {share: row[share] for share in scores if share in SHARES}
    again.compare(row, scores, f"step {it}, {name} at {loops}, shift {shift}")
    first, depth, text = line.split(maxsplit=2)
    mark = "*" if loops == again.model_config.counts() else ""
    assert (first, depth) == (name, mark + (",".join(map(str, loops)) or "-"))
    words, shown = "# # # #%", [row["loss"], row["bits_per_token"], row["bits_per_byte"]]
    shown.append(100 * row["accuracy"])
    if "exact" in row:
        words += " #%" + " #:#%" * len(row["by_level"])
        shown.append(100 * row["exact"])
        for level, share in row["by_level"].items():
            shown += [int(level), 100 * share]
    if again.config["predict_ahead"]:
        words, shown = words + " #", [*shown, shift]
    assert_printed(" ".join(text.split()), words, shown)


def check_watch(again, it, got):
    """Compare the report on the states."""
    groups, gain = again.watch(it)
    assert got["gain"] == approx(gain, smallest=5e-6), it
    for group, want in zip(got["groups"], groups, strict=True):
        assert group.keys() == want.keys()
        for name in want:
            near = again.near["states"]
            assert group[name] == approx(want[name], near, smallest=near), (it, name)


def check_evaluations(again, entries, out):
    """Compare all entries and tables of evaluations, and the best loss in checkpoints."""
    steps, best = again.config["max_iters"], math.inf
    evaluated = {entry["iter"]: entry for entry in entries if "eval" in entry}
    assert list(evaluated) == [0, steps]
    for it, entry in evaluated.items():
        _, *lines = re.search(rf"^step {it}\n(.*?)\n\n", out, re.M | re.S)[1].splitlines()
        rows = [(row["split"], row["loops"], row["shift"]) for row in entry["eval"]]
        assert rows == wanted_rows(again)
        of_val = [row["loss"] for row in entry["eval"] if row["split"] == "val"]
        best = min(best, of_val[0])
        for row, line in zip(entry["eval"], lines):
            check_row(again, it, row, line)
        details = again.details(it)
        again.compare(entry["objective"], details, f"step {it}, besides")
        if details:
            words = f"besides, on val: {named(details)}"
            assert_printed(lines[len(rows)], words, entry["objective"].values())
        check_watch(again, it, entry["watch"])
        known = [ckpt["best_val_loss"] for ckpt in again.checkpoints[max(1, it) :]]
        assert known[0] == best


def check_run(folder, data_of, out, wall, n_processes=1, peak=None):
    again, entries = Again(folder, data_of), log(folder)
    if peak is None:  # of processes that are gone: what the first figure says
        first = next(entry for entry in entries if "mfu" in entry)
        peak = first["flops"] / first["elapsed"] / first["mfu"]
    check_first_line(again, out, n_processes)
    check_steps(again, entries, out, peak, wall)
    check_evaluations(again, entries, out)


# -----------------------------------------------------------------------------
# runs

PLAIN = "--n_prelude=0 --n_block=0 --n_coda=0 --n_loop=1"
CASES = {
    "plain": f"{PLAIN} --n_layer=2",
    "sampled": """
        --loop_sampling=poisson --n_loop=3 --bptt_k=1 --loop_warmup_iters=3 --eval_loops=1,2,4
        --log_interval=2""",
    "groups": f"""
        {PLAIN} --n_layer=3 --loop_groups=[[0],[2]] --loop_counts=2,3 --eval_loops=2
        --optimizer=muon --logit_softcap=2""",
    "loops per row": "--loops_per_row --loop_sampling=uniform --n_loop=3",
    "late": "--loop_start=0.4 --loop_sampling=uniform --n_loop=3",
    "bfloat16": "--dtype=bfloat16",
    "bfloat16 in chunks": "--dtype=bfloat16 --loss_chunk=9 --n_ahead=2",
    "bfloat16 weights": "--param_dtype=bfloat16",
    "average": "--ema_decay=0.7",
    "ahead": "--predict_ahead --max_shift=3",
    "heads": "--n_ahead=3",
    "average of heads": "--ema_decay=0.7 --n_ahead=2",
    "deep": "--objective=deep --loss_weighting=linear --n_loop=3",
    "distill": "--objective=distill --n_loop=3",
    "exit": "--objective=exit --exit_gate=mean_state --n_loop=3",
    "exit_gate": "--objective=exit_gate --exit_gate=state --n_loop=3",
    "confidence": "--objective=confidence --exit_gate=state --n_loop=3",
    "early exit": "--automatic_loop_exit --automatic_loop_exit_threshold=0.3 --n_loop=4",
    "stride": "--eval_stride=5",
    "baseline": "--use_model_baseline --objective=deep --eval_loops=1",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A prepared folder of so little text that training comes to its second epoch."""
    folder = tmp_path_factory.mktemp("text")
    splits = [prose(seed, 90).replace("a", "\u00e4") for seed in (1, 2)]  # of two bytes
    chars = "".join(sorted(set("".join(splits))))
    write_dataset(
        folder,
        {"tokenizer": "char", "chars": chars},
        dict(zip(("train", "val"), ([part] for part in splits))),
    )
    return folder


def run_and_check(folder, data_of, *options):
    """Run train.py in this process and compare all its figures."""
    began = time.perf_counter()
    run = Run("train.py", f"--out_dir={folder}", *TRAIN, *SHORT, *options)
    assert run.code == 0, run.err
    wall = time.perf_counter() - began
    bfloat16 = "--dtype=bfloat16" in options
    peak = peak_flops(CPU, torch.bfloat16 if bfloat16 else torch.float32)
    check_run(folder, data_of, run.out, wall, peak=peak)


@pytest.mark.parametrize("case", CASES)
def test_every_figure_of_a_run(text, tmp_path, case):
    options = (f"--dataset={text}", *CASES[case].split())
    run_and_check(tmp_path / "out", functools.partial(Data, text), *options)


@pytest.mark.parametrize("options", ["--eval_loops=1", "--objective=deep"])
def test_every_figure_of_a_task(task, tmp_path, options):
    own = (f"--dataset={task}", "--block_size=6", "--eval_iters=10", *options.split())
    run_and_check(tmp_path / "out", functools.partial(Data, task), *own)


def test_every_figure_of_a_streamed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # waits for the hub
    text = (ROOT / "data" / "wikipedia" / "prepare.py").read_text()
    text = text.replace('tokenizer = "gpt2"', 'tokenizer = "bytes"')
    (tmp_path / "prepare.py").write_text(re.sub("val_share = [0-9.]+", "val_share = 0.2", text))
    documents = prose(3, 2000).splitlines()
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    data = ("--stream", f"--dataset={tmp_path}", f"--input_files={tmp_path}/*.jsonl")
    documents = [document.encode() for document in documents]
    run_and_check(tmp_path / "out", functools.partial(StreamedData, documents), *data)


class Clock:
    """A clock that stands still but for what the functions that it watches are said to take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def watch(self, function, seconds):
        def watched(*arguments, **options):
            self.now += seconds
            return function(*arguments, **options)

        return watched


def test_the_clock_counts_steps_and_nothing_else(text, tmp_path, monkeypatch):
    """Evaluations take a hundred seconds here, checkpoints a thousand, steps more than an hour."""
    peak, clock = peak_flops(CPU, torch.float32), Clock()  # measured with a clock that moves
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(Evaluation, "run", clock.watch(Evaluation.run, 100))
    monkeypatch.setattr(checkpoint, "save", clock.watch(checkpoint.save, 1000))
    monkeypatch.setattr(SpectralClip, "__call__", clock.watch(SpectralClip.__call__, 4000))
    out = (f"--out_dir={tmp_path}", "--eval_interval=2", "--log_interval=3")
    run = Run("train.py", f"--dataset={text}", *TRAIN, *SHORT, *out)
    assert run.code == 0, run.err
    first, second = [entry for entry in log(tmp_path) if "ms" in entry]
    assert (first["elapsed"], second["elapsed"]) == (4000, 16000)
    assert first["ms"] == second["ms"] == 4e6
    assert second["mfu"] == approx((second["flops"] - first["flops"]) / 12000 / peak)
    check_step_line(rest_of_line(run.out, "iter 0: "), first, ["loss"], steps_left=3)
    check_step_line(rest_of_line(run.out, "iter 3: "), second, ["loss"], steps_left=0)


def test_loops_used_by_samples(text, tmp_path):
    out = f"--out_dir={tmp_path}"
    assert Run("train.py", f"--dataset={text}", out, *TRAIN, *SHORT).code == 0
    model, prompt = in_float64(pretrained.load(tmp_path)), [3, 1, 4]
    start = make_tokenizer(load_meta(text)).decode(prompt)
    shape = ("--num_samples=2", "--max_new_tokens=9", "--jsonl", "--n_loop=6", "--device=cpu")
    exits = ("--automatic_loop_exit", "--automatic_loop_exit_threshold=0.01")
    run = Run("sample.py", out, f"--start={start}", *shape, *exits)
    assert run.code == 0, run.err
    used = []
    for line in run.out.splitlines():
        entry = json.loads(line)
        row = torch.tensor([prompt + entry["tokens"][:-1]])
        with torch.no_grad():
            loops = exit_by_token(model, row, 0.01, 6, len(prompt))[1][
                0, len(prompt) - 1 :
            ].tolist()
        assert entry["loops"] == loops
        used += loops
    assert len(set(used)) > 1
    assert_printed(rest_of_line(run.err, "loops used "), "# of #", [sum(used) / len(used), 6])


TWO = {
    "whole": "--loop_sampling=poisson --bptt_k=1 --eval_iters=3",
    "bfloat16 in chunks": "--dtype=bfloat16 --loss_chunk=9 --n_ahead=2",
    "shared": "--shard --n_loop=3 --objective=deep",
    "shared average": "--shard --ema_decay=0.7",
}


@pytest.mark.parametrize("case", TWO)
def test_every_figure_of_two_processes(text, tmp_path, case):
    folder, printed = tmp_path / "out", tmp_path / "printed"
    options = (f"--dataset={text}", f"--out_dir={folder}", *TRAIN, *SHORT, *TWO[case].split())
    began = time.perf_counter()
    assert end(start_two(printed, *options)) == [0, 0], tail(printed)
    wall = time.perf_counter() - began
    check_run(folder, functools.partial(Data, text), printed.read_text(), wall, n_processes=2)
