"""Measurements of a model against the model itself, against decoding, and by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROPE, build, few_ids, split_of, tokens
from torch.testing import assert_close

from decode import Cache, Decoder
from model import spectral_clip
from nanorecur import measure
from nanorecur.evaluation import Evaluation
from nanorecur.exit_rules import EXITS, exit_distribution, make_exit

GROUPS = dict(n_layer=4, loop_groups=((0, 1), (3,)), loop_counts=(3, 2))
SHAPES = {
    "prelude and coda": dict(),
    "groups": GROUPS,
    "noise, gate and grouped queries": dict(
        state_init="noise", exit_gate="state", n_kv_head=2, **ROPE
    ),
    "latent attention": dict(attention="mla", **ROPE),
    "documents": dict(document_separator=5, input_injection="diagonal", loop_norm="none"),
    "predicting ahead": dict(predict_ahead=True, loop_exit="linear"),
}


@pytest.fixture(params=SHAPES, scope="module")
def model(request):
    return build(spread=0.1, **SHAPES[request.param])


# -----------------------------------------------------------------------------
# attention


class ComparingRecorder(measure.AttentionRecorder):
    """Records pairs: the output of the model's own attention, and that of recorded weights."""

    def __init__(self):
        super().__init__(lambda weights: weights)
        self.pairs = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs)
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
            self.pairs.append((y, self.recorded[-1] @ v))
        return y


@torch.no_grad()
def test_recorded_attention_gives_the_models_own_output(model):
    recorder = ComparingRecorder()
    with recorder:
        logits = model(tokens(), tokens())[0]
    assert len(recorder.pairs) == len(measure.pass_names(model.config)) == model.config.n_effective
    for y, from_weights in recorder.pairs:
        assert_close(y, from_weights)
    assert torch.equal(logits, model(tokens(), tokens())[0])


def test_passes_are_in_the_order_of_the_forward_pass():
    """A pass for each block, also where several blocks outside the loops follow one another."""
    names = measure.pass_names(build(**GROUPS).config)
    assert names == ["0/1", "1/1", "0/2", "1/2", "0/3", "1/3", "2", "3/1", "3/2"]
    names = measure.pass_names(build(n_prelude=2, n_block=1, n_coda=2, n_loop=2).config)
    assert names == ["0", "1", "2/1", "2/2", "3", "4"]
    assert measure.pass_names(build(n_layer=3).config) == ["0", "1", "2"]


def test_attention_summary_by_hand():
    weights = torch.rand(3, 2, 7, 7).tril()
    weights /= weights.sum(-1, keepdim=True)
    summary = measure.attention_summary(weights)
    at_distance = [(i - j, weights[:, :, i, j]) for i in range(7) for j in range(i + 1)]
    mean = sum(distance * weight for distance, weight in at_distance).mean(0) / 7
    assert_close(summary["mean distance"], mean)
    far = sum(weight for distance, weight in at_distance if 4 <= distance < 8).mean(0) / 7
    assert_close(summary["by distance"][:, 3], far)
    assert_close(summary["by distance"].sum(-1), torch.ones(2))
    assert_close(summary["on the first token"], weights[:, :, 1:, 0].mean((0, 2)))
    even = torch.full((1, 1, 1, 8), 1 / 8).expand(1, 1, 8, 8)
    assert measure.attention_summary(even)["entropy"].item() == pytest.approx(3)


def test_induction_score_of_a_perfect_head_is_one():
    L = 5
    weights = torch.zeros(1, 2, 2 * L, 2 * L)
    weights[0, 0, range(L, 2 * L), range(1, L + 1)] = 1.0  # at what followed the same token
    weights[0, 1, range(L, 2 * L), range(0, L)] = 1.0  # at the same token
    assert measure.induction_score(weights).tolist() == [1.0, 0.0]


# -----------------------------------------------------------------------------
# states and read-outs


@torch.no_grad()
def test_readouts_are_the_models_own_predictions_at_every_depth(model):
    idx, counts = tokens(), model.config.counts()
    for group in range(len(counts)):
        logits_after = [logits for _, logits in measure.readouts(model, idx, group, 5)]
        assert len(logits_after) == 5
        for n, logits in enumerate(logits_after, 1):
            n_loop = (*counts[:group], n, *counts[group + 1 :])
            assert_close(logits, model(idx, idx, n_loop=n_loop)[0])


