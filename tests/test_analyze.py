"""Pictures: what is measured equals what the model computes, what is drawn equals what is stored, pages open in a browser."""

import base64
import csv
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Run, build, tokens, train

import pretrained
from model import spectral_clip
from nanorecur import checkpoint, figures
from nanorecur.exit_rules import exit_distribution

SHAPES = {
    "prelude and coda": dict(),
    "groups": dict(
        n_prelude=0,
        n_block=0,
        n_coda=0,
        n_loop=1,
        n_layer=4,
        loop_groups=((0, 1), (3,)),
        loop_counts=(3, 2),
        block_size=16,
        vocab_size=61,
        n_embd=32,
        n_head=4,
    ),
    "noise, gate and grouped queries": dict(
        state_init="noise", exit_gate="state", n_kv_head=2, position="rope"
    ),
    "latent attention": dict(attention="mla", position="rope"),
    "documents": dict(document_separator=5, input_injection="diagonal", loop_norm="none"),
    "predicting ahead": dict(predict_ahead=True, loop_exit="linear"),
}


@pytest.fixture(params=SHAPES, scope="module")
def model(request):
    return build(spread=0.1, **SHAPES[request.param])


# -----------------------------------------------------------------------------
# attention


class Compared(figures.Recorded):
    """Keeps, besides, what the model's own attention gives, and the same from the weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs)
        if func is F.scaled_dot_product_attention:
            v = args[2].repeat_interleave(args[0].size(1) // args[2].size(1), dim=1)
            self.pairs.append((y, self.kept[-1] @ v))
        return y


@torch.no_grad()
def test_recorded_attention_gives_the_models_own_output(model):
    compared = Compared(lambda weights: weights)
    compared.pairs = []
    with compared:
        plain = model(tokens(), tokens())[0]
    assert len(compared.pairs) == len(figures.passes(model.config)) == model.config.n_effective
    for y, again in compared.pairs:
        torch.testing.assert_close(y, again)
    torch.testing.assert_close(plain, model(tokens(), tokens())[0], rtol=0, atol=0)


def test_passes_are_in_the_order_of_the_forward_pass():
    names = figures.passes(build(**SHAPES["groups"]).config)
    assert names == ["0/1", "1/1", "0/2", "1/2", "0/3", "1/3", "2", "3/1", "3/2"]


def test_attention_summary_by_hand():
    weights = torch.rand(3, 2, 7, 7).tril()
    weights /= weights.sum(-1, keepdim=True)
    got = figures.attention_summary(weights)
    back = [(i - j, weights[:, :, i, j]) for i in range(7) for j in range(i + 1)]
    mean = sum(d * w for d, w in back).mean(0) / 7
    torch.testing.assert_close(got["mean distance"], mean)
    far = sum(w for d, w in back if 4 <= d < 8).mean(0) / 7
    torch.testing.assert_close(got["by distance"][:, 3], far)
    torch.testing.assert_close(got["by distance"].sum(-1), torch.ones(2))
    torch.testing.assert_close(got["on the first token"], weights[:, :, 1:, 0].mean((0, 2)))
    even = figures.attention_summary(torch.full((1, 1, 1, 8), 1 / 8).expand(1, 1, 8, 8))
    assert even["entropy"].item() == pytest.approx(3)


def test_induction_score_of_a_perfect_head_is_one():
    L = 5
    weights = torch.zeros(1, 2, 2 * L, 2 * L)
    weights[0, 0, range(L, 2 * L), range(1, L + 1)] = 1.0  # at what followed the same token
    weights[0, 1, range(L, 2 * L), range(0, L)] = 1.0  # at the same token
    assert figures.induction_score(weights).tolist() == [1.0, 0.0]


# -----------------------------------------------------------------------------
# states, read-outs, exits


@torch.no_grad()
def test_readouts_are_the_models_own_predictions_at_every_depth(model):
    idx, counts = tokens(), model.config.counts()
    for group in range(len(counts)):
        read = list(figures.readouts(model, idx, group, 5))
        assert len(read) == 5
        for i, (_, logits) in enumerate(read, 1):
            at = (*counts[:group], i, *counts[group + 1 :])
            torch.testing.assert_close(logits, model(idx, idx, n_loop=at)[0])
    states, likeliest, probabilities = figures.look(model, idx[:1], group, counts[-1])
    own = model(idx[:1], idx[:1])[0][0].softmax(-1).topk(5)
    assert (likeliest[-1] == own.indices.numpy()).all()
    np.testing.assert_allclose(probabilities[-1], own.values.numpy(), rtol=1e-5)
    torch.testing.assert_close(
        states[-1], model.loops_representation(idx[:1])[-1][-1][0, -idx.size(1) :]
    )


def test_state_measures_by_hand():
    states = torch.randn(4, 6, 8)
    got = figures.state_measures(states)
    change = [
        np.mean([(states[i, t] - states[i - 1, t]).norm() / states[i, t].norm() for t in range(6)])
        for i in (1, 2, 3)
    ]
    distance = [
        np.mean([(states[i, t] - states[3, t]).norm() / states[3, t].norm() for t in range(6)])
        for i in range(3)
    ]
    np.testing.assert_allclose(got["change"][0], change, rtol=1e-5)
    np.testing.assert_allclose(got["distance"][0], distance, rtol=1e-5)
    np.testing.assert_allclose(got["norm"][0], states.norm(dim=-1).mean(1), rtol=1e-5)
    cosine = [
        np.mean(
            [F.cosine_similarity(s[a], s[b], dim=0) for a in range(6) for b in range(6) if a != b]
        )
        for s in states
    ]
    np.testing.assert_allclose(got["correlation"], cosine, rtol=1e-4, atol=1e-6)


def test_pca_keeps_the_distances_of_points_in_a_plane():
    plane, _ = torch.linalg.qr(torch.randn(20, 2))
    flat = torch.randn(5, 7, 2) * torch.tensor([3.0, 1.0])
    points, share = figures.pca(flat @ plane.T + 2.0)
    assert points.shape == (5, 7, 2) and share.sum() == pytest.approx(1) and share[0] > share[1]
    got, before = torch.from_numpy(points).flatten(0, 1), flat.flatten(0, 1)
    torch.testing.assert_close(torch.pdist(got).float(), torch.pdist(before), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_residual_stream_ends_in_the_models_prediction(model, monkeypatch):
    monkeypatch.setattr(figures, "pca", lambda points: (points, np.zeros(2)))
    stream = figures.residual_stream(model, tokens(1), [0, 4])["points"]
    assert len(stream) == model.config.n_effective + 1
    if (
        model.config.loop_exit == "none"
        and not model.config.predict_ahead
        and not model.config.stages[-1][1]
    ):
        logits = model.logits(model.transformer.ln_f(stream[-1][None]))
        torch.testing.assert_close(logits, model(tokens(1), tokens(1))[0][:, [0, 4]])
    assert not any(block._forward_hooks for block in model.transformer.h)


def test_exits_at_threshold_zero_are_the_full_depth_and_each_rule_by_hand(model):
    x, y = tokens(3), tokens(3, seed=2)
    y[0, :4] = -1
    group, n = len(model.config.counts()) - 1, 6
    course = figures.exit_course(model, x, y, group, n)
    data = figures.exits(course)
    full = model(x, y, n_loop=(*model.config.counts()[:group], n))[1].item()
    rules = set(figures.THRESHOLDS) - ({"gate"} if model.config.exit_gate == "none" else set())
    assert set(course) == rules | {"loss"}
    for rule in rules:
        assert data[f"{rule} threshold"][0] == 0 and data[f"{rule} loops"][0] == n
        assert data[f"{rule} loss"][0] == pytest.approx(full, rel=1e-5)
        np.testing.assert_allclose(data[f"{rule} share"].sum(1), 1)
        np.testing.assert_allclose(
            data[f"{rule} share"] @ np.arange(1, n + 1), data[f"{rule} loops"]
        )
    with torch.no_grad():
        read = [
            (s[y >= 0], logits[y >= 0].log_softmax(-1))
            for s, logits in figures.readouts(model, x, group, n)
        ]
    for token in range(0, 20, 5):
        states, p = [s[token] for s, _ in read], [q[token] for _, q in read]
        moved = [((b - a).norm() / b.norm()).item() for a, b in zip(states, states[1:])]
        kl = [F.kl_div(b, a, log_target=True, reduction="sum").item() for a, b in zip(p, p[1:])]
        np.testing.assert_allclose(course["state"][1:, token], moved, rtol=1e-4)
        np.testing.assert_allclose(course["KL"][1:, token], kl, rtol=1e-3, atol=1e-6)
        likeliest = [q.argmax().item() for q in p]
        twice = next(
            (i + 1 for i in range(2, n) if len({*likeliest[i - 2 : i + 1]}) == 1), n
        )  # has stayed for two loops
        assert figures.exit_depths(course["argmax"], 1 / 2)[token] == twice


def test_the_gates_exits_follow_its_distribution():
    model = build(spread=0.3, exit_gate="state")
    x = tokens(2)
    gate = figures.exit_course(model, x, x, 0, 4)["gate"]
    with torch.no_grad():
        stop = (
            exit_distribution(model, [s for s, _ in figures.readouts(model, x, 0, 4)])
            .flatten(0, 1)
            .T
        )
    np.testing.assert_allclose(gate, 1 - stop.cumsum(0), atol=1e-6)
    assert gate[-1] == pytest.approx(0, abs=1e-6) and (figures.exit_depths(gate, 1.1) == 1).all()


def test_a_token_stops_below_the_threshold_and_at_zero_never():
    values = np.array([[np.inf, np.inf, 9.0], [0.5, 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert figures.exit_depths(values, 0.0).tolist() == [
        3,
        3,
        3,
    ]  # also where nothing moves any more
    assert figures.exit_depths(values, 0.5).tolist() == [3, 2, 2] and figures.exit_depths(
        values, 10
    ).tolist() == [2, 2, 1]


def test_steps_alike():
    got = figures.steps_alike(np.array([[1, 2], [1, 3], [1, 3], [2, 3]]))
    assert got.T.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]


def test_loops_to_try_and_where_training_was():
    assert figures.loops_to_try(4) == [1, 2, 3, 4] and figures.loops_to_try(1) == [1]
    many = figures.loops_to_try(128)
    assert many[0] == 1 and many[-1] == 128 and len(many) <= 24 and many == sorted(set(many))
    assert figures.trained_range(build(n_loop=3).config).tolist() == [[3, 3]]
    low, high = figures.trained_range(build(n_loop=3, loop_sampling="uniform").config)[0]
    assert (low, high) == (1, 5)
    assert figures.trained_range(build(n_layer=1).config).shape[0] == 0


def test_spectra_are_clipped_where_they_are_above_beta():
    model, earlier = build(spread=0.2), build(seed=3, spread=0.2)
    data = figures.spectra(model, earlier, 0.9)
    assert {key.rsplit(":", 1)[0] for key in data} - {"beta"} == {
        *(
            f"{kind}:{block}"
            for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            for block in (1, 2)
        ),
        "inject:0",
    }
    matrix = model.transformer.h[2].mlp.c_fc.weight
    np.testing.assert_allclose(
        data["mlp.c_fc:2:now"], torch.linalg.svdvals(matrix).detach(), rtol=1e-5
    )
    clipped = torch.linalg.svdvals(spectral_clip(matrix, 0.9)).detach()
    np.testing.assert_allclose(data["mlp.c_fc:2:clipped"], clipped, rtol=1e-5)
    np.testing.assert_allclose(clipped, data["mlp.c_fc:2:now"].clip(max=0.9), rtol=0.01)
    before = torch.linalg.svdvals(earlier.transformer.h[2].mlp.c_fc.weight).detach()
    np.testing.assert_allclose(data["mlp.c_fc:2:before"], before, rtol=1e-5)


# -----------------------------------------------------------------------------
# the page


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for name, options in {
        "looped": ["--exit_gate=state"],
        "plain": ["--n_prelude=0", "--n_block=0", "--n_loop=1", "--n_layer=2", "--n_coda=0"],
    }.items():
        run = train(corpus, folder / name, *options)
        assert run.code == 0, run.err
    return folder


TEXT = 'A <b>"$x_1$" & co'


@pytest.fixture(scope="module")
def page(trained):
    """The analysis of both runs: its folder, and the page's text."""
    run = Run(
        "analyze.py",
        "--compare",
        trained / "looped",
        trained / "plain",
        f"--to={trained / 'both'}",
        f"--start={TEXT[:15]}",
        "--windows=12",
        "--n_loop=4",
        "--maps=1",
        "--tokens=0,-1,3",
        "--device=cpu",
    )
    assert run.code == 0, run.err
    assert re.search(r"index.html: \d+ pictures in \d+ s", run.out)
    return trained / "both", (trained / "both" / "index.html").read_text()


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)
        if self.tags and self.tags[-1][0] in ("td", "th"):
            self.cells.append(data)


