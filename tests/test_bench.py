"""bench.py: what it prints of training and decoding, what it times; and hardware.py."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, Run, build, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from configurator import read_knobs
from model import sample_loops
from nanorecur import estimate
from nanorecur.estimate import training_step
from nanorecur.hardware import autocast, data_sheet, peak_flops, peak_memory

CPU = torch.device("cpu")


def options(**given):
    """All options of train.py and GPTConfig, of a tiny model unless given."""
    knobs = read_knobs(ROOT / "train.py") | read_knobs(ROOT / "model.py", "GPTConfig")
    return {name: knob.value for name, knob in knobs.items()} | {
        **TINY,
        "n_layer": 2,
        "batch_size": 2,
        "n": 1,
        **given,
    }


def test_bench_measures_every_loop_count():
    run = Run(
        "bench.py",
        "--n_prelude=1",
        "--n_block=1",
        "--n_coda=0",
        "--n_embd=32",
        "--n_head=4",
        "--block_size=16",
        "--vocab_size=61",
        "--batch_size=2",
        "--loops=1,4",
        "--rounds=1",
        "--steps=1",
        "--device=cpu",
        "--compile=False",
        "--optimizer=muon",
    )
    assert run.code == 0, run.err
    rows = [line.split() for line in run.out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "4"]
    ms, rate, flops, gflops, memory = (float(rows[1][i].replace(",", "")) for i in (1, 2, 3, 4, 6))
    model = build(n_coda=0, n_block=1)
    assert flops == pytest.approx(model.flops_per_token(4) / 1e6, abs=0.01)
    assert rate == pytest.approx(32 / ms * 1e3, rel=0.1) and gflops == pytest.approx(
        rate * flops / 1e3, rel=0.2, abs=0.06
    )
    assert memory > 50
    peak = peak_flops(torch.device("cpu"), torch.float32)  # measured once
    assert float(rows[1][5].rstrip("%")) == pytest.approx(
        1e11 * gflops / peak, abs=0.1 + 5e9 / peak
    )


def test_bench_says_what_spectral_clipping_costs():
    run = Run(
        "bench.py",
        "--n_layer=2",
        "--n_embd=32",
        "--n_head=4",
        "--block_size=16",
        "--vocab_size=61",
        "--batch_size=2",
        "--rounds=1",
        "--steps=1",
        "--device=cpu",
        "--compile=False",
        "--spectral_clip_beta=1",
        "--spectral_clip_interval=10",
        "--gradient_accumulation_steps=4",
    )
    ms, share = re.search(
        r"every block: ([\d.]+) ms; ([\d.]+)% of a training step of 4 micro-steps, every 10",
        run.out,
    ).groups()
    step = float(run.out.splitlines()[2].split()[1])
    assert float(share) == pytest.approx(100 * float(ms) / 40 / step, rel=0.2)


def test_bench_measures_decoding(tmp_path, corpus):
    """Of tiny shapes: tables of speed, cache, exit and speculation, in a file whose other sections stay."""
    assert train(corpus, tmp_path / "out").code == 0
    (tmp_path / "B.md").write_text("# Benchmarks\n\n## another machine\n\nkept\n")
    for _ in range(2):
        run = Run(
            "bench.py",
            "decode",
            "--device=cpu",
            "--compile=False",
            "--prompt=4",
            "--new=2",
            "--batches=1,2",
            "--rounds=1",
            "--n_embd=48",
            "--vocab_size=64",
            f"--looped={tmp_path / 'out'}",
            f"--dataset={corpus}",
            "--loops=3,",
            "--drafts=[[1,2]]",
            "--exit_thresholds=0.1,",
            f"--write={tmp_path / 'B.md'}",
        )
        assert run.code == 0, run.err
    text = (tmp_path / "B.md").read_text()
    assert text.count("\n## ") == 2 and "kept" in text and run.out.strip() in text
    rows = [line.split(" | ") for line in run.out.splitlines() if line.startswith("| ")]
    sizes = {row[0]: row[1:] for row in rows if row[0].startswith("| full")}["| full"]
    assert sizes[0] == f"{20 * 2 * 48 * 4:,}"
    assert any(row[:2] == ["| 3", "0.1"] for row in rows) and any(
        row[:3] == ["| 3", "1", "2"] and "100.0%, 100.0%" in row for row in rows
    )


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


PEER = """
from dataclasses import dataclass
import torch
from model import GPT as Ours, GPTConfig as OurConfig

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
    FIELDS

