"""bench.py: what it prints of training, decoding and plans, and what it refuses."""

import concurrent.futures
import itertools
import re
import sys
import time

import pytest
import torch
from conftest import Run, build, train

from nanorecur import hardware
from nanorecur.hardware import peak_flops, peak_memory

CPU = torch.device("cpu")
TINY = (
    "--n_embd=32 --n_head=4 --block_size=16 --vocab_size=61 --batch_size=2 --rounds=1 --steps=1 "
    "--device=cpu --compile=False"
).split()
LOOPED = "--n_prelude=1 --n_block=1 --n_coda=0".split()


class SameProcess(concurrent.futures.ThreadPoolExecutor):
    """Stands for a process of its own where a test is not about its memory."""

    def __init__(self, max_workers, mp_context):
        super().__init__(max_workers)


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", SameProcess)


def number(cell):
    return float(cell.replace(",", "").rstrip("%"))


def table_rows(text):
    """Return {first cell: other cells} of all Markdown tables in a text."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines}


# -----------------------------------------------------------------------------
# train
def test_a_step_is_timed_at_each_loop_count(one_process):
    run = Run("bench.py", *TINY, *LOOPED, "--loops=1,4", "--optimizer=muon")
    assert run.code == 0, run.err
    rows = [line.split() for line in run.out.splitlines()[2:]]
    model, peak = build(n_coda=0, n_block=1), peak_flops(CPU, torch.float32)
    assert [row[0] for row in rows] == ["1", "4"]
    for row in rows:
        ms, rate, flops, gflops, mfu, memory = map(number, row[1:])
        assert flops == pytest.approx(model.flops_per_token(int(row[0])) / 1e6, abs=0.01)
        assert rate == pytest.approx(32 / ms * 1e3, rel=0.1)  # tokens of a step
        assert gflops == pytest.approx(rate * flops / 1e3, rel=0.2, abs=0.06)
        assert mfu == pytest.approx(1e11 * gflops / peak, abs=0.1 + 5e9 / peak)
        assert memory == pytest.approx(peak_memory(CPU) / 2**20, rel=0.1)


def test_the_time_of_a_step_is_that_of_a_turn_by_its_steps(one_process, monkeypatch):
    ticks = itertools.count()  # seconds: every turn takes one
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    run = Run("bench.py", *TINY, "--n_layer=1", "--steps=4", "--rounds=3")
    ms, rate = map(number, run.out.splitlines()[2].split()[1:3])
    assert (ms, rate) == (250, 128)


def test_spectral_clipping_is_timed_by_itself_and_shared_among_its_steps(one_process):
    clip = "--spectral_clip_beta=1 --spectral_clip_interval=10 --gradient_accumulation_steps=4"
    run = Run("bench.py", *TINY, "--n_layer=2", *clip.split())
    words = r"every block: ([\d.]+) ms; ([\d.]+)% of a training step of 4 micro-steps, every 10"
    ms, share = re.search(words, run.out).groups()
    step = float(run.out.splitlines()[2].split()[1])
    assert float(share) == pytest.approx(100 * float(ms) / 40 / step, rel=0.2)


def peak_mib(*options):
    """Return the last column of bench.py train: MiB of a process at its peak."""
    run = Run("bench.py", *TINY, *options)
    assert run.code == 0, run.err
    return [number(line.split()[-1]) for line in run.out.splitlines()[2:]]


@pytest.mark.slow
def test_memory_is_that_of_a_process_that_makes_the_steps_of_this_row():
    """Five more loops take more; a process that computed something else would not."""
    big = ("--n_embd=128", "--block_size=256", "--batch_size=16")
    one, six = peak_mib(*LOOPED, *big, "--loops=1,6")
    kept = 5 * 16 * 16 * 256 * 128 * 4 / 2**20  # MiB: at least 16 (B, T, C) of each loop
    assert kept < six - one < 2 * kept


@pytest.mark.slow
def test_memory_is_that_of_the_vocabulary_of_the_data(corpus):
    """With 50,304 ids in place of the characters it would be 300 MiB more."""
    size = ("--n_layer=1", "--n_embd=256", f"--dataset={corpus}")
    known = [option for option in TINY if "vocab_size" not in option and "n_embd" not in option]
    run = Run("bench.py", *known, *size)
    assert "vocabulary 100, " in run.out
    (explicit,) = peak_mib(*size, "--vocab_size=100")
    assert number(run.out.splitlines()[2].split()[-1]) < explicit + 100


# -----------------------------------------------------------------------------
# train --peer
PEER = """
from dataclasses import dataclass
import torch
from model import GPT as Ours, GPTConfig as OurConfig

