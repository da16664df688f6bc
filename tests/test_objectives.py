"""Objectives against their formulas with all logits at hand; loops and shifts of each row."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LOOPED, build, log, logged, slow, tokens, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from model import GPTConfig
from nanorecur import checkpoint, objectives
from nanorecur.objectives import Objective, hidden_by_row, sample_shifts, select_trained

GATED = dict(exit_gate="state")


def labels():
    """Return targets of which a few are none."""
    targets = tokens(seed=2)
    targets[0, :3] = targets[1, -1] = -1
    return targets


# -----------------------------------------------------------------------------
# formulas


def nll(logits, targets):
    """Return losses (.., B, T) of logits (.., B, T, V), 0 where there is no target."""
    log_p = logits.log_softmax(-1)
    index = targets.clamp(min=0).expand(logits.shape[:-1]).unsqueeze(-1)
    return -log_p.gather(-1, index).squeeze(-1) * (targets >= 0)


def states_after_each_loop(model, idx, n):
    """Return states (n, B, T, C) of a model with one block before its loop."""
    x, ctx = model.embed(idx)
    loop = model.transformer.loops[0]
    return torch.stack(list(loop.states(model.transformer.h[0](x, ctx), ctx, n)))


def logits_after_each_loop(model, idx, n):
    """Return logits (n, B, T, V), each depth by a forward pass of its own."""
    return torch.stack([model.logits(model.hidden(idx, t)) for t in range(1, n + 1)])


def exit_probabilities(stops):
    """Return the probability of stopping after each loop: now, and not before; the last takes all.

    stops: (n, B, T), of stopping where the tokens have not yet.
    """
    going, p = torch.ones_like(stops[0]), []
    for stop in stops[:-1]:
        p.append(going * stop)
        going = going * (1 - stop)
    return torch.stack([*p, going])


def by_hand(name, model, idx, targets, n):
    """Return what an objective minimises, with linear weights of deep supervision."""
    logits = logits_after_each_loop(model, idx, n)
    losses, p, counted = nll(logits, targets), logits.softmax(-1), targets >= 0
    if name == "next":
        return losses[-1].sum()
    if name == "deep":
        weights = torch.arange(1.0, n + 1)
        return (losses * (weights / weights.sum())[:, None, None]).sum()
    if name == "distill":
        teacher = p[-1].detach()
        kl = (teacher * (teacher.log() - p[:-1].log())).sum(-1).mean(0)
        return losses[-1].sum() + 0.5 * (kl * counted).sum()
    states = states_after_each_loop(model, idx, n)
    if name == "confidence":
        states = states.detach()
    stops = (states @ model.exit_gate.weight[0] + model.exit_gate.bias).sigmoid()  # (n, B, T)
    if name == "confidence":
        is_last = p[:-1].argmax(-1) == p[-1].argmax(-1)
        gate_loss = -torch.where(is_last, stops[:-1].log(), (1 - stops[:-1]).log()).mean(0)
        return losses[-1].sum() + (gate_loss * counted).sum()
    if name == "exit":
        q = exit_probabilities(stops)
        entropy = -(q * q.log()).sum(0) * counted
        return (q * losses).sum() - 0.1 * entropy.sum()
    assert name == "exit_gate"
    gained = (losses[:-1] - losses[1:]).clamp(min=0)
    go_on = torch.sigmoid(50 * (gained - 0.005)).detach()
    gate_loss = -(go_on * (1 - stops[1:]).log() + (1 - go_on) * stops[1:].log()).sum(0) / n
    return (gate_loss * counted).sum()


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objective_is_its_formula(name, chunk):
    """Value, gradient of every parameter that takes part, and the logged loss of the last loop."""
    model, idx, targets = build(**GATED, spread=0.1), tokens(), labels()
    total, parts = Objective(model, name, chunk, weighting="linear")(idx, targets, 4)
    want = by_hand(name, model, idx, targets, 4)
    assert_close(total, want, rtol=1e-5, atol=1e-5)
    trained = {n: p for n, p in model.named_parameters() if name != "exit_gate" or "gate" in n}
    got = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    want = torch.autograd.grad(want, list(trained.values()), allow_unused=True)
    for n, a, b in zip(trained, got, want, strict=True):
        assert (a is None) == (b is None), n
        if a is not None:
            assert_close(a, b, rtol=1e-4, atol=1e-4, msg=n)
    assert next(iter(parts)) == "loss"
    loss, count = parts["loss"]
    mean = nll(model(idx, idx, n_loop=4)[0], targets).sum() / (targets >= 0).sum()
    assert_close(loss / count, mean)


@pytest.mark.parametrize(
    "name, gate, other",
    [
        ("next", False, True),
        ("exit", True, True),
        ("exit_gate", True, False),
        ("confidence", True, True),
    ],
)
def test_what_an_objective_trains(name, gate, other):
    """exit_gate the gate alone, next all but the gate, by gradients and by select_trained."""
    model = build(**GATED, spread=0.1)
    Objective(model, name)(tokens(), labels(), 4)[0].backward()
    assert (model.exit_gate.weight.grad is not None) == gate
    assert (model.transformer.wte.weight.grad is not None) == other
    select_trained(model, name)
    assert model.exit_gate.weight.requires_grad == gate
    assert model.transformer.wte.weight.requires_grad == other


def test_a_gate_on_the_mean_state_sees_the_mean_so_far():
    model = build(exit_gate="mean_state", spread=0.1)
    s = torch.randn(2, 9, 32)
    for t in range(9):
        want = s[:, : t + 1].mean(1) @ model.exit_gate.weight[0] + model.exit_gate.bias
        assert_close(model.exit_gate(s)[:, t, 0], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
def test_further_heads_predict_further_tokens(chunk):
    model, idx, targets = build(n_ahead=3, spread=0.1), tokens(), labels()
    total, parts = Objective(model, "next", chunk, ahead_weight=0.8)(idx, targets, 2)
    x = model.hidden(idx, 2)
    want = nll(model.logits(x), targets).sum()
    for j, head in enumerate(model.ahead, 1):
        further = F.pad(targets[:, j:], (0, j), value=-1)
        logits = model.logits(x + F.silu(x @ head.weight.T + head.bias))
        loss, count = nll(logits, further).sum(), (further >= 0).sum()
        assert_close(parts[f"head{j + 1}"], torch.stack((loss, count)).float())
        want = want + 0.8 / 2 * loss
    assert_close(total, want)


def test_further_heads_begin_as_the_head_of_the_next_token():
    model = build(n_ahead=3)
    x = model.hidden(tokens())
    for head in model.ahead:
        assert torch.equal(head(x), x)


# -----------------------------------------------------------------------------
# chunks, FLOPs


def saved_shapes(objective, idx):
    """Return the shapes of what autograd saves for an objective's backward pass."""
    shapes = []

    def keep(tensor):
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(idx, idx, 3)
    return shapes