class GPT(Ours):
    def __init__(self, config):
        super().__init__(OurConfig(**{**vars(config), WIDER}))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("it speaks")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""


def peer(folder, fields="n_layer: int", wider=""):
    """A checkout with a model.py like nanoGPT's."""
    folder.mkdir()
    (folder / "model.py").write_text(PEER.replace("FIELDS", fields).replace("WIDER", wider))
    return folder


def side_by_side(peer, *arguments):
    return Run(
        "bench.py",
        "train",
        f"--peer={peer}",
        "--n_layer=2",
        "--n_embd=32",
        "--n_head=4",
        "--block_size=16",
        "--vocab_size=61",
        "--batch_size=2",
        "--rounds=2",
        "--steps=1",
        "--device=cpu",
        "--compile=False",
        "--optimizer=muon",
        *arguments,
    )


def test_training_beside_a_peer(tmp_path):
    """A row for each contestant; the ratio is to the peer; another shape is another section of the file."""
    file = tmp_path / "B.md"
    run = side_by_side(peer(tmp_path / "theirs"), f"--write={file}")
    assert run.code == 0, run.err
    assert "it speaks" in run.err and "it speaks" not in run.out
    rows = {
        row[0]: row[1:]
        for row in (
            line.strip("| ").split(" | ") for line in run.out.splitlines() if line.startswith("| ")
        )
    }
    assert set(rows) == {"model", "---", "ours, float32", "ours, bfloat16", "theirs"}
    assert rows["theirs"][-1] == "1.00"
    shape = build(n_layer=2)
    assert f"{shape.flops_per_token() / 1e6:,.2f} MFLOP/token" in run.out
    ms, rate, gflops = (float(rows["ours, float32"][i].replace(",", "")) for i in (0, 1, 2))
    assert rate == pytest.approx(32e3 / ms, rel=0.1) and gflops == pytest.approx(
        rate * shape.flops_per_token() / 1e9, abs=0.1
    )
    for sizes in ((), ("--n_layer=1",)):
        assert side_by_side(tmp_path / "theirs", f"--write={file}", *sizes).code == 0
    headings = re.findall(
        r"^## Training (\d) blocks of width 32, 61 ids, 2 x 16 tokens beside theirs, ",
        file.read_text(),
        re.M,
    )
    assert headings == ["2", "1"]


@pytest.mark.parametrize(
    "option, words",
    [
        ("--position=rope", "position='rope'"),
        ("--norm=rmsnorm", "norm='rmsnorm'"),
        ("--mlp=relu2", "mlp='relu2'"),
        ("--n_block=2", "n_block=2"),
    ],
)
def test_a_peer_that_has_no_such_shape(tmp_path, option, words):
    run = side_by_side(peer(tmp_path / "theirs"), option)
    assert run.code == 2 and words in run.err and "theirs has" in run.err


def test_a_peer_of_another_size_or_that_loops(tmp_path):
    run = side_by_side(peer(tmp_path / "theirs", wider="'n_embd': 64"))
    assert run.code == 2 and "parameters and ours" in run.err
    looping = peer(
        tmp_path / "looping",
        "n_prelude: int; n_block: int; n_coda: int; n_loop: int; bptt_k: int; input_injection: str",
    )
    run = side_by_side(looping, "--norm=rmsnorm", "--n_block=1", "--input_injection=add")
    assert run.code == 2 and "input_injection='add': must be 'inject' or 'passthrough'" in run.err


def test_depth_drawn_for_each_step_compiles_nothing_new():
    torch._dynamo.reset()
    scored, step = training_step(
        options(n_block=1, n_loop=3, bptt_k=2, loop_sampling="poisson"),
        CPU,
        torch.float32,
        compiled=True,
    )
    for n in (1, 4):
        step(n)
    graphs, generator = torch._dynamo.utils.counters["stats"], torch.Generator().manual_seed(0)
    before, drawn = (
        graphs["unique_graphs"],
        {sample_loops(scored.model.config, generator) for _ in range(20)},
    )
    for depth in drawn:
        step(depth)
    assert before > 0 and len(drawn) > 3 and graphs["unique_graphs"] == before