def test_the_page_holds_all_pictures_and_needs_nothing_else(page):
    folder, text = page
    parsed = Parsed(text)
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    held = {
        base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images
    }
    files = {path.read_bytes(): path.stem for path in folder.glob("*.png")}
    assert held == set(files) and all(data.startswith(b"\x89PNG\r\n\x1a\n") for data in held)
    assert set(files.values()) == {
        "curves",
        "sweep",
        "states",
        "trajectories",
        "residual",
        "exits",
        "pareto",
        "attention",
        "distances",
        "spectra",
        "map_0_1",
        "map_1_1",
    }
    assert {path.stem for path in folder.glob("*.npz")} == set(files.values())
    assert all(image["alt"] for image in images)
    assert "<script" not in text and not re.search(r"(src|href|url\()\W*(https?:)?//", text)
    assert "A <b>" not in text and html.escape("<b>", quote=False) in text  # the prompt is text
    words = " ".join(parsed.texts)
    assert "Left out for plain" in words and "nothing in it is looped" in words
    assert {"looped", "plain", "loss (nats/token)", "mean loops", "loop", "rank 1", "KL"} <= set(
        parsed.cells
    )


def test_both_ways_to_compare(trained):
    for spelt in (
        ["--compare", trained / "looped", trained / "missing"],
        [f"--compare={trained / 'looped'},{trained / 'missing'}"],
    ):
        run = Run("analyze.py", *spelt, "--device=cpu", f"--to={trained / 'none'}")
        assert run.code == 2 and "missing" in run.err and run.err.count("\n") == 1, run.err


