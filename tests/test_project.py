"""Configs, compilation, and that the README's commands are the real ones."""

import re
import subprocess

import pytest
import torch
from conftest import LOOPED, ROOT, tokens

from configurator import read_config_file, read_knobs
from model import GPT, GPTConfig

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_parses_and_builds(path):
    model_knobs, train_knobs = (
        read_knobs(ROOT / "model.py", "GPTConfig"),
        read_knobs(ROOT / "train.py"),
    )
    given = read_config_file(str(ROOT / path), model_knobs | train_knobs)
    with torch.device("meta"):
        model = GPT(
            GPTConfig(**{name: value for name, value in given.items() if name in model_knobs})
        )
    assert model.get_num_params() > 0
    assert (ROOT / "data" / given["dataset"] / "prepare.py").exists()
    head = (ROOT / path).read_text().split("\n\n")[0]
    assert (
        head.startswith("#")
        and f"train.py {path}" in head
        and "Loss to expect: " in head
        and "TBD" not in head
    ), "says the command and the loss to expect"


def test_compiled_blocks_compute_the_same_and_never_recompile_for_a_loop_count():
    counters, logged = torch._dynamo.utils.counters, []
    model, idx = GPT(GPTConfig(**{**LOOPED, "bptt_k": 2})), tokens(2, 16)
    eager = GPT(model.config)
    eager.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    for block in model.transformer.h:
        block.compile()
    for n in (3, 1, 2, 5, 8, 4, 1):
        model.zero_grad()
        loss = model(idx, idx, n_loop=n)[1]
        loss.backward()
        torch.testing.assert_close(loss, eager(idx, idx, n_loop=n)[1])
        logged.append(counters["stats"]["unique_graphs"])
    assert logged[0] > 0 and len(set(logged)) == 1, logged
    assert set(model.state_dict()) == set(eager.state_dict())


def test_the_readmes_test_command_is_what_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = next(
        line for line in readme.splitlines() if "pytest" in line and "venv" in line
    ).strip()
    assert command in ci and subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_readme_names_only_files_and_options_that_exist():
    readme = (ROOT / "README.md").read_text()
    scripts = [
        *(
            ROOT / f"{name}.py"
            for name in ("train", "sample", "bench", "analyze", "pretrained", "tests/torture")
        ),
        *(ROOT / "data").glob("*/prepare.py"),
    ]
    knobs = {name for script in scripts for name in read_knobs(script)}
    knobs |= set(read_knobs(ROOT / "model.py", "GPTConfig")) | {
        "standalone",
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "master_addr",
        "max",  # -restarts
        "signal",  # of Slurm
    }
    for option in re.findall(r"--([a-z_]+)", readme):
        assert option in knobs, option
    for path in re.findall(r"(?:config|data)/[a-z0-9_/]+\.py", readme):
        assert (ROOT / path).exists(), path