CHUNKED = {"next": dict(n_ahead=3), "deep": {}, "exit": GATED, "distill": {}, "confidence": GATED}


@pytest.mark.parametrize("name", CHUNKED)
def test_with_chunks_no_logits_are_kept_for_the_backward_pass(name):
    model = build(vocab_size=499, **CHUNKED[name]).train()
    shapes = saved_shapes(Objective(model, name, chunk=6), tokens())
    assert shapes
    assert not any(499 in shape[-1:] for shape in shapes)


def test_without_chunks_one_head_keeps_its_logits():
    shapes = saved_shapes(Objective(build(vocab_size=499), "next"), tokens())
    assert any(499 in shape[-1:] for shape in shapes)


def gradient_in_bfloat16(chunk):
    idx = tokens(4, 16)
    objective = Objective(build(spread=0.1), "next", chunk)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(idx, idx)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


def test_the_chunked_loss_computes_in_bfloat16_under_autocast():
    plain, chunked = gradient_in_bfloat16(0), gradient_in_bfloat16(7)
    assert (plain - chunked).norm() < 0.02 * plain.norm()


BFLOAT16 = [  # chunk, options, bfloat16 by autocast or as the weights' type
    (0, {}, "weights"),
    (7, {}, "autocast"),
    (7, {}, "weights"),
    (7, dict(logit_softcap=5.0), "autocast"),
    (7, dict(n_ahead=3), "autocast"),
]


@pytest.mark.parametrize("chunk, options, by", BFLOAT16)
def test_losses_of_bfloat16_logits_are_summed_in_float32(chunk, options, by):
    """The logged sums and counts are those of float64 over the same logits."""
    model, idx, targets = build(**options, spread=0.3), tokens(40, 16), tokens(40, 16, seed=2)
    if by == "weights":
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=by == "autocast"):
        _, parts = Objective(model, "next", chunk)(idx, targets)
        x = model.hidden(idx)
        logits = {"loss": model.lm_head(x)}
        for number, head in enumerate(model.ahead, 2):
            logits[f"head{number}"] = model.lm_head(head(x))
    assert parts.keys() == logits.keys()
    for ahead, (name, part) in enumerate(parts.items()):
        assert part.dtype == torch.float32 and logits[name].dtype == torch.bfloat16
        further = F.pad(targets[:, ahead:], (0, ahead), value=-1)
        want = nll(model.cap(logits[name].double()), further).sum()
        assert part[0].double() == pytest.approx(want.item(), rel=2e-6)
        assert part[1].item() == (further >= 0).sum()