@dataclass(kw_only=True)
class GPTConfig:
    block_size: int
    vocab_size: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool = True
    FIELDS

class GPT(Ours):
    def __init__(self, config):
        super().__init__(OurConfig(**{**vars(config), WIDER}))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("it speaks")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)

    def generate(self, idx, count, top_k):
        for _ in range(count):
            idx = torch.cat((idx, self(idx)[0][:, -1:].argmax(-1)), dim=1)
"""
LOOPING = (
    "n_prelude: int; n_block: int; n_coda: int; n_loop: int; bptt_k: int; input_injection: str"
)


def make_peer(folder, fields="n_layer: int", wider=""):
    """Make a checkout with a model.py like nanoGPT's."""
    folder.mkdir()
    (folder / "model.py").write_text(PEER.replace("FIELDS", fields).replace("WIDER", wider))
    return folder


def side_by_side(peer, *options):
    return Run("bench.py", "train", f"--peer={peer}", *TINY, "--n_layer=2", *options)


def test_a_row_for_each_trainer_and_speed_to_the_peer(tmp_path):
    run = side_by_side(make_peer(tmp_path / "theirs"), "--optimizer=muon")
    assert run.code == 0, run.err
    assert "it speaks" in run.err and "it speaks" not in run.out
    rows = table_rows(run.out)
    assert set(rows) == {"model", "---", "ours, float32", "ours, bfloat16", "theirs"}
    assert rows["model"][-1] == "speed to theirs at its best" and rows["theirs"][-1] == "1.00"
    ms, rate, gflops, _, ratio = map(number, rows["ours, float32"])
    flops = build(n_layer=2).flops_per_token()
    assert f"{flops / 1e6:,.2f} MFLOP/token" in run.out
    assert rate == pytest.approx(32e3 / ms, rel=0.1)
    assert gflops == pytest.approx(rate * flops / 1e9, abs=0.1)
    assert ratio == pytest.approx(number(rows["theirs"][0]) / ms, rel=0.05)


def test_the_number_types_that_are_timed_are_those_asked_for(tmp_path):
    run = side_by_side(make_peer(tmp_path / "theirs"), "--dtypes=bfloat16")
    assert run.code == 0, run.err
    assert set(table_rows(run.out)) == {"model", "---", "ours, bfloat16", "theirs"}


def test_a_section_is_replaced_by_one_of_the_same_shape_only(tmp_path):
    file, peer = tmp_path / "B.md", make_peer(tmp_path / "theirs")
    for n_layer in (2, 2, 1):
        run = side_by_side(peer, f"--write_to={file}", f"--n_layer={n_layer}")
        assert run.code == 0, run.err
    shape = "blocks? of width 32, 61 ids, 2 x 16 tokens beside theirs, "
    headings = re.findall(rf"^## Training (\d) {shape}", file.read_text(), re.M)
    assert headings == ["2", "1"] and run.out.strip() in file.read_text()


def test_memory_of_a_peer_stands_beside_ours_with_options_that_save(tmp_path, one_process):
    run = side_by_side(make_peer(tmp_path / "theirs"), "--peak_memory")
    assert run.code == 0, run.err
    rows = table_rows(run.out.split("### Memory")[1])
    names = ["", ", loss_chunk=256", ", and recompute=cheap", ", or recompute=block"]
    ours = [f"ours{name}" for name in [*names, ", and optimizer=muon"]]
    assert [*rows] == ["model", "---", "theirs", *ours]
    assert rows["theirs"][1] == "1.00" and rows["model"][2] == "MALLOC_MMAP_THRESHOLD_=4194304"
    for mib, share, *_ in list(rows.values())[2:]:
        assert number(share) == pytest.approx(number(mib) / number(rows["theirs"][0]), abs=0.02)


