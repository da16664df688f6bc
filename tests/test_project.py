"""Configs, bench.py, compilation, and that the README's commands are the real ones."""

import re
import subprocess

import pytest
import torch
from conftest import LOOPED, ROOT, Run, build, tokens, train

from configurator import read_config_file, read_knobs
from model import GPT, GPTConfig

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_parses_and_builds(path):
    model_knobs, train_knobs = read_knobs(ROOT / "model.py", "GPTConfig"), read_knobs(ROOT / "train.py")
    given = read_config_file(str(ROOT / path), model_knobs | train_knobs)
    with torch.device("meta"):
        model = GPT(GPTConfig(**{name: value for name, value in given.items() if name in model_knobs}))
    assert model.get_num_params() > 0
    assert (ROOT / "data" / given["dataset"] / "prepare.py").exists()
    head = (ROOT / path).read_text().split("\n\n")[0]
    assert head.startswith("#") and f"train.py {path}" in head and "Loss to expect: " in head and "TBD" not in head, (
        "says the command and the loss to expect"
    )


def test_bench_measures_every_loop_count():
    run = Run("bench.py", "--n_prelude=1", "--n_block=1", "--n_coda=0", "--n_embd=32", "--n_head=4", "--block_size=16", "--vocab_size=61",
              "--batch_size=2", "--loops=1,4", "--rounds=1", "--steps=1", "--device=cpu", "--compile=False", "--optimizer=muon")  # fmt: skip
    assert run.code == 0, run.err
    rows = [line.split() for line in run.out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "4"]
    ms, rate, flops, gflops, memory = (float(rows[1][i].replace(",", "")) for i in (1, 2, 3, 4, 6))
    model = build(n_coda=0, n_block=1)
    assert flops == pytest.approx(model.flops_per_token(4) / 1e6, abs=0.01)
    assert rate == pytest.approx(32 / ms * 1e3, rel=0.1) and gflops == pytest.approx(rate * flops / 1e3, rel=0.2, abs=0.06)
    assert rows[1][5] == "n/a" and memory > 50


def test_bench_says_what_spectral_clipping_costs():
    run = Run("bench.py", "--n_layer=2", "--n_embd=32", "--n_head=4", "--block_size=16", "--vocab_size=61", "--batch_size=2", "--rounds=1",
              "--steps=1", "--device=cpu", "--compile=False", "--spectral_clip_beta=1", "--spectral_clip_interval=10", "--gradient_accumulation_steps=4")  # fmt: skip
    ms, share = re.search(r"every block: ([\d.]+) ms; ([\d.]+)% of a training step of 4 micro-steps, every 10", run.out).groups()
    step = float(run.out.splitlines()[2].split()[1])
    assert float(share) == pytest.approx(100 * float(ms) / 40 / step, rel=0.2)


def test_bench_measures_decoding(tmp_path, corpus):
    """Of tiny shapes: tables of speed, cache, exit and speculation, in a file whose other sections stay."""
    assert train(corpus, tmp_path / "out").code == 0
    (tmp_path / "B.md").write_text("# Benchmarks\n\n## another machine\n\nkept\n")
    for _ in range(2):
        run = Run("bench.py", "decode", "--device=cpu", "--compile=False", "--prompt=4", "--new=2", "--batches=1,2", "--rounds=1", "--n_embd=48",
                  "--vocab_size=64", f"--looped={tmp_path / 'out'}", f"--dataset={corpus}", "--loops=3,", "--drafts=[[1,2]]", "--exit_thresholds=0.1,", f"--write={tmp_path / 'B.md'}")  # fmt: skip
        assert run.code == 0, run.err
    text = (tmp_path / "B.md").read_text()
    assert text.count("\n## ") == 2 and "kept" in text and run.out.strip() in text
    rows = [line.split(" | ") for line in run.out.splitlines() if line.startswith("| ")]
    sizes = {row[0]: row[1:] for row in rows if row[0].startswith("| full")}["| full"]
    assert sizes[0] == f"{20 * 2 * 48 * 4:,}"
    assert any(row[:2] == ["| 3", "0.1"] for row in rows) and any(row[:3] == ["| 3", "1", "2"] and "100.0%, 100.0%" in row for row in rows)


@pytest.mark.parametrize("wrong", ["--loops=0", "--rounds=0", "--n_embd=30", "--learning_rte=1"])
def test_bench_on_wrong_input(wrong):
    run = Run(
        "bench.py",
        "--n_layer=1",
        "--n_embd=32",
        "--n_head=4",
        "--block_size=16",
        "--device=cpu",
        "--compile=False",
        wrong,
    )
    assert run.code == 2 and run.err.count("\n") == 1, run.err


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
    command = next(line for line in readme.splitlines() if "pytest" in line and "venv" in line).strip()
    assert command in ci and subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_readme_names_only_files_and_options_that_exist():
    readme = (ROOT / "README.md").read_text()
    scripts = [*(ROOT / f"{name}.py" for name in ("train", "sample", "bench", "analyze", "pretrained", "tests/torture")), *(ROOT / "data").glob("*/prepare.py")]
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