@torch.no_grad()
def test_a_text_ends_in_the_models_own_states_and_predictions(model):
    idx, counts = tokens(1), model.config.counts()
    text = measure.text_states(model, idx, len(counts) - 1, counts[-1])
    top = model(idx, idx)[0][0].softmax(-1).topk(5)
    assert (text.likeliest[-1] == top.indices.numpy()).all()
    np.testing.assert_allclose(text.probabilities[-1], top.values.numpy(), rtol=1e-5)
    last = model.loops_representation(idx)[-1][-1]
    assert_close(text.states[-1], last[0, -idx.size(1) :])


def test_state_measures_by_hand():
    states = torch.randn(4, 6, 8)
    measures = measure.state_measures(states)

    def mean_distance(i, j, of):
        ratios = [(states[i, t] - states[j, t]).norm() / states[of, t].norm() for t in range(6)]
        return np.mean(ratios)

    change = [mean_distance(i, i - 1, of=i) for i in (1, 2, 3)]
    distance = [mean_distance(i, 3, of=3) for i in (0, 1, 2)]
    np.testing.assert_allclose(measures["change"][0], change, rtol=1e-5)
    np.testing.assert_allclose(measures["distance"][0], distance, rtol=1e-5)
    np.testing.assert_allclose(measures["norm"][0], states.norm(dim=-1).mean(1), rtol=1e-5)
    pairs = [(a, b) for a in range(6) for b in range(6) if a != b]
    cosines = [[F.cosine_similarity(s[a], s[b], dim=0).item() for a, b in pairs] for s in states]
    np.testing.assert_allclose(
        measures["correlation"], np.mean(cosines, axis=1), rtol=1e-4, atol=1e-6
    )


