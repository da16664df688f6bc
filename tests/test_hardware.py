"""hardware.py: devices, data sheets, attention under autocast on a CPU, clock and memory."""

import copy
import json
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, build, tokens

from decode import generate
from nanorecur import hardware
from nanorecur.hardware import (
    Progress,
    autocast,
    cast_linear_weights,
    data_sheet,
    find_gpu,
    peak_flops,
    peak_memory,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, words",
    [
        ("tpu", "device='tpu': must be auto, cpu, cuda, cuda:N or mps"),
        ("cuda:x", "device='cuda:x': must be auto, cpu, cuda, cuda:N or mps"),
        ("cuda:99", "device=cuda:99: this torch .* sees no such device; try --device=cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(name, words):
    with pytest.raises(ValueError, match=words):
        hardware.pick_device(name)


def test_auto_is_float32_on_a_cpu_and_float16_is_refused():
    assert hardware.pick_dtype("auto", CPU) == torch.float32
    with pytest.raises(ValueError, match="dtype='float16': must be auto, float32 or bfloat16"):
        hardware.pick_dtype("float16", CPU)


def test_autocast_on_a_cpu_computes_products_in_bfloat16_and_attention_in_float32():
    q, mask = torch.randn(2, 4, 9, 8), torch.randn(9, 9)
    with autocast(CPU, torch.bfloat16):
        assert (mask @ mask).dtype == torch.bfloat16
        for each in (mask, mask > 0, mask.bfloat16()):
            y = F.scaled_dot_product_attention(q.bfloat16(), q, q, each)
            with torch.autocast("cpu", enabled=False):
                low = q.bfloat16().float()
                full_mask = each if each.dtype == torch.bool else each.float()
                expected = F.scaled_dot_product_attention(low, q, q, full_mask)
            assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())


@pytest.mark.parametrize("options", [{}, dict(attention="mla", input_injection="diagonal")])
def test_weights_cast_once_give_the_bits_of_autocast(options):
    model, idx = build(spread=0.1, **options), tokens()
    cast = copy.deepcopy(model)
    cast_linear_weights(cast, torch.bfloat16)
    assert cast.lm_head.weight.dtype == torch.bfloat16
    assert cast.transformer.wte.weight.dtype == torch.float32
    with autocast(CPU, torch.bfloat16), torch.no_grad():
        assert torch.equal(cast(idx, idx)[0], model(idx, idx)[0])
        text, _ = generate(cast, idx, 5, temperature=0)
        assert torch.equal(text, generate(model, idx, 5, temperature=0)[0])


def test_autocast_to_float32_changes_nothing():
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")


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
    others = ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3080 Ti"]
    others += ["NVIDIA GeForce RTX 4080 SUPER", "NVIDIA A1000"]
    assert {name: data_sheet(name) for name in others} == dict.fromkeys(others)


def test_every_data_sheet_has_a_short_name():
    short = {words.lower().replace(" ", "-"): gpu for words, gpu in hardware.GPUS.items()}
    assert {name: find_gpu(name) for name in short} == short
    assert find_gpu("a100-80gb-pcie").link == 32e9
    with pytest.raises(ValueError, match="gpu='k80': must be cpu or one of b200, .*, mi210"):
        find_gpu("k80")


@pytest.mark.parametrize(
    "name, close",
    [
        ("rtx4090", "did you mean rtx-4090\\?"),
        ("H100", "did you mean h100\\?"),
        ("A100 80GB PCIe", "did you mean a100-80gb-pcie\\?"),
        ("v100", "did you mean h100 or .*v100-sxm2"),
    ],
)
def test_a_name_that_is_nearly_known_is_suggested(name, close):
    with pytest.raises(ValueError, match=f"gpu='{name}': has no data sheet here, {close}"):
        find_gpu(name)


def test_the_data_sheet_of_this_cpu_is_measured():
    cpu = find_gpu("cpu")
    assert cpu.float32 == peak_flops(CPU, torch.float32)
    assert cpu.bfloat16 == peak_flops(CPU, torch.bfloat16)
    assert 0.1 < cpu.memory < 1e5  # GiB


def test_the_measured_peak_is_the_pace_of_a_matrix_product():
    """Within a factor of 4, measured at the same time, as other work may come between."""
    peak = hardware.measured_flops.__wrapped__(torch.float32, torch.get_num_threads())
    a, seconds = torch.ones(1024, 1024), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    assert 0.25 < peak * min(seconds) / (2 * 1024**3) < 4


def test_the_measured_peak_leaves_random_numbers_alone():
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    hardware.measured_flops.cache_clear()
    peak_flops(CPU, torch.float32)
    assert torch.equal(torch.rand(3), first)


def test_what_is_going_on_is_said_every_so_often_until_the_end(capsys):
    with Progress(interval=0.02) as progress:
        progress.now("one")
        time.sleep(0.15)
        progress.now("two")
        time.sleep(0.15)
    ended = capsys.readouterr()
    lines = ended.err.splitlines()
    assert ended.out == "" and len(lines) > 2
    assert lines[0] == "  0 s: one" and lines[-1].endswith(": two")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_what_is_done_soon_says_nothing(capsys):
    with Progress():
        pass
    assert capsys.readouterr().err == ""


def test_peak_memory_is_in_bytes_and_at_least_what_this_process_holds():
    held = torch.ones(2**26)
    assert held.nbytes < peak_memory(CPU) < 100 * 2**30


@pytest.mark.slow
def test_peak_memory_is_of_what_this_process_held_at_most():
    before = peak_memory(CPU)
    held = torch.ones(before // 4 + 2**26)  # 4 bytes each: more than the peak so far
    assert before + 2**26 < peak_memory(CPU) < before + held.nbytes + 2**26
    del held
    assert peak_memory(CPU) > before + 2**26


@pytest.mark.slow
def test_peak_memory_is_not_of_the_process_that_started_this_one():
    held = torch.ones(2**28)
    words = "import torch; from nanorecur import hardware"
    words += "; print(hardware.peak_memory(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, check=True)
    assert int(child.stdout) < held.nbytes < peak_memory(CPU)


# -----------------------------------------------------------------------------
# weights laid out for decoding on a CPU


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The path of the file with remembered layouts, on a machine that is not busy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "is_busy", lambda: False)
    return tmp_path / "nanorecur" / "decoding.json"


def never(*arguments):
    raise AssertionError("timed again")


@pytest.mark.parametrize("layout", hardware.LAYOUTS)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_layout_computes_the_same(layout, dtype, near):
    if layout not in hardware.usable_layouts(dtype):
        pytest.skip("this CPU has no packed products of this type")
    model, idx = build(spread=0.1), tokens()
    want = model(idx, idx)[0]
    assert hardware.lay_out(model, dtype, layout) == layout
    difference = (model(idx, idx)[0] - want).abs().max()
    assert difference < near * want.abs().max()
    assert difference > 0 or dtype == torch.float32  # bfloat16 weights act


@pytest.mark.parametrize("fastest", hardware.LAYOUTS)
def test_auto_takes_the_layout_whose_products_are_fastest(fastest, cache, monkeypatch):
    def sleep(layer, dtype, layout):
        return lambda x: time.sleep(0 if layout == fastest else 0.002)

    monkeypatch.setattr(hardware, "laid_out", sleep)
    assert hardware.lay_out(build(), torch.float32) == fastest


def test_shapes_count_as_often_as_the_model_has_them(monkeypatch):
    """Each layer of 8 to 9 is twice as fast packed, the one of 9 to 8 much slower."""

    def sleep(layer, dtype, layout):
        wide = layer.in_features == 9
        return lambda x: time.sleep(0.004 if wide == (layout == "packed") else 0.001)

    monkeypatch.setattr(hardware, "laid_out", sleep)
    many, one = [torch.nn.Linear(8, 9) for _ in range(5)], torch.nn.Linear(9, 8)
    seconds = hardware.time_layouts([*many, one], torch.float32, rows=1)
    assert min(seconds, key=seconds.get) == "packed"
    assert seconds["packed"] > 5 * 0.001 + 0.004
    assert seconds["plain"] > 5 * 0.004 + 0.001


def test_looped_layers_count_as_often_as_they_are_applied():
    model = build(n_prelude=1, n_block=2, n_coda=0, n_loop=3)
    first, *core = model.transformer.h
    applied = [model.lm_head, *hardware.linear_layers(first)]
    for block in 3 * core:
        applied += hardware.linear_layers(block)
    assert list(map(id, hardware.layers_in_order(model))) == list(map(id, applied))


def test_of_a_large_model_a_part_is_timed(monkeypatch):
    passed = []

    def note(layer, dtype, layout):
        return lambda x: passed.append(layer.out_features)

    monkeypatch.setattr(hardware, "laid_out", note)
    monkeypatch.setattr(hardware, "MOST_TIMED", 8 * (10 + 20))
    layers = [torch.nn.Linear(8, n) for n in (10, 20, 30)]
    hardware.time_layouts([layers[0], layers[1], layers[0], layers[2]], torch.float32, rows=1)
    assert set(passed) == {10, 20}
    assert passed.count(10) == 2 * passed.count(20)


def test_a_layout_is_chosen_once_for_each_processor_type_and_number_of_rows(cache, monkeypatch):
    first = hardware.lay_out(build(), torch.float32)
    monkeypatch.setattr(hardware, "time_layouts", never)
    assert hardware.lay_out(build(), torch.float32) == first
    for other in [dict(rows=2), dict(dtype=torch.bfloat16)]:
        with pytest.raises(AssertionError, match="timed again"):
            hardware.lay_out(build(), **{"dtype": torch.float32, **other})
    with pytest.raises(AssertionError, match="timed again"):
        hardware.lay_out(build(n_embd=64), torch.float32)
    monkeypatch.setattr(hardware, "cpu_name", lambda: "another one")
    with pytest.raises(AssertionError, match="timed again"):
        hardware.lay_out(build(), torch.float32)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"KEY": "none"}'])
def test_a_damaged_file_of_layouts_is_made_anew(text, cache):
    hardware.lay_out(build(), torch.float32)
    (key,) = json.loads(cache.read_text())
    cache.write_text(text.replace("KEY", key))
    layout = hardware.lay_out(build(), torch.float32)
    assert layout in hardware.LAYOUTS
    assert json.loads(cache.read_text()) == {key: layout}


def test_what_a_busy_machine_chooses_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(hardware, "is_busy", lambda: True)
    assert hardware.lay_out(build(), torch.float32) in hardware.LAYOUTS
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_no_error(cache):
    cache.parent.write_text("a file")
    assert hardware.lay_out(build(), torch.float32) in hardware.LAYOUTS


def test_without_onednn_no_weights_are_packed(cache, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert hardware.lay_out(build(), torch.float32) in ("plain", "transposed")
    words = "cpu_weights='packed': must be one of auto, plain, transposed"
    with pytest.raises(ValueError, match=words):
        hardware.lay_out(build(), torch.float32, "packed")
