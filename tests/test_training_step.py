"""training_step.py: it is the step of train.py; what a step of train.py computes in."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, train
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import read_knobs
from model import sample_loops
from nanorecur.dataset import load_meta, open_split, random_key
from nanorecur.training_step import TrainingStep

CPU = torch.device("cpu")
N_STEPS = 3
WARMUP = (1 / 3, 2 / 3, 1.0)  # shares of the learning rate, with warmup_iters=2
OPTIONS = {
    "plain": ["--n_block=0", "--n_prelude=0", "--n_coda=0", "--n_layer=2", "--n_loop=1"],
    "looped": [
        "--bptt_k=1",
        "--dropout=0.2",
        "--optimizer=muon",
        "--ema_decay=0.9",
        "--spectral_clip_beta=0.05",
        "--spectral_clip_interval=2",
        "--weight_decay_all",
    ],
    "bfloat16": [
        "--dtype=bfloat16",
        "--param_dtype=bfloat16",
        "--loss_chunk=9",
        "--recompute=block",
    ],
    "baseline": ["--objective=deep", "--use_model_baseline=True"],
    "exit": ["--objective=exit", "--exit_gate=state", "--grad_clip=0.1", "--entropy_weight=0.3"],
}


def options(**given):
    """Return all options of train.py and GPTConfig, of a tiny model unless given."""
    knobs = read_knobs(ROOT / "train.py") | read_knobs(ROOT / "model.py", "GPTConfig")
    defaults = {name: knob.value for name, knob in knobs.items()}
    return {**defaults, **TINY, "n_layer": 2, "batch_size": 2, **given}


def batches_of(split, config, it):
    """Return x, y of each micro-step of step it, as get_tokens of train.py does for one process."""
    rows, micro_steps = config["batch_size"], config["gradient_accumulation_steps"]
    batches = []
    for number in range(micro_steps):
        positions = (it * micro_steps + number) * rows + np.arange(rows)
        x, y = split.windows(split.shuffled(positions, config["seed"]))
        batches.append((torch.from_numpy(x), torch.from_numpy(y)))
    return batches


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_three_steps_give_the_weights_of_train(corpus, tmp_path, options):
    run = train(corpus, tmp_path, f"--max_iters={N_STEPS}", "--eval_iters=1", *options)
    assert run.code == 0, run.err
    config = json.loads((tmp_path / "config.json").read_text())
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    meta = load_meta(corpus)
    split = open_split(corpus, "train", meta, config["block_size"], meta["vocab_size"])
    dtype = torch.bfloat16 if config["dtype"] == "bfloat16" else torch.float32
    step = TrainingStep(config, CPU, dtype)
    for it in range(N_STEPS):
        torch.manual_seed(random_key(config["seed"], it, 0))
        step(batches=batches_of(split, config, it), iter_num=it, rate_share=WARMUP[it])
    assert_same(step.average.model, saved["model"])
    assert_same(step.model, saved.get("training_model", saved["model"]))


def assert_same(model, weights):
    state = model.state_dict()
    assert state.keys() == weights.keys()
    different = [name for name in state if not torch.equal(state[name], weights[name])]
    assert not different


def test_a_step_on_random_tokens_is_one_on_the_same_batch_in_each_micro_step():
    step = TrainingStep(options(), CPU, torch.float32, micro_steps=2)
    other = TrainingStep(options(), CPU, torch.float32)
    (batch,) = other.random_batches
    assert len(step.random_batches) == 2
    step()
    other(batches=[batch, batch])
    assert_same(step.model, other.model.state_dict())


def test_a_gradient_that_is_not_finite_changes_nothing():
    step = TrainingStep(options(ema_decay=0.9), CPU, torch.float32)
    with torch.no_grad():
        step.model.transformer.wpe.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in step.model.state_dict().items()}
    step()
    after = step.model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    assert step.guard.state["skipped"] == 1
    assert all(p.grad is None for p in step.model.parameters())


def test_a_loss_that_is_not_finite_is_no_step_even_if_its_gradient_is():
    step = TrainingStep(options(), CPU, torch.float32)
    weight = step.model.lm_head.weight
    step.computed.objective = lambda x, y, n_loop: (weight.sum() + float("nan"), {})
    step()
    assert step.guard.state["skipped"] == 1


@pytest.mark.slow
def test_depth_drawn_for_each_step_compiles_nothing_new():
    torch._dynamo.reset()
    config = options(n_block=1, n_loop=3, bptt_k=2, loop_sampling="poisson")
    step = TrainingStep(config, CPU, torch.float32, compiled=True)
    for n in (1, 4):
        step(n)
    graphs, generator = torch._dynamo.utils.counters["stats"], torch.Generator().manual_seed(0)
    before = graphs["unique_graphs"]
    drawn = {sample_loops(step.model.config, generator) for _ in range(20)}
    for depth in drawn:
        step(depth)
    assert before > 0 and len(drawn) > 3 and graphs["unique_graphs"] == before


class AttentionTypes(TorchDispatchMode):
    """Notes (kernel, number type) of each call of torch's attention, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.calls.append((str(func).split(".")[1], args[0].dtype))
        return func(*args, **(kwargs or {}))


def gradient_of_step(step):
    """Make a step and return its gradient, flat."""
    gradients = {}

    def keep(name, p):
        gradients[name] = p.grad.flatten().clone()

    for name, p in step.model.named_parameters():
        p.register_post_accumulate_grad_hook(partial(keep, name))
    step()
    return torch.cat([gradients[name] for name in sorted(gradients)])


@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "loop"])
def test_attention_is_in_float32_under_autocast_on_a_cpu(recompute):
    config = options(n_block=2, n_loop=2, recompute=recompute, grad_clip=0.0)
    gradients, types = [], AttentionTypes()
    for dtype in (torch.float32, torch.bfloat16):
        step = TrainingStep(config, CPU, dtype)
        with types:
            gradients.append(gradient_of_step(step))
    assert {dtype for _, dtype in types.calls} == {torch.float32}
    n_backward = sum("backward" in kernel for kernel, _ in types.calls)
    recomputed = recompute in ("block", "loop")
    assert n_backward == 8 and len(types.calls) == (24 if recomputed else 16)
    full, half = gradients
    assert 0 < (full - half).norm() < 0.02 * full.norm()
