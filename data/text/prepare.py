"""
Write your own text, in any tokenizer:

    python data/text/prepare.py --input_files='my/*.txt' --name=mine
    python data/text/prepare.py --input_files=my/ --tokenizer=hf:HuggingFaceTB/SmolLM2-135M

Writes train.bin, val.bin and meta.json into data/<name>. Of many documents some are held out whole;
of few, the end of each.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import check_ranges, clear_errors, configure, require
from nanorecur.corpus import open_corpus, write_documents
from nanorecur.dataset import DATA, write_dataset
from nanorecur.tokenizer import find_tokenizer

input_files = ""  # comma-separated folders or globs of .txt, .md, .jsonl or .parquet files
name = "mine"  # what --dataset= of train.py will call it
tokenizer = "bytes"  # bytes, char, gpt2, a tokenizer.json, or hf:<folder or name on the hub>
val_share = 0.05  # share of the text held out for validation
out_dir = ""  # folder to write; "": data/<name>
configure(globals(), positional="input_files")

FEW = 200  # documents; of fewer, the end of each is held out

with clear_errors():
    require("input_files", input_files, input_files != "", "your files, such as 'my/*.txt'")
    check_ranges(globals(), {"val_share": (0.0001, 0.9)})
    has_script = (DATA / name / "prepare.py").exists()
    legal = name not in ("", ".", "..") and Path(name).name == name and not has_script
    require("name", name, legal, "one word, and not that of another data set")
    corpus = open_corpus(input_files, "", "", "")
    n_documents = sum(1 for _ in itertools.islice(corpus, FEW))
    if tokenizer == "char":
        characters = set().union(*(document["text"] for document in corpus))
        fields = {"tokenizer": "char", "chars": "".join(sorted(characters))}
    else:
        fields = find_tokenizer(tokenizer)
    folder = Path(out_dir or DATA / name)
    if n_documents >= FEW:
        write_documents(folder, fields, corpus, val_share)
    else:
        texts = [document["text"] for document in corpus]
        cuts = [round(len(text) * (1 - val_share)) for text in texts]
        heads = [text[:cut] for text, cut in zip(texts, cuts)]
        tails = [text[cut:] for text, cut in zip(texts, cuts)]
        write_dataset(folder, fields, {"train": heads, "val": tails}, separate=True)

dataset = folder.resolve() if out_dir else name
print("next, a small looped model that fits any tokenizer, though it was tuned for bytes:")
print(f"python train.py config/quickstart.py --dataset={dataset} --out_dir=out-{name}")
