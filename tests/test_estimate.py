"""estimate.py: the bytes are those of the step, the FLOPs those that torch counts."""

import contextlib
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import read_knobs
from nanorecur import estimate
from nanorecur.hardware import autocast, data_sheet
from nanorecur.training_step import TrainingStep, make_objective

CPU = torch.device("cpu")
LOOP = dict(n_prelude=1, n_block=1, n_coda=1, n_loop=3)


KNOBS = read_knobs(ROOT / "train.py") | read_knobs(ROOT / "bench.py")
KNOBS |= read_knobs(ROOT / "model.py", "GPTConfig")


def options(**given):
    """Return all options of train.py, bench.py and GPTConfig, of a tiny model unless given."""
    defaults = {name: knob.value for name, knob in KNOBS.items()}
    return {**defaults, **TINY, "n_layer": 1, "batch_size": 2, **given}


def peak_of_loops(n, **given):
    """Return the bytes of a step of one block that loops n times, at its peak, in states.

    A state is (B, T, C) in float32.
    """
    config = options(n_block=1, n_loop=n, block_size=64, gradient_accumulation_steps=1, **given)
    state = 4 * config["batch_size"] * config["block_size"] * config["n_embd"]
    return sum(estimate.memory(config, None, torch.float32).values()) / state


# -----------------------------------------------------------------------------
# memory
def test_memory_does_not_grow_with_loops_under_truncated_backprop():
    two, many = peak_of_loops(2, bptt_k=2), peak_of_loops(6, bptt_k=2)
    assert two <= many <= 1.03 * two


def test_memory_grows_by_a_state_for_each_loop_that_is_recomputed():
    growth = peak_of_loops(4, recompute="loop") - peak_of_loops(3, recompute="loop")
    assert growth == pytest.approx(1, abs=0.01)


def test_memory_grows_by_all_that_a_loop_makes_else_and_cheap_saves_some_of_it():
    growth = peak_of_loops(3) - peak_of_loops(2)
    cheap = peak_of_loops(3, recompute="cheap") - peak_of_loops(2, recompute="cheap")
    assert growth > 12 and 1 < cheap < 0.8 * growth


PLANNED = {
    "plain": dict(optimizer="muon", ema_decay=0.9, n_ahead=3),
    "truncated": dict(**LOOP, bptt_k=2, state_init="noise", dropout=0.1),
    "block": dict(
        **LOOP, recompute="block", position="rope", mlp="swiglu", n_kv_head=2, document_separator=3
    ),
    "loop": dict(**LOOP, recompute="loop", loss_chunk=8, spectral_clip_beta=1.0),
    "bfloat16": dict(param_dtype="bfloat16", predict_ahead=True),
    "exit": dict(**LOOP, objective="exit", exit_gate="state"),
    "gate": dict(**LOOP, objective="exit_gate", exit_gate="state"),
}


def test_parts_add_up_to_the_peak_of_two_steps_on_real_tensors():
    config = options(optimizer="muon")
    with estimate.LiveBytes() as counted:
        step = TrainingStep(config, CPU, torch.float32, micro_steps=2)
        step()
        step()
    parts = estimate.memory(config, None, torch.float32)
    assert sum(parts.values()) == counted.peak


def test_only_what_an_objective_trains_has_gradients():
    config = options(n_block=1, n_loop=2, objective="exit_gate", exit_gate="state")
    gate = config["n_embd"] + 1
    assert estimate.memory(config, None, torch.float32)["gradients"] == 4 * gate


SLOW = ("block", "loop", "exit", "gate")
CASES = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in PLANNED]


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_those_of_the_step(monkeypatch, case):
    assert_planned_is_real(monkeypatch, options(**PLANNED[case]), torch.float32, 0.0)


def test_planned_bytes_in_bfloat16_are_those_of_the_step_but_for_statistics_of_norms(monkeypatch):
    config = options(**PLANNED["bfloat16"])
    assert_planned_is_real(monkeypatch, config, torch.bfloat16, 0.01)


def assert_planned_is_real(monkeypatch, config, dtype, tolerance):
    """Fake tensors take what real ones take."""
    autocast(CPU, torch.bfloat16)  # its kernel is there from now on, for both
    planned = estimate.memory(config, None, dtype, on_gpu=False)
    monkeypatch.setattr(estimate, "FakeTensors", contextlib.nullcontext)
    real = estimate.memory(config, None, dtype, on_gpu=False)
    assert planned == pytest.approx(real, rel=tolerance, abs=0)


