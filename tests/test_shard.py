"""Models divided among processes by FSDP2 (--shard): the same numbers and the same files as whole ones."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TRAIN, train
from test_train import log, losses, torchrun

from nanorecur import checkpoint

PLAIN = "--n_prelude=0 --n_block=0 --n_coda=0 --n_layer=3 --n_loop=1".split()
LOOPED = (
    "--objective=exit --exit_gate=state --loop_sampling=poisson --bptt_k=2 --ema_decay=0.9 --recompute=loop "
    "--automatic_loop_exit --automatic_loop_exit_threshold=0.3 --eval_loops=1"
).split()
FOUR = "--gradient_accumulation_steps=4"


def assert_losses_alike(ours, theirs, rel):
    """Of training and evaluation; and the norm of the first gradient, which later small differences cannot blur."""
    assert log(ours)[1]["grad_norm"] == pytest.approx(log(theirs)[1]["grad_norm"], rel=rel)
    assert losses(ours) == pytest.approx(losses(theirs), rel=rel) and len(losses(theirs)) == 8
    for a, b in zip(log(ours), log(theirs), strict=True):
        for x, y in zip(a.get("eval", []), b.get("eval", []), strict=True):
            assert x["loops"] == y["loops"] and x["loss"] == pytest.approx(y["loss"], rel=rel)
        assert a.get("objective", {}) == pytest.approx(b.get("objective", {}), rel=10 * rel)


@pytest.mark.parametrize("options", [PLAIN, LOOPED], ids=["plain", "looped"])
def test_a_divided_run_is_the_whole_one_and_goes_on_as_it(corpus, tmp_path, options):
    """Divided for four steps and then whole, or the other way round: as the run that was whole throughout."""
    options = (FOUR, *options)
    whole, first, then = (tmp_path / name for name in ("whole", "first", "then"))
    train(corpus, whole, *options)
    run = torchrun(corpus, first, *options, "--shard", "--max_iters=4")
    assert run.returncode == 0, run.stderr
    train(corpus, then, *options, "--max_iters=4")
    a, b = (checkpoint.load(folder) for folder in (first, then))
    assert a.keys() == b.keys()
    for part in ("model", "training_model", "optimizer"):
        assert shapes(a.get(part)) == shapes(b.get(part))
    assert len(head_and_embedding(a)) == len(head_and_embedding(b)) == 1  # tied in the file too
    assert train(corpus, first, *options, "--init_from=resume").code == 0
    run = torchrun(corpus, then, *options, "--shard", "--init_from=resume")
    assert run.returncode == 0, run.stderr
    assert_losses_alike(first, whole, 1e-5)
    assert_losses_alike(then, whole, 1e-5)


def shapes(part):
    """Nested dicts and lists with what a tensor is in its place."""
    if isinstance(part, dict):
        return {name: shapes(inner) for name, inner in part.items()}
    return (part.shape, part.dtype, part.requires_grad) if isinstance(part, torch.Tensor) else part


def head_and_embedding(ckpt):
    return {
        ckpt["model"][name].untyped_storage().data_ptr()
        for name in ("lm_head.weight", "transformer.wte.weight")
    }


def test_muon_and_bfloat16_weights_divided(corpus, tmp_path):
    """Within the rounding of bfloat16, in which Muon and the loss are computed."""
    options = (
        FOUR,
        "--optimizer=muon",
        "--param_dtype=bfloat16",
        "--learning_rate=1e-3",
        "--muon_learning_rate=1e-2",
    )
    train(corpus, tmp_path / "whole", *options)
    run = torchrun(corpus, tmp_path / "divided", *options, "--shard")
    assert run.returncode == 0, run.stderr
    assert_losses_alike(tmp_path / "divided", tmp_path / "whole", 1e-2)


@pytest.mark.parametrize(
    "wrong, words",
    {
        "--spectral_clip_beta=1": "spectral_clip_beta=1.0",
        "--loops_per_row --loop_sampling=uniform": "loops_per_row=True",
    }.items(),
)
def test_what_cannot_be_divided_is_refused(corpus, tmp_path, monkeypatch, wrong, words):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run = train(corpus, tmp_path / "out", "--shard", *wrong.split())
    assert run.code == 2 and run.err.count("\n") == 1 and words in run.err and "shard" in run.err, (
        run.err
    )
    assert not (tmp_path / "out").exists()


def test_divided_gradients_are_averaged_in_the_last_micro_step(corpus, tmp_path):
    """In each of 3 steps those of prelude, coda and what is in no block, and of the looped block after both its loops."""
    script, calls = tmp_path / "counted.py", tmp_path / "calls"
    script.write_text(f"""
import runpy, sys
import torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
original = dist.reduce_scatter_single
def counted(*arguments, **options):
    if dist.get_rank() == 0:
        print("called", file=open({str(calls)!r}, "a"))
    return original(*arguments, **options)
dist.reduce_scatter_single = counted
runpy.run_path("train.py", run_name="__main__")
""")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    command += [
        f"--dataset={corpus}",
        f"--out_dir={tmp_path / 'out'}",
        *TRAIN,
        "--shard",
        FOUR,
        "--max_iters=3",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len(calls.read_text().splitlines()) == 3 * 5
