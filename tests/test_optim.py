"""What happens between the gradient of a step and the next step, against formulas."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, build, evaluated, losses, split_of, tokens, train, val_losses
from torch.testing import assert_close

import pretrained
from nanorecur import checkpoint, optim
from nanorecur.objectives import Objective
from nanorecur.optim import parameter_groups
from nanorecur.parallel import Processes

OPTIONS = dict(
    optimizer="adamw",
    learning_rate=1e-2,
    muon_learning_rate=0.1,
    muon_row_norm=False,
    weight_decay=5.0,
    weight_decay_all=False,
    beta1=0.5,
    beta2=0.7,
)


def named_groups(model):
    """Return {group: names of its parameters}."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group: [names[id(p)] for p in part] for group, part in parameter_groups(model).items()}


def set_gradients(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -----------------------------------------------------------------------------
# parameter groups


def test_parameter_groups_hold_every_parameter_once():
    model = build(loop_embedding="learned", exit_gate="state")
    groups = named_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_matrices_are_those_of_linear_layers_with_more_than_one_row():
    groups = named_groups(build(loop_embedding="learned", exit_gate="state"))
    assert set(groups["embeddings"]) == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.loops.0.index.weight",
    }
    assert "transformer.loops.0.inject.weight" in groups["matrices"]
    assert "exit_gate.weight" in groups["vectors"]  # one row
    for name in groups["matrices"]:
        assert re.search(r"(attn|mlp|inject).*weight$", name), name
    for name in groups["vectors"]:
        assert re.search(r"bias$|ln_|norm|exit_gate", name), name


def test_a_head_of_its_own_counts_as_an_embedding_and_what_is_frozen_not_at_all():
    model = build(tie_weights=False)
    model.transformer.wte.requires_grad_(False)
    groups = named_groups(model)
    assert "lm_head.weight" in groups["embeddings"]
    assert not any("wte" in name for group in groups.values() for name in group)


# -----------------------------------------------------------------------------
# AdamW


class AdamWByHand:
    """AdamW of one parameter, its equations written out (arXiv 1711.05101, algorithm 2)."""

    def __init__(self, p, beta1, beta2, decay):
        self.p = p.detach().clone()
        self.beta1, self.beta2, self.decay = beta1, beta2, decay
        self.m, self.v, self.t = torch.zeros_like(p), torch.zeros_like(p), 0

    def step(self, gradient, rate):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m = self.m / (1 - self.beta1**self.t)
        v = self.v / (1 - self.beta2**self.t)
        self.p = self.p - rate * (m / (v.sqrt() + 1e-8) + self.decay * self.p)


def adamw_by_hand(model, options):
    """Return {name: AdamWByHand} of a model's parameters, decay where the options put it."""
    matrices = named_groups(model)["matrices"]
    by_name = {}
    for name, p in model.named_parameters():
        decays = options["weight_decay_all"] or name in matrices
        decay = options["weight_decay"] if decays else 0.0
        by_name[name] = AdamWByHand(p, options["beta1"], options["beta2"], decay)
    return by_name


@pytest.mark.parametrize("decay_all", [False, True])
def test_adamw_is_its_formula_and_decays_matrices_alone_unless_asked(decay_all):
    model, options = build(spread=0.1), {**OPTIONS, "weight_decay_all": decay_all}
    by_hand = adamw_by_hand(model, options)
    optimizers = optim.Optimizers(model, options)
    for step, share in enumerate((0.3, 1.0, 0.5)):
        set_gradients(model, step)
        for name, p in model.named_parameters():
            by_hand[name].step(p.grad, share * 1e-2)
        optimizers.step(share)
    for name, p in model.named_parameters():
        assert_close(p.detach(), by_hand[name].p, msg=name)
    optimizers.zero_grad()
    for p in model.parameters():
        assert p.grad is None


ONE_BATCH = ("--batch_size=8", "--gradient_accumulation_steps=1", "--eval_iters=1")


