"""
Text from a trained model:

    python sample.py --out_dir=out-quickstart --start="def loop(" --n_loop=8
    python sample.py --out_dir=out-quickstart --start=FILE:prompt.txt --num_samples=3 --temperature=0
    python sample.py --out_dir=out-quickstart --automatic_loop_exit=True --color        # loops follow the text
    python sample.py --out_dir=out-quickstart --draft_tokens=4 --draft_loops=1          # the same text, sooner
    python sample.py --out_dir=out-quickstart --chat                                    # goes on from what you type

All samples are made at once; the first is shown as it comes.
"""

import json
import sys
from pathlib import Path

import torch

import pretrained
from configurator import clear_errors, configure
from decode import generate
from nanorecur.dataset import make_tokenizer
from nanorecur.exit_rules import make_exit
from nanorecur.hardware import autocast, compile_works, pack, pick_device, pick_dtype

# -----------------------------------------------------------------------------
out_dir = "out"  # folder of a run, a checkpoint file, an exported folder, gpt2, or hf:<name>
start = "\n"  # the prompt, or FILE:prompt.txt
num_samples = 3
max_new_tokens = 500  # of each sample
stop = ""  # text before which a sample ends, or FILE:stops.txt with one on each line
seed = 1337
# what is drawn
temperature = 0.8  # 0: always the likeliest token; less than 1: less random
top_k = 200  # draw from the k likeliest tokens; 0: from all
top_p = 0.0  # from the fewest that together have this probability; 0: from all
min_p = 0.0  # from those with this share of the likeliest's probability
repetition_penalty = 1.0  # of tokens that occurred; 1: none
# how deep
n_loop = 0  # loops of every group, any number; 0: as the model was configured
automatic_loop_exit = False  # each token stops looping by itself
automatic_loop_exit_threshold = 0.03  # of the rule; 0: never
exit_rule = "state"  # state, kl, entropy (their change is less than the threshold), argmax (stays so often), gate
min_loops = 1  # no exit before
warm_start = False  # each token's state starts from the last one's
# how
draft_tokens = 0  # drafted in each round, then verified at full depth; output is as without
draft_loops = 0  # loops of a draft; 0: the model's heads further ahead
slots = "full"  # what loops share in the cache: full (nothing), last, mod (n_slot of them), first+shared, shared
n_slot = 1  # of slots=last and mod
slide = 0  # tokens by which a full window moves on, 1 is slow; 0: a quarter of it
chat = False  # goes on from each line that is typed
color = False  # loops of each token in color, from green (few) to red
jsonl = False  # a line of JSON for each sample
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype = "auto"  # float32, or bfloat16 for matrix products; auto: bfloat16 on a GPU that has it
compile = False  # the decode step, once for all loop counts; takes a minute at first
configure(globals())


# -----------------------------------------------------------------------------
class Shown:
    """The text of a sample, which grows by tokens and ends before a stop string."""

    def __init__(self, live):
        self.live, self.ids, self.loops, self.text, self.length, self.pieces = (
            live,
            [],
            [],
            "",
            0,
            [],
        )

    def add(self, token, loops):
        """True when the sample is over."""
        self.ids.append(token)
        self.loops.append(loops)
        text = tokenizer.decode(self.ids)
        ends = [text.find(word) for word in stops if word in text]
        open_end = max(
            (k for word in stops for k in range(1, len(word)) if text.endswith(word[:k])), default=0
        )
        safe = (
            min(ends) if ends else len(text.rstrip("\ufffd")) - open_end
        )  # what more tokens cannot change
        self.write(text[self.length : safe], loops)
        self.text, self.length = text[: min(ends)] if ends else text, max(self.length, safe)
        return bool(ends)

    def write(self, text, loops):
        self.pieces.append(painted(text, loops) if text else "")
        if self.live:
            print(self.pieces[-1], end="", flush=True)

    def close(self):
        """Print what has not been printed."""
        last = painted(self.text[self.length :], self.loops[-1]) if self.text[self.length :] else ""
        print(*([] if self.live else self.pieces), last, sep="", end="", flush=True)


