"""
Score a model on standard benchmarks at several numbers of loops, side by side:

    python eval.py out-quickstart --tasks=hellaswag,arc_easy,lambada_openai --loops=1,2,4,8
    python eval.py hf:HuggingFaceTB/SmolLM2-360M --tasks=arc_easy --num_fewshot=5 --limit=200
    python eval.py out-x --tasks=mine --include_path=my-tasks             task files of your own
    python eval.py out-x --tasks=gsm8k --automatic_loop_exit --loops=8    each token stops by itself
    python eval.py out-x --core_bundle=eval_bundle --loops=1,4            nanochat's CORE

Tasks, prompts and metrics are those of lm-evaluation-harness; pip install -r requirements-eval.txt.
One forward pass serves every number of loops where a single group is looped and no token exits.
"""

import csv
import hashlib
import json
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import pretrained
from configurator import check_ranges, clear_errors, configure, require
from decode import check_drafts, generate
from model import GPT
from nanorecur.exit_rules import ExitRule, exit_logits, hidden_at_depths, make_exit
from nanorecur.files import write_atomically
from nanorecur.hardware import autocast, check_versions, pick_device, pick_dtype
from nanorecur.tokenizer import HuggingFaceTokenizer, Tokenizer, without_surrogates

try:
    from lm_eval import evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:  # -h and core_bundle need none of these
    TemplateLM, missing = object, str(error)
else:
    missing = ""

# -----------------------------------------------------------------------------
# what is scored
out_dir = "out"  # the folder of a run
source = ""  # or a checkpoint file, an exported folder, gpt2, hf:<name>; the first bare argument
tasks = ""  # tasks or groups of lm-evaluation-harness, such as hellaswag,arc_easy
loops = ()  # loop counts of every group, a column each, such as 1,2,4,8; (): the model's own
num_fewshot = -1  # solved examples before each question; -1: as the task says
limit = 0  # questions of each task; 0: all
include_path = ""  # folder of further task files (YAML)
core_bundle = ""  # folder of nanochat's eval_bundle: its 22 tasks and their mean, CORE
out = ""  # file of the results; "": eval.json beside the checkpoint, else in this folder
samples = False  # write every question with its answers into that file too
batch_size = 8  # texts that are scored or continued together
seed = 1337  # of sampling, in tasks that sample
# when a token stops looping
automatic_loop_exit = False  # let each token stop looping by itself
exit_rule = "state"  # relative change of state; kl, entropy (nats); loops of one argmax; gate
automatic_loop_exit_threshold = (
    0.03  # state, kl, entropy: below; argmax, gate: from it on; 0: never
)
min_loops = 1  # fewest loops of a token
# speed
draft_tokens = 0  # tokens drafted in each round of generation: the same output
draft_loops = 0  # loops that draft; 0: the model's heads further ahead draft
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype = "auto"  # float32, or bfloat16 for matrix products; auto: bfloat16 on a GPU that has it
options, given = configure(globals(), positional="source")

NEEDS = {  # options that act only beside another one
    "exit_rule": "automatic_loop_exit",
    "automatic_loop_exit_threshold": "automatic_loop_exit",
    "min_loops": "automatic_loop_exit",
    "draft_loops": "draft_tokens",
    "num_fewshot": "tasks",
    "include_path": "tasks",
    "samples": "tasks",
}
MAX_NEW_TOKENS = 256  # of an answer, where the task does not say; as lm-eval's own models have it
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")  # of a task that generate() takes


# -----------------------------------------------------------------------------
# scores of continuations


class Score(NamedTuple):
    """A continuation at one depth."""

    log_p: float  # its log-probability, in nats
    greedy: bool  # every token of it is the likeliest one
    loops: float  # of its tokens together
    n_tokens: int


