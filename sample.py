"""
Write text from a trained model:

    python sample.py out-quickstart --start="def loop(" --n_loop=8
    python sample.py out-quickstart --start=FILE:prompt.txt --temperature=0
    python sample.py out-quickstart --automatic_loop_exit --color       exit early, in color
    python sample.py out-quickstart --draft_tokens=4 --draft_loops=1    the same text, sooner
    python sample.py out-quickstart --chat                              continue each line you type
    python sample.py gpt2 --start="The loop"                            other people's weights

All samples are made in one batch; the first is printed as it comes.
"""

import json
import sys
from pathlib import Path

import torch

import pretrained
from configurator import check_ranges, clear_errors, configure, require
from decode import generate
from nanorecur import checkpoint
from nanorecur.exit_rules import make_exit
from nanorecur.files import runs_here
from nanorecur.hardware import (
    autocast,
    cast_linear_weights,
    check_versions,
    compile_works,
    lay_out,
    pick_device,
    pick_dtype,
)
from nanorecur.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# what is printed
out_dir = "out"  # the folder of a run
source = ""  # or a checkpoint file, an exported folder, gpt2, hf:<name>; the first bare argument
start = "\n"  # the prompt, or FILE:prompt.txt
num_samples = 3
max_new_tokens = 500  # tokens of each sample
n_loop = 0  # loops of every group, any number; 0: as the model was configured
temperature = 0.8  # less than 1: less random; 0: always the likeliest token
top_k = 200  # draw from the k likeliest tokens; 0: from all
seed = 1337
chat = False  # continue each line that is typed
color = False  # color each token by its loops, from green (few) to red (many)
# when a token stops looping
automatic_loop_exit = False  # let each token stop looping by itself
exit_rule = "state"  # relative change of state; kl, entropy (nats); loops of one argmax; gate
automatic_loop_exit_threshold = (
    0.03  # state, kl, entropy: below; argmax, gate: from it on; 0: never
)
min_loops = 1  # fewest loops of a token
warm_start = False  # begin each token's state at the last state of the token before it
# speed
draft_tokens = 0  # tokens drafted in each round, then verified at full depth: the same output
draft_loops = 0  # loops that draft; 0: the model's heads further ahead draft
compile = False  # compile decoding, once for all loop counts; takes a minute at first
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype = "auto"  # float32, or bfloat16 for matrix products; auto: bfloat16 on a GPU that has it
cpu_weights = "auto"  # their order on a CPU: packed, plain, transposed; auto: the fastest here
# rarely
top_p = 0.0  # draw from the fewest tokens that together have this probability; 0: from all
min_p = 0.0  # draw from tokens with this share of the likeliest's probability; 0: from all
repetition_penalty = 1.0  # makes tokens that occurred less likely; 1: off
stop = ""  # text before which a sample ends, or FILE:stops.txt with one on each line
slots = "full"  # what loops share in the cache: full (nothing), last, mod, first+shared, shared
n_slot = 1  # loops with cells of their own, of slots=last and mod
slide = 0  # tokens by which a full window moves on; 1 is slow; 0: a quarter of the window
jsonl = False  # print a line of JSON for each sample
_, given = configure(globals(), positional="source")

NEEDS = {  # options that act only beside another one
    "exit_rule": "automatic_loop_exit",
    "automatic_loop_exit_threshold": "automatic_loop_exit",
    "min_loops": "automatic_loop_exit",
    "draft_loops": "draft_tokens",
}
SHADES = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)  # of 256 colors: green to red


# -----------------------------------------------------------------------------
class Sample:
    """A sample as it grows token by token; it ends before a stop string."""

    def __init__(self, prompt: str, live: bool):
        """prompt: printed before the first token. live: print text as it comes."""
        self.live = live
        self.ids, self.loops = [], []
        self.text = ""  # of all tokens, without what follows a stop string
        self.n_final = 0  # characters that further tokens cannot change
        self.unprinted = [prompt]  # final text, colored

    def add(self, token: int, loops: int) -> bool:
        """Add a token; return True where the sample ends."""
        self.ids.append(token)
        self.loops.append(loops)
        text = tokenizer.decode(self.ids)
        ends = [text.find(word) for word in stops if word in text]
        if ends:
            self.text = text[: min(ends)]
            n_final = len(self.text)
        else:
            self.text = text
            # the last characters may turn into another one, or into a stop string
            n_final = len(text.rstrip("\ufffd")) - longest_stop_begun(text)
        self.unprinted.append(colored(text[self.n_final : n_final], loops))
        self.n_final = max(self.n_final, n_final)
        if self.live:
            self.show()
        return bool(ends)

    def show(self) -> None:
        """Print the final text that has not been printed."""
        print(*self.unprinted, sep="", end="", flush=True)
        self.unprinted = []

    def close(self) -> None:
        """Print all that has not been printed."""
        if self.ids:
            self.unprinted.append(colored(self.text[self.n_final :], self.loops[-1]))
        self.show()