RESIDENT = """
import json, sys, torch
from nanorecur import hardware
from nanorecur.training_step import TrainingStep
tiny, config = map(json.loads, sys.argv[1:])
cpu = torch.device("cpu")
TrainingStep(tiny, cpu, torch.float32)()  # what is loaded once
before = hardware.peak_memory(cpu)
step = TrainingStep(config, cpu, torch.float32, micro_steps=2)
step()
step()
print(hardware.peak_memory(cpu) - before)
"""


@pytest.mark.slow
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
    sizes = dict(n_embd=256, block_size=256, batch_size=5, vocab_size=4096)
    config = options(**{**sizes, "gradient_accumulation_steps": 2, **case})
    planned = sum(estimate.memory(config, None, torch.float32, on_gpu=False).values())
    child = [sys.executable, "-c", RESIDENT, json.dumps(options()), json.dumps(config)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    run = subprocess.run(child, cwd=ROOT, env=exact, capture_output=True, check=True)
    assert planned > 100 * 2**20 and int(run.stdout) == pytest.approx(planned, rel=0.1)


def number_types(monkeypatch, on_gpu, recompute, loss_chunk=0):
    """Return {kernel: number types} of attention and loss in a planned step."""
    types = {"_scaled_dot_product_flash_attention_for_cpu": set(), "_log_softmax": set()}

    class Types(estimate.LiveBytes):
        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            name = str(func).split(".")[1]
            if name in types:
                types[name].add(args[0].dtype)
            return super().__torch_dispatch__(func, kinds, args, kwargs)

    config = options(recompute=recompute, dropout=0.1 if on_gpu else 0.0, loss_chunk=loss_chunk)
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "LiveBytes", Types)
        estimate.memory(config, None, torch.bfloat16, on_gpu)
    return list(types.values())


@pytest.mark.parametrize(
    "recompute, chunk", [("none", 0), ("none", 8), pytest.param("block", 0, marks=pytest.mark.slow)]
)
def test_number_types_of_a_plan_are_those_of_cuda(monkeypatch, recompute, chunk):
    """On a GPU attention is in bfloat16 and the loss in float32; a CPU's are then as before."""
    attention, loss = number_types(monkeypatch, True, recompute, chunk)
    assert attention == {torch.bfloat16} and loss == {torch.float32}
    attention, _ = number_types(monkeypatch, False, recompute)
    assert attention == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_chunks_takes_the_heads_gradient_but_no_logits_of_all_tokens(dtype):
    """In float32: the gradient of the head, a product that is added to it, and one chunk."""
    vocab, chunk, given = 5000, 4, dict(vocab_size=5000, gradient_accumulation_steps=1)

    def total(rows, loss_chunk):
        config = options(**given, batch_size=rows, loss_chunk=loss_chunk, tie_weights=False)
        return sum(estimate.memory(config, None, dtype).values())

    logits = 4 * vocab * 16  # bytes of a window, in float32
    assert total(8, 0) - total(2, 0) > 6 * logits
    assert total(8, chunk) - total(2, chunk) < logits
    head = 4 * vocab * 32
    config = options(**given, loss_chunk=chunk, tie_weights=False)
    parts = estimate.memory(config, None, dtype)
    made = parts["gradients"] + parts["activations"]  # before any other gradient
    assert 2 * head < made < 2 * head + 4 * 4 * vocab * chunk + head / 2


def test_processes_with_a_model_each_need_buckets_but_no_second_gradient():
    """DDP's buckets are the gradients; a second micro-step has these in its forward pass anyway."""
    one = estimate.memory(options(gradient_accumulation_steps=16), None, torch.float32)
    eight = options(n_gpus=8, gradient_accumulation_steps=16)
    assert estimate.memory(eight, None, torch.float32) == one
    alone = estimate.memory(options(gradient_accumulation_steps=1), None, torch.float32)
    eight = options(n_gpus=8, gradient_accumulation_steps=8)
    buckets = {"all-reduce": one["gradients"]}
    assert estimate.memory(eight, None, torch.float32) == alone | buckets