@pytest.mark.slow
def test_depth_that_is_sampled_is_timed_per_flop_and_compiles_nothing_new(tmp_path):
    peer = make_peer(tmp_path / "looping", LOOPING, "'bptt_k': 0, 'norm': 'rmsnorm'")
    options = ("--norm=rmsnorm", "--n_block=1", "--n_loop=2", "--max_loops=4", "--compile=True")
    run = side_by_side(peer, *options, "--dtypes=float32")
    assert run.code == 0, run.err
    rows = table_rows(run.out.split("### Sampled depth, compiled")[1])
    _, gflop, _, ratio = map(number, rows["fixed"])
    assert gflop == pytest.approx(
        32e-9 * build(n_prelude=0, n_block=1, n_coda=0, n_loop=2).flops_per_token(), abs=0.001
    )
    assert ratio == 1 and "Graphs compiled after warm-up: 0." in run.out


@pytest.mark.slow
def test_a_depth_that_the_config_samples_is_timed_without_a_peer_too(one_process):
    shape = ("--n_block=1", "--n_loop=2", "--max_loops=4", "--loop_sampling=uniform", "--steps=3")
    run = Run("bench.py", *TINY, *shape, "--compile=True")
    assert run.code == 0, run.err
    rows = table_rows(run.out.split("Sampled depth, compiled:")[1])
    assert set(rows) == {"depth", "---", "fixed", "uniform"}
    for ms, gflop, per_gflop, _ in (map(number, rows[name]) for name in ("fixed", "uniform")):
        assert per_gflop == pytest.approx(ms / gflop, rel=0.3)  # of rounded numbers
    assert "Graphs compiled after warm-up: 0." in run.out
    fixed = Run("bench.py", *TINY, *shape, "--loop_sampling=fixed", "--compile=True")
    assert fixed.code == 0 and "Sampled depth" not in fixed.out


@pytest.mark.parametrize(
    "option, words",
    [
        ("--position=rope", "position='rope': must be 'learned', all that"),
        ("--norm=rmsnorm", "norm='rmsnorm': must be 'layernorm', all that"),
        ("--mlp=relu2", "mlp='relu2': must be 'gelu', all that"),
        ("--n_block=2", "n_block=2: must be 0, all that"),
    ],
)
def test_a_shape_that_a_peer_does_not_have_is_refused(tmp_path, option, words):
    run = side_by_side(make_peer(tmp_path / "theirs"), option)
    assert run.code == 2 and words in run.err and "theirs has" in run.err


def test_peers_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_peer(tmp_path / folder / "x")
    run = side_by_side(f"{tmp_path / 'a' / 'x'},{tmp_path / 'b' / 'x'}")
    assert run.code == 2 and "must be folders of different names" in run.err


def test_a_peer_of_another_size_is_refused(tmp_path):
    run = side_by_side(make_peer(tmp_path / "theirs", wider="'n_embd': 64"))
    assert run.code == 2
    assert re.search(r"theirs': must be one .* 27,936 parameters as ours, not 105,024", run.err)


def test_a_peer_that_loops_has_two_injections(tmp_path):
    peer = make_peer(tmp_path / "looping", LOOPING)
    run = side_by_side(peer, "--norm=rmsnorm", "--n_block=1", "--input_injection=add")
    words = "input_injection='add': must be 'inject' or 'passthrough', all that"
    assert run.code == 2 and words in run.err


# -----------------------------------------------------------------------------
# decode
DECODE = (
    "--prompt_tokens=4 --new_tokens=2 --batch_sizes=1,2 --rounds=1 --n_embd=48 --n_layer=1 "
    "--vocab_size=64 --block_size=32 --device=cpu --compile=False"
).split()