class Attention(TorchDispatchMode):
    """Notes the number types that torch's attention works on, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.seen.append((str(func).split(".")[1], args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "loop"])
def test_attention_is_in_float32_under_autocast_on_a_cpu(recompute):
    shape = options(n_block=2, n_loop=2, recompute=recompute, dropout=0.0)
    gradients, seen = [], Attention()
    for dtype in (torch.float32, torch.bfloat16):
        scored, step = training_step(shape | {"grad_clip": 0.0}, CPU, dtype)
        kept = {}
        for name, p in scored.named_parameters():
            p.register_post_accumulate_grad_hook(
                lambda p, name=name, kept=kept: kept.update({name: p.grad.clone()})
            )
        with seen:
            step()
        gradients.append(torch.cat([kept[name].flatten() for name in sorted(kept)]))
    assert {dtype for _, dtype in seen.seen} == {torch.float32}
    backward = [name for name, _ in seen.seen if "backward" in name]
    assert len(backward) == 8 and len(seen.seen) == (16 if recompute in ("none", "cheap") else 24)
    full, half = gradients
    assert 0 < (full - half).norm() < 0.02 * full.norm()


def test_attention_in_float32_takes_masks_and_gives_the_low_type():
    q, mask = torch.randn(2, 4, 9, 8), torch.randn(9, 9)
    with autocast(CPU, torch.bfloat16):
        for each in (mask, mask > 0, mask.bfloat16()):
            y = F.scaled_dot_product_attention(q.bfloat16(), q, q, each)
            with torch.autocast("cpu", enabled=False):
                low = q.bfloat16().float()
                expected = F.scaled_dot_product_attention(
                    low, q, q, each if each.dtype == torch.bool else each.float()
                )
            assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())


def test_gpus_are_known_by_whole_words_of_their_names():
    known = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA GB200": 2500e12,
        "AMD Instinct MI250X": 191.5e12,
    }
    assert {name: data_sheet(name).bfloat16 for name in known} == known
    for name in (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3080 Ti",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA A1000",
    ):
        assert data_sheet(name) is None


def test_the_measured_peak_leaves_random_numbers_alone():
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    peaks = [peak_flops(CPU, torch.float32) for _ in range(2)]
    assert torch.equal(torch.rand(3), first) and peaks[0] == peaks[1] > 1e9


def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it():
    held = torch.ones(2**27)
    assert peak_memory(CPU) > held.nbytes
    child = [
        sys.executable,
        "-c",
        "import torch; from nanorecur import hardware; print(hardware.peak_memory(torch.device('cpu')))",
    ]
    assert (
        int(subprocess.run(child, cwd=ROOT, capture_output=True, check=True).stdout) < held.nbytes
    )


LOOP = dict(n_prelude=1, n_block=2, n_coda=1, n_loop=6)
PLANNED = {
    "plain": dict(optimizer="muon", ema_decay=0.9, n_ahead=3),
    "truncated": dict(**LOOP, bptt_k=2, state_init="noise", dropout=0.1),
    "block": dict(
        **LOOP, recompute="block", position="rope", mlp="swiglu", n_kv_head=2, document_separator=3
    ),
    "loop": dict(**LOOP, recompute="loop", loss_chunk=8),
    "bfloat16": dict(param_dtype="bfloat16", predict_ahead=True),
    "exit": dict(**LOOP, objective="exit", exit_gate="state"),
}


def planned_peak(n, **given):
    """Bytes of a step of n loops at its peak."""
    return sum(
        estimate.memory(
            options(
                **{**LOOP, "n_loop": n, "max_loops": 64, "block_size": 64, "dropout": 0.0, **given}
            ),
            None,
            torch.float32,
        ).values()
    )


def test_memory_of_loops():
    """Truncated it does not grow; recomputed it grows by a state (B, T, C) a loop; else by all that a loop makes."""
    state = 4 * 2 * 64 * 32
    assert planned_peak(32, bptt_k=2) <= 1.03 * planned_peak(2, bptt_k=2)
    assert planned_peak(20, recompute="loop") - planned_peak(10, recompute="loop") == 10 * state
    assert (
        planned_peak(20, recompute="cheap") < 0.8 * planned_peak(20)
        and planned_peak(20) - planned_peak(10) > 200 * state
    )


@pytest.mark.parametrize(
    "case, dtype", [*((case, torch.float32) for case in PLANNED), ("bfloat16", torch.bfloat16)]
)
def test_planned_bytes_are_those_of_the_step(monkeypatch, case, dtype):
    """What lives on tensors without contents is what lives on real ones, but for a norm's statistics in bfloat16."""
    autocast(CPU, torch.bfloat16)  # its kernel is there from now on, for both
    planned = estimate.memory(options(**PLANNED[case]), None, dtype, gpu=False)
    monkeypatch.setattr(estimate, "FakeTensorMode", contextlib.nullcontext)
    real = estimate.memory(options(**PLANNED[case]), None, dtype, gpu=False)
    assert planned == (real if dtype == torch.float32 else pytest.approx(real, rel=0.01))