def test_the_sweep_is_trains_evaluation_and_lens_and_exits_are_the_models(page, trained, corpus):
    folder, _ = page
    run = train(
        corpus,
        trained / "looped",
        "--exit_gate=state",
        "--init_from=resume",
        "--eval_only",
        "--eval_loops=1,4,8",
    )
    rows = {
        row["loops"][0]: row
        for row in json.loads(run.out.strip().splitlines()[-1])
        if row["split"] == "val"
    }
    sweep = np.load(folder / "sweep.npz")
    for name in ("loss", "bits_per_byte", "accuracy"):
        of = dict(zip(sweep["looped:loops"].tolist(), sweep[f"looped:{name}"]))
        assert of.keys() == {1, 2, 3, 4, 5, 6, 7, 8}
        for loops, row in rows.items():
            assert of[loops] == pytest.approx(row[name], rel=1e-5), (name, loops)
        assert sweep[f"looped:configured_{name}"] == pytest.approx(rows[2][name], rel=1e-5)
    pareto = np.load(folder / "pareto.npz")
    assert pareto["looped:fixed loss"] == pytest.approx(sweep["looped:loss"][:4], rel=1e-5)
    assert pareto["looped:gate loss"][0] == pytest.approx(rows[4]["loss"], rel=1e-5)
    with open(folder / "lens.csv", newline="") as file:
        lens = list(csv.DictReader(file))
    model = pretrained.load(trained / "looped")
    chars = checkpoint.load(trained / "looped")["tokenizer"]["chars"]
    idx = torch.tensor([[chars.index(c) for c in TEXT[:15]]])
    for n in (1, 2, 4):
        own = model(idx, n_loop=n)[0][0, 0].softmax(-1)
        said = next(
            row for row in lens if (row["loop"], row["token"], row["rank"]) == (str(n), "14", "1")
        )
        assert float(said["probability"]) == pytest.approx(own.max().item(), rel=1e-4)