def test_pca_keeps_the_distances_of_points_in_a_plane():
    plane, _ = torch.linalg.qr(torch.randn(20, 2))
    flat = torch.randn(5, 7, 2) * torch.tensor([3.0, 1.0])
    points, share = measure.pca(flat @ plane.T + 2.0)
    assert points.shape == (5, 7, 2)
    assert share.sum() == pytest.approx(1) and share[0] > share[1]
    distances = torch.pdist(torch.from_numpy(points).flatten(0, 1)).float()
    assert_close(distances, torch.pdist(flat.flatten(0, 1)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_residual_stream_ends_in_the_models_prediction(model, monkeypatch):
    monkeypatch.setattr(measure, "pca", lambda points: (points, np.zeros(2)))
    idx = tokens(1)
    stream = measure.residual_stream(model, idx, [0, 4])["points"]
    assert len(stream) == model.config.n_effective + 1
    _, last_is_looped = model.config.layout[-1]
    if not model.config.predict_ahead and not last_is_looped:
        logits = model.logits(model.transformer.ln_f(stream[-1][None]))
        assert_close(logits, model(idx, idx)[0][:, [0, 4]])
    assert not any(block._forward_hooks for block in model.transformer.h)


def test_loops_to_try_and_where_training_was():
    assert measure.loops_to_try(4) == [1, 2, 3, 4] and measure.loops_to_try(1) == [1]
    many = measure.loops_to_try(128)
    assert many[0] == 1 and many[-1] == 128 and len(many) <= 24 and many == sorted(set(many))
    assert measure.trained_range(build(n_loop=3).config).tolist() == [[3, 3]]
    uniform = build(n_loop=3, loop_sampling="uniform").config
    assert measure.trained_range(uniform).tolist() == [[1, 5]]
    assert measure.trained_range(build(n_layer=1).config).shape == (0, 2)


# -----------------------------------------------------------------------------
# losses


@torch.no_grad()
def test_a_sweep_is_a_forward_pass_at_each_loop_count(model):
    """Also where one pass serves all counts, and where targets are left out."""
    x, y, loops = tokens(3), tokens(3, seed=2), [1, 2, 5]
    y[0, :4] = -1
    data = measure.depth_sweep(model, x, y, loops, 0.5)
    counted = y >= 0
    for i, n in enumerate(loops):
        logits, loss = model(x, y, n_loop=n)
        assert data["loss"][i] == pytest.approx(loss.item(), rel=1e-5)
        assert data["bits_per_byte"][i] == pytest.approx(loss.item() / np.log(2) / 2, rel=1e-5)
        right = (logits.argmax(-1) == y)[counted].float().mean().item()
        assert data["accuracy"][i] == pytest.approx(right)
    assert data["configured_loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-5)
    assert data["configured"].tolist() == list(model.config.counts())


def test_one_pass_serves_all_loop_counts_of_one_group(monkeypatch):
    model, blocks = build(n_prelude=0, n_block=1, n_coda=0), []
    model.transformer.h[0].register_forward_hook(lambda *_: blocks.append(1))
    measure.score(model, tokens(), tokens(), [None, 1, 2, 5])
    assert len(blocks) == 5


def test_a_plain_model_has_the_one_loss():
    model, x = build(n_layer=2), tokens()
    data = measure.depth_sweep(model, x, x, [], 1.0)
    assert data["configured_loss"] == pytest.approx(model(x, x)[1].item(), rel=1e-5)
    assert len(data["loops"]) == len(data["loss"]) == len(data["configured"]) == 0


@pytest.mark.parametrize("settings", [(2, 3, 0), (9999, 1, 0), (2, 3, 5)])
def test_windows_are_those_of_trains_evaluation(corpus, settings):
    config = dict(zip(("eval_iters", "batch_size", "eval_stride"), settings))
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.config = config
    split = split_of(corpus)
    for mine, theirs in zip(measure.evaluated_windows(split, config), evaluation.windows(split)):
        np.testing.assert_array_equal(mine, theirs)


def test_curves_hold_what_was_logged_and_nothing_else():
    step = dict(loss=2.0, lr=0.1, loops=0, tokens_per_second=5)
    evaluation = {"iter": 1, "eval": [dict(split="val", loss=1.0, bits_per_byte=2.0)]}
    curves = measure.training_curves([dict(iter=0, **step), evaluation])
    names = {"iter", "loss", "lr", "tokens_per_second", "eval iter", "val loss"}
    assert set(curves) == {*names, "val bits_per_byte"}  # nothing is looped
    assert set(measure.training_curves([evaluation])) == {"eval iter", "val loss"} | {
        "val bits_per_byte"
    }
    looped = measure.training_curves([dict(iter=0, **step | {"loops": 2})])
    assert looped["loops"].tolist() == [2] and set(looped) == names - {"eval iter", "val loss"} | {
        "loops"
    }


# -----------------------------------------------------------------------------
# early exit


def gated(**overrides):
    """Return a model with a gate that tells states apart."""
    model = build(spread=0.2, exit_gate="state", **overrides)
    with torch.no_grad():
        for parameter in model.exit_gate.parameters():
            parameter *= 5
    return model


def decoded_loops(model, idx, rule, n):
    """Return the loops (T,) of a text idx (1, T), decoded token by token."""
    decoder = Decoder(model, Cache(model, 1, n), n, rule)
    return [decoder.step(token, torch.arange(1))[1].item() for token in idx.split(1, dim=1)]


THREE_THRESHOLDS = {  # their numbers in the list of a rule
    "state": (7, 9, 11),
    "kl": (9, 12, 14),
    "entropy": (6, 8, 10),
    "argmax": (6, 7, 8),
    "gate": (1, 2, 5),
}


@pytest.mark.parametrize("rule", EXITS)
@torch.no_grad()
def test_the_loops_of_a_text_are_those_of_decoding(rule):
    """Where tokens stop at different loops, and sooner from one threshold to the next."""
    model, idx, n = gated(n_coda=0), few_ids(1, 16), 8
    means = []
    for number in THREE_THRESHOLDS[rule]:
        exit_rule = make_exit(model, rule, measure.THRESHOLDS[rule][number])
        loops = measure.exit_loops(model, idx, exit_rule, 0, n).tolist()
        assert loops == decoded_loops(model, idx, exit_rule, n)
        assert len(set(loops)) > 1
        means.append(np.mean(loops))
    assert means[0] > means[1] > means[2]


NO_NORM = dict(loop_norm="none", input_injection="diagonal")  # the first loop moves states little


@pytest.mark.parametrize("kind", [{}, NO_NORM], ids=str)
@torch.no_grad()
def test_the_curves_of_single_tokens_are_decoding(kind):
    """Full passes and decoding differ only in what later tokens read of stopped ones."""
    model, x, n = gated(**kind), torch.arange(61)[:, None], 8
    measured = measure.exit_measures(model, x, x, 0, n)
    curves = measure.exit_curves(model, measured)
    for rule in EXITS:
        n_different = set()
        for i, threshold in enumerate(measure.THRESHOLDS[rule]):
            exit_rule = make_exit(model, rule, threshold)
            decoder = Decoder(model, Cache(model, 61, n), n, exit_rule)
            hidden, loops = decoder.step(x, torch.arange(61))
            loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), x.flatten()).item()
            share = np.bincount(loops.numpy(), minlength=n + 1)[1:] / 61
            np.testing.assert_allclose(curves[f"{rule} share"][i], share)
            assert curves[f"{rule} loops"][i] == pytest.approx(loops.float().mean().item())
            assert curves[f"{rule} loss"][i] == pytest.approx(loss, rel=1e-5)
            n_different.add(len(loops.unique()))
        assert max(n_different) > 2


def test_threshold_zero_is_the_loss_at_all_loops(model):
    x, y, n = tokens(3), tokens(3, seed=2), 6
    y[0, :4] = -1
    counts = model.config.counts()
    measured = measure.exit_measures(model, x, y, len(counts) - 1, n)
    curves = measure.exit_curves(model, measured)
    assert measured["loss"].shape == (n, 3 * 9 - 4)
    full = model(x, y, n_loop=(*counts[:-1], n))[1].item()
    assert curves["fixed loss"][-1] == pytest.approx(full, rel=1e-5)
    rules = [rule for rule in EXITS if rule != "gate" or model.config.exit_gate != "none"]
    assert set(measured) == {"loss", *rules}
    for rule in rules:
        assert curves[f"{rule} threshold"].tolist() == measure.THRESHOLDS[rule]
        assert curves[f"{rule} threshold"][0] == 0
        assert curves[f"{rule} loops"][0] == n
        assert curves[f"{rule} loss"][0] == curves["fixed loss"][-1]
        assert (np.diff(curves[f"{rule} loops"]) <= 0).all()  # from never to soonest


def test_windows_are_measured_alike_a_few_rows_at_a_time(monkeypatch):
    model, x, y = gated(), tokens(5), tokens(5, seed=2)
    y[1] = -1
    together = measure.exit_measures(model, x, y, 0, 3)
    score = measure.score(model, x, y, [3])
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", 1)
    apart = measure.exit_measures(model, x, y, 0, 3)
    for name, values in together.items():
        np.testing.assert_allclose(apart[name], values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(measure.score(model, x, y, [3]), score)
    assert score[0, 0] == pytest.approx(model(x, y, n_loop=3)[1].item())


def test_the_gate_measures_the_probability_to_have_stopped():
    model, x = gated(), tokens(2)
    measured = measure.exit_measures(model, x, x, 0, 4)["gate"]
    with torch.no_grad():
        states = [state for state, _ in measure.readouts(model, x, 0, 4)]
        stopped = exit_distribution(model, states).cumsum(-1).flatten(0, 1).T
    np.testing.assert_allclose(measured[:-1], stopped[:-1], atol=1e-6)


# -----------------------------------------------------------------------------
# spectra


def test_spectra_are_clipped_where_they_are_above_beta():
    model, earlier = build(spread=0.2), build(seed=3, spread=0.2)
    data = measure.spectra(model, earlier, 0.9)
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = {f"{kind}:{block}" for kind in kinds for block in (1, 2)} | {"inject:0"}
    assert {key.rsplit(":", 1)[0] for key in data} == names | {"beta"}
    matrix = model.transformer.h[2].mlp.c_fc.weight.detach()
    now, clipped = data["mlp.c_fc:2:now"], data["mlp.c_fc:2:clipped"]
    np.testing.assert_allclose(now, torch.linalg.svdvals(matrix), rtol=1e-5)
    of_clipped = torch.linalg.svdvals(spectral_clip(matrix, 0.9))
    np.testing.assert_allclose(clipped, of_clipped, rtol=1e-5)
    np.testing.assert_allclose(clipped, now.clip(max=0.9), rtol=0.01)
    before = torch.linalg.svdvals(earlier.transformer.h[2].mlp.c_fc.weight.detach())
    np.testing.assert_allclose(data["mlp.c_fc:2:before"], before, rtol=1e-5)


def test_level_curves_are_those_of_the_last_evaluation_of_levels():
    def row(split, level, loops, accuracy):
        own = loops == level
        return dict(split=split, level=level, loops=loops, accuracy=accuracy, own=own)

    first = [row("val", 1, 1, 0.1)]
    last = [row("val", 1, 1, 0.9), row("val", 1, 4, 0.8), row("hard", 3, 3, 0.7)]
    data = measure.level_curves([{"iter": 0, "levels": first}, {"loss": 1}, {"levels": last}])
    assert data["levels"].tolist() == [1, 3]
    assert data["loops"].tolist() == [1, 3, 4]
    nan = float("nan")
    np.testing.assert_array_equal(data["accuracy"], [[0.9, nan, 0.8], [nan, 0.7, nan]])
    assert data["own"].tolist() == [1, 3]
    assert data["beyond"].tolist() == [False, True]
    assert measure.level_curves([{"iter": 0, "loss": 1.0}]) == {}