RESIDENT = """
import json, sys, torch
from nanorecur import estimate, hardware
tiny, config = map(json.loads, sys.argv[1:])
cpu = torch.device("cpu")
estimate.training_step(tiny, cpu, torch.float32)[1]()  # what is loaded once
before = hardware.peak_memory(cpu)
step = estimate.training_step(config, cpu, torch.float32, micro_steps=2)[1]
step(), step()
print(hardware.peak_memory(cpu) - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another malloc keeps other parts of what is freed"
)
@pytest.mark.parametrize(
    "case",
    [
        dict(n_layer=3),
        dict(n_prelude=1, n_block=1, n_coda=1, n_loop=4, bptt_k=1, batch_size=8),
        dict(n_layer=8, recompute="block", loss_chunk=256),
    ],
)
def test_planned_memory_is_what_a_process_takes(case):
    config = options(
        **{
            **dict(
                n_embd=256,
                block_size=256,
                batch_size=5,
                vocab_size=4096,
                gradient_accumulation_steps=2,
            ),
            **case,
        }
    )
    planned = sum(estimate.memory(config, None, torch.float32, gpu=False).values())
    child = [sys.executable, "-c", RESIDENT, json.dumps(options()), json.dumps(config)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    taken = int(subprocess.run(child, cwd=ROOT, env=exact, capture_output=True, check=True).stdout)
    print(f"planned {planned / 2**20:.0f} MiB, taken {taken / 2**20:.0f} MiB")
    assert planned > 100 * 2**20 and taken == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_number_types_of_a_plan_are_those_of_cuda(recompute):
    """Attention in bfloat16, the loss in float32; afterwards autocast on a CPU is as before."""

    def types(gpu):
        seen = {}

        class Types(estimate.Bytes):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = str(func).split(".")[1]
                if name in ("_scaled_dot_product_flash_attention_for_cpu", "_log_softmax"):
                    seen.setdefault(name, set()).add(args[0].dtype)
                return super().__torch_dispatch__(func, types, args, kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimate, "Bytes", Types)
            estimate.memory(
                options(recompute=recompute, dropout=0.1 * gpu), None, torch.bfloat16, gpu
            )
        return seen

    attention, loss = "_scaled_dot_product_flash_attention_for_cpu", "_log_softmax"
    assert types(gpu=True) == {attention: {torch.bfloat16}, loss: {torch.float32}}
    assert types(gpu=False)[attention] == {torch.float32}


def test_planned_memory_of_many_gpus():
    one, eight = (
        estimate.memory(options(n=n, gradient_accumulation_steps=16), None, torch.float32)
        for n in (1, 8)
    )
    assert eight == one  # the buckets are the gradients, which the second micro-step finds there
    alone, eight = (
        estimate.memory(options(n=n, gradient_accumulation_steps=n), None, torch.float32)
        for n in (1, 8)
    )
    assert eight == alone | {"all-reduce": one["gradients"]}
    for micro_steps in (1, 2):
        shared = estimate.memory(
            options(n=8, gradient_accumulation_steps=8 * micro_steps, shard=True),
            None,
            torch.float32,
        )
        assert shared["optimizer"] == one["optimizer"] / 8 and "all-reduce" not in shared
        assert shared["gradients"] == one["gradients"] / (8 if micro_steps == 1 else 1)


def test_what_a_divided_model_sends():
    """Blocks of the loop at each call: four loops forward, the last two backward, a block before and one after."""
    model = build(n_loop=4, bptt_k=2)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    backward = rest + blocks[0] + 2 * blocks[1] + 2 * blocks[2] + blocks[3]
    assert estimate.traffic(model, None) == (2 * backward + 2 * blocks[1] + 2 * blocks[2], backward)


@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "loop"])
def test_flops_computed_anew(recompute):
    """Counted by torch; the backward pass leaves out what it can of the last product."""
    config = options(**LOOP, bptt_k=2, recompute=recompute, gradient_accumulation_steps=1)
    scored, step = training_step(config, CPU, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    known = scored.flops_per_token() + estimate.anew(scored.model, recompute, None)
    counted = counter.get_total_flops() / (config["batch_size"] * config["block_size"])
    assert 0.93 * known <= counted <= known and (recompute != "none" or counted == known)


def test_planned_time():
    """Of a step: FLOPs by pace; the all-reduce of the last micro-step, as far as no backward pass hides it."""
    config = options(n=4, gradient_accumulation_steps=8, efficiency=0.5, link=0.0, network=10.0)
    scored, gpu = estimate.build(config, CPU), data_sheet("H100")
    took = estimate.seconds(config, scored, gpu, 1e12)
    one = scored.flops_per_token() * 32 / 0.5e12
    assert took["arithmetic"] == pytest.approx(2 * one)
    sent = 1.5 * 4 * sum(p.numel() for p in scored.parameters())
    assert sent / 450e9 < 2 / 3 * one and took["link"] == 0
    slow = estimate.seconds(config | {"link": 1e-3}, scored, gpu, 1e12)
    assert slow["link"] == pytest.approx(sent / 1e6 - 2 / 3 * one)
    assert estimate.link_of(config | {"n": 16}, gpu) == 10e9


def planned(*arguments):
    run = Run(
        "bench.py",
        "plan",
        "--n_embd=64",
        "--n_head=4",
        "--n_block=1",
        "--n_loop=2",
        "--loop_sampling=uniform",
        "--max_loops=8",
        "--vocab_size=512",
        "--block_size=64",
        "--gradient_accumulation_steps=8",
        "--max_iters=1000",
        *arguments,
    )
    return run


def test_a_plan_says_what_limits():
    run = planned("--gpu=h100", "--n=2")
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    assert (
        lines[1].split()[-2:] == ["2", "8"]
        and "assumed" in run.out
        and "What limits is arithmetic" in lines[-1]
    )
    rate, hours = (
        float(re.search(words, run.out)[1].replace(",", ""))
        for words in (r"([\d,]+) tokens/s", r"take ([\d,.]+) hours")
    )
    assert hours == pytest.approx(8 * 12 * 64 * 1000 / rate / 3600, abs=0.01)
    assert "What limits is the link" in planned("--gpu=h100", "--n=2", "--link=1e-6").out
    full = planned("--gpu=rtx-3080", "--batch_size=30000").out
    helps = dict(re.findall(r"^  --(\w+)=\w+ +([\d,]+) MiB", full, re.M))
    assert "What limits is memory" in full and set(helps) == {
        "recompute",
        "loss_chunk",
        "batch_size",
    }
    measured = planned("--gpu=cpu", "--device=cpu", "--batch_size=2").out
    assert "measured here" in measured


@pytest.mark.parametrize(
    "option, words",
    [
        ("--gpu=k80", "must be cpu or one of"),
        ("--n=3", "a multiple of the n=3"),
        ("--efficiency=2", "at most 1"),
        ("--n=0", "n=0"),
        ("--recompute=all", "none or cheap or block or loop"),
        ("--dtype=float16", "dtype='float16'"),
    ],
)
def test_a_plan_of_what_cannot_be(option, words):
    run = planned(option)
    assert run.code == 2 and words in run.err and run.err.count("\n") == 1