def test_what_is_drawn_is_what_is_stored(page):
    folder, _ = page

    def stored(name):
        file = np.load(folder / f"{name}.npz")
        return {
            run: {key.split(":", 1)[1]: file[key] for key in file if key.startswith(f"{run}:")}
            for run in ("looped", "plain")
        }

    curves, both = stored("curves"), figures.draw_curves(stored("curves"))
    drawn = [line.get_xydata() for line in both.axes[0].lines]
    for line, (run, x, y) in zip(
        drawn,
        [
            ("looped", "iter", "loss"),
            ("looped", "eval iter", "val loss"),
            ("plain", "iter", "loss"),
        ],
    ):
        np.testing.assert_array_equal(line, np.stack((curves[run][x], curves[run][y]), axis=1))
    sweep = {"looped": stored("sweep")["looped"]}
    line = figures.draw_sweep(sweep).axes[0].lines[1].get_xydata()
    np.testing.assert_array_equal(
        line, np.stack((sweep["looped"]["loops"], sweep["looped"]["loss"]), axis=1)
    )
    states = {"looped": stored("states")["looped"]}
    np.testing.assert_array_equal(
        figures.draw_states(states).axes[0].lines[0].get_ydata(), states["looped"]["change"][0]
    )
    attention = stored("attention")
    image = figures.draw_attention(attention).axes[0].images[0].get_array()
    np.testing.assert_array_equal(image, attention["looped"]["mean distance"].T)
    paths = {"looped": stored("trajectories")["looped"]}
    names = {"looped": ["a", "b", "c"]}
    assert paths["looped"]["tokens"].tolist() == [0, 3, 14]
    line = figures.draw_trajectories(paths, names).axes[0].lines[0].get_xydata()
    np.testing.assert_array_equal(line, paths["looped"]["points"][:, 0])
    spectra = {"looped": stored("spectra")["looped"]}
    assert any(key.endswith(":before") for key in spectra["looped"])  # ckpt_prev.pt
    line = figures.draw_spectra(spectra).axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(line, spectra["looped"]["attn.c_attn:1:now"])