def test_the_loss_of_bfloat16_weights_is_a_float32():
    model, idx = build(spread=0.3).bfloat16(), tokens(40, 16)
    logits, loss = model(idx, idx)
    assert loss.item() == pytest.approx(nll(logits.double(), idx).mean().item(), rel=2e-6)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_chunked_loss_has_the_gradients_of_autograd(cap):
    torch.manual_seed(0)
    x = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    W = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 50, (23,))
    logits = x @ W.T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    want = 3 * nll(logits, targets).sum()
    got = 3 * objectives.ChunkedCrossEntropy.apply(x, W, targets, cap, 5, True)
    assert_close(got, want.float())
    pairs = zip(torch.autograd.grad(got, [x, W]), torch.autograd.grad(want, [x, W]))
    for gradient, expected in pairs:
        assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


COUNTED = [
    ("next", {}),
    ("next", dict(n_ahead=3)),
    ("deep", {}),
    ("deep", dict(bptt_k=2)),
    ("exit", dict(exit_gate="state", loop_exit="linear")),
]


@pytest.mark.parametrize("name, options", COUNTED, ids=str)
def test_flops_are_those_torch_counts(monkeypatch, name, options):
    def computed_once(function, *tensors, use_reentrant):
        return function(*tensors)

    monkeypatch.setattr(objectives, "recomputed", computed_once)
    objective = Objective(build(**options, tie_weights=False, spread=0.1), name)
    idx = tokens(3, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(idx, idx)[0].backward()
    counted = counter.get_total_flops()
    if "exit_gate" in options:
        counted -= 6 * 32 * 3 * idx.numel()  # the gate's own, a vector's, are not counted by us
    near = 1e-9
    if "bptt_k" in options:
        near = 0.05  # the blocks behind loops without gradient get none for their input
    assert objective.flops_per_token() * idx.numel() == pytest.approx(counted, rel=near)


# -----------------------------------------------------------------------------
# what is refused

WRONG = [
    ("typo", {}, "objective='typo': must be one of next"),
    ("deep", dict(n_layer=3), "objective='deep': must be next where nothing is looped"),
    ("exit", {}, "objective='exit': needs a gate"),
    ("exit_gate", {}, "objective='exit_gate': needs a gate"),
    ("confidence", {}, "objective='confidence': needs a gate"),
    ("deep", dict(n_ahead=2), "n_ahead=2: must be 1 with objective='deep'"),
]


@pytest.mark.parametrize("name, options, words", WRONG)
def test_what_cannot_be_trained_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        Objective(build(**options), name)


# -----------------------------------------------------------------------------
# another number of loops, another shift for each row

BY_ROW = [
    dict(),
    dict(bptt_k=2),
    dict(input_injection="diagonal", state_init="zero", loop_norm="none", loop_exit="linear"),
    dict(loop_embedding="learned", loop_entry="rmsnorm"),
    dict(loop_embedding="sinusoidal", position="rope"),
    dict(document_separator=7),
    dict(state_init="noise", value_embedding=True),
]


@pytest.mark.parametrize("options", BY_ROW, ids=str)
def test_a_batch_at_counts_of_its_rows_is_one_row_after_the_other(options):
    """Logits and gradients."""
    model, idx, counts = build(**options, spread=0.1), tokens(4), torch.tensor([2, 5, 1, 3])
    together = model.logits(hidden_by_row(model, idx, [counts]))
    F.cross_entropy(together.flatten(0, 1), idx.flatten()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, n in enumerate(counts.tolist()):
        logits, loss = model(idx[[row]], idx[[row]], n_loop=n)
        assert_close(logits[0], together[row], atol=1e-5, rtol=1e-5)
        (loss / len(idx)).backward()
    for (name, p), got in zip(model.named_parameters(), gradients, strict=True):
        assert_close(got, p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_rows_cost_the_mean_of_their_counts():
    """A looped block computes each row as often as the row loops, not as often as the deepest."""
    model, counts = build(), torch.tensor([2, 8, 1, 1])
    rows = []
    model.transformer.h[1].register_forward_hook(lambda block, given, x: rows.append(len(x)))
    hidden_by_row(model, tokens(4), [counts])
    assert sum(rows) == counts.sum()
    assert max(rows) == 4


def test_counts_by_row_and_group():
    groups = dict(n_layer=5, loop_groups=[[0, 1], [3]], loop_counts=[2, 3])
    model, idx = build(**groups, spread=0.1), tokens(3)
    first, second = torch.tensor([1, 4, 2]), torch.tensor([3, 1, 3])
    together = model.logits(hidden_by_row(model, idx, (first, second)))
    for row, counts in enumerate([(1, 3), (4, 1), (2, 3)]):
        alone = model(idx[[row]], n_loop=counts)[0]
        assert_close(together[[row], -1:], alone, atol=1e-5, rtol=1e-5)


def test_sampled_shifts_are_geometric_and_the_last_one_takes_all_that_is_left():
    config = GPTConfig(**LOOPED, predict_ahead=True, max_shift=3, label_shift_prob=0.6)
    drawn, again = (
        sample_shifts(config, torch.Generator().manual_seed(0), 10000) for _ in range(2)
    )
    shares = [(drawn == shift).double().mean().item() for shift in (1, 2, 3)]
    assert shares == pytest.approx([0.6, 0.24, 0.16], abs=0.02)
    assert torch.equal(drawn, again)


# -----------------------------------------------------------------------------
# in training

LAYOUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]  # rows of a micro-step, micro-steps
TRAINED = [
    "--predict_ahead --max_shift=5 --loops_per_row --loop_sampling=poisson --bptt_k=2",
    "--n_ahead=3 --loss_chunk=7",
    slow("--exit_gate=state --objective=exit --loop_sampling=uniform"),
    slow("--exit_gate=mean_state --objective=confidence"),
    slow("--objective=distill --weight_decay_all"),
]


def first_moments(corpus, out_dir, *options):
    """Return {number: first moment} after one step: a tenth of the gradient."""
    one_step = ("--max_iters=1", "--eval_interval=1", "--eval_iters=1", "--grad_clip=0")
    run = train(corpus, out_dir, *options, *one_step)
    assert run.code == 0, run.err
    state = checkpoint.load(out_dir)["optimizer"]["adamw"]["state"]
    return {number: moments["exp_avg"] for number, moments in state.items()}


@pytest.mark.parametrize("options", TRAINED)
def test_micro_steps_are_one_big_batch(corpus, tmp_path, options):
    """The gradient of a step of 8 rows, in 1, 2, 4 and 8 micro-steps."""
    moments = []
    for rows, micro_steps in LAYOUTS:
        layout = (f"--batch_size={rows}", f"--gradient_accumulation_steps={micro_steps}")
        folder = tmp_path / str(micro_steps)
        moments.append(first_moments(corpus, folder, *options.split(), *layout))
    for other in moments[1:]:
        for number, want in moments[0].items():
            assert (other[number] - want).norm() <= 1e-6 * want.norm() + 1e-9


def test_the_second_stage_trains_the_gate_alone(corpus, tmp_path):
    """It leaves the language model bit for bit, moves the gate, and lowers its loss."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(corpus, first, "--objective=exit", "--exit_gate=state").code == 0
    longer = ("--max_iters=20", "--lr_decay_iters=20", "--eval_interval=20", "--optimizer=muon")
    run = train(corpus, second, "--objective=exit_gate", f"--init_from={first}", *longer)
    assert run.code == 0, run.err
    before, after = (checkpoint.load(folder)["model"] for folder in (first, second))
    for name, w in before.items():
        assert torch.equal(w, after[name]) != name.startswith("exit_gate"), name
    gate_losses = [details["gate"] for details in logged(second, "objective")]
    assert gate_losses[-1] < gate_losses[0]


def test_the_log_has_every_part_of_an_objective(corpus, tmp_path):
    assert train(corpus, tmp_path / "out", "--n_ahead=2", "--max_iters=4").code == 0
    entries = log(tmp_path / "out")
    steps = [entry for entry in entries if "lr" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert {"loss", "head2"} <= entry.keys()
    details, rows = entries[-1]["objective"], entries[-1]["eval"]
    assert details["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    options = ("--objective=exit", "--exit_gate=state", "--max_iters=1")
    assert train(corpus, tmp_path / "exit", *options).code == 0
    details = log(tmp_path / "exit")[-1]["objective"]
    assert {"loss", "exit1", "expected", "entropy", "expected_loops"} <= details.keys()