class Scorer:
    """Scores continuations of contexts at every depth, each pair once."""

    def __init__(self, model: GPT, depths: list[tuple], rule: ExitRule | None):
        """depths: loop counts, one int per group. rule: with which tokens stop looping, or None."""
        self.model, self.depths, self.rule = model, depths, rule
        self.known = {}  # key of a pair: {depth: Score}

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[dict[tuple, Score]]:
        """Return {depth: Score} of each pair (context, continuation) of ids.

        A context has at least one id and is cut on the left where block_size asks for it.
        ValueError where a continuation is longer than block_size.
        """
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        fits = longest <= self.model.block_size
        allowed = f"at least the {longest} tokens of a task's continuation"
        require("block_size", self.model.block_size, fits, allowed)
        keys = [key_of(*pair) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs) if key not in self.known}
        lengths = {key: len(context) + len(answer) - 1 for key, (context, answer) in new.items()}
        n_cut = sum(length > self.model.block_size for length in lengths.values())
        if n_cut:
            cut = f"{n_cut} of {len(new)} contexts were cut on the left"
            print(f"{cut}: block_size={self.model.block_size}", file=sys.stderr)
        order = sorted(new, key=lambda key: -lengths[key])
        bar = tqdm(total=len(order), unit=" texts", disable=None)
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            self.known |= zip(batch, self.score_batch([new[key] for key in batch]))
            bar.update(len(batch))
        bar.close()
        return [self.known[key] for key in keys]

    @torch.no_grad()
    def score_batch(self, pairs: list[tuple[list[int], list[int]]]) -> list[dict[tuple, Score]]:
        """Return {depth: Score} of pairs that are padded on the right and scored together."""
        most = self.model.block_size + 1
        rows = [(context + continuation)[-most:] for context, continuation in pairs]
        T = max(map(len, rows)) - 1
        x, y = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
        for i, (row, (_, continuation)) in enumerate(zip(rows, pairs)):
            n, n_scored = len(row) - 1, len(continuation)
            x[i, :n] = torch.tensor(row[:-1])
            y[i, n - n_scored : n] = torch.tensor(row[len(row) - n_scored :], dtype=torch.long)
        x, y = x.to(device), y.to(device)
        scored, results = y >= 0, [{} for _ in rows]
        row_of = scored.nonzero()[:, 0].cpu()
        for depth, logits, used in self.passes(x, scored):
            nats = F.cross_entropy(logits.float(), y[scored], reduction="none")
            right = logits.argmax(-1) == y[scored]
            terms = torch.stack((-nats, right.float(), used.float()), dim=-1).cpu().double()
            sums = torch.zeros(len(rows), 3, dtype=torch.float64).index_add_(0, row_of, terms)
            for i, (log_p, n_right, n_loops) in enumerate(sums.tolist()):
                n_tokens = len(pairs[i][1])
                results[i][depth] = Score(log_p, n_right == n_tokens, n_loops, n_tokens)
        return results

    def passes(self, x: Tensor, scored: Tensor) -> Iterator[tuple[tuple, Tensor, Tensor]]:
        """Yield (depth, logits (N, V), loops (N,)) of the N tokens of x (B, T) that are scored."""
        with autocast(device, dtype):
            if self.rule:
                for depth in self.depths:
                    logits, used = exit_logits(self.model, x, self.rule, depth, min_loops)
                    yield depth, logits[scored], used[scored]
                return
            for i, hidden in hidden_at_depths(self.model, x, self.depths):
                logits, n = self.model.logits(hidden[scored]), sum(self.depths[i])
                yield self.depths[i], logits, torch.full((len(logits),), n, device=x.device)


def key_of(context: list[int], continuation: list[int]) -> bytes:
    """Return a digest of a pair, which takes less memory than the pair."""
    return hashlib.blake2b(repr((context, continuation)).encode(), digest_size=16).digest()


# -----------------------------------------------------------------------------
# text and ids as lm-eval's hf model has them


