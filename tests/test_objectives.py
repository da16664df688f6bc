"""Each objective against its formula written out with all logits at hand, and what training makes of it."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import build, tokens, train
from test_train import log, losses, torchrun
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanorecur import checkpoint, objectives
from nanorecur.objectives import Objective, compute_anew

GATED = dict(exit_gate="state")


def labels():
    """Targets of which a few are none."""
    targets = tokens(seed=2)
    targets[0, :3] = targets[1, -1] = -1
    return targets


def at_every_loop(model, idx, n):
    """Logits (n, B, T, V) and states (n, B, T, C), each depth by a forward pass of its own."""
    logits = torch.stack([model.logits(model.hidden(idx, t)) for t in range(1, n + 1)])
    h, loop = model.transformer.h, model.transformer.loops[0]
    x, where = model.embed(idx)
    return logits, torch.stack(list(loop.states(h[0](x, where), where, n)))


@pytest.mark.parametrize(
    "what, products, activations",
    [("none", 1, 1), ("cheap", 1, 2), ("block", 2, 2), ("loop", 2, 2)],
)
def test_what_is_computed_anew(what, products, activations):
    """Results of looped blocks that a step computes, in passes: matrix products of MLPs, and their activations."""
    model, seen = build(n_prelude=0, n_coda=0, n_embd=32, n_hidden=48), []
    with torch.no_grad():
        want = model(tokens(), tokens())[1].item()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() > 1 and out.size(-1) == 48:
                seen.append(function.overloadpacket)
            return out

    compute_anew(model, what)
    with Watch():
        loss = model(tokens(), tokens())[1]
        seen.append("backward")
        loss.backward()
    aten, passes = torch.ops.aten, model.config.n_block * model.config.n_loop
    forward = [name for name in seen if name in (aten.gelu, aten.addmm)]
    assert (
        forward.count(aten.addmm) == products * passes
        and forward.count(aten.gelu) == activations * passes
    )
    assert loss.item() == pytest.approx(want, abs=1e-6)


def nll(logits, targets):
    """(.., B, T), 0 where there is no target."""
    chosen = (
        logits.log_softmax(-1)
        .gather(-1, targets.clamp(min=0).expand(logits.shape[:-1]).unsqueeze(-1))
        .squeeze(-1)
    )
    return -chosen * (targets >= 0)


def by_hand(name, model, idx, targets, n):
    logits, states = at_every_loop(model, idx, n)
    losses, counted = nll(logits, targets), targets >= 0
    p = logits.softmax(-1)
    if name == "next":
        return losses[-1].sum()
    if name == "deep":
        weights = torch.arange(1.0, n + 1)
        return (losses * (weights / weights.sum())[:, None, None]).sum()
    if name == "distill":
        last = p[-1].detach()
        apart = (last * (last.log() - p[:-1].log())).sum(-1).mean(0) * counted
        return losses[-1].sum() + 0.5 * apart.sum()
    if name == "confidence":
        states = states.detach()
    g = (states @ model.exit_gate.weight[0] + model.exit_gate.bias).sigmoid()  # (n, B, T): stop
    if name == "confidence":
        same = p[:-1].argmax(-1) == p[-1].argmax(-1)
        wrong = -torch.where(same, g[:-1].log(), (1 - g[:-1]).log()).mean(0)
        return losses[-1].sum() + (wrong * counted).sum()
    if name == "exit":
        reach, q = torch.ones_like(g[0]), []
        for t in range(n):
            q.append(reach * (g[t] if t < n - 1 else 1))
            reach = reach * (1 - g[t])
        q = torch.stack(q)
        return ((q * losses).sum(0) + 0.1 * (q * q.log()).sum(0) * counted).sum()
    want = torch.sigmoid(50 * ((losses[:-1] - losses[1:]).clamp(min=0) - 0.005)).detach()
    wrong = -(want * (1 - g[1:]).log() + (1 - want) * g[1:].log()).sum(0) / n
    return (wrong * counted).sum()


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("name", objectives.OBJECTIVE)
def test_objective_is_its_formula(name, chunk):
    """Value, and gradient of every parameter that takes part."""
    model, idx, targets = build(**GATED, spread=0.1), tokens(), labels()
    total, parts = Objective(model, name, chunk, weighting="linear")(idx, targets, 4)
    wanted = by_hand(name, model, idx, targets, 4)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    trained = {
        n: p
        for n, p in model.named_parameters()
        if n.startswith("exit_gate") or name != "exit_gate"
    }
    got, want = (
        torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for loss in (total, wanted)
    )
    for n, a, b in zip(trained, got, want, strict=True):
        assert (a is None) == (b is None), n
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=n)
    assert next(iter(parts)) == "loss"
    mean = nll(model(idx, idx, n_loop=4)[0], targets).sum() / (targets >= 0).sum()
    torch.testing.assert_close(parts["loss"][0] / parts["loss"][1], mean)


def test_what_an_objective_trains():
    """exit_gate the gate alone; confidence the gate by states that it leaves alone; exit the trunk through the gate too."""
    for name, gate, trunk in (
        ("exit_gate", True, False),
        ("confidence", True, True),
        ("exit", True, True),
    ):
        model = build(**GATED, spread=0.1)
        Objective(model, name)(tokens(), labels(), 4)[0].backward()
        assert (model.exit_gate.weight.grad is not None) == gate
        assert (model.transformer.wte.weight.grad is not None) == trunk


def test_mean_state_gate_sees_the_mean_so_far():
    model = build(exit_gate="mean_state", spread=0.1)
    s = torch.randn(2, 9, 32)
    for t in range(9):
        wanted = s[:, : t + 1].mean(1) @ model.exit_gate.weight[0] + model.exit_gate.bias
        torch.testing.assert_close(model.exit_gate(s)[:, t, 0], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
def test_further_heads_predict_further_tokens(chunk):
    model, idx, targets = build(n_ahead=3, spread=0.1), tokens(), labels()
    total, parts = Objective(model, "next", chunk, ahead_weight=0.8)(idx, targets, 2)
    x = model.hidden(idx, 2)
    wanted = nll(model.logits(x), targets).sum()
    for j, head in enumerate(model.ahead, 1):
        further = F.pad(targets[:, j:], (0, j), value=-1)
        loss = nll(model.logits(x + F.silu(x @ head.weight.T + head.bias)), further).sum()
        torch.testing.assert_close(
            parts[f"head{j + 1}"], torch.stack((loss, (further >= 0).sum())).float()
        )
        wanted = wanted + 0.4 * loss
    torch.testing.assert_close(total, wanted)
    model = build(n_ahead=3)
    x = model.hidden(idx)
    assert all(
        torch.equal(head(x), x) for head in model.ahead
    )  # they begin as the head of the next token


@pytest.mark.parametrize(
    "name,options",
    [
        ("next", dict(n_ahead=3)),
        ("deep", {}),
        ("exit", GATED),
        ("distill", {}),
        ("confidence", GATED),
    ],
)
def test_no_logits_are_kept_for_the_backward_pass(name, options):
    """Nothing of V channels in what autograd saves; without chunks one head alone does save its own."""
    model, idx, kept = build(vocab_size=499, **options).train(), tokens(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        Objective(model, name, chunk=6)(idx, idx, 3)
        assert kept and not any(499 in shape[-1:] for shape in kept)
        Objective(build(vocab_size=499), "next")(idx, idx, 3)
    assert any(499 in shape[-1:] for shape in kept)


@pytest.mark.parametrize(
    "name,options",
    [
        ("next", {}),
        ("next", dict(n_ahead=3)),
        ("deep", {}),
        ("deep", dict(bptt_k=2)),
        ("exit", dict(exit_gate="state", loop_exit="linear")),
    ],
)
def test_flops_are_those_torch_counts(monkeypatch, name, options):
    monkeypatch.setattr(
        objectives, "recomputed", lambda function, *tensors, use_reentrant: function(*tensors)
    )
    scored, idx = Objective(build(**options, tie_weights=False, spread=0.1), name), tokens(3, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scored(idx, idx)[0].backward()
    gates = (
        6 * 32 * 3 * idx.numel() if options.get("exit_gate") else 0
    )  # a vector's, which are not counted
    counted = counter.get_total_flops() - gates
    if options.get(
        "bptt_k"
    ):  # loops without a gradient: the blocks after them get none for their input
        assert scored.flops_per_token() * idx.numel() == pytest.approx(counted, rel=0.05)
    else:
        assert scored.flops_per_token() * idx.numel() == pytest.approx(counted, rel=1e-9)


WRONG = [
    ("typo", {}),
    ("deep", dict(n_layer=3)),
    ("exit", {}),
    ("exit_gate", {}),
    ("confidence", {}),
    ("deep", dict(n_ahead=2)),
]


@pytest.mark.parametrize("name,options", WRONG, ids=str)
def test_what_cannot_be_trained_so_is_refused(name, options):
    with pytest.raises(ValueError, match="objective"):
        Objective(build(**options), name)


# -----------------------------------------------------------------------------
# in training

LAYOUTS = [
    ("--batch_size=8", 1),
    ("--batch_size=4", 2),
    ("--batch_size=2", 4),
    ("--batch_size=1", 8),
]
EVERYTHING = [
    "--predict_ahead --max_shift=5 --loops_per_row --loop_sampling=poisson --bptt_k=2",
    "--n_ahead=3 --loss_chunk=7",
    "--exit_gate=state --objective=exit --loop_sampling=uniform",
    "--exit_gate=mean_state --objective=confidence",
    "--objective=distill --weight_decay_all",
]


@pytest.mark.parametrize("options", EVERYTHING)
def test_micro_steps_are_one_big_batch(corpus, tmp_path, options):
    """The gradient of a step, as the optimizer's first moment keeps a tenth of it, from 1, 2, 4 and 8 micro-steps."""
    moments = []
    for batch, micro_steps in LAYOUTS:
        folder = tmp_path / str(micro_steps)
        run = train(
            corpus,
            folder,
            *options.split(),
            batch,
            f"--gradient_accumulation_steps={micro_steps}",
            "--max_iters=1",
            "--eval_interval=1",
            "--grad_clip=0",
        )
        assert run.code == 0, run.err
        moments.append(checkpoint.load(folder)["optimizer"]["adamw"]["state"])
    for state in moments[1:]:
        for key, wanted in moments[0].items():
            apart = (state[key]["exp_avg"] - wanted["exp_avg"]).norm()
            assert apart <= 1e-6 * wanted["exp_avg"].norm() + 1e-9, apart


