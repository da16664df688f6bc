"""The same numbers on a GPU as on a CPU: all of it runs on the CPU too, where there is no GPU.

What takes long on a CPU is slow there alone.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    ROPE,
    TRAIN,
    Run,
    build,
    few_ids,
    halfway_rule,
    losses,
    started,
    train,
    val_losses,
)
from forked import forked_python
from test_bench import make_peer
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import pretrained
from decode import Cache, Decoder, compiled_loop, generate
from nanorecur.compilation import compile_parts
from nanorecur.exit_rules import exit_evaluation, exit_logits, make_exit
from nanorecur.hardware import autocast
from nanorecur.objectives import Objective, select_trained
from nanorecur.optim import ComputeCopy, SpectralClip
from nanorecur.recompute import recompute_activations

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
needs_gpu = pytest.mark.skipif(DEVICE == CPU, reason="needs a GPU")
COUNTERS = torch._dynamo.utils.counters

DIAGONAL = dict(input_injection="diagonal", state_init="zero", loop_norm="none")
GATE, MLA = dict(exit_gate="state"), dict(attention="mla", **ROPE)
TWO_GROUPS = dict(n_prelude=0, n_block=0, n_coda=0, n_layer=4, loop_groups=[[0, 1], [3]])
WIDE = dict(n_embd=128, n_head=2, block_size=256)  # shapes for which GPUs have other kernels
MODELS = {
    "plain": dict(n_layer=3),
    "inject": dict(bptt_k=2),
    "diagonal": dict(**DIAGONAL, bptt_k=1),
    "residual": dict(input_injection="residual"),
    "two groups": dict(**TWO_GROUPS, loop_counts=[2, 3], n_loop=1),
    "rope, swiglu": dict(**ROPE, mlp="swiglu", norm="rmsnorm"),
    "norm of heads": dict(**ROPE, qk_norm="head"),
    "norm of width": dict(**ROPE, qk_norm="width"),
    "norm after rotation": dict(**ROPE, qk_norm="rotated"),
    "grouped queries": dict(n_kv_head=2),
    "latent attention": MLA,
    "value embedding": dict(value_embedding=True),
    "documents": dict(document_separator=3),
    "window": dict(attention_window=3),
    "learned index": dict(loop_embedding="learned"),
    "sinusoidal index": dict(loop_embedding="sinusoidal"),
    "noise": dict(state_init="noise", loop_noise_scale=1.0),
    "shifted labels": dict(predict_ahead=True),
    "heads further ahead": dict(n_ahead=3),
    "softcap": dict(logit_softcap=1.0),
    "wide": WIDE,
    "wide, grouped": dict(**WIDE, **ROPE, n_kv_head=1),
    "wide, latent": dict(**WIDE, **MLA),
}
KINDS = {name: (shape, {}) for name, shape in MODELS.items()} | {
    "deep": ({}, dict(name="deep", weighting="linear")),
    "distill": ({}, dict(name="distill")),
    "exit": (GATE, dict(name="exit")),
    "exit by the mean": (dict(exit_gate="mean_state"), dict(name="exit")),
    "exit gate alone": (GATE, dict(name="exit_gate")),
    "confidence": (GATE, dict(name="confidence")),
    "entry and exit": (dict(loop_entry="rmsnorm", loop_exit="final_norm"), {}),
    "chunks": ({}, dict(chunk=7)),
    "chunks, softcap": (dict(logit_softcap=1.0), dict(chunk=7)),
    "chunks, deep": ({}, dict(name="deep", chunk=7)),
}


def slow_on_a_cpu(test):
    return pytest.mark.slow(test) if DEVICE == CPU else test


@pytest.fixture(autouse=True)
def global_settings():
    """Compute in full float32; set back what these tests and their scripts change."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.set_autocast_cache_enabled(True)


@pytest.fixture
def fresh_compiler(monkeypatch):
    """On a CPU without code generation, which takes minutes there and has its tests elsewhere."""
    if DEVICE == CPU:
        compiled = torch.compile

        def graphs_only(function, backend="inductor", mode="default", **options):
            return compiled(function, backend="aot_eager", **options)

        monkeypatch.setattr(torch, "compile", graphs_only)
    compiled_loop.cache_clear()
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    compiled_loop.cache_clear()
    torch._dynamo.reset()