def test_gradients_in_bfloat16_have_buckets_of_half_the_bytes_in_every_micro_step():
    given = dict(param_dtype="bfloat16", n_gpus=2, gradient_accumulation_steps=4)
    parts = estimate.memory(options(**given), None, torch.float32)
    assert parts["all-reduce"] == parts["gradients"] / 2


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_processes_that_share_a_model_hold_a_part_of_what_lasts(micro_steps):
    """Gradients are whole as long as those of several micro-steps are added up."""
    accumulated = dict(gradient_accumulation_steps=8 * micro_steps)
    one = estimate.memory(options(**accumulated), None, torch.float32)
    parts = estimate.memory(options(n_gpus=8, shard=True, **accumulated), None, torch.float32)
    assert parts["weights"] == one["weights"] / 8 and parts["optimizer"] == one["optimizer"] / 8
    assert parts["gradients"] == one["gradients"] / (8 if micro_steps == 1 else 1)
    model = build(n_layer=1)
    block = sum(p.nbytes for p in model.transformer.h[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - block
    assert parts["gathered"] == 2 * (rest + 2 * block) and "all-reduce" not in parts


def test_shared_weights_that_compute_in_bfloat16_are_gathered_so_and_kept_once():
    """FSDP2 keeps shards in float32 and no copy; gathered weights have half the bytes."""
    given = dict(n_gpus=4, shard=True, gradient_accumulation_steps=4, n_layer=3)
    full = estimate.memory(options(**given), None, torch.bfloat16)
    half = estimate.memory(options(**given, param_dtype="bfloat16"), None, torch.bfloat16)
    for name in ("weights", "optimizer", "gradients"):
        assert half[name] == full[name], name
    assert half["gathered"] == full["gathered"] / 2
    alone = options(param_dtype="bfloat16", gradient_accumulation_steps=1, n_layer=3)
    alone = estimate.memory(alone, None, torch.bfloat16)
    assert alone["weights"] == pytest.approx(1.5 * 4 * full["weights"], rel=0.01)
    assert half["activations"] == alone["activations"] < full["activations"]


def test_remedies_are_other_values_of_options_that_save_memory(monkeypatch):
    def size_of_batch(config, n_loop, dtype, on_gpu):
        return {"weights": 2, "activations": 10 * config["batch_size"] - config["loss_chunk"]}

    monkeypatch.setattr(estimate, "memory", size_of_batch)
    config = options(n_block=1, n_gpus=2, recompute="block", batch_size=4)
    sizes = estimate.remedies(config, None, torch.float32, True)
    first, second, *others = sizes.items()
    assert (first, second) == (("--loss_chunk=2048", 42 - 2048), ("--batch_size=2", 22))
    changes = ("recompute=cheap", "recompute=loop", "shard=True")
    assert others == [(f"--{change}", 42) for change in changes]
    plain = estimate.remedies(options(batch_size=1), None, torch.float32, True)
    assert set(plain) == {"--recompute=cheap", "--recompute=block", "--loss_chunk=2048"}


WIDE = dict(n_embd=256, block_size=4)  # few rows take less than the optimizer's step


@pytest.mark.parametrize(
    "batch_size, given",
    [(12, {}), (1, WIDE), (1, WIDE | dict(optimizer="muon")), (12, dict(loss_chunk=2048))],
)
def test_the_largest_batch_fits_and_one_row_more_does_not(batch_size, given):
    last = (None, torch.bfloat16, True)

    def size(rows):
        return sum(estimate.memory(options(batch_size=rows, **given), *last).values())

    def largest(room):
        return estimate.largest_batch(options(batch_size=batch_size, **given), *last, room)

    room = size(3000)
    assert largest(room) == 3000 and largest(room - 1) == 2999
    assert largest(1) == 0


# -----------------------------------------------------------------------------
# time
def test_a_divided_model_gathers_blocks_at_each_call():
    """Blocks of the loop at each call: four loops forward, two backward; others once."""
    model = build(n_loop=4, bptt_k=2)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    backward = rest + blocks[0] + 2 * blocks[1] + 2 * blocks[2] + blocks[3]
    forward = backward + 2 * blocks[1] + 2 * blocks[2]
    assert estimate.traffic(model, None) == (forward + backward, backward)


@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "loop"])
def test_flops_computed_anew_are_those_that_torch_counts(recompute):
    """The backward pass leaves out what it can of the last product."""
    config = options(**LOOP, bptt_k=2, recompute=recompute)
    step = TrainingStep(config, CPU, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    anew = estimate.recomputed_flops(step.model, recompute, None)
    known = step.objective.flops_per_token() + anew
    counted = counter.get_total_flops() / (config["batch_size"] * config["block_size"])
    assert 0.93 * known <= counted <= known
    assert (anew > 0) == (recompute in ("block", "loop"))
    if recompute == "none":
        assert counted == known


def test_time_is_that_of_the_flops_and_of_what_no_backward_pass_hides():
    config = options(n_gpus=4, gradient_accumulation_steps=8, efficiency=0.5)
    objective, gpu = make_objective(config), data_sheet("H100")
    took = estimate.seconds(config, objective, gpu, 1e12)
    one = objective.flops_per_token() * 32 / 0.5e12  # a micro-step
    assert took["arithmetic"] == pytest.approx(2 * one)
    sent = 1.5 * 4 * sum(p.numel() for p in objective.parameters())
    assert sent / 450e9 < 2 / 3 * one and took["link"] == 0
    slow = estimate.seconds(config | {"link_gbps": 1e-3}, objective, gpu, 1e12)
    assert slow["link"] == pytest.approx(sent / 1e6 - 2 / 3 * one)
    bfloat16 = config | {"link_gbps": 1e-3, "param_dtype": "bfloat16"}  # in both micro-steps
    slow = estimate.seconds(bfloat16, objective, gpu, 1e12)
    assert slow["link"] == pytest.approx(2 * (sent / 2 / 1e6 - 2 / 3 * one))


def test_time_of_a_divided_model_is_that_of_its_traffic():
    """Weights come in both micro-steps, gradients go in the last."""
    config = options(n_gpus=4, gradient_accumulation_steps=8, shard=True, link_gbps=1e-3)
    objective, gpu = make_objective(config), data_sheet("H100")
    took = estimate.seconds(config, objective, gpu, 1e15)
    gathered, sent = estimate.traffic(objective.model, None)
    seconds = 0.75 * 4 * (2 * gathered + sent) / 1e6
    assert took["link"] == pytest.approx(seconds - took["arithmetic"])


def test_time_of_sampled_depth_is_the_mean_over_draws():
    """FLOPs, also those computed again, and the traffic of a divided model are means."""
    config = options(**LOOP, loop_sampling="uniform", seed=3, recompute="block", shard=True)
    config |= dict(n_gpus=2, gradient_accumulation_steps=2, link_gbps=1e-3)
    objective, gpu = make_objective(config), data_sheet("H100")
    model, flops, numbers = objective.model, 0, 0
    shares = estimate.depths_of(config, model)
    assert set(shares) == {(n,) for n in range(1, 6)} and sum(shares.values()) == pytest.approx(1)
    for depth, share in shares.items():
        flops += share * objective.flops_per_token(depth)
        flops += share * estimate.recomputed_flops(model, "block", depth)
        numbers += share * sum(estimate.traffic(model, depth))
    took = estimate.seconds(config, objective, gpu, 1e15)
    assert took["arithmetic"] == pytest.approx(flops * 32 / (1e15 * config["efficiency"]))
    assert took["link"] == pytest.approx(0.5 * 4 * numbers / 1e6 - took["arithmetic"])


def test_the_link_is_the_data_sheets_in_a_node_and_the_network_beyond():
    gpu, config = data_sheet("H100"), options(network_gbps=10.0)
    assert estimate.link_of(config | {"n_gpus": 8}, gpu) == 450e9
    assert estimate.link_of(config | {"n_gpus": 16}, gpu) == 10e9
    assert estimate.link_of(config | {"n_gpus": 16, "link_gbps": 3.0}, gpu) == 3e9


# -----------------------------------------------------------------------------
# options
@pytest.mark.parametrize(
    "given, words",
    [
        (dict(n_gpus=0), "n_gpus=0: must be at least 1"),
        (dict(n_gpus=3), "gradient_accumulation_steps=40: must be a multiple of the 3 processes"),
        (dict(efficiency=2.0), "efficiency=2.0: must be from 0 to 1"),
        (dict(efficiency=0.0), "efficiency=0.0: must be more than 0"),
        (dict(link_gbps=-1.0), "link_gbps=-1.0: must be at least 0"),
        (dict(network_gbps=0.0), "network_gbps=0.0: must be more than 0"),
        (dict(recompute="all"), "recompute='all': must be one of none, cheap, block, loop"),
        (dict(shard=True), "shard=True: must be False in one process"),
    ],
)
def test_an_option_that_cannot_be_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        estimate.check(options(**given))