# -----------------------------------------------------------------------------
# wrong input, and what else there is to look at


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out_dir={folder}/none"], "--to needs a value"),
        (["--out_dir={folder}/none", "--to={folder}/x"], "no such checkpoint"),
        (["--out_dir={folder}/empty"], "no such checkpoint"),
        (["--out_dir={folder}/badlog"], "log.jsonl: line 2 is not one that train.py writes"),
        (
            ["--out_dir={folder}/looped", "--start=ab"],
            "the text has 2 tokens: the pictures need at least 4",
        ),
        (
            ["--out_dir={folder}/looped", "--start=a long text of many tokens"],
            "more than block_size=16",
        ),
        (["--out_dir={folder}/looped", "--start=\u00e9t\u00e9 et plus"], "is not in the alphabet"),
        (["--out_dir={folder}/looped", "--start=FILE:{folder}/none.txt"], "none.txt"),
        (["--out_dir={folder}/looped", "--tokens=99"], "tokens=(99,): must be from -16 to 15"),
        (["--out_dir={folder}/looped", "--maps=4"], "maps=(4,): must be from 0 to 3"),
        (
            ["--out_dir={folder}/looped", "--exit_rule=kl"],
            "exit_rule='kl': must be one of state, KL",
        ),
        (["--out_dir={folder}/looped", "--windows=0"], "windows=0"),
        (["--out_dir={folder}/looped", "--spectral_clip_beta=0"], "must be positive"),
        (["--out_dir={folder}/looped", "--dataset=nothing"], "missing or damaged"),
        (
            ["--out_dir={folder}/ungated", "--exit_rule=gate", "--start=abcdef"],
            "exit_rule=gate: must be another one",
        ),
        (["--out_dir={folder}/ungated"], "give --start some text"),
        (["--out_dir={folder}/infinite", "--start=abcdef"], "not all finite"),
        (["--compare", "{folder}/looped", "{folder}/none"], "no such checkpoint"),
        (["--outdir=x"], "did you mean 'out_dir'"),
    ],
)
def test_wrong_input_is_one_line(trained, arguments, words):
    if not (trained / "empty").exists():
        (trained / "empty").mkdir()
        shutil.copytree(trained / "looped", trained / "badlog")
        with open(trained / "badlog" / "log.jsonl", "w") as file:
            file.write(
                '{"iter": 0, "loss": 1.0, "lr": 1, "loops": 1, "tokens_per_second": 1}\n{"iter": 1, "loss": 1}\n'
            )
        for name, fill in {"ungated": None, "infinite": math.inf}.items():
            model = build(vocab_size=256)
            if fill:
                model.transformer.ln_f.weight.data.fill_(fill)
            pretrained.export(model, trained / name, {"tokenizer": "bytes"})
    run = Run(
        "analyze.py",
        "--device=cpu",
        *(str(argument).format(folder=trained) for argument in arguments),
    )
    assert run.code == 2 and run.err.count("\n") == 1 and words in run.err, run.err