@pytest.mark.parametrize("more", [[], ["--weight_decay_all"]], ids=str)
def test_a_run_is_adamw_written_out(corpus, tmp_path, more):
    """Batches, gradients, clipping, the schedule and the steps of train.py, by hand."""
    shape = dict(n_prelude=1, n_block=1, n_coda=1, n_loop=2, max_loops=6, bias=False)
    model = build(spread=0.1, vocab_size=100, **shape)
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config)}
    torch.save(ckpt, tmp_path / "start.pt")
    options = ["--beta1=0.5", "--beta2=0.7", "--weight_decay=5", "--grad_clip=0.3", "--bias=False"]
    start = f"--init_from={tmp_path / 'start.pt'}"
    run = train(corpus, tmp_path / "out", start, *ONE_BATCH, *options, *more)
    assert run.code == 0, run.err

    split, before = split_of(corpus, "train"), weights_of(model)
    by_hand = adamw_by_hand(model, {**OPTIONS, "weight_decay_all": bool(more)})
    for step in range(8):
        positions = torch.arange(8 * step, 8 * step + 8).numpy()
        x, y = map(torch.from_numpy, split.windows(split.shuffled(positions, 1337)))
        model.zero_grad()
        model(x, y)[1].backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
        rate = 1e-2 * (step + 1) / 3 if step < 2 else 1e-3 + (1e-2 - 1e-3) * cosine
        with torch.no_grad():
            for name, p in model.named_parameters():
                by_hand[name].step(p.grad * min(1.0, 0.3 / norm), rate)
                p.copy_(by_hand[name].p)
    after = checkpoint.load(tmp_path / "out")["model"]
    for name, want in weights_of(model).items():
        assert (after[name] - want).norm() < 1e-3 * (want - before[name]).norm(), name


# -----------------------------------------------------------------------------
# Muon


def test_muon_orthogonalises_the_gradients_of_matrices_and_adamw_takes_the_others():
    model, options = build(spread=0.1), {**OPTIONS, "optimizer": "muon"}
    by_hand, before = adamw_by_hand(model, options), weights_of(model)
    optimizers = optim.Optimizers(model, options)
    set_gradients(model, 0)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizers.step(0.5)
    matrices = named_groups(model)["matrices"]
    for name, p in model.named_parameters():
        if name not in matrices:
            by_hand[name].step(gradients[name], 0.5 * 1e-2)
            assert_close(p.detach(), by_hand[name].p, msg=name)
            continue
        rate = 0.5 * 0.1
        step = ((1 - 5.0 * rate) * before[name] - p.detach()) / rate
        u, _, v = torch.linalg.svd(gradients[name], full_matrices=False)
        n_rows, n_columns = p.shape
        sign = u @ v * max(1, n_rows / n_columns) ** 0.5
        cosine = F.cosine_similarity(step.flatten(), sign.flatten(), dim=0)
        assert cosine > 0.95, name
        assert step.norm().item() == pytest.approx(sign.norm().item(), rel=0.3), name


# -----------------------------------------------------------------------------
# states


@pytest.mark.parametrize("name, row_norm", [("adamw", False), ("muon", False), ("muon", True)])
def test_restored_optimizers_go_on_as_if_nothing_had_happened(name, row_norm):
    options = {**OPTIONS, "optimizer": name, "muon_row_norm": row_norm}
    model = build(spread=0.1)
    optimizers = optim.Optimizers(model, options)
    for step in range(4):
        if step == 2:
            other = copy.deepcopy(model)
            restored = optim.Optimizers(other, options)
            restored.restore(copy.deepcopy(optimizers.state_dict()), Processes())
        set_gradients(model, step)
        optimizers.step(1.0)
        if step >= 2:
            set_gradients(other, step)
            restored.step(1.0)
    assert_same(weights_of(model), weights_of(other))
    assert_same(optimizers.state_dict(), restored.state_dict())


def test_an_optimizers_state_of_another_shape_is_refused():
    small, large = build(), build(n_hidden=48)
    states = optim.Optimizers(large, OPTIONS)
    set_gradients(large, 0)
    states.step(1.0)
    with pytest.raises(ValueError):
        optim.Optimizers(small, OPTIONS).restore(states.state_dict(), Processes())


# -----------------------------------------------------------------------------
# clipping the gradient


