"""Runs of several processes, by DDP and divided by FSDP2: the numbers and files of one process."""

import inspect
import socket

import pytest
import torch
from conftest import (
    ROOT,
    TRAIN,
    assert_refused,
    assert_same,
    log,
    logged,
    losses,
    slow,
    torchrun,
    train,
)
from forked import end, start, start_two, tail

from nanorecur import checkpoint
from nanorecur.parallel import Processes, buffers_option

SAMPLED = ("--loop_sampling=poisson", "--bptt_k=1", "--eval_loops=1,3", "--exit_gate=state")
AHEAD = ("--predict_ahead", "--max_shift=5", "--loops_per_row", "--loop_sampling=poisson")
AHEAD += ("--bptt_k=2", "--max_iters=4")
GATE = ("--exit_gate=state", "--objective=exit_gate", "--max_iters=4")


def assert_logs_alike(ours, theirs, rel):
    """Compare losses, loops, evaluations and what objectives log."""
    assert losses(ours) == pytest.approx(losses(theirs), rel=rel)
    for a, b in zip(log(ours), log(theirs), strict=True):
        assert a["iter"] == b["iter"]
        assert a.get("loops") == b.get("loops")
        assert a.get("objective", {}) == pytest.approx(b.get("objective", {}), rel=10 * rel)
        for x, y in zip(a.get("eval", []), b.get("eval", []), strict=True):
            assert x["loops"] == y["loops"]
            assert x["loss"] == pytest.approx(y["loss"], rel=rel)


# -----------------------------------------------------------------------------
# one process


def test_alone_messages_are_what_was_sent():
    processes = Processes()
    assert not processes.distributed
    assert processes.is_first
    assert processes.agree(3) == 3
    assert torch.equal(processes.sum(torch.tensor([1, 2])), torch.tensor([1, 2]))
    assert processes.merge({1: "a"}) == {1: "a"}
    assert processes.gradient_norm(torch.tensor(2.5)) == 2.5


def test_torchruns_environment_says_which_process_this_is(monkeypatch):
    for name, value in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    processes = Processes()
    assert (processes.rank, processes.local_rank, processes.world_size) == (5, 1, 8)
    assert processes.distributed
    assert not processes.is_first


