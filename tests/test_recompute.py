"""Recomputed activations: which results are computed again, and that no number changes."""

import pytest
import torch
from conftest import build, losses, slow, tokens, train
from torch.utils._python_dispatch import TorchDispatchMode

from nanorecur.recompute import RECOMPUTE, recompute_activations


@pytest.fixture(autouse=True)
def autocast_cache():
    """Set the global that "cheap" changes back to what it is without it."""
    yield
    torch.set_autocast_cache_enabled(True)


class WidthCounter(TorchDispatchMode):
    """Counts the calls of each operator whose result has so many channels."""

    def __init__(self, width):
        super().__init__()
        self.width, self.operators = width, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.size(-1) == self.width:
            self.operators.append(function.overloadpacket)
        return out

    def count(self, operator):
        return self.operators.count(operator)


@pytest.mark.parametrize(
    "what, products, activations",
    [("none", 1, 1), ("cheap", 1, 2), ("block", 2, 2), ("loop", 2, 2)],
)
def test_what_is_computed_again(what, products, activations):
    """How often a step computes the first product of each MLP, and its activation."""
    model, idx = build(n_prelude=0, n_coda=0, n_hidden=48), tokens()
    with torch.no_grad():
        want = model(idx, idx)[1].item()
    recompute_activations(model, what)
    with WidthCounter(48) as counter:
        loss = model(idx, idx)[1]
        loss.backward()
    passes = model.config.n_block * model.config.n_loop
    assert counter.count(torch.ops.aten.addmm) == products * passes
    assert counter.count(torch.ops.aten.gelu) == activations * passes
    assert loss.item() == pytest.approx(want, abs=1e-6)


def gradients(what, **options):
    """Return the gradients of a step, with random numbers in training, by name."""
    model, idx = build(spread=0.1, **options).train(), tokens()
    recompute_activations(model, what)
    torch.manual_seed(5)
    model(idx, idx, n_loop=4)[1].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [dict(dropout=0.2), dict(bptt_k=2, loop_noise_scale=1.0)])
@pytest.mark.parametrize("what", [what for what in RECOMPUTE if what != "none"])
def test_gradients_are_the_same_bit_for_bit(what, options):
    want = gradients("none", **options)
    for name, got in gradients(what, **options).items():
        assert torch.equal(got, want[name]), name


@pytest.mark.parametrize("what", ["cheap", slow("block"), slow("loop")])
def test_a_run_logs_the_same_losses(plain_run, corpus, tmp_path, what):
    run = train(corpus, tmp_path / "out", f"--recompute={what}", "--eval_loops=1,2,4")
    assert run.code == 0, run.err
    assert losses(tmp_path / "out") == losses(plain_run[0])