@pytest.mark.parametrize("most", [0, 1e9, 0.5])
def test_clip_gradient_returns_the_norm_and_scales_a_longer_gradient_to_its_bound(most):
    model = build()
    set_gradients(model, 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert_close(optim.clip_gradient(model, most), norm)
    factor = min(1.0, most / norm.item()) if most else 1.0
    for p, gradient in zip(model.parameters(), gradients):
        assert_close(p.grad, factor * gradient)


# -----------------------------------------------------------------------------
# weights in bfloat16


def test_in_float32_the_model_itself_computes():
    objective = Objective(build())
    computed = optim.ComputeCopy(objective, "float32")
    assert computed.objective is objective
    assert not computed.is_copy
    set_gradients(objective, 0)
    before = [p.grad.clone() for p in objective.parameters()]
    computed.collect_gradients()
    computed.copy_weights()
    for p, gradient in zip(objective.parameters(), before):
        assert torch.equal(p.grad, gradient)


def test_a_copy_in_bfloat16_computes_and_float32_collects_its_gradients():
    objective = Objective(build(spread=0.1))
    computed = optim.ComputeCopy(objective, "bfloat16")
    want = {}
    for seed in (1, 2):  # two micro-steps
        idx = tokens(seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            computed.objective(idx, idx)[0].backward()
        for name, p in computed.objective.named_parameters():
            assert p.dtype == torch.bfloat16
            want[name] = want.get(name, 0) + p.grad.float()
        computed.collect_gradients()
        for p in computed.objective.parameters():
            assert p.grad is None
    for name, p in objective.named_parameters():
        assert p.grad.dtype == p.dtype == torch.float32
        assert torch.equal(p.grad, want[name]), name


def test_gradients_of_later_micro_steps_are_added_in_one_operation():
    objective = Objective(build())
    computed = optim.ComputeCopy(objective, "bfloat16")
    set_gradients(computed.objective, 0)
    computed.collect_gradients()
    set_gradients(computed.objective, 1)
    with torch.profiler.profile() as profile:
        computed.collect_gradients()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_foreach_add_"] == 1


def test_the_copy_follows_float32_weights_that_remember_steps_too_small_for_bfloat16():
    objective = Objective(build(spread=0.1))
    computed = optim.ComputeCopy(objective, "bfloat16")
    p = objective.model.transformer.h[0].mlp.c_fc.weight
    copied = computed.objective.model.transformer.h[0].mlp.c_fc.weight
    before = copied.clone()
    for _ in range(100):
        with torch.no_grad():
            p.mul_(1 + 1e-4)
        computed.copy_weights()
        assert torch.equal(copied, p.bfloat16())
    assert_close(copied.float(), before.float() * 1.01, rtol=0.01, atol=0)
    assert not torch.equal(copied, before)


@pytest.mark.slow
def test_a_run_in_bfloat16_saves_float32_and_loses_little(corpus, tmp_path):
    options = ("--max_iters=30", "--lr_decay_iters=30", "--eval_interval=30")
    options += ("--learning_rate=3e-3",)
    full, half = tmp_path / "full", tmp_path / "half"
    assert train(corpus, full, *options).code == 0
    assert train(corpus, half, *options, "--param_dtype=bfloat16").code == 0
    weights = checkpoint.load(half)["model"]
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert not all(torch.equal(w, w.bfloat16().float()) for w in weights.values())
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), abs=0.05)


# -----------------------------------------------------------------------------
# spectral clipping


def largest_singular_values(weights):
    """Return {(block, name): value} of the matrices of all blocks."""
    values = {}
    for name, W in weights.items():
        found = re.search(r"h\.(\d)\.((attn|mlp).*weight)", name)
        if found:
            values[int(found[1]), found[2]] = torch.linalg.matrix_norm(W, 2).item()
    return values


def test_spectral_clipping_bounds_the_looped_matrices_or_all():
    for all_blocks, clipped in ((False, {1, 2}), (True, {0, 1, 2, 3})):
        model = build(spread=0.1)
        optim.SpectralClip(model, 0.2, 1, all_blocks)(iter_num=5)
        values = largest_singular_values(model.state_dict())
        assert len(values) == 4 * 4
        for (block, _), value in values.items():
            assert (value <= 0.2 * 1.01) == (block in clipped)