def painted(text, loops):
    """In the color of so many loops, on a terminal of 256."""
    shades = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)
    shade = shades[min(10, 10 * loops // deepest)]
    return f"\x1b[30;48;5;{shade}m{text}\x1b[0m" if color else text


def sample(prompt, rows):
    """rows continuations of the tokens prompt, the first shown as it comes."""
    shown = [Shown(live=row == 0 and not jsonl) for row in range(rows)]
    idx = torch.tensor([prompt] * rows, device=device)
    with clear_errors(), autocast(device, torch.float32 if packed else dtype):
        stats = generate(
            model,
            idx,
            max_new_tokens,
            n_loop=n_loop or None,
            temperature=temperature,
            top_k=top_k or None,
            top_p=top_p or None,
            min_p=min_p or None,
            repetition_penalty=repetition_penalty,
            generator=generator,
            vocab_size=tokenizer.vocab_size,
            slots=slots,
            n_slot=n_slot,
            slide=slide,
            exit_rule=exit_when,
            min_loops=min_loops,
            warm_start=warm_start,
            draft_tokens=draft_tokens,
            draft_loops=draft_loops,
            static=compile,
            watch=lambda row, token, loops: shown[row].add(token, loops),
        )[1]
    return shown, stats


# -----------------------------------------------------------------------------
with clear_errors():
    for name, least in {"num_samples": 1, "max_new_tokens": 0, "top_k": 0, "n_loop": 0}.items():
        if globals()[name] < least:
            raise ValueError(f"{name}={globals()[name]}: must be at least {least}")
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    if start.startswith("FILE:"):
        start = Path(start.removeprefix("FILE:")).read_text("utf-8", "surrogateescape")
    stops = (
        Path(stop.removeprefix("FILE:")).read_text("utf-8").splitlines()
        if stop.startswith("FILE:")
        else [stop]
    )
    stops = [word for word in stops if word]
    model = pretrained.load(out_dir).to(device)
    named = pretrained.tokenizer_of(out_dir)
    if (
        not named and not 50257 <= model.config.vocab_size <= 50304
    ):  # what names none has to be GPT-2's, maybe padded
        raise ValueError(
            f"{out_dir}: names no tokenizer, and {model.config.vocab_size} ids are not GPT-2's 50,257"
        )
    tokenizer = make_tokenizer(named or {"tokenizer": "gpt2"})
    prompt = [] if chat else tokenizer.encode(start)
    if not prompt and not chat:
        raise ValueError("the prompt is empty: give --start some text, or a file that holds some")
    exit_when = (
        make_exit(model, exit_rule, automatic_loop_exit_threshold) if automatic_loop_exit else None
    )
    deepest = max((*model.config.counts(n_loop or None), 1))

if device.type == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32
compile = compile and compile_works(device)
packed = device.type == "cpu" and not compile and pack(model, dtype)
generator = torch.Generator(device).manual_seed(seed)

while chat:
    try:
        prompt += tokenizer.encode(input("> ") + "\n")
    except EOFError:
        break
    prompt = prompt[-model.block_size :]
    (answer,), stats = sample(prompt, 1)
    answer.close()
    print()
    prompt += answer.ids
if chat:
    sys.exit()

if not jsonl:
    print(start, end="", flush=True)
shown, stats = sample(prompt, num_samples)
for number, one in enumerate(shown):
    if jsonl:
        print(
            json.dumps({"prompt": start, "text": one.text, "tokens": one.ids, "loops": one.loops})
        )
        continue
    if number:
        print(start, end="")
    one.close()
    print("\n---------------")
print(
    f"loops per token {stats['loops']}, {stats['cache_bytes_per_token']:,} bytes of cache per token",
    file=sys.stderr,
)
if exit_when or draft_tokens:
    used = torch.tensor([loops for one in shown for loops in one.loops], dtype=torch.float)
    drafts = f"{stats['accepted']} of {stats['drafted']} drafts accepted"
    print(f"loops used {used.mean():.2f} of {deepest}; {drafts}", file=sys.stderr)
