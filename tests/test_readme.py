"""Every command of the README runs, in its order, at small sizes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, prose
from forked import forked_python
from test_bench import make_peer
from test_eval import rolling_task, write_lines, write_model
from test_project import README, code_blocks

SETUP = "python3 -m venv .venv && .venv/bin/pip install -r requirements"
# what CI runs: setting up, and the tests
IN_CI = [
    "pip install -r requirements-eval.txt",
    f"{SETUP}-dev.txt && .venv/bin/python -m pytest -n auto",
]
# what a machine without a network, and with two cores, has instead
STANDS_FOR = {
    f"{SETUP}.txt && ": "",
    ".venv/bin/python": "python",
    "hf:HuggingFaceTB/SmolLM2-360M": "hf:../llama",
    "sample.py gpt2": "sample.py ../gpt2",
    " out-x": " out-Huginn",
    "--watch=30": "--watch=1",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--tasks=hellaswag,arc_easy,lambada_openai": "--tasks=rolling --include_path=../tasks",
    "--tasks=arc_easy,hellaswag": "--tasks=rolling --include_path=../tasks",
}
WIDTH = " --n_embd=32 --n_head=2"
STEPS = " --max_iters=2 --eval_iters=1 --eval_interval=2 --batch_size=2 --device=cpu"
# options added to a command; the longest beginning of it counts
SMALL = {
    "python data/prefix/prepare.py": " --train_rows=300 --val_rows=4",
    "python data/pycode/prepare.py": "",
    "python data/text/prepare.py": "",
    "python train.py -h": "",
    "python train.py": STEPS + WIDTH,
    "python train.py config/quickstart.py": STEPS + WIDTH,
    "python train.py config/heal_smollm2.py": STEPS
    + " --n_prelude=2 --n_block=4 --n_coda=2 --block_size=32 --gradient_accumulation_steps=2"
    + " --compile=False",
    "torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py": STEPS
    + WIDTH
    + " --out_dir=out-two",
    "torchrun --standalone --nproc_per_node=2 train.py config/train_gpt2_looped.py": STEPS
    + WIDTH
    + " --block_size=32 --gradient_accumulation_steps=2 --dataset=pycode --compile=False",
    "python sample.py": " --num_samples=1 --max_new_tokens=4 --device=cpu",
    "python eval.py": " --device=cpu",
    "python pretrained.py export": "",
    "python analyze.py": " --windows=2 --length=8 --new_tokens=4 --device=cpu",
    "python runs.py sweep": STEPS + WIDTH,
    "python runs.py table": "",
    "python runs.py compare": STEPS + WIDTH + " --max_new_tokens=4",
    "python bench.py": " --rounds=1 --steps=1 --device=cpu" + WIDTH,
    "python bench.py train": " --rounds=1 --steps=1 --device=cpu --compile=False" + WIDTH,
    "python bench.py race": " --rounds=1 --max_iters=2 --eval_iters=1" + WIDTH,
    "python bench.py plan": WIDTH + " --block_size=64",
}
THEIR_TRAIN = """
import os, shutil, sys
out = next(part for part in sys.argv if part.startswith("--out_dir="))[10:]
os.makedirs(out)
shutil.copy("../nanoRecur/out-shakespeare-char-cpu/ckpt.pt", out)
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the repository; beside it what its commands read of others."""
    folder = tmp_path / "nanoRecur"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out*", "wandb", "*.bin", "tests")
    shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)
    healing = folder / "config" / "heal_smollm2.py"
    healing.write_text(healing.read_text().replace("hf:HuggingFaceTB/SmolLM2-360M", "hf:../llama"))
    for name in ("llama", "gpt2"):
        write_model(tmp_path / name, name)
    (folder / "my").mkdir()
    (folder / "my" / "text.txt").write_text(prose(3, 9000))
    (tmp_path / "tasks").mkdir()
    test = write_lines(tmp_path / "tasks" / "test.jsonl", [{"text": prose(8, 40)}] * 3)
    (tmp_path / "tasks" / "rolling.yaml").write_text(yaml.safe_dump(rolling_task(test)))
    make_peer(tmp_path / "nanoGPT")
    (tmp_path / "nanoGPT" / "train.py").write_text(THEIR_TRAIN)
    run_command("python data/shakespeare_char/prepare.py --input_files=my/text.txt", folder)
    theirs = tmp_path / "nanoGPT" / "data" / "shakespeare_char"
    theirs.mkdir(parents=True)
    shutil.copy(folder / "data" / "shakespeare_char" / "val.bin", theirs)
    return folder


def run_command(command, folder, python=Path(sys.executable)):
    """Run a command and fail with what it printed if it fails.

    python: what the command finds under this name.
    """
    path = f"{python.parent}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    printed = folder.with_name("printed.txt")
    with printed.open("a") as file:
        pipes = {"stdout": file, "stderr": file}
        code = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, timeout=300, **pipes
        ).returncode
    assert code == 0, f"{command}\n{printed.read_text(errors='replace')[-4000:]}"


def commands_of_the_readme():
    """Yield the commands of the README's blocks, small; IN_CI is left out.

    Lines of options alone are for the command that the text before them names.
    """
    for block in code_blocks(README):
        for line in block.replace("\\\n", "").splitlines():
            line = re.sub(r"\s+#\s.*", "", line)
            if line in IN_CI:
                continue
            if line.startswith("--"):
                options, name = re.split(r"\s{2,}", line)
                base = "python train.py config/quickstart.py --loop_start=0 --loop_sampling=poisson"
                line = f"{base} --out_dir=out-{name} {options}"
            for before, instead in STANDS_FOR.items():
                line = line.replace(before, instead)
            for command in line.split(" && "):
                found = [start for start in SMALL if command.startswith(start)]
                yield command + SMALL[max(found, key=len)] if found else command


def is_command(text):
    return re.match(r"(python3?|torchrun|pip|bash)\s", text) is not None


@pytest.mark.slow
def test_every_command_of_the_readme_runs(checkout, tmp_path):
    """The first of each script in a fresh Python, later ones forked, which is faster."""
    commands = [text for text in commands_of_the_readme() if is_command(text)]
    assert len(commands) >= 35
    (tmp_path / "bin").mkdir()
    known = set()
    with forked_python(tmp_path / "bin" / "python") as forked:
        for command in commands:
            script = command.split()[1]
            run_command(command, checkout, forked if script in known else Path(sys.executable))
            known.add(script)