class Encoding:
    """A tokenizer, with the ids that its model expects before a text and at its end."""

    def __init__(self, tokenizer: Tokenizer):
        """Raise ValueError where nothing can stand before a text."""
        self.tokenizer = tokenizer
        self.is_hf = isinstance(tokenizer, HuggingFaceTokenizer)
        self.end = None  # id that ends a text
        if self.is_hf:
            self.end = tokenizer.separator
        elif len(ids := tokenizer.encode_document("")):
            self.end = int(ids[-1])
        before = self.encode("")  # such as Llama's <s>
        if not before:
            before = tokenizer.encode("\n") if self.end is None else [self.end]
        self.start = before[0]  # id before a text that has no context
        self.start_text = tokenizer.decode([self.start])

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return ids. special: with those that tokenizer.json puts before every text."""
        if not (self.is_hf and special):
            return self.tokenizer.encode(text)
        return self.tokenizer.of_prompts.encode(without_surrogates(text)).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        if self.is_hf:
            return self.tokenizer.of_prompts.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode(ids)


# -----------------------------------------------------------------------------
# lm-evaluation-harness


class Harness(TemplateLM):
    """The model at one depth, as lm-evaluation-harness asks it."""

    def __init__(self, scorer: Scorer, encoding: Encoding):
        super().__init__()
        self.scorer, self.encoding, self.model = scorer, encoding, scorer.model
        self.begin(scorer.depths[0])

    def begin(self, depth: tuple) -> None:
        """Answer at these loops from now on."""
        self.depth = depth
        self.loops = self.n_tokens = 0  # of the tokens that were scored or generated
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def eot_token_id(self) -> int:
        return self.encoding.start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        special = add_special_tokens
        if special is None:  # a text may begin with its special token already
            special = not (self.encoding.start_text and string.startswith(self.encoding.start_text))
        return self.encoding.encode(string, special)

    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        found = self.scorer.score(
            [(context, continuation) for _, context, continuation in requests]
        )
        scores = [of_depth[self.depth] for of_depth in found]
        self.loops += sum(score.loops for score in scores)
        self.n_tokens += sum(score.n_tokens for score in scores)
        return [(score.log_p, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list, **_) -> list[float]:
        """Return the log-probability of each whole text, in windows of block_size tokens."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cuts = get_rolling_token_windows(ids, self.encoding.start, self.model.block_size, 1)
            for window in map(make_disjoint_window, cuts):
                windows.append(("", *window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += log_p
        return totals

    def generate_until(self, requests: list, **_) -> list[str]:
        """Return the continuation of each prompt, up to the first text that ends it."""
        answers, groups = {}, {}  # groups: numbers of the requests with the same options
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            options = json.dumps(requests[i].args[1], sort_keys=True)
            groups.setdefault(options, []).append(i)
        bar = tqdm(total=len(requests), unit=" answers", disable=None)
        for options, numbers in groups.items():
            for begin in range(0, len(numbers), batch_size):
                batch = numbers[begin : begin + batch_size]
                texts = self.continue_all([prompts[i] for i in batch], json.loads(options))
                answers |= zip(batch, texts)
                bar.update(len(batch))
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def continue_all(self, prompts: list[list[int]], options: dict) -> list[str]:
        """Return the continuations of prompts, which are cut on the left to leave room for them.

        options: the task's generation_kwargs.
        """
        asked = read_options(options)
        T = self.model.block_size
        room = T - asked.n_new if asked.n_new < T else max(1, T // 2)  # a full window slides
        prompts = [prompt[-room:] or [self.encoding.start] for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        idx = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            idx[i, : len(prompt)] = torch.tensor(prompt)
        ids = [[] for _ in prompts]

        def watch(row: int, token: int, used: int) -> bool:
            self.loops += used
            self.n_tokens += 1
            if token == self.encoding.end:
                return True
            ids[row].append(token)
            text = self.encoding.decode(ids[row])
            return any(word in text for word in asked.stops)

        with autocast(device, dtype):
            generate(
                self.model,
                idx.to(device),
                asked.n_new,
                n_loop=self.depth,
                lengths=lengths,
                vocab_size=self.encoding.tokenizer.vocab_size,
                generator=self.generator,
                exit_rule=self.scorer.rule,
                min_loops=min_loops,
                draft_tokens=draft_tokens,
                draft_loops=draft_loops,
                watch=watch,
                **asked.sampling,
            )
        return [before_stop(self.encoding.decode(row), asked.stops) for row in ids]


class Generation(NamedTuple):
    """How a task wants its prompts continued."""

    n_new: int  # most tokens of a continuation
    stops: list[str]  # texts that end it
    sampling: dict  # options of generate()


def read_options(options: dict) -> Generation:
    """Return a task's generation_kwargs as generate() takes them; ValueError for what it cannot."""
    options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
    n_new, stops = options.pop("max_gen_toks"), options.pop("until")
    sampled = options.pop("do_sample")
    temperature = float(options.pop("temperature", 1.0))
    known = set(options) <= set(SAMPLING)
    require("generation_kwargs", options, known, "of " + ", ".join(SAMPLING))
    options["temperature"] = temperature if sampled else 0.0
    return Generation(n_new, [word for word in stops if word], options)


def before_stop(text: str, stops: list[str]) -> str:
    """Return what stands before the first stop string in a text."""
    return text[: min((text.find(word) for word in stops if word in text), default=len(text))]


def find_tasks() -> tuple["TaskManager", list[str]]:
    """Return (index of the task files, names of the tasks that are asked for)."""
    patterns = [name.strip() for name in tasks.split(",")]
    is_folder = not include_path or Path(include_path).is_dir()
    require("include_path", include_path, is_folder, "a folder")
    index = TaskManager(include_path=include_path or None, include_defaults=False)
    if not all(index.match_tasks([pattern]) for pattern in patterns):
        index = TaskManager(include_path=include_path or None)  # reads for half a minute
    names = []
    for pattern in patterns:
        found = index.match_tasks([pattern])
        allowed = "names that lm-eval has (lm_eval ls tasks) or files in include_path"
        require("tasks", pattern, found, allowed)
        names += found
    return index, list(dict.fromkeys(names))


def load_tasks(index: "TaskManager", name: str) -> dict:
    """Return the questions of a task or group, with the examples that are asked for.

    As lm_eval.simple_evaluate does, which looks at the whole machine besides, a second each time.
    """
    random.seed(0)
    loaded = index.load([name])
    for task in loaded["tasks"].values():
        stated = task.get_config("num_fewshot")
        if stated is None or (num_fewshot >= 0 and stated != 0):  # 0 in a task file stays
            task.set_config("num_fewshot", max(0, num_fewshot))
    return loaded


def run_task(harness: Harness, index: "TaskManager", name: str) -> Iterator[dict]:
    """Yield the entry_of() a task at each depth."""
    loaded = load_tasks(index, name)
    for depth in harness.scorer.depths:
        harness.begin(depth)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(1234)  # lm-eval's own: the same examples at every depth
        found = evaluate(
            harness, loaded, limit=limit or None, bootstrap_iters=1000, log_samples=samples
        )
        results = found.get("groups") or found["results"]
        entry = entry_of(name, depth, results, harness.loops / max(1, harness.n_tokens))
        kept = ("results", "n-shot", "n-samples", "versions", "samples")
        yield entry | {"lm_eval": {key: found[key] for key in kept if key in found}}
    harness.scorer.known.clear()


# -----------------------------------------------------------------------------
# CORE: the tasks of DCLM (arXiv 2406.11794) as nanochat's eval_bundle has them


class Core:
    """The tasks of an eval_bundle: core.yaml, eval_meta_data.csv, eval_data/."""

    def __init__(self, folder: Path, scorer: Scorer, encoding: Encoding):
        """Raise ValueError where a file of the bundle is missing."""
        import yaml

        for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
            exists = (folder / name).exists()
            require("core_bundle", str(folder), exists, f"a folder that holds {name}")
        self.folder, self.scorer, self.encoding = folder, scorer, encoding
        self.tasks = yaml.safe_load((folder / "core.yaml").read_text("utf-8"))["icl_tasks"]
        with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            percent = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(file)}
        self.chance = {label: float(number) / 100 for label, number in percent.items()}

    def run(self) -> Iterator[dict]:
        """Yield the entry_of() each task at each depth, and of their mean, CORE."""
        means = dict.fromkeys(self.scorer.depths, 0.0)
        for task in self.tasks:
            label, chance = task["label"], self.chance[task["label"]]
            for depth, (accuracy, mean_loops) in self.answer(task).items():
                centered = (accuracy - chance) / (1 - chance)  # 0 for guesses, 1 if all are right
                means[depth] += centered / len(self.tasks)
                results = {f"CORE {label}": {"centered": centered, "acc": accuracy}}
                yield entry_of(f"CORE {label}", depth, results, mean_loops)
        for depth, mean in means.items():
            yield entry_of("CORE", depth, {"CORE": {"centered": mean}})

    def answer(self, task: dict) -> dict[tuple, tuple[float, float]]:
        """Return {depth: (accuracy, mean loops of a token)} of a task."""
        with open(self.folder / "eval_data" / task["dataset_uri"], encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        random.Random(1337).shuffle(items)
        items = items[: limit or None]
        sums = {depth: Counter() for depth in self.scorer.depths}
        for begin in range(0, len(items), 100):  # all prompts together may not fit into memory
            numbers = range(begin, min(begin + 100, len(items)))
            questions = [self.question(task, items, i) for i in numbers]
            found = iter(self.scorer.score([pair for pairs in questions for pair in pairs]))
            for i, pairs in zip(numbers, questions):
                options = [next(found) for _ in pairs]
                for depth, total in sums.items():
                    scores = [option[depth] for option in options]
                    total["right"] += is_right(task["icl_task_type"], scores, items[i].get("gold"))
                    total["loops"] += sum(score.loops for score in scores)
                    total["tokens"] += sum(score.n_tokens for score in scores)
            self.scorer.known.clear()
        results = {}
        for depth, total in sums.items():
            results[depth] = total["right"] / len(items), total["loops"] / max(1, total["tokens"])
        return results

    def question(self, task: dict, items: list[dict], i: int) -> list[tuple[list, list]]:
        """Return a pair (context, continuation) of ids for each possible answer to item i."""
        others, kind = items[:i] + items[i + 1 :], task["icl_task_type"]
        n_examples = min(task["num_fewshot"][0], len(others))
        before = ""
        for item in random.Random(1234 + i).sample(others, n_examples):
            before += wordings(task, item)[item.get("gold", -1)] + "\n\n"
        texts = [before + text for text in wordings(task, items[i])]
        if kind == "language_modeling":  # and the context alone, to see where it ends
            texts.insert(0, texts[0].removesuffix(items[i]["continuation"]).strip())
        rows = [[self.encoding.start, *self.encoding.encode(text, special=False)] for text in texts]
        cuts = [common_beginning(rows)] * len(rows)
        if kind == "schema":  # contexts differ, what follows them does not
            shared = common_beginning([row[::-1] for row in rows])
            cuts = [max(1, len(row) - shared) for row in rows]
        if kind == "language_modeling":
            rows = rows[1:]
        pairs = []
        for row, cut in zip(rows, cuts):
            room = max(1, self.scorer.model.block_size - len(row) + cut)  # ids of the context
            pairs.append((row[:cut][-room:], row[cut:]))
        return pairs


def wordings(task: dict, item: dict) -> list[str]:
    """Return the texts of an item, one for each possible answer; language modeling has one."""
    kind, between = task["icl_task_type"], task.get("continuation_delimiter", " ")
    if kind == "multiple_choice":
        return [item["query"] + between + choice for choice in item["choices"]]
    if kind == "schema":
        ends = between + item["continuation"]
        return [context + ends for context in item["context_options"]]
    require("icl_task_type", kind, kind == "language_modeling", "one that CORE has")
    return [item["context"].strip() + between + item["continuation"]]


def is_right(kind: str, scores: list[Score], gold: int | None) -> bool:
    """Return whether an item is answered right.

    scores: of the possible answers; of language modeling there is one, and all its tokens have to
    be the likeliest ones. Else the answer with the largest mean log-probability is chosen. gold:
    the number of the right answer.
    """
    if kind == "language_modeling":
        return scores[0].greedy
    means = [score.log_p / score.n_tokens if score.n_tokens else -torch.inf for score in scores]
    return means.index(max(means)) == gold


def common_beginning(rows: list[list[int]]) -> int:
    """Return how many first ids all rows share."""
    shared = os.path.commonprefix(rows)
    return len(shared)


# -----------------------------------------------------------------------------
# results


def entry_of(name: str, depth: tuple, results: dict, mean_loops: float | None = None) -> dict:
    """Return the entry of a task at a depth. results: {row of the table: {metric: value}}."""
    return {"task": name, "loops": depth, "mean_loops": mean_loops, "results": results}


def table(entries: list[dict], own: tuple) -> str:
    """Return entries as a text table: rows are metrics, columns depths, the model's own marked *.

    The last column is the largest standard error of a row, where there is one.
    """
    depths = list(dict.fromkeys(entry["loops"] for entry in entries))
    rows, errors = {}, {}  # {(row, metric): {depth: value}}
    for entry in entries:
        for name, values in entry["results"].items():
            for key, value in values.items():
                metric, _, variant = key.partition(",")
                error = values.get(f"{metric}_stderr,{variant}")
                if not isinstance(value, float) or metric.endswith("_stderr"):
                    continue
                row = (name, metric if variant in ("", "none") else f"{metric} {variant}")
                rows.setdefault(row, {})[entry["loops"]] = value
                if isinstance(error, float):
                    errors[row] = max(error, errors.get(row, 0.0))
        if automatic_loop_exit and entry["mean_loops"] is not None:
            rows.setdefault((entry["task"], "mean loops"), {})[entry["loops"]] = entry["mean_loops"]
    labels = [",".join(map(str, depth)) or "-" for depth in depths]
    marks = ["*" if depth == own else " " for depth in depths]
    width = max(len(" ".join(row)) for row in rows)
    cells = "".join(f"{mark + label:>11}" for mark, label in zip(marks, labels))
    lines = [f"{'loops':<{width}}{cells}{'+-':>11}"]
    for row, values in rows.items():
        cells = "".join(cell(values.get(depth)) for depth in depths)
        lines.append(f"{' '.join(row):<{width}}{cells}{cell(errors.get(row))}".rstrip())
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """Return a number in 11 columns of text; None is blank."""
    if value is None:
        return " " * 11
    return f"{value:>11.4f}" if abs(value) < 1e5 else f"{value:>11.3e}"


def results_path() -> Path:
    """Return the file that results are written to."""
    place = Path(source.removeprefix("hf:"))
    if not place.is_dir():
        place = place.parent if place.is_file() else Path()
    return Path(out) if out else place / "eval.json"


def save(entries: list[dict]) -> None:
    """Write what was asked and all entries so far as JSON."""
    asked = {name: value for name, value in options.items() if name not in ("samples", "out")}
    content = {"source": source, "options": asked, "entries": entries}
    if tasks:
        content["lm_eval"] = version("lm_eval")
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    write_atomically(results_path(), text.encode())


def check_effects() -> None:
    """Raise ValueError where an option is given that has no effect beside the others."""
    for name, other in NEEDS.items():
        acts = name not in given or globals()[other]
        require(name, globals()[name], acts, f"left out, or with --{other}")
    require("tasks", tasks, tasks or core_bundle, "names such as hellaswag, or left to core_bundle")
    if tasks:
        allowed = f"left out, or pip install -r requirements-eval.txt first ({missing})"
        require("tasks", tasks, not missing, allowed)


# -----------------------------------------------------------------------------
with clear_errors():
    limits = {"num_fewshot": -1, "limit": 0, "batch_size": 1, "min_loops": 1, "draft_tokens": 0}
    check_ranges(globals(), {name: (least, torch.inf) for name, least in limits.items()})
    check_effects()
    check_versions()
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    pretrained.check_exists(source, out_dir)
    source = source or out_dir
    model = pretrained.load(source).to(device)
    encoding = Encoding(pretrained.open_tokenizer(source, model))
    own = model.config.counts()
    require("loops", loops, own or not loops, "() where nothing is looped")
    depths = [model.config.counts(n) for n in dict.fromkeys(loops)] or [own]
    rule = None
    if automatic_loop_exit:
        rule = make_exit(model, exit_rule, automatic_loop_exit_threshold)
    for depth in depths:
        check_drafts(model, depth, draft_tokens, draft_loops, rule, "full")
        fits = min_loops <= max(depth, default=1)
        require("min_loops", min_loops, fits, f"at most the {max(depth, default=1)} loops")
    scorer = Scorer(model, depths, rule)
    core = Core(Path(core_bundle), scorer, encoding) if core_bundle else None
    index, names = find_tasks() if tasks else (None, [])

if device.type == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32
logging.getLogger("lm_eval").setLevel(logging.ERROR)
os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's processes would run this script again on macOS
entries = []
with clear_errors():
    for name in names:
        entries += run_task(Harness(scorer, encoding), index, name)
        save(entries)
    if core:
        for entry in core.run():
            entries.append(entry)
            save(entries)
print(table(entries, own))
print(f"{results_path()}: written", file=sys.stderr)