def test_without_matplotlib_it_says_what_to_install(trained, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = Run("analyze.py", f"--out_dir={trained / 'looped'}")
    assert (
        run.code == 2
        and run.err == "analyze.py: the pictures need matplotlib; run: pip install matplotlib\n"
    )


def test_other_peoples_weights_without_a_log_or_data(tmp_path):
    """A GPT-2 shape, looked at with repetition: what it has not is named, the residual stream and attention are there."""
    model = build(n_layer=2, vocab_size=256, mlp="gelu_tanh")
    pretrained.export(model, tmp_path / "theirs", {"tokenizer": "bytes"})
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "gpt2"
    run = Run(
        "analyze.py",
        f"--out_dir={tmp_path / 'theirs'}",
        "--start=loop",
        "--repeats=3",
        "--device=cpu",
    )
    assert run.code == 0, run.err
    folder = tmp_path / "theirs" / "analysis"
    assert {path.stem for path in folder.glob("*.png")} == {"residual", "attention", "distances"}
    assert np.load(folder / "residual.npz")["theirs:points"].shape == (3, 12, 2)
    text = (folder / "index.html").read_text()
    for reason in ("there is no log.jsonl", "nothing in it is looped"):
        assert reason in text


def test_a_folded_model_whose_loop_does_nothing_yet(tmp_path):
    """Nothing moves from loop to loop: the measures are 0, and there is no loss to measure."""
    pretrained.export(build(n_layer=3, vocab_size=256), tmp_path / "plain", {"tokenizer": "bytes"})
    folded = pretrained.load(tmp_path / "plain", n_prelude=1, n_block=1, n_coda=1, n_loop=3)
    pretrained.export(folded, tmp_path / "folded", {"tokenizer": "bytes"})
    run = Run("analyze.py", f"--out_dir={tmp_path / 'folded'}", "--start=in a loop", "--device=cpu")
    assert run.code == 0, run.err
    folder = tmp_path / "folded" / "analysis"
    states = np.load(folder / "states.npz")
    assert not states["folded:change"].any() and states["folded:norm"].shape == (3, 3)
    assert "no validation set is known" in (folder / "index.html").read_text()


# -----------------------------------------------------------------------------
# a real browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FRAME = """<!DOCTYPE html><iframe id=f src="{page}" style="border: 0; width: {width}px; height: 900px"></iframe><pre id=out></pre><script>
f.onload = () => {{
  const d = f.contentDocument, e = d.documentElement, inside = x => x.closest(".wide") && !x.matches(".wide");
  const over = [...d.body.querySelectorAll("*")].filter(x => !inside(x) && x.getBoundingClientRect().right > {width} + 0.5);
  out.textContent = JSON.stringify({{
    scroll: e.scrollWidth, client: e.clientWidth, over: over.map(x => x.tagName),
    images: [...d.images].map(i => i.complete && i.naturalWidth > 0), text: d.body.innerText}});
}};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(page, width):
    folder, _ = page
    frame = folder / f"frame{width}.html"
    frame.write_text(FRAME.format(page="index.html", width=width))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--window-size=1400,1000",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    out = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert out and out[1], done.stderr[-2000:]
    seen = json.loads(html.unescape(out[1]))
    assert seen["client"] == width and seen["scroll"] <= width and seen["over"] == []
    assert len(seen["images"]) == 12 and all(seen["images"])
    for words in ("loss (nats/token)", "mean loops", "after token", "rank 1", "Left out for plain"):
        assert words in seen["text"]
