"""
Write your own text, in any tokenizer:

    python data/text/prepare.py --input_files='my/*.txt' --name=mine
    python data/text/prepare.py --input_files=my/ --tokenizer=hf:HuggingFaceTB/SmolLM2-135M
    python data/text/prepare.py --input_files=questions.jsonl --name=questions

Writes train.bin, val.bin and meta.json into data/<name>. Of many documents some are held out whole;
of few, the end of each. JSON lines with "prompt" and "answer" instead of "text" become rows, of
which the answer alone is predicted; some prompts are held out.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure, require
from nanorecur.corpus import find_files, open_corpus, write_documents
from nanorecur.dataset import DATA, window_of, write_answers, write_dataset
from nanorecur.tokenizer import find_tokenizer

input_files = ""  # comma-separated folders or globs of .txt, .md, .jsonl or .parquet files
name = "mine"  # what --dataset= of train.py will call it
tokenizer = "bytes"  # bytes, char, gpt2, a tokenizer.json, or hf:<folder or name on the hub>
val_share = 0.05  # share of the text, or of the prompts, held out for validation
block_size = 0  # with prompts: tokens of a row, longer ones are left out; 0: the longest row's
out_dir = ""  # folder to write; "": data/<name>
configure(globals(), positional="input_files")

FEW = 200  # documents; of fewer, the end of each is held out


def read_pairs(paths: list[str]) -> list[tuple[str, str]]:
    """Return (prompt, answer) of all lines, or [] where the first line has neither.

    Raises ValueError that names a line which has not both.
    """
    pairs = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                pair = pair_in(line)
                if not pairs and pair == (None, None):
                    return []
                if line.strip():
                    legal = all(isinstance(text, str) for text in pair)
                    allowed = "an object with texts named prompt and answer"
                    require(f"{path}, line {number}", line.strip()[:60], legal, allowed)
                    pairs.append(pair)
    return pairs


def pair_in(line: str) -> tuple[str | None, str | None]:
    """Return what a line of JSON calls prompt and answer, None for what it has not."""
    try:
        row = json.loads(line)
        return row.get("prompt"), row.get("answer")
    except (ValueError, AttributeError):
        return None, None


with clear_errors():
    require("input_files", input_files, input_files != "", "your files, such as 'my/*.txt'")
    check_ranges(globals(), {"val_share": (0.0001, 0.9), "block_size": (0, 2**20)})
    has_script = (DATA / name / "prepare.py").exists()
    legal = name not in ("", ".", "..") and Path(name).name == name and not has_script
    require("name", name, legal, "one word, and not that of another data set")
    paths = find_files(input_files)
    pairs = read_pairs(paths) if Path(paths[0]).suffix == ".jsonl" else []
    require("block_size", block_size, pairs or not block_size, "0 without prompts and answers")
    corpus = [{"text": prompt + answer} for prompt, answer in pairs]
    corpus = corpus or open_corpus(input_files, "", "", "")
    if tokenizer == "char":
        characters = set().union(*(document["text"] for document in corpus))
        fields = {"tokenizer": "char", "chars": "".join(sorted(characters))}
    else:
        fields = find_tokenizer(tokenizer)
    folder = Path(out_dir or DATA / name)
    window = ""  # what the next command says of it
    if pairs:
        meta = write_answers(folder, fields, pairs, val_share, block_size)
        window = f" --block_size={window_of(meta['row'])}"
    elif sum(1 for _ in itertools.islice(corpus, FEW)) >= FEW:
        write_documents(folder, fields, corpus, val_share)
    else:
        texts = [document["text"] for document in corpus]
        cuts = [round(len(text) * (1 - val_share)) for text in texts]
        heads = [text[:cut] for text, cut in zip(texts, cuts)]
        tails = [text[cut:] for text, cut in zip(texts, cuts)]
        write_dataset(folder, fields, {"train": heads, "val": tails}, separate=True)

dataset = folder.resolve() if out_dir else name
if tokenizer.startswith("hf:"):
    print("next, that model folded into a loop and trained on this text; its head says more:")
    print(f"python train.py config/heal_smollm2.py --init_from={tokenizer} --dataset={dataset}")
print("next, a small looped model that fits any tokenizer, though it was tuned for bytes:")
print(f"python train.py config/quickstart.py --dataset={dataset}{window} --out_dir=out-{name}")