# -----------------------------------------------------------------------------
# losses and gradients


def objective_of(kind, device=DEVICE, dtype=torch.float32):
    """Return the objective of a kind, always with the same weights."""
    shape, options = KINDS[kind]
    objective = Objective(build(spread=0.1, **shape), **options)
    select_trained(objective.model, objective.name)
    return objective.to(device, dtype)


def batch_for(model):
    """Return idx and targets (2, block_size) on the model's device; some targets are -1."""
    idx, targets = (few_ids(2, model.block_size, seed) for seed in (1, 2))
    targets[:, :3] = -1
    device = model.lm_head.weight.device
    return idx.to(device), targets.to(device)


def gradients_of(objective, n_loop=None, dtype=torch.float32):
    """Return the loss and {name: gradient} of a batch, with matrix products in dtype."""
    model = objective.model
    idx, targets = batch_for(model)
    shift = 2 if model.config.predict_ahead else 1
    objective.zero_grad()
    with autocast(idx.device, dtype):
        loss, _ = objective(idx, targets, n_loop, shift)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_near(got, want, share):
    """Compare what gradients_of returned: losses, and gradients by the length of what differs."""
    (loss, gradients), (want_loss, want_gradients) = got, want
    assert loss == pytest.approx(want_loss, rel=share)
    assert gradients.keys() == want_gradients.keys()
    want_gradients = {name: g.double().cpu() for name, g in want_gradients.items()}
    total = torch.stack([g.norm() for g in want_gradients.values()]).norm()
    assert total > 0 or want_loss == 0
    for name, g in want_gradients.items():
        error = (gradients[name].double().cpu() - g).norm()
        assert error <= share * (g.norm() + 0.01 * total), name


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_float64_on_a_cpu(kind):
    reference, ours = objective_of(kind, CPU, torch.float64), objective_of(kind)
    reference.chunk = 0
    share = 1e-3 if kind == "exit gate alone" else 1e-4  # a steep function of small differences
    for n_loop in (None, 1):
        assert_near(gradients_of(ours, n_loop), gradients_of(reference, n_loop), share)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_loss_is_that_of_float32_but_for_rounding(kind):
    ours = objective_of(kind)
    want, want_gradients = gradients_of(ours)
    want_gradients = {name: g.clone() for name, g in want_gradients.items()}
    loss, gradients = gradients_of(ours, dtype=torch.bfloat16)
    assert loss == pytest.approx(want, rel=2e-2)
    flat = [
        torch.cat([g.flatten() for g in all_of.values()]) for all_of in (gradients, want_gradients)
    ]
    assert (flat[0] - flat[1]).norm() < 0.1 * flat[1].norm()


def test_rows_of_their_own_depth_are_those_of_a_cpu():
    counts = (torch.tensor([3, 1]),)
    reference = objective_of("learned index", CPU, torch.float64)
    ours = gradients_of(objective_of("learned index"), counts)
    assert_near(ours, gradients_of(reference, counts), 1e-4)