def test_two_processes_are_one(corpus, tmp_path):
    options = (EVERYTHING[0] + " --max_iters=4 --eval_interval=4").split()
    assert train(corpus, tmp_path / "one", *options).code == 0
    run = torchrun(corpus, tmp_path / "two", *options)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    gated = "--exit_gate=state --objective=exit_gate --max_iters=4 --eval_interval=4".split()
    assert train(corpus, tmp_path / "three", *gated).code == 0
    run = torchrun(corpus, tmp_path / "four", *gated)
    assert run.returncode == 0, run.stderr
    for a, b in zip(log(tmp_path / "three"), log(tmp_path / "four"), strict=True):
        assert a.get("objective", {}) == pytest.approx(b.get("objective", {}), rel=1e-5)


def test_the_gate_alone_is_trained(corpus, tmp_path):
    """Stage II leaves the language model bit for bit, moves the gate, and lowers its loss."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(corpus, first, "--objective=exit", "--exit_gate=state").code == 0
    run = train(
        corpus,
        second,
        "--objective=exit_gate",
        f"--init_from={first}",
        "--max_iters=20",
        "--lr_decay_iters=20",
        "--optimizer=muon",
        "--eval_interval=20",
    )
    assert run.code == 0, run.err
    before, after = (checkpoint.load(folder)["model"] for folder in (first, second))
    for name, w in before.items():
        assert torch.equal(w, after[name]) != name.startswith("exit_gate"), name
    gate = [entry["objective"]["gate"] for entry in log(second) if "eval" in entry]
    assert gate[-1] < gate[0]
    assert {"loss", "exit1", "expected", "entropy", "loops"} <= log(first)[-1]["objective"].keys()


def test_evaluation_tells_each_shift(corpus, tmp_path):
    """Rows for 1, 2 and 3 tokens ahead; the first has the plain columns, and every row is what the model gives."""
    run = train(corpus, tmp_path / "out", "--predict_ahead", "--max_shift=3")
    assert run.code == 0 and "tokens ahead" in run.out, run.err
    rows = log(tmp_path / "out")[-1]["eval"]
    assert [(row["split"], row["shift"]) for row in rows] == [
        ("train", 1),
        ("val", 1),
        ("val", 2),
        ("val", 3),
    ]
    import pretrained
    from nanorecur.dataset import load_meta, open_split

    model, meta = pretrained.load(tmp_path / "out"), load_meta(corpus)
    split = open_split(corpus, "val", meta, 16, meta["vocab_size"])
    x, y = map(torch.from_numpy, split.windows(split.spread(3 * 4)))
    with torch.no_grad():
        assert rows[3]["loss"] == pytest.approx(model(x, y, shift=3)[1].item(), rel=1e-5)
        plain = model(x, y)[1].item()
    assert rows[1]["loss"] == pytest.approx(plain, rel=1e-5)


def test_bfloat16_weights_have_float32_masters(corpus, tmp_path):
    """What is saved is float32 and remembers steps too small for bfloat16; losses stay near those of float32."""
    options = (
        "--max_iters=30",
        "--lr_decay_iters=30",
        "--eval_interval=30",
        "--learning_rate=3e-3",
    )
    assert train(corpus, tmp_path / "full", *options).code == 0
    assert train(corpus, tmp_path / "half", *options, "--param_dtype=bfloat16").code == 0
    weights = checkpoint.load(tmp_path / "half")["model"]
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())
    full, half = losses(tmp_path / "full"), losses(tmp_path / "half")
    assert half != full and half == pytest.approx(full, abs=0.05)


def test_weight_decay_spares_norms_and_embeddings_unless_asked(corpus, tmp_path):
    """With a rate so small that the gradient hardly counts: what weight decay alone does to the weights."""
    norms = {}
    for name, more in (("spared", ()), ("all", ("--weight_decay_all",))):
        options = (
            "--max_iters=1",
            "--eval_interval=1",
            "--weight_decay=100",
            "--learning_rate=1e-3",
            "--decay_lr=False",
            *more,
        )
        assert train(corpus, tmp_path / name, *options).code == 0
        norms[name] = {
            key: w.norm().item() for key, w in checkpoint.load(tmp_path / name)["model"].items()
        }
    for key, spared in norms["spared"].items():
        decayed = norms["all"][key]
        if key.startswith("transformer.w") or "ln_" in key and "weight" in key:
            assert decayed == pytest.approx(0.9 * spared, rel=0.02), key
        elif key.endswith("c_fc.weight"):
            assert decayed == pytest.approx(spared, rel=1e-6), key


def test_the_log_has_every_part(corpus, tmp_path):
    assert train(corpus, tmp_path / "out", "--n_ahead=2").code == 0
    entries = [
        json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    ]
    assert all({"loss", "head2"} <= entry.keys() for entry in entries if "lr" in entry)
    assert entries[-1]["objective"]["loss"] == pytest.approx(
        entries[-1]["eval"][1]["loss"], rel=1e-5
    )


def test_the_chunked_loss_computes_in_bfloat16_where_the_rest_does():
    idx = tokens(4, 16)
    whole, chunked = (Objective(build(spread=0.1), "next", chunk) for chunk in (0, 7))
    gradients = []
    for scored in (whole, chunked):
        with torch.autocast("cpu", torch.bfloat16):
            loss = scored(idx, idx)[0]
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in scored.parameters()]))
    a, b = gradients
    assert (a - b).norm() < 0.02 * a.norm()
