"""bench.py: what it prints of training and decoding, what it times; and device.py."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, Run, build, train
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import read_knobs
from device import autocast, data_sheet, peak_flops, peak_memory
from model import sample_loops
from plan import training_step

CPU = torch.device("cpu")


def options(**given):
    """All options of train.py and GPTConfig, of a tiny model unless given."""
    knobs = read_knobs(ROOT / "train.py") | read_knobs(ROOT / "model.py", "GPTConfig")
    return {name: knob.value for name, knob in knobs.items()} | {**TINY, "n_layer": 2, "batch_size": 2, **given}


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
    assert memory > 50
    peak = peak_flops(torch.device("cpu"), torch.float32)  # measured once
    assert float(rows[1][5].rstrip("%")) == pytest.approx(1e11 * gflops / peak, abs=0.1 + 5e9 / peak)


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
    return Run("bench.py", "train", f"--peer={peer}", "--n_layer=2", "--n_embd=32", "--n_head=4", "--block_size=16", "--vocab_size=61",
               "--batch_size=2", "--rounds=2", "--steps=1", "--device=cpu", "--compile=False", "--optimizer=muon", *arguments)  # fmt: skip


def test_training_beside_a_peer(tmp_path):
    """A row for each contestant; the ratio is to the peer; another shape is another section of the file."""
    file = tmp_path / "B.md"
    run = side_by_side(peer(tmp_path / "theirs"), f"--write={file}")
    assert run.code == 0, run.err
    assert "it speaks" in run.err and "it speaks" not in run.out
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in run.out.splitlines() if line.startswith("| "))}
    assert set(rows) == {"model", "---", "ours, float32", "ours, bfloat16", "theirs"}
    assert rows["theirs"][-1] == "1.00"
    shape = build(n_layer=2)
    assert f"{shape.flops_per_token() / 1e6:,.2f} MFLOP/token" in run.out
    ms, rate, gflops = (float(rows["ours, float32"][i].replace(",", "")) for i in (0, 1, 2))
    assert rate == pytest.approx(32e3 / ms, rel=0.1) and gflops == pytest.approx(rate * shape.flops_per_token() / 1e9, abs=0.1)
    for sizes in ((), ("--n_layer=1",)):
        assert side_by_side(tmp_path / "theirs", f"--write={file}", *sizes).code == 0
    headings = re.findall(r"^## Training (\d) blocks of width 32, 61 ids, 2 x 16 tokens beside theirs, ", file.read_text(), re.M)
    assert headings == ["2", "1"]


@pytest.mark.parametrize("option, words", [
    ("--position=rope", "position='rope'"), ("--norm=rmsnorm", "norm='rmsnorm'"), ("--mlp=relu2", "mlp='relu2'"), ("--n_block=2", "n_block=2"),
])  # fmt: skip
def test_a_peer_that_has_no_such_shape(tmp_path, option, words):
    run = side_by_side(peer(tmp_path / "theirs"), option)
    assert run.code == 2 and words in run.err and "theirs has" in run.err


def test_a_peer_of_another_size_or_that_loops(tmp_path):
    run = side_by_side(peer(tmp_path / "theirs", wider="'n_embd': 64"))
    assert run.code == 2 and "parameters and ours" in run.err
    looping = peer(tmp_path / "looping", "n_prelude: int; n_block: int; n_coda: int; n_loop: int; bptt_k: int; input_injection: str")
    run = side_by_side(looping, "--norm=rmsnorm", "--n_block=1", "--input_injection=add")
    assert run.code == 2 and "input_injection='add': must be 'inject' or 'passthrough'" in run.err


def test_depth_drawn_for_each_step_compiles_nothing_new():
    torch._dynamo.reset()
    scored, step = training_step(options(n_block=1, n_loop=3, bptt_k=2, loop_sampling="poisson"), CPU, torch.float32, compiled=True)
    for n in (1, 4):
        step(n)
    graphs, generator = torch._dynamo.utils.counters["stats"], torch.Generator().manual_seed(0)
    before, drawn = graphs["unique_graphs"], {sample_loops(scored.model.config, generator) for _ in range(20)}
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


@pytest.mark.parametrize("recompute", ["none", "block", "loop"])
def test_attention_is_in_float32_under_autocast_on_a_cpu(recompute):
    shape = options(n_block=2, n_loop=2, recompute=recompute, dropout=0.0)
    gradients, seen = [], Attention()
    for dtype in (torch.float32, torch.bfloat16):
        scored, step = training_step(shape | {"grad_clip": 0.0}, CPU, dtype)
        kept = {}
        for name, p in scored.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name, kept=kept: kept.update({name: p.grad.clone()}))
        with seen:
            step()
        gradients.append(torch.cat([kept[name].flatten() for name in sorted(kept)]))
    assert {dtype for _, dtype in seen.seen} == {torch.float32}
    backward = [name for name, _ in seen.seen if "backward" in name]
    assert len(backward) == 8 and len(seen.seen) == (16 if recompute == "none" else 24)
    full, half = gradients
    assert 0 < (full - half).norm() < 0.02 * full.norm()


def test_attention_in_float32_takes_masks_and_gives_the_low_type():
    q, mask = torch.randn(2, 4, 9, 8), torch.randn(9, 9)
    with autocast(CPU, torch.bfloat16):
        for each in (mask, mask > 0, mask.bfloat16()):
            y = F.scaled_dot_product_attention(q.bfloat16(), q, q, each)
            with torch.autocast("cpu", enabled=False):
                low = q.bfloat16().float()
                expected = F.scaled_dot_product_attention(low, q, q, each if each.dtype == torch.bool else each.float())
            assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())


def test_gpus_are_known_by_whole_words_of_their_names():
    known = {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12, "NVIDIA L40S": 362e12, "NVIDIA L40": 181e12, "NVIDIA L4": 121e12,
             "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA GB200": 2500e12, "AMD Instinct MI250X": 191.5e12}  # fmt: skip
    assert {name: data_sheet(name).bfloat16 for name in known} == known
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3080 Ti", "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA A1000"):
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
    child = [sys.executable, "-c", "import torch, device; print(device.peak_memory(torch.device('cpu')))"]
    assert int(subprocess.run(child, cwd=ROOT, capture_output=True, check=True).stdout) < held.nbytes