@pytest.mark.slow
def test_ddp_averages_gradients_once_per_step_and_changes_no_bit(corpus, tmp_path, monkeypatch):
    """One process under DDP, of two micro-steps in each of eight steps."""
    calls = []

    def count(calls, bucket):  # in place of the all-reduce
        calls.append(bucket.is_last())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    class CountedDDP(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(calls, count)

    alone, out = tmp_path / "alone", tmp_path / "out"
    assert train(corpus, alone).code == 0
    monkeypatch.setattr("nanorecur.parallel.DDP", CountedDDP)
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    for name, value in dict(**environment, MASTER_ADDR="localhost", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)
    run = train(corpus, out)
    assert run.code == 0, run.err
    assert sum(calls) == 8
    assert_same(checkpoint.load(out)["model"], checkpoint.load(alone)["model"])


class OlderDDP:
    """DistributedDataParallel of torch 2.11, as far as its arguments go."""

    def __init__(self, module, device_ids=None, broadcast_buffers=True):
        pass


def test_ddp_is_told_not_to_send_buffers_by_the_name_that_this_torch_knows():
    here = torch.nn.parallel.DistributedDataParallel
    assert buffers_option(here) in inspect.signature(here).parameters
    assert buffers_option(OlderDDP) == "broadcast_buffers"


# -----------------------------------------------------------------------------
# two processes


def two_processes(corpus, out_dir, *arguments):
    """Run two gloo processes, forked from one that has imported torch."""
    printed = out_dir.with_name(f"{out_dir.name}_printed")
    call = (f"--dataset={corpus}", f"--out_dir={out_dir}", *TRAIN, *arguments)
    assert end(start_two(printed, *call)) == [0, 0], tail(printed)


@pytest.mark.parametrize(
    "options", [SAMPLED, slow(AHEAD), slow(GATE)], ids=["sampled", "ahead", "gate"]
)
def test_two_processes_are_one(corpus, tmp_path, options):
    assert train(corpus, tmp_path / "one", *options).code == 0
    two_processes(corpus, tmp_path / "two", *options)
    assert_logs_alike(tmp_path / "two", tmp_path / "one", 1e-6)


@pytest.mark.slow
def test_a_run_that_two_processes_saved_goes_on_on_one(corpus, tmp_path):
    assert train(corpus, tmp_path / "one", *SAMPLED).code == 0
    two_processes(corpus, tmp_path / "two", *SAMPLED, "--max_iters=4")
    assert train(corpus, tmp_path / "two", *SAMPLED, "--init_from=resume").code == 0
    assert_logs_alike(tmp_path / "two", tmp_path / "one", 1e-6)


@pytest.mark.slow
def test_torchruns_processes_are_one(corpus, tmp_path):
    assert train(corpus, tmp_path / "one", *SAMPLED).code == 0
    run = torchrun(corpus, tmp_path / "two", *SAMPLED)
    assert run.returncode == 0, run.stderr
    assert_logs_alike(tmp_path / "two", tmp_path / "one", 1e-6)


@pytest.mark.slow
def test_processes_meet_whose_hosts_count_restarts_differently(corpus, tmp_path):
    """Two hosts' torchruns, of which one was started anew; each process opens a store afresh."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group, printed = [], tmp_path / "printed"
    for rank in ("0", "1"):
        environment = dict(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2")
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environment |= dict(TORCHELASTIC_USE_AGENT_STORE="False", TORCHELASTIC_RESTART_COUNT=rank)
        call = (f"--dataset={corpus}", f"--out_dir={tmp_path / 'out'}", *TRAIN, "--patience=20")
        group.append(start(printed, *call, **environment))
    assert end(group, within=60) == [0, 0], tail(printed)


# -----------------------------------------------------------------------------
# divided by FSDP2

FOUR = "--gradient_accumulation_steps=4"
PLAIN = ("--n_prelude=0", "--n_block=0", "--n_coda=0", "--n_layer=3", "--n_loop=1")
LOOPED = """
    --objective=exit --exit_gate=state --loop_sampling=poisson --bptt_k=2 --ema_decay=0.9
    --recompute=loop --automatic_loop_exit --automatic_loop_exit_threshold=0.3 --eval_loops=1
""".split()


def assert_divided_is_alike(ours, theirs, rel):
    """Compare logs, and the norm of the first gradient, which no earlier difference can blur."""
    assert len(losses(theirs)) == 8
    first, want = logged(ours, "grad_norm")[0], logged(theirs, "grad_norm")[0]
    assert first == pytest.approx(want, rel=rel)
    assert_logs_alike(ours, theirs, rel)


def shapes(part):
    """Return nested dicts with (shape, dtype, requires_grad) in place of tensors."""
    if isinstance(part, dict):
        return {name: shapes(inner) for name, inner in part.items()}
    return (part.shape, part.dtype, part.requires_grad) if isinstance(part, torch.Tensor) else part


def storages_of_head_and_embedding(ckpt):
    names = ("lm_head.weight", "transformer.wte.weight")
    return {ckpt["model"][name].untyped_storage().data_ptr() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, LOOPED], ids=["plain", "looped"])
def test_a_divided_run_is_the_undivided_one_and_they_go_on_as_each_other(corpus, tmp_path, options):
    """Divided for four steps and then not, and the other way round."""
    options = (FOUR, *options)
    undivided, first, second = (tmp_path / name for name in ("undivided", "first", "second"))
    assert train(corpus, undivided, *options).code == 0
    two_processes(corpus, first, *options, "--shard", "--max_iters=4")
    assert train(corpus, second, *options, "--max_iters=4").code == 0
    a, b = checkpoint.load(first), checkpoint.load(second)
    assert a.keys() == b.keys()
    for part in ("model", "training_model", "optimizer"):
        assert shapes(a.get(part)) == shapes(b.get(part))
    assert len(storages_of_head_and_embedding(a)) == 1  # tied in the file, too
    assert len(storages_of_head_and_embedding(b)) == 1
    assert train(corpus, first, *options, "--init_from=resume").code == 0
    two_processes(corpus, second, *options, "--shard", "--init_from=resume")
    assert_divided_is_alike(first, undivided, 1e-5)
    assert_divided_is_alike(second, undivided, 1e-5)


@pytest.mark.slow
def test_a_divided_run_is_the_undivided_one(corpus, tmp_path):
    assert train(corpus, tmp_path / "undivided", FOUR).code == 0
    two_processes(corpus, tmp_path / "divided", FOUR, "--shard")
    assert_divided_is_alike(tmp_path / "divided", tmp_path / "undivided", 1e-5)


@pytest.mark.slow
def test_muon_and_bfloat16_weights_divided(corpus, tmp_path):
    """Within the rounding of bfloat16, in which Muon and the loss are computed."""
    options = (FOUR, "--optimizer=muon", "--param_dtype=bfloat16")
    options += ("--learning_rate=1e-3", "--muon_learning_rate=1e-2")
    assert train(corpus, tmp_path / "undivided", *options).code == 0
    two_processes(corpus, tmp_path / "divided", *options, "--shard")
    assert_divided_is_alike(tmp_path / "divided", tmp_path / "undivided", 1e-2)


COUNTING_SCRIPT = """
import runpy, sys
import torch.distributed as dist
sys.path.insert(0, {root!r})
name = "reduce_scatter_single"  # since torch 2.13
if not hasattr(dist, name):
    name = "reduce_scatter_tensor"
original = getattr(dist, name)
def counted(*arguments, **options):
    if dist.get_rank() == 0:
        print("called", file=open({calls!r}, "a"))
    return original(*arguments, **options)
setattr(dist, name, counted)
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_divided_gradients_are_averaged_in_the_last_micro_step_alone(corpus, tmp_path):
    """In each of 3 steps five averages of two micro-steps' sums.

    Those of prelude, coda and what is in no block, and of the looped block after both its loops.
    """
    script, calls = tmp_path / "counted.py", tmp_path / "calls"
    script.write_text(COUNTING_SCRIPT.format(root=str(ROOT), calls=str(calls)))
    run = torchrun(corpus, tmp_path / "out", "--shard", FOUR, "--max_iters=3", script=script)
    assert run.returncode == 0, run.stderr
    assert len(calls.read_text().splitlines()) == 3 * 5


REFUSED = {
    "--spectral_clip_beta=1": "spectral_clip_beta=1.0: must be 0 with shard",
    "--loops_per_row --loop_sampling=uniform": "loops_per_row=True: must be False with shard",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_divided_is_refused(corpus, tmp_path, monkeypatch, wrong):
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    run = train(corpus, tmp_path / "out", "--shard", *wrong.split())
    assert_refused(run, REFUSED[wrong])
    assert not (tmp_path / "out").exists()