def longest_stop_begun(text: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = 0
    for word in stops:
        for k in range(1, len(word)):
            if text.endswith(word[:k]):
                longest = max(longest, k)
    return longest


def colored(text: str, loops: int) -> str:
    """Return a text in the color of its loops, for a terminal of 256 colors."""
    if not color or not text:
        return text
    shade = SHADES[min(10, 10 * loops // deepest)]
    return f"\x1b[30;48;5;{shade}m{text}\x1b[0m"


def sample(prompt: list[int], count: int, shown: str = "") -> tuple[list[Sample], dict]:
    """Return count continuations of the prompt's tokens, and the statistics of generate().

    shown: text that is printed before each sample.
    """
    samples = [Sample(shown, live=row == 0 and not jsonl) for row in range(count)]
    idx = torch.tensor([prompt] * count, device=device)

    def watch(row: int, token: int, loops: int) -> bool:
        return samples[row].add(token, loops)

    with clear_errors(), autocast(device, dtype):
        _, stats = generate(
            model,
            idx,
            max_new_tokens,
            n_loop=n_loop or None,
            temperature=temperature,
            top_k=top_k or None,
            top_p=top_p or None,
            min_p=min_p or None,
            repetition_penalty=repetition_penalty,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
            slots=slots,
            n_slot=n_slot,
            slide=slide,
            exit_rule=rule,
            min_loops=min_loops,
            warm_start=warm_start,
            draft_tokens=draft_tokens,
            draft_loops=draft_loops,
            static=compile,
            watch=watch,
        )
    return samples, stats


def read_text(text: str) -> str:
    """Return the text, or that of the file in FILE:name."""
    if not text.startswith("FILE:"):
        return text
    return Path(text.removeprefix("FILE:")).read_text("utf-8", "surrogateescape")


def check_effects() -> None:
    """Raise ValueError where an option is given that has no effect beside the others."""
    for name, other in NEEDS.items():
        acts = name not in given or globals()[other]
        require(name, globals()[name], acts, f"left out, or with --{other}")
    for name in ("start", "num_samples", "jsonl"):
        require(name, globals()[name], not (chat and name in given), "left out with --chat")
    require("color", color, not (color and jsonl), "left out with --jsonl")
    acts = "n_slot" not in given or slots in ("last", "mod")
    require("n_slot", n_slot, acts, "left out, or with --slots=last or mod")


def encode_prompt(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of --start. ValueError where the model has not all of its characters."""
    try:
        return tokenizer.encode(start)
    except ValueError as error:
        raise ValueError(f"{error}; --start= takes another text") from None


def find_source() -> str:
    """Return what pretrained.load takes: --source, or else --out_dir where it holds a run."""
    if source:
        return source
    if checkpoint.exists(out_dir):
        return out_dir
    runs = ", ".join(runs_here()) or "none"
    other = f"--source={out_dir} takes other people's weights and exports"
    raise ValueError(f"{out_dir}: no such checkpoint; runs here: {runs}; {other}")


# -----------------------------------------------------------------------------
with clear_errors():
    limits = {"num_samples": 1, "max_new_tokens": 0, "top_k": 0, "n_loop": 0}
    check_ranges(globals(), {name: (least, torch.inf) for name, least in limits.items()})
    check_effects()
    check_versions()
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    start = read_text(start)
    stops = read_text(stop).splitlines() if stop.startswith("FILE:") else [stop]
    stops = [word for word in stops if word]
    source = find_source()
    model = pretrained.load(source).to(device)
    tokenizer = pretrained.open_tokenizer(source, model)
    prompt = [] if chat else encode_prompt(tokenizer)
    if not prompt and not chat:
        raise ValueError("the prompt is empty: give --start some text, or a file that holds some")
    if max(prompt, default=0) >= model.config.vocab_size:
        ids = f"id {max(prompt)} is beyond vocab_size={model.config.vocab_size}"
        raise ValueError(f"{source}: its tokenizer is not of this model, {ids}")
    counts = model.config.counts(n_loop or None)
    require("n_loop", n_loop, counts or n_loop == 0, "0 where nothing is looped")
    deepest = max(1, sum(counts))  # loops of a token, of all groups together
    rule = None
    if automatic_loop_exit:
        rule = make_exit(model, exit_rule, automatic_loop_exit_threshold)

if device.type == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32
compile = compile and compile_works(device)
on_cpu, layout = device.type == "cpu" and not compile, ""
with clear_errors():
    acts = on_cpu or "cpu_weights" not in given
    require("cpu_weights", cpu_weights, acts, "left out on a GPU and with --compile")
    if on_cpu:
        layout = lay_out(model, dtype, cpu_weights, 1 if chat else num_samples)
        dtype = torch.float32  # of what is not a Linear layer
    elif dtype != torch.float32:
        cast_linear_weights(model, dtype)
generator = torch.Generator(device).manual_seed(seed)

if color:
    few, most = colored(" 1 ", 1), colored(f" {deepest} ", deepest)
    print(f"loops of a token, from few to all: {few} to {most}", file=sys.stderr)

while chat:
    try:
        line = input("> ")
    except EOFError:
        sys.exit()
    prompt += tokenizer.encode(line + "\n")
    prompt = prompt[-model.block_size :]
    (answer,), _ = sample(prompt, 1)
    answer.close()
    print()
    prompt += answer.ids

samples, stats = sample(prompt, num_samples, start)
for one in samples:
    if jsonl:
        entry = {"prompt": start, "text": one.text, "tokens": one.ids, "loops": one.loops}
        print(json.dumps(entry))
        continue
    one.close()
    print("\n---------------")
cache_bytes = f"{stats['cache_bytes_per_token']:,} bytes of cache per token"
chosen = f", weights {layout} (cpu_weights)" if layout else ""
print(f"loops per token {stats['loops']}, {cache_bytes}{chosen}", file=sys.stderr)
if rule:
    used = torch.tensor([loops for one in samples for loops in one.loops], dtype=torch.float)
    print(f"loops used {used.mean():.2f} of {deepest}", file=sys.stderr)
if draft_tokens:
    print(f"{stats['accepted']} of {stats['drafted']} drafts accepted", file=sys.stderr)