def test_spectral_clipping_computes_in_full_float32_and_leaves_the_precision_as_it_was(monkeypatch):
    """TF32, which training allows on a GPU, rounds to 10 bits and misses beta by 0.2 %."""
    seen = []

    def clip(W, beta):
        seen.append(torch.get_float32_matmul_precision())
        return W

    monkeypatch.setattr(optim, "spectral_clip", clip)
    torch.set_float32_matmul_precision("high")
    try:
        optim.SpectralClip(build(), 0.2, 1, False)(iter_num=0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_spectral_clipping_is_made_every_few_steps_and_not_at_beta_0():
    model = build(spread=0.1)
    before = weights_of(model)
    optim.SpectralClip(model, 0.0, 1, True)(iter_num=0)
    every_third = optim.SpectralClip(model, 0.2, 3, False)
    every_third(iter_num=7)
    assert_same(weights_of(model), before)
    every_third(iter_num=6)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert not torch.equal(weights_of(model)[name], before[name])


@pytest.mark.parametrize(
    "options, clipped",
    [
        ([], {1}),
        (["--spectral_clip_all"], {0, 1, 2}),
        (["--use_model_baseline"], set()),
        (["--spectral_clip_interval=3", "--max_iters=7"], {1}),  # the last step is step 6
        (["--spectral_clip_interval=4", "--max_iters=7"], set()),
    ],
    ids=str,
)
def test_a_run_clips_after_its_steps(corpus, tmp_path, options, clipped):
    options = ("--spectral_clip_beta=0.2", "--eval_iters=1", *options)
    assert train(corpus, tmp_path / "out", *options).code == 0
    values = largest_singular_values(checkpoint.load(tmp_path / "out")["model"])
    for (block, _), value in values.items():
        assert (value <= 0.2 * 1.01) == (block in clipped)


# -----------------------------------------------------------------------------
# the guard


def test_the_guard_refuses_what_is_not_finite_and_counts_it():
    guard = optim.GradientGuard(0.0)
    answers = [guard.accepts(norm) for norm in (1.0, math.nan, math.inf, 1e30, math.nan)]
    assert answers == [True, False, False, True, False]
    assert guard.state == {"norms": [1.0, 1e30], "skipped": 3, "in_a_row": 1}


def test_the_guard_compares_with_the_median_of_the_last_hundred():
    guard = optim.GradientGuard(3.0)
    for i in range(99):
        assert guard.accepts(1000.0 if i < 40 else 1.0)
    assert guard.accepts(50.0)  # the hundredth: there was no median yet
    assert guard.accepts(3.0)
    assert not guard.accepts(3.1)
    assert not guard.accepts(50.0)
    assert guard.state["in_a_row"] == 2
    assert guard.accepts(2.0)
    assert guard.state["in_a_row"] == 0
    assert guard.state["skipped"] == 2
    assert len(guard.state["norms"]) == 100


def test_a_restored_guard_knows_what_the_other_knew():
    guard = optim.GradientGuard(2.0)
    for _ in range(100):
        guard.accepts(1.0)
    guard.accepts(5.0)
    other = optim.GradientGuard(2.0, copy.deepcopy(guard.state))
    assert other.state == guard.state
    assert not other.accepts(2.5)


# -----------------------------------------------------------------------------
# the moving average


def test_without_a_decay_the_average_is_the_model_itself():
    model = build()
    average = optim.MovingAverage(model, 0.0)
    average.update()
    average.restore({}, 3)
    assert average.model is model


def test_the_average_begins_with_the_first_weights_and_goes_on_when_restored():
    model, decay = build(spread=0.1), 0.75
    average, want = optim.MovingAverage(model, decay), None
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if step == 3:  # the run is stopped and goes on
            saved = copy.deepcopy(average.model.state_dict())
            model = copy.deepcopy(model)
            average = optim.MovingAverage(model, decay)
            average.restore(saved, step)
        average.update()
        new = weights_of(model)
        want = new if want is None else {n: decay * want[n] + 0.25 * new[n] for n in new}
        assert_close(weights_of(average.model), want)


def test_a_run_evaluates_and_saves_the_average(corpus, tmp_path):
    """Against the weights of every step, averaged here."""
    steps = {}
    for stop in range(1, 5):
        train(corpus, tmp_path / str(stop), f"--max_iters={stop}", "--eval_iters=1")
        steps[stop] = checkpoint.load(tmp_path / str(stop))["model"]
    out = tmp_path / "out"
    run = train(corpus, out, "--max_iters=4", "--ema_decay=0.75")
    assert run.code == 0, run.err
    ckpt = checkpoint.load(out)
    assert_same(ckpt["training_model"], steps[4])
    want = steps[1]
    for stop in (2, 3, 4):
        want = {name: 0.75 * want[name] + 0.25 * steps[stop][name] for name in want}
    for name, w in want.items():
        assert_close(ckpt["model"][name], w, atol=1e-6, rtol=1e-5)
    x, y = evaluated(corpus)
    with torch.no_grad():
        loss = pretrained.load(out)(x, y)[1].item()
    assert val_losses(out)[4] == pytest.approx(loss, rel=1e-5)