@pytest.fixture(scope="module")
def decoded(tmp_path_factory, corpus):
    """A tiny bench.py decode with a trained model, and the file that it wrote to."""
    folder = tmp_path_factory.mktemp("decoded")
    assert train(corpus, folder / "out", "--max_iters=1", "--eval_iters=1").code == 0
    (folder / "B.md").write_text("# Benchmarks\n\n## another machine\n\nkept\n")
    options = [f"--looped={folder / 'out'}", f"--dataset={corpus}", "--loops=3,"]
    options += ["--drafts=[[1,2]]", "--exit_thresholds=0.1,", f"--write_to={folder / 'B.md'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # as if it were not installed
        run = Run("bench.py", "decode", *DECODE, *options)
    assert run.code == 0, run.err
    return run, folder / "B.md"


@pytest.mark.slow
def test_decoding_is_compared_with_transformers_and_a_peer(tmp_path):
    pytest.importorskip("transformers")
    peer = make_peer(tmp_path / "theirs")
    run = Run("bench.py", "decode", f"--peer={peer}", *DECODE)
    assert run.code == 0, run.err
    lines = [line.strip("| ").split(" | ") for line in run.out.splitlines() if line[:2] == "| "]
    others = [f"transformers' GPT-2, {dtype}" for dtype in ("float32", "bfloat16")]
    others += ["nanoGPT's generate, float32"]
    assert lines[0][5:] == [f"speed to {name}" for name in others]
    ratios = {row[1]: row[-3:] for row in lines if row[0] == "1"}
    assert [ratios[name][number] for number, name in enumerate(others)] == ["1.00"] * 3


def test_decoding_is_a_section_of_a_file_whose_others_stay(decoded):
    run, file = decoded
    text = file.read_text()
    assert text.count("\n## ") == 2 and "## another machine\n\nkept\n" in text
    assert run.out[run.out.index("## ") :].strip() in text


def test_decoding_is_measured_with_its_cache_exits_and_drafts(decoded):
    run, _ = decoded
    assert "transformers is not installed: not timed" in run.out
    lines = [line.strip("| ").split(" | ") for line in run.out.splitlines() if line[:2] == "| "]
    contestants = {(row[0], row[1]) for row in lines if "float" in row[1]}
    for rows in ("1", "2"):
        for shape in ("1 block", "2 + 4x4 + 2"):
            assert {(rows, f"{shape}, float32"), (rows, f"{shape}, bfloat16")} < contestants
    assert ["full", f"{20 * 2 * 48 * 4:,}"] in [row[:2] for row in lines]
    exits = {row[1]: row for row in lines if row[0] == "3" and len(row) == 8}
    assert set(exits) == {"0", "0.1"}
    assert exits["0"][3:6] == ["+0.00%", "3.00", "0%"] and exits["0"][6:] == ["1.00", "1.00"]
    ((*pair, accepted, same, _, _),) = [row[1:] for row in lines if row[0] == "3" and len(row) == 7]
    assert pair == ["1", "2"] and same == "100.0%, 100.0%"


@pytest.mark.parametrize(
    "option, words",
    [
        ("--drafts=2,3", "drafts=(2, 3): must be pairs of counts such as [[2,3],[4,6]]"),
        ("--drafts=[[0,3]]", "drafts=((0, 3),): must be pairs of counts such as"),
        ("--exit_thresholds=0.1,-1", "exit_thresholds=(0.1, -1): must be positive numbers"),
        ("--dataset=nothing", "nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_minutes_of_timing(corpus, decoded, option, words):
    _, file = decoded
    options = [f"--looped={file.parent / 'out'}", f"--dataset={corpus}", option]
    run = Run("bench.py", "decode", *DECODE, *options)
    assert run.code == 2 and run.err.count("\n") == 1  # no line of a timing
    assert run.out == "" and words in run.err


def test_a_plain_model_has_no_exits_to_measure(corpus, tmp_path):
    plain = ["--n_prelude=0", "--n_block=0", "--n_loop=1", "--n_layer=1", "--n_coda=0"]
    assert train(corpus, tmp_path / "out", "--max_iters=1", "--eval_iters=1", *plain).code == 0
    options = [f"--looped={tmp_path / 'out'}", f"--dataset={corpus}"]
    run = Run("bench.py", "decode", *DECODE, *options)
    assert run.code == 2 and "must be a model in which something is looped" in run.err


@pytest.mark.parametrize(
    "options, name",
    [
        ("--n_layer=3", "3 blocks"),
        ("--n_prelude=1 --n_block=2 --n_coda=1 --n_loop=3", "1 + 2x3 + 1 blocks"),
        ("--n_layer=4 --loop_groups=[[0,1],[3]] --loop_counts=4,2", "2x4 + 1 + 1x2 blocks"),
    ],
)
@pytest.mark.slow
def test_what_is_decoded_is_named_by_its_blocks(monkeypatch, options, name):
    monkeypatch.setitem(sys.modules, "transformers", None)
    run = Run("bench.py", "decode", *DECODE, *options.split(), "--batch_sizes=1,")
    assert run.code == 0, run.err
    for shown in (name, "2 + 4x4 + 2"):
        assert f"| 1 | {shown}, float32 | " in run.out


def test_what_is_timed_is_said_every_so_often(one_process, monkeypatch):
    monkeypatch.setattr(hardware.Progress.__init__, "__defaults__", (0.01,))
    run = Run("bench.py", *TINY, *LOOPED, "--loops=3,", "--rounds=2", "--steps=20")
    assert run.code == 0, run.err
    assert re.search(r"^  \d+ s: memory and first steps at 3 loops$", run.err, re.M)
    assert re.search(r"^  \d+ s: round 2 of 2: 3 loops$", run.err, re.M)


# -----------------------------------------------------------------------------
# plan
PLAN = (
    "--n_embd=64 --n_head=4 --n_block=1 --n_loop=2 --loop_sampling=uniform --max_loops=4 "
    "--vocab_size=512 --block_size=64 --gradient_accumulation_steps=8 --max_iters=1000000000"
).split()


SHALLOW = "--n_block=0 --n_layer=1 --n_loop=1".split()


def plan(*options):
    run = Run("bench.py", "plan", *PLAN, *options)
    assert run.code == 0, run.err
    return run.out.splitlines()


def test_a_plan_says_what_takes_memory_and_how_long_the_run_takes():
    lines = plan("--gpu=h100", "--n_gpus=2")
    assert lines[0].endswith("4 x 12 x 64 tokens a step on each of 2 x h100 in bfloat16")
    assert lines[1].split() == ["MiB", "with", "loops", "2", "4"]
    parts = {line[:16].strip(): [*map(number, line[16:].split())] for line in lines[2:7]}
    assert [*parts] == ["weights", "optimizer", "gradients", "activations", "in all"]
    for column in (0, 1):
        summed = sum(parts[name][column] for name in parts if name != "in all")
        assert parts["in all"][column] == pytest.approx(summed, abs=2)
    assert parts["activations"][1] > 1.3 * parts["activations"][0]
    assert lines[7].endswith(" at 40% (assumed: measured on none) of 989 TFLOP/s")
    ms = number(re.search(r"a step: ([\d.]+) ms of arithmetic, 0.0 ms of waiting", lines[8])[1])
    words = r"([\d,]+) tokens/s; 1,000,000,000 steps of 6,144 tokens take ([\d,.]+) hours"
    rate, hours = map(number, re.search(words, lines[9]).groups())
    assert hours == pytest.approx(6144 * 1e9 / rate / 3600, rel=0.01)
    assert ms == pytest.approx(1e3 * 6144 / rate, abs=0.06)
    words = r"into the 76.0 GiB .* does --batch_size=(\d+)\. What limits is arithmetic\."
    largest = int(re.search(words, lines[10])[1])
    row = (76 * 1024 - parts["in all"][1]) / (largest - 12)  # MiB of each row more
    assert row == pytest.approx(parts["activations"][1] / 12, rel=0.01)


def test_a_plan_with_a_slow_link_is_limited_by_it():
    lines = plan("--gpu=h100", "--n_gpus=2", "--link_gbps=1e-6", *SHALLOW)
    assert lines[-1].endswith("is the link.")


@pytest.mark.slow
def test_a_plan_that_does_not_fit_names_what_would_help():
    text = "\n".join(plan("--gpu=rtx-3080", "--n_embd=2048", "--batch_size=2000", *SHALLOW))
    found = re.findall(r"^  --(\w+)=(\w+) +([\d,]+) MiB, (fits|too much)$", text, re.M)
    assert "What limits is memory: " in text and "more than the 9.5 that can be used" in text
    assert {name for name, *_ in found} == {"recompute", "loss_chunk", "batch_size"}
    for *_, mib, verdict in found:
        assert (number(mib) <= 0.95 * 10 * 1024) == (verdict == "fits")


def test_a_plan_for_this_cpu_measures_it():
    lines = plan("--gpu=cpu", "--batch_size=2", *SHALLOW)
    assert " x cpu in float32" in lines[0] and "(measured here) of" in "\n".join(lines)


# -----------------------------------------------------------------------------
# what is refused
@pytest.mark.parametrize(
    "options, words",
    [
        ("--loops=0", "loops=(0,): must be whole numbers of at least 1"),
        ("--loops=1,2", "loops=(1, 2): must be left out: nothing is looped in this model"),
        ("--gpu=a100", "gpu='a100': must be left out of train: it belongs to plan"),
        (
            "--peak_memory",
            "peak_memory=True: must be left out of train: it belongs to train --peer",
        ),
        (
            "--write_to=x.md",
            "write_to='x.md': must be left out of train: it belongs to train --peer",
        ),
        ("--peer=nowhere", "peer='nowhere': must be a folder with a model.py"),
        ("--rounds=0", "rounds=0: must be at least 1"),
        ("--dtypes=float32", "dtypes='float32': must be left out of train: it belongs to train"),
        ("--steps=0", "steps=0: must be at least 1"),
        ("--threads=-1", "threads=-1: must be at least 0"),
        ("--n_embd=30", "n_embd=30: must be a multiple of n_head=4"),
        ("--batch_size=0", "batch_size=0: must be at least 1"),
        ("--optimizer=sgd", "optimizer='sgd': must be one of adamw, muon"),
        ("--learning_rte=1", "unknown option 'learning_rte', did you mean 'learning_rate'?"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(options, words):
    run = Run("bench.py", *TINY, options)
    assert run.code == 2 and run.err.count("\n") == 1
    assert run.err.startswith(f"bench.py: {words}"), run.err


@pytest.mark.parametrize(
    "options, words",
    [
        ("decode --new_tokens=1", "new_tokens=1: must be at least 2"),
        ("decode --drafts=[[2,3]]", "drafts=((2, 3),): must be left out of decode: it belongs to"),
        ("decode --batch_sizes=0,", "batch_sizes=(0,): must be whole numbers of at least 1"),
        ("decode --batch_sizes=", "batch_sizes=(): must be not empty"),
        ("decode --dtypes=float16", "dtypes='float16': must be of float32,bfloat16"),
        ("decode --new_tokens=2000", "new_tokens=2000: must be what block_size holds, behind"),
        ("decode --write_to=nowhere/x.md", "write_to='nowhere/x.md': must be in a folder that"),
        ("decode --steps=2", "steps=2: must be left out of decode: it belongs to train or train"),
        ("decode --n_head=4 --n_embd=36", "position='rope': must be another one with heads of 9"),
        ("decode --prompt_tokens=0", "prompt_tokens=0: must be at least 1"),
        ("plan --gpu=k80", "gpu='k80': must be cpu or one of b200, "),
        ("plan --gpu=rtx4090", "gpu='rtx4090': has no data sheet here, did you mean rtx-4090?"),
        ("plan --loops_of_level=1,0", "loops_of_level=(1, 0): must be ()"),
        ("plan --n_gpus=3", "gradient_accumulation_steps=40: must be a multiple of the 3 "),
        ("plan --dtype=float16", "dtype='float16': must be auto, float32 or bfloat16"),
        (
            "plan --gpu=t4 --dtype=bfloat16",
            "dtype='bfloat16': must be one that the data sheet of t4",
        ),
    ],
)
def test_a_wrong_option_of_decode_or_plan_is_named_in_one_line(options, words):
    run = Run("bench.py", *options.split(), "--vocab_size=61")
    assert run.code == 2 and run.err.count("\n") == 1
    assert run.err.startswith(f"bench.py: {words}"), run.err