@needs_gpu
@pytest.mark.parametrize("kind", ["plain", "inject", "diagonal", "learned index", "wide"])
def test_a_micro_step_waits_for_nothing(kind):
    objective = objective_of(kind)
    idx, targets = batch_for(objective.model)
    objective(idx, targets)[0].backward()  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(idx, targets)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("what", ["cheap", "block", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_computed_again_give_the_same_gradients(what, dtype):
    share = 1e-4 if dtype == torch.float32 else 1e-2  # gradients of casts add up in another type
    for kind in ("inject", "wide"):
        want, ours = gradients_of(objective_of(kind), dtype=dtype), objective_of(kind)
        recompute_activations(ours.model, what)
        assert_near(gradients_of(ours, dtype=dtype), want, share)
        torch.set_autocast_cache_enabled(True)


def test_weights_in_bfloat16_collect_float32_gradients():
    plain, ours = objective_of("inject"), objective_of("inject")
    want, _ = gradients_of(plain)
    computed = ComputeCopy(ours, "bfloat16")
    for times in (1, 2):  # the second is added to the first
        loss, _ = gradients_of(computed.objective, dtype=torch.bfloat16)
        computed.collect_gradients()
        assert loss == pytest.approx(want, rel=2e-2)
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert p.grad.dtype == torch.float32 and p.grad.device == DEVICE
            assert_close(p.grad, times * q.grad, rtol=0.2, atol=0.1 * float(q.grad.abs().max()))
    with torch.no_grad():
        ours.model.lm_head.weight.add_(1)
    computed.copy_weights()
    copied = computed.objective.model.lm_head.weight
    assert torch.equal(copied, ours.model.lm_head.weight.bfloat16())


# -----------------------------------------------------------------------------
# compiled stages

COMPILED = ["plain", "diagonal", "learned index", "latent attention", "documents", "two groups"]


@slow_on_a_cpu
@pytest.mark.parametrize(
    "kind, by_block", [*((kind, False) for kind in COMPILED), ("diagonal", True)]
)
def test_compiled_stages_are_eager_and_no_depth_adds_a_graph(fresh_compiler, kind, by_block):
    """In training and in evaluation, behind a warm-up."""
    ours, theirs = objective_of(kind), objective_of(kind)
    compile_parts(ours, by_block=by_block)
    idx, targets = batch_for(ours.model)

    def both(n_loop):
        assert_near(gradients_of(ours, n_loop), gradients_of(theirs, n_loop), 1e-3)
        with torch.no_grad():
            assert_close(ours(idx, targets, n_loop)[0], theirs(idx, targets, n_loop)[0])

    for n_loop in (3, 1, 2):
        both(n_loop)
    before = COUNTERS["stats"]["unique_graphs"]
    assert before > 0
    for n_loop in (5, 8, 4):
        both(n_loop)
    assert COUNTERS["stats"]["unique_graphs"] == before


# -----------------------------------------------------------------------------
# decoding


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_cached_greedy_tokens_are_the_likeliest_of_the_forward_pass(kind):
    """Of rows of two lengths; within the rounding of the two passes."""
    model = build(spread=0.1, **MODELS[kind]).to(DEVICE)
    text, stats = generate(model, few_ids(2, 5).to(DEVICE), 8, temperature=0, lengths=[5, 3])
    for row, length in zip(text, stats["lengths"].tolist(), strict=True):
        row = row[None, :length]
        logits = model(row, row)[0]
        chosen = logits[:, :-1].gather(-1, row[:, 1:, None])[..., 0]
        behind = logits[:, :-1].amax(-1) - chosen
        assert (behind[0, length - 9 :] < 1e-3).all()


@slow_on_a_cpu
@pytest.mark.parametrize("kind", ["plain", "learned index", "latent attention"])
def test_compiled_decoding_is_eager_over_calls_in_which_rows_end(fresh_compiler, kind):
    model = build(spread=0.3, **MODELS[kind]).to(DEVICE)
    for seed in (1, 2):
        idx, found = few_ids(3, 5, seed).to(DEVICE), []
        for static in (False, True):
            shown = [0, 0, 0]

            def watch(row, token, loops, shown=shown):
                shown[row] += 1
                return shown[row] == 4 * row + 2

            options = dict(static=static, watch=watch, lengths=[5, 3, 4], temperature=0)
            found.append(generate(model, idx, 8, **options)[0])
        assert torch.equal(*found) and (found[0][0] == -1).sum() > (found[0][2] == -1).sum()


@pytest.mark.parametrize("draft_loops, kind", [(1, "inject"), (0, "heads further ahead")])
def test_speculation_is_plain_greedy_decoding(draft_loops, kind):
    model = build(spread=0.3, **MODELS[kind]).to(DEVICE)
    idx = few_ids(2, 4).to(DEVICE)
    plain, _ = generate(model, idx, 10, temperature=0)
    options = dict(draft_tokens=2, draft_loops=draft_loops)
    assert torch.equal(generate(model, idx, 10, temperature=0, **options)[0], plain)


def test_drawn_tokens_are_those_of_the_same_seed():
    model, idx, texts = build(spread=0.3).to(DEVICE), few_ids(2, 4).to(DEVICE), []
    for seed in (1, 1, 2):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        filters = dict(top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
        texts.append(generate(model, idx, 10, generator=generator, **filters)[0])
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("rule", ["state", "gate", "kl", "argmax"])
@torch.no_grad()
def test_evaluation_with_exit_is_decoding_with_exit(rule):
    model = build(spread=0.2, n_coda=0, **GATE).to(DEVICE)
    for p in model.exit_gate.parameters():
        p *= 5  # else the gate would hardly tell states apart
    idx = few_ids(4, 12).to(DEVICE)
    exit_rule, rows = halfway_rule(model, idx, rule), torch.arange(4)
    decoder = Decoder(model, Cache(model, 4, 6), 6, exit_rule)
    logits, used = [], []
    for token in idx.split(1, dim=1):
        hidden, loops = decoder.step(token, rows)
        logits.append(model.logits(hidden))
        used.append(loops)
    loss, loops = exit_evaluation(model, idx, idx, exit_rule, 6)
    want = F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), idx.flatten()).item()
    assert loss == pytest.approx(want, abs=1e-4)
    assert loops == pytest.approx(torch.stack(used).float().mean().item())
    assert 1 < loops < 6


# -----------------------------------------------------------------------------
# between steps


def test_spectral_clipping_bounds_matrices_under_tf32_too():
    model, beta = build(spread=0.3, n_embd=128).to(DEVICE), 0.8
    torch.set_float32_matmul_precision("high")  # as train.py does on a GPU
    SpectralClip(model, beta, every=1, all_blocks=True)(0)
    assert torch.get_float32_matmul_precision() == "high"
    largest = []
    for module in model.transformer.h.modules():
        if isinstance(module, torch.nn.Linear):
            largest.append(torch.linalg.svdvals(module.weight.double().cpu()).max().item())
    assert len(largest) == 16
    assert max(largest) < 1.0005 * beta and max(largest) > 0.99 * beta


# -----------------------------------------------------------------------------
# runs

ON_DEVICE = f"--device={DEVICE.type}"


@slow_on_a_cpu
def test_a_run_of_the_device_is_read_and_goes_on_on_a_cpu(corpus, tmp_path):
    first = train(corpus, tmp_path, ON_DEVICE, "--dtype=float32", "--optimizer=muon")
    assert first.code == 0, first.err
    model, log_before = pretrained.load(tmp_path), val_losses(tmp_path)
    assert model.lm_head.weight.device == CPU
    again = train(corpus, tmp_path, "--eval_only", "--init_from=resume")
    assert again.code == 0, again.err
    options = ("--init_from=resume", "--max_iters=12", "--device=cpu", "--compile=False")
    longer = Run("train.py", f"--dataset={corpus}", f"--out_dir={tmp_path}", *options)
    assert longer.code == 0, longer.err
    after = val_losses(tmp_path)
    assert after.keys() == {*log_before, 12}
    assert after[12] < after[0]


def in_a_process(corpus, out_dir, *options):
    """Return {iteration: loss} of a run in a fresh Python on the device."""
    started(corpus, out_dir, "()", ON_DEVICE, *options)
    return losses(out_dir)


@slow_on_a_cpu
def test_deterministic_runs_are_the_same_bits(corpus, tmp_path):
    """In windows so long that attention adds up gradients of several blocks of keys."""
    options = ["--deterministic", "--block_size=128", "--compile=False", "--eval_iters=1"]
    if DEVICE != CPU:
        options += ["--block_size=1024", "--n_embd=128", "--n_head=2"]
    runs = [in_a_process(corpus, tmp_path / name, *options) for name in "ab"]
    assert runs[0] == runs[1] and len(runs[0]) == 8


@slow_on_a_cpu
def test_one_process_of_torchrun_is_a_run_without(corpus, tmp_path):
    """With nccl on a GPU, with gloo on a CPU."""
    options = [ON_DEVICE, "--dtype=float32"]
    want = in_a_process(corpus, tmp_path / "alone", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["train.py", f"--dataset={corpus}", f"--out_dir={tmp_path / 'one'}", *TRAIN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "one") == pytest.approx(want, rel=1e-4)


# -----------------------------------------------------------------------------
# without a card: tensors without contents, which refuse to be mixed with those of the CPU


def every_pass(model, idx):
    """Yield a text, and where something is looped the logits of an evaluation with exit."""
    options = dict(n_loop=1, top_k=5, repetition_penalty=1.1)
    yield generate(model, idx, 2, lengths=[idx.size(1), 4], **options)[0]
    if model.config.groups:
        yield exit_logits(model, idx, make_exit(model, "state", 0.1), 2)[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "wide" not in kind])
def test_no_pass_mixes_tensors_of_two_devices(kind, monkeypatch):
    """On torch's device "meta" in place of a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # knows no such device
    objective = objective_of(kind, "meta").train()
    idx = few_ids().to("meta")
    loss, _ = objective(idx, idx, 2)
    loss.backward()
    assert all(p.grad.is_meta for p in objective.parameters() if p.requires_grad)
    if kind in MODELS:
        assert all(result.is_meta for result in every_pass(objective.model.eval(), idx))


class CudaWithoutACard(FakeTensorMode):
    """Lets tensors on "cuda" exist without contents, while those on the CPU stay real."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        parts = tree_leaves((args, kwargs))
        devices = {part.type for part in parts if isinstance(part, torch.device)}
        if "cuda" in devices or any(isinstance(part, FakeTensor) for part in parts):
            return super().__torch_dispatch__(function, types, args, kwargs)
        return function(*args, **(kwargs or {}))

    def fake(self, tensor):
        return FakeTensor(self, torch.empty_like(tensor, device="meta"), torch.device("cuda"))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch built for CUDA")
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_no_pass_leaves_cuda(kind):
    mode, model = CudaWithoutACard(allow_non_fake_inputs=True), build(**MODELS[kind])
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(mode.fake(p), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = mode.fake(buffer)
    with mode:
        idx = mode.fake(few_ids())
        assert model(idx, idx)[1].device.type == "cuda"
        for result in every_pass(model, idx):
            assert result.device.type == "cuda"


# -----------------------------------------------------------------------------
# gpu.sh


def gpu_day(part, *options, **environment):
    command = ["bash", "tests/gpu.sh", part, *map(str, options)]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("part, sections", [("A", 0), ("B", 1), ("C", 1)])
def test_each_part_of_the_gpu_day_runs_small_on_a_cpu(tmp_path, part, sections):
    """Scripts are forked, since a start takes longer than what they do here."""
    peer = make_peer(tmp_path / "theirs")
    options = ("--device=cpu", "--small", f"--peer={peer}")
    with forked_python(tmp_path / "python") as python:
        run = gpu_day(part, *options, OUT=str(tmp_path), PYTHON=str(python))
    assert run.returncode == 0, run.stdout
    assert (tmp_path / f"{part}.txt").read_text() == run.stdout
    assert run.stdout.endswith("failed: nothing\n")
    written = tmp_path / "BENCHMARKS.md"
    assert written.exists() == (sections > 0)
    if sections:
        text = written.read_text()
        assert text.count("\n## ") == sections and "theirs" in text


def test_a_forked_script_is_killed_with_its_stand_in(tmp_path):
    words = "import time; print('begun', flush=True); time.sleep(40); open('ended', 'w')"
    (tmp_path / "sleeps.py").write_text(words)
    with forked_python(tmp_path / "python") as python:
        command = [python, "sleeps.py"]
        started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert started.stdout.readline() == "begun\n"
        started.kill()
        started.communicate()
    assert not (tmp_path / "ended").exists()


def test_a_command_that_fails_is_named_and_the_others_run(tmp_path):
    run = gpu_day("C", "--device=cpu", f"--out={tmp_path}", PYTHON="false")
    assert run.returncode == 1
    commands = [line[2:] for line in run.stdout.splitlines() if line.startswith("$ ")]
    failed = [line[8:] for line in run.stdout.splitlines() if line.startswith("failed: ")]
    assert len(commands) == 5 and failed == commands


@pytest.mark.parametrize("arguments", [["D"], [], ["A", "--smal"]])
def test_wrong_arguments_of_the_gpu_day_are_named_in_one_line(arguments):
    run = gpu_day(*arguments) if arguments else gpu_day("")
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("gpu.sh: ") and run.stdout == ""
