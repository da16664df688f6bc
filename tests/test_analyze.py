"""The page of analyze.py: its numbers are the model's, it draws what it stores, it opens alone."""

import base64
import csv
import html
import json
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import Run, build, log, train, val_losses

import pretrained
from decode import Cache, Decoder, generate
from nanorecur import checkpoint, exit_rules, findings, plots
from nanorecur.dataset import load_meta, open_split
from nanorecur.exit_rules import make_exit
from nanorecur.page import Page


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A folder with two tiny runs."""
    folder = tmp_path_factory.mktemp("trained")
    plain = ["--n_prelude=0", "--n_block=0", "--n_loop=1", "--n_layer=2", "--n_coda=0"]
    for name, options in {"looped": ["--exit_gate=state"], "plain": plain}.items():
        run = train(corpus, folder / name, *options)
        assert run.code == 0, run.err
    return folder


PROMPT = 'A <b>"$x_1$" & '


@pytest.fixture(scope="module")
def page(trained):
    """The analysis of both runs: its folder, and the page's text."""
    sources = [trained / "looped", trained / "plain", f"--to={trained / 'both'}"]
    options = ["--n_loop=4", "--maps=1", "--tokens=0,-1,3", "--device=cpu", "--new_tokens=20"]
    run = Run("analyze.py", *sources, f"--start={PROMPT}", *options)
    assert run.code == 0, run.err
    assert re.search(r"index.html: \d+ pictures in \d+ s", run.out)
    return trained / "both", (trained / "both" / "index.html").read_text()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a looped model whose tokens stop at different loops, without log and data."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    model = build(spread=0.2, n_coda=0, vocab_size=256)
    pretrained.export(model, folder, {"tokenizer": "bytes"})
    return folder


# -----------------------------------------------------------------------------
# the page


class Parsed(HTMLParser):
    """The tags, texts and cells of tables of a page."""

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


PICTURES = """curves costs sweep states trajectories residual exits pareto attention distances
    spectra map_0_1 map_1_1""".split()


@pytest.mark.slow
def test_the_page_holds_all_pictures_and_needs_nothing_else(page):
    folder, text = page
    images = [attributes for tag, attributes in Parsed(text).tags if tag == "img"]
    prefix = "data:image/png;base64,"
    shown = {base64.b64decode(image["src"].removeprefix(prefix)) for image in images}
    stored = {path.read_bytes(): path.stem for path in folder.glob("*.png")}
    assert shown == set(stored)
    assert all(data.startswith(b"\x89PNG\r\n\x1a\n") for data in shown)
    assert set(stored.values()) == set(PICTURES)
    assert {path.stem for path in folder.glob("*.npz")} == set(PICTURES)
    assert all(image["alt"] for image in images)
    assert "<script" not in text and not re.search(r"(src|href|url\()\W*(https?:)?//", text)
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
def test_the_page_says_what_it_shows(page):
    _, text = page
    assert "A <b>" not in text and html.escape("<b>", quote=False) in text  # the prompt is text
    parsed = Parsed(text)
    words = " ".join(parsed.texts)
    assert "Left out for plain" in words and "nothing in it is looped" in words
    assert "measured on full forward passes" in words
    cells = {"looped", "plain", "loss (nats/token)", "mean loops", "loop", "rank 1", "kl", "gate"}
    assert cells <= set(parsed.cells)


def stored(folder, name):
    """Return {run: arrays} of a picture's file of numbers."""
    file, data = np.load(folder / f"{name}.npz"), {}
    for key in file:
        run, _, array = key.partition(":")
        data.setdefault(run, {})[array] = file[key]
    return data


def test_the_pages_loss_is_the_last_one_of_the_log(trained, page):
    """At the run's own depth, with or without loops."""
    folder, text = page
    sweeps = stored(folder, "sweep")
    for name in ("looped", "plain"):
        logged = list(val_losses(trained / name).values())[-1]
        assert sweeps[name]["configured_loss"] == pytest.approx(logged, rel=1e-5)
        assert f"<td>{logged:.4f}</td>" in text
    assert text.count("on 12 windows of corpus0/val.bin, those that train.py evaluates.") == 2


def test_the_page_begins_with_findings_losses_and_a_sample(trained, page):
    """Before any picture: three findings of each run, with the numbers that are measured below."""
    folder, text = page
    top = text[: text.index("<img")]
    assert top.count("<li>") == 6 and top.count('class="lead"') == 2
    assert "looped is a looped GPT of " in top and "plain is a GPT without loops of " in top
    sweeps = stored(folder, "sweep")
    of_one, own = sweeps["looped"]["loss"][0], sweeps["looped"]["configured_loss"]
    assert f"validation loss is {of_one:.3f} at one loop and {own:.3f} at 2" in top
    assert f"Validation loss is {sweeps['plain']['configured_loss']:.3f} (" in top
    _, settling, exits = map(html.unescape, re.findall("<li>(.*?)</li>", top)[:3])
    assert settling == findings.settling_finding(stored(folder, "states")["looped"]["change"])
    assert exits == findings.exit_finding(stored(folder, "pareto")["looped"]) != ""
    for row in log(trained / "looped")[-1]["eval"]:
        assert f"<td>{row['loss']:.4f}</td><td>{row['bits_per_byte']:.4f}</td>" in top
    assert "<th>looped</th><th>plain</th>" in top


def test_the_sample_is_what_the_model_writes(trained, page):
    _, text = page
    model = pretrained.load(trained / "looped")
    chars = checkpoint.load(trained / "looped")["tokenizer"]["chars"]
    idx = torch.tensor([[chars.index(c) for c in PROMPT]])
    seeded = dict(generator=torch.Generator().manual_seed(1337), vocab_size=len(chars))
    ids, _ = generate(model, idx, 20, temperature=0.8, top_k=200, **seeded)
    written = "".join(chars[i] for i in ids[0, len(PROMPT) :])
    written = re.sub(r"[\r\x0b\x0c]", lambda sign: f"\\x{ord(sign[0]):02x}", written)
    bold = html.escape(PROMPT, quote=False)
    assert f"<b>{bold}</b>{html.escape(written, quote=False)}</p>" in text


def test_every_picture_says_what_is_healthy_and_ten_at_most_are_shown(page):
    _, text = page
    shown, more = text.split("<details>")
    assert 0 < shown.count("<figure>") <= 10 and more.count("<figure>") >= 4
    captions = re.findall(r'<figcaption>.*?<p class="healthy">(.*?)</p></figcaption>', text)
    assert len(captions) == text.count("<figure>") == len(PICTURES)
    assert all(re.fullmatch(r"Healthy: [^.]+\.", caption) for caption in captions)
    for name in ("map_0_1", "residual", "spectra"):
        assert f"{name}.npz" in more


@pytest.mark.slow
def test_pictures_beyond_ten_are_put_where_one_has_to_open_them(tmp_path):
    page = Page(tmp_path, "many")
    page.part = page.main
    for number in range(12):
        figure, _ = plots.panels(1, 1, 1, 1)
        page.picture(f"map_{number}", figure, {"a": {"x": np.zeros(1)}})
    shown, more = page.write().read_text().split("<details>")
    assert (shown.count("<figure>"), more.count("<figure>")) == (10, 2)


@pytest.mark.slow
def test_rows_of_a_task_have_the_models_answers(task, tmp_path):
    """Of each level with its own loops; the text to look at is the last row of validation."""
    options = ["--loops_of_level=1,1", "--block_size=6", "--max_iters=60", "--lr_decay_iters=60"]
    assert train(task, tmp_path / "run", *options, "--eval_interval=60").code == 0
    run = Run("analyze.py", tmp_path / "run", "--device=cpu")
    assert run.code == 0, run.err
    text = (tmp_path / "run" / "analysis" / "index.html").read_text()
    split = open_split(task, "val", load_meta(task), 6, 12)
    model, chars = pretrained.load(tmp_path / "run"), "0123456789=."
    for level, loops in ((1, 2), (2, 3)):
        row = split.tokens[split.rows_of_level(level)[0] * 7 :][:7].tolist()
        asked, right = ("".join(chars[i] for i in part) for part in (row[:5], row[5:]))
        ids, _ = generate(model, torch.tensor([row[:5]]), 2, n_loop=loops, temperature=0.0)
        found = "".join(chars[i] for i in ids[0, 5:])
        n_right = sum(a == b for a, b in zip(found, right))
        cells = [level, loops, f"{n_right} of 2", asked, right, found]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    with open(tmp_path / "run" / "analysis" / "exits_0.csv", newline="") as file:
        looked_at = "".join(row["text"] for row in csv.DictReader(file))
    assert looked_at == "".join(chars[i] for i in split.tokens[-7:-1])
    assert "what it was trained on" in text


def test_fewer_windows_are_said_to_be_so(trained, tmp_path):
    options = ["--windows=5", f"--to={tmp_path}", "--device=cpu"]
    run = Run("analyze.py", trained / "plain", *options)
    assert run.code == 0, run.err
    page = (tmp_path / "index.html").read_text()
    assert "on 5 windows of corpus0/val.bin; train.py evaluates 12, so that" in page


@pytest.mark.slow
def test_the_sweep_is_trains_evaluation(page, trained, corpus):
    folder, _ = page
    again = ["--init_from=resume", "--eval_only", "--eval_loops=1,4,8"]
    run = train(corpus, trained / "looped", "--exit_gate=state", *again)
    rows = json.loads(run.out.strip().splitlines()[-1])
    by_loops = {row["loops"][0]: row for row in rows if row["split"] == "val"}
    sweep = stored(folder, "sweep")["looped"]
    for name in ("loss", "bits_per_byte", "accuracy"):
        measured = dict(zip(sweep["loops"].tolist(), sweep[name]))
        assert measured.keys() == {1, 2, 3, 4, 5, 6, 7, 8}
        for loops, row in by_loops.items():
            assert measured[loops] == pytest.approx(row[name], rel=1e-5), (name, loops)
        assert sweep[f"configured_{name}"] == pytest.approx(by_loops[2][name], rel=1e-5)
    pareto = stored(folder, "pareto")["looped"]
    assert pareto["fixed loss"] == pytest.approx(sweep["loss"][:4], rel=1e-5)
    assert pareto["gate loss"][0] == pytest.approx(by_loops[4]["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_lens_is_the_models_prediction(page, trained):
    folder, _ = page
    with open(folder / "lens.csv", newline="", encoding="utf-8") as file:
        lens = {(row["loop"], row["token"], row["rank"]): row for row in csv.DictReader(file)}
    model = pretrained.load(trained / "looped")
    chars = checkpoint.load(trained / "looped")["tokenizer"]["chars"]
    idx = torch.tensor([[chars.index(c) for c in PROMPT]])
    for n in (1, 2, 4):
        p = model(idx, n_loop=n)[0][0, 0].softmax(-1)
        row = lens[str(n), "14", "1"]
        assert float(row["probability"]) == pytest.approx(p.max().item(), rel=1e-4)


# -----------------------------------------------------------------------------
# early exit means the same in every script


def exits_of(folder, number=0):
    """Return the loops of each token of the text that a page colors, of a looped group."""
    with open(folder / f"exits_{number}.csv", newline="", encoding="utf-8") as file:
        return [int(row["loops"]) for row in csv.DictReader(file)]


@torch.no_grad()
def decoded_loops(model, ids, rule, n):
    """Return the loops of each token of a text, decoded token by token."""
    decoder, loops = Decoder(model, Cache(model, 1, n), n, rule), []
    for token in ids:
        loops += decoder.step(torch.tensor([[token]]), torch.arange(1))[1].tolist()
    return loops


@pytest.mark.slow
def test_a_rule_and_its_threshold_go_unchanged_to_sample(exported, tmp_path, monkeypatch):
    """The page's loops are those of decoding, and its command gives sample.py the same rule."""
    asked = []

    def recorded(model, rule, threshold):
        asked.append((rule, threshold))
        return make_exit(model, rule, threshold)

    monkeypatch.setattr(exit_rules, "make_exit", recorded)
    text = "def loop(self): "
    options = ["--exit_rule=kl", "--automatic_loop_exit_threshold=0.0123456789", "--n_loop=8"]
    run = Run("analyze.py", exported, f"--to={tmp_path}", f"--start={text}", *options)
    assert run.code == 0, run.err
    assert asked == [("kl", 0.0123456789)]

    model = pretrained.load(exported)
    loops = decoded_loops(model, text.encode(), make_exit(model, *asked[0]), 8)
    assert exits_of(tmp_path) == loops and len(set(loops)) > 1

    page = html.unescape((tmp_path / "index.html").read_text())
    command = shlex.split(re.search(r"python (sample.py [^<]*)", page)[1])
    assert set(options) <= set(command)
    run = Run(*command, "--start=d", "--max_new_tokens=20", "--num_samples=1")
    assert run.code == 0, run.err
    assert asked[1:] == asked[:1]
    assert 1 < float(re.search(r"loops used (\S+) of 8", run.err)[1]) < 8


@pytest.mark.slow
def test_each_group_has_the_loops_of_decoding_where_its_rule_stops_them_all(tmp_path):
    groups = dict(n_layer=4, loop_groups=((0, 1), (3,)), loop_counts=(5, 4))
    model = build(spread=0.2, vocab_size=256, **groups)
    pretrained.export(model, tmp_path / "model", {"tokenizer": "bytes"})
    threshold, text = 0.4, "def loop(self): "
    options = ["--exit_rule=state", f"--automatic_loop_exit_threshold={threshold}"]
    run = Run("analyze.py", tmp_path / "model", *options, f"--start={text}", "--device=cpu")
    assert run.code == 0, run.err
    folder = tmp_path / "model" / "analysis"
    by_group = [exits_of(folder, number) for number in (0, 1)]
    model = pretrained.load(tmp_path / "model")
    rule = make_exit(model, "state", threshold)
    together = decoded_loops(model, text.encode(), rule, None)
    assert [sum(pair) for pair in zip(*by_group)] == together
    assert all(len(set(loops)) > 1 for loops in by_group)
    assert "in the last looped group alone" not in (folder / "index.html").read_text()


@pytest.mark.slow
def test_threshold_zero_never_stops(exported, tmp_path):
    options = ["--automatic_loop_exit_threshold=0", "--n_loop=3", "--start=def loop"]
    run = Run("analyze.py", exported, f"--to={tmp_path}", *options)
    assert run.code == 0, run.err
    assert exits_of(tmp_path) == [3] * 8
    assert "No token stops early" in (tmp_path / "index.html").read_text()


# -----------------------------------------------------------------------------
# what is drawn is what is stored


def drawn_line(figure, panel=0, line=0):
    """Return the points (.., 2) of a line in a figure."""
    return figure.axes[panel].lines[line].get_xydata()


PER_NAT = 1 / math.log(2)  # bits


def curves_of(*loss, per_byte=PER_NAT, **others):
    """Return curves of a run with these losses of training, and one of validation."""
    steps = np.arange(len(loss))
    validation = {"eval iter": np.array([0]), "val loss": np.array([2.0])}
    validation["val bits_per_byte"] = np.array([2.0 * per_byte])
    return {"iter": steps, "loss": np.array(loss), **others, **validation}


def test_points_too_few_for_a_line_are_dots_and_no_panel_is_empty():
    figure = plots.draw_curves({"a": curves_of(3.0, lr=np.array([0.1]))})
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss (nats/token)", "learning rate"]
    for panel in figure.axes:
        assert all(line.get_marker() not in ("", "None") for line in panel.lines)
        low, high = panel.get_xlim()
        assert low < 0 < high
    many = plots.draw_curves({"a": curves_of(*range(10))})
    assert many.axes[0].lines[0].get_marker() in ("", "None")


def test_bits_of_bytes_are_an_axis_of_the_loss_and_others_a_panel():
    bits = "validation (bits/byte)"
    figure = plots.draw_curves({"a": curves_of(3.0), "b": curves_of(2.0)})
    (loss,) = figure.axes
    (axis,) = loss.child_axes
    assert axis.get_ylabel() == "bits/byte"
    figure.draw_without_rendering()
    np.testing.assert_allclose(axis.get_ylim(), np.array(loss.get_ylim()) / math.log(2))
    figure = plots.draw_curves({"a": curves_of(3.0), "b": curves_of(2.0, per_byte=0.5)})
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss (nats/token)", bits]
    assert not figure.axes[0].child_axes


def test_a_plain_run_is_a_horizontal_line_among_depths(page):
    folder, _ = page
    sweep = stored(folder, "sweep")
    (line,) = (line for line in drawn_lines(plots.draw_sweep(sweep)) if line.get_label() == "plain")
    assert [float(y) for y in line.get_ydata()] == 2 * [sweep["plain"]["configured_loss"]]
    assert line.get_xdata() == [0, 1]  # shares of the panel's width


def drawn_lines(figure):
    return figure.axes[0].lines


def test_costs_are_lines_with_the_range_of_seeds_and_plain_runs_are_horizontal():
    def curve(looped, seconds):
        loss = np.array([3.0, 2.0])
        cost = dict(flops=np.array([1e9, 2e9]), seconds=np.array(seconds))
        band = dict(least=loss - 0.1, largest=loss + 0.3)
        return {**cost, "loss": loss, **band, "looped": np.array(looped)}

    data = {"looped": curve(True, [1.0, 2.0]), "plain": curve(False, [3.0, 6.0])}
    figure = plots.draw_costs(data)
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "training FLOPs",
        "seconds of training",
    ]
    for panel, cost in zip(figure.axes, ("flops", "seconds")):
        line, level, dot = panel.lines
        x, y = line.get_xydata().T
        assert list(x) == list(data["looped"][cost]) and list(y) == [3.0, 2.0]
        assert list(level.get_ydata()) == [2.0, 2.0] and list(level.get_xdata()) == [0, 1]
        assert dot.get_xydata().tolist() == [[data["plain"][cost][-1], 2.0]]
        (band,) = panel.collections
        assert sorted(set(band.get_paths()[0].vertices[:, 1])) == pytest.approx(
            [1.9, 2.3, 2.9, 3.3]
        )
        assert sorted(set(panel.patches[0].get_corners()[:, 1])) == pytest.approx([1.9, 2.3])
    unknown = plots.draw_costs(data | {"older": curve(True, [np.nan, np.nan])})
    assert [panel.get_xlabel() for panel in unknown.axes] == ["training FLOPs"]


@pytest.mark.slow
def test_curves_sweep_and_states_are_drawn_as_stored(page):
    folder, _ = page
    curves = stored(folder, "curves")
    figure = plots.draw_curves(curves)
    for line, (run, x, y) in enumerate(
        [
            ("looped", "iter", "loss"),
            ("looped", "eval iter", "val loss"),
            ("plain", "iter", "loss"),
        ]
    ):
        points = np.stack((curves[run][x], curves[run][y]), axis=1)
        np.testing.assert_array_equal(drawn_line(figure, 0, line), points)
    costs = stored(folder, "costs")
    points = np.stack((costs["looped"]["flops"], costs["looped"]["loss"]), axis=1)
    np.testing.assert_array_equal(drawn_line(plots.draw_costs(costs), 0, 0), points)
    assert costs["looped"]["looped"] and not costs["plain"]["looped"]
    sweep = stored(folder, "sweep")
    points = np.stack((sweep["looped"]["loops"], sweep["looped"]["loss"]), axis=1)
    np.testing.assert_array_equal(drawn_line(plots.draw_sweep(sweep), 0, 1), points)
    states = stored(folder, "states")
    change = drawn_line(plots.draw_states(states))[:, 1]
    np.testing.assert_array_equal(change, states["looped"]["change"][0])


@pytest.mark.slow
def test_exits_are_drawn_as_stored_in_the_rules_units(page):
    folder, _ = page
    exits = stored(folder, "exits")
    figure = plots.draw_exits(exits)
    panels = [axes for axes in figure.axes if axes.get_xlabel() == "loops"]
    assert len(panels) == 5
    for panel, (rule, _, unit) in zip(panels, plots.EXIT_RULES):
        image = panel.images[0].get_array()
        np.testing.assert_array_equal(image, exits["looped"][f"{rule} share"])
        assert panel.get_ylabel() == f"threshold ({unit})"
        thresholds = exits["looped"][f"{rule} threshold"]
        names = [label.get_text() for label in panel.get_yticklabels()]
        assert names[0] == "never"
        for place, name in zip(panel.get_yticks()[1:], names[1:]):
            assert float(name) == pytest.approx(thresholds[int(place)], rel=0.01)
    pareto = stored(folder, "pareto")["looped"]
    points = np.stack((pareto["state loops"], pareto["state loss"]), axis=1)
    figure = plots.draw_pareto({"looped": pareto})
    np.testing.assert_array_equal(drawn_line(figure, 0, 1), points)
    low, high = figure.axes[0].get_ylim()
    assert low < pareto["fixed loss"][-1] < high


@pytest.mark.slow
def test_attention_paths_and_spectra_are_drawn_as_stored(page):
    folder, _ = page
    attention = stored(folder, "attention")
    image = plots.draw_attention(attention).axes[0].images[0].get_array()
    np.testing.assert_array_equal(image, attention["looped"]["mean distance"].T)
    paths = stored(folder, "trajectories")
    assert paths["looped"]["tokens"].tolist() == [0, 3, 14]
    figure = plots.draw_trajectories(paths, {"looped": ["a", "b", "c"]})
    np.testing.assert_array_equal(drawn_line(figure), paths["looped"]["points"][:, 0])
    spectra = stored(folder, "spectra")
    assert any(key.endswith(":before") for key in spectra["looped"])  # ckpt_prev.pt
    values = drawn_line(plots.draw_spectra(spectra))[:, 1]
    np.testing.assert_array_equal(values, spectra["looped"]["attn.c_attn:1:now"])


# -----------------------------------------------------------------------------
# wrong input, and models that lack something

WRONG = [
    ("--out_dir={}/none", "none: no such checkpoint; runs here: "),
    ("--source={}/none", "none: no such checkpoint"),
    ("{}/none", "none: no such checkpoint"),
    ("{}/looped {}/none", "none: no such checkpoint"),
    ("--compare={}/looped {}/plain", "must be left out, or one of those in compare"),
    ("{}/badsessions", "sessions.jsonl: line 1 is not one that train.py writes"),
    ("--out_dir={}/empty", "no such checkpoint"),
    ("--out_dir={}/badlog", "log.jsonl: line 2 is not one that train.py writes"),
    ("--out_dir={}/looped --start=ab", "the text has 2 tokens: the pictures need at least 4"),
    ("--out_dir={}/looped --start=a_long_text_of_tokens", "more than block_size=16"),
    ("--out_dir={}/looped --start=\u00e9t\u00e9_et_plus", "is not in the alphabet"),
    ("--out_dir={}/looped --start=FILE:{}/none.txt", "none.txt"),
    ("--out_dir={}/looped --tokens=99", "tokens=(99,): must be from -16 to 15"),
    ("--out_dir={}/looped --maps=4", "maps=(4,): must be from 0 to 3"),
    ("--out_dir={}/looped --exit_rule=KL", "exit_rule='KL': must be one of state, kl"),
    (
        "--out_dir={}/looped --automatic_loop_exit_threshold=-1",
        "automatic_loop_exit_threshold=-1.0: must be from 0",
    ),
    ("--out_dir={}/looped --windows=-1", "windows=-1: must be at least 0"),
    ("--out_dir={}/looped --spectral_clip_beta=0", "spectral_clip_beta=0.0: must be positive"),
    ("--out_dir={}/looped --dataset=nothing", "dataset=nothing: no such folder"),
    ("{}/ungated --exit_rule=gate --start=abcdef", "exit_rule=gate: needs a model with"),
    ("{}/ungated", "give --start some text"),
    ("{}/infinite --start=abcdef", "not all finite"),
    ("{}/sweep --start=abcdef", "sweep/n_loop=2,3+seed=1: this run has not saved a checkpoint yet"),
    ("--compare {}/looped {}/none", "no such checkpoint"),
    ("--compare={}/looped,{}/none", "no such checkpoint"),
    ("--outdir=x", "did you mean 'out_dir'"),
    ("--out_dir={}/looped --new_tokens=-1", "new_tokens=-1: must be at least 0"),
    ("--out_dir={}/looped --refresh=-1", "refresh=-1: must be at least 0"),
    ("--out_dir={}/looped --watch=-1", "watch=-1: must be at least 1"),
]


@pytest.fixture(scope="module")
def sources(trained):
    """The folder of the two runs, with further sources that are wrong or lack something."""
    (trained / "empty").mkdir()
    shutil.copytree(trained / "looped", trained / "badlog")
    entry = dict(iter=0, loss=1.0, lr=1, loops=1, tokens_per_second=1)
    lines = [json.dumps(entry), json.dumps(dict(iter=1, loss=1)), ""]
    (trained / "badlog" / "log.jsonl").write_text("\n".join(lines))
    shutil.copytree(trained / "looped", trained / "badsessions")
    (trained / "badsessions" / "sessions.jsonl").write_text('{"commit": "0"}\n')
    begun = trained / "sweep" / "n_loop=2,3+seed=1"  # a run inside the folder of a sweep
    begun.mkdir(parents=True)
    for name in ("config.json", "sessions.jsonl"):
        (begun / name).write_text("{}")
    model = build(vocab_size=256)
    pretrained.export(model, trained / "ungated", {"tokenizer": "bytes"})
    model.transformer.ln_f.weight.data.fill_(math.inf)
    pretrained.export(model, trained / "infinite", {"tokenizer": "bytes"})
    return trained


@pytest.mark.parametrize("arguments, words", WRONG)
def test_wrong_input_is_one_line(sources, arguments, words):
    arguments = [argument.replace("{}", str(sources)) for argument in arguments.split()]
    run = Run("analyze.py", "--device=cpu", *arguments)
    assert run.code == 2 and run.err.count("\n") == 1 and words in run.err, run.err


def test_without_a_run_it_lists_those_that_are_here(trained):
    run = Run("analyze.py", cwd=trained)
    assert run.code == 2
    before, _, found = run.err.partition("; runs here: ")
    assert before == "analyze.py: out: no such checkpoint"
    assert {"looped", "plain"} <= set(found.strip().split(", "))


def test_the_page_says_how_a_run_came_to_be(trained, tmp_path):
    shutil.copytree(trained / "plain", tmp_path / "plain")
    logged, sessions = (tmp_path / "plain" / f"{name}.jsonl" for name in ("log", "sessions"))
    entries = logged.read_text().splitlines()
    step = next(json.loads(line) for line in entries if '"loss"' in line and '"eval"' not in line)
    step |= {"tokens": 12345, "elapsed": 3725.4}
    logged.write_text("\n".join([*entries, json.dumps(step), '{"iter": 9, "lo']))  # half written
    last = {"command": "train.py <x>", "commit": "0123456789abcdef", "dirty": True}
    starts = [{"command": "train.py first"}, last]
    sessions.write_text("\n".join(map(json.dumps, starts)))
    options = ["--windows=1", "--device=cpu", "--refresh=30"]
    run = Run("analyze.py", tmp_path / "plain", *options)
    assert run.code == 0, run.err
    text = (tmp_path / "plain" / "analysis" / "index.html").read_text()
    cells = Parsed(text).cells
    assert {"12,345", "1:02:05", "0123456789 (changed)", "train.py <x>", "2"} <= set(cells)
    assert "not at their defaults" in cells and "n_embd=32, " in text and "out_dir=" not in text
    assert "plain is a GPT without loops of " in text and "in 62.1 minutes." in text
    assert '<meta http-equiv="refresh" content="30">' in text


@pytest.mark.slow
def test_a_page_of_many_runs_has_a_short_title(trained, tmp_path):
    sources = []
    for number in range(3):
        sources.append(tmp_path / f"run{number}")
        shutil.copytree(trained / "plain", sources[-1])
    options = [f"--to={tmp_path / 'page'}", "--windows=1", "--device=cpu"]
    assert Run("analyze.py", *sources, *options).code == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<h1>Analysis of 3 runs</h1>" in text


def test_without_matplotlib_it_says_what_to_install(trained, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = Run("analyze.py", f"--out_dir={trained / 'looped'}")
    assert run.code == 2
    assert run.err == "analyze.py: the pictures need matplotlib; run: pip install matplotlib\n"


def test_other_peoples_weights_without_a_log_or_data(tmp_path):
    """GPT-2's family: the page names what it lacks, and shows residual stream and attention."""
    model = build(n_layer=2, vocab_size=256, mlp="gelu_tanh")
    pretrained.export(model, tmp_path / "theirs", {"tokenizer": "bytes"})
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "gpt2"
    text = ["--start=loop", "--repeats=3"]
    run = Run("analyze.py", tmp_path / "theirs", *text, "--device=cpu")
    assert run.code == 0, run.err
    folder = tmp_path / "theirs" / "analysis"
    assert {path.stem for path in folder.glob("*.png")} == {"residual", "attention", "distances"}
    assert np.load(folder / "residual.npz")["theirs:points"].shape == (3, 12, 2)
    text = (folder / "index.html").read_text()
    for reason in ("there is no log.jsonl", "nothing in it is looped"):
        assert reason in text
    assert "how it was trained is not known" in text and text.count("<li>") == 3


@pytest.mark.slow
def test_a_folded_model_whose_loop_does_nothing_yet(tmp_path):
    """Nothing moves from loop to loop: the measures are 0, and there is no loss to measure."""
    pretrained.export(build(n_layer=3, vocab_size=256), tmp_path / "plain", {"tokenizer": "bytes"})
    folded = pretrained.load(tmp_path / "plain", n_prelude=1, n_block=1, n_coda=1, n_loop=3)
    pretrained.export(folded, tmp_path / "folded", {"tokenizer": "bytes"})
    run = Run("analyze.py", tmp_path / "folded", "--start=in a loop", "--device=cpu")
    assert run.code == 0, run.err
    folder = tmp_path / "folded" / "analysis"
    states = np.load(folder / "states.npz")
    assert not states["folded:change"].any() and states["folded:norm"].shape == (3, 3)
    assert "no validation split is known" in (folder / "index.html").read_text()


# -----------------------------------------------------------------------------
# a real browser

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)
FRAME = """<!DOCTYPE html>
<iframe id=f src="{page}" style="border: 0; width: {width}px; height: 900px"></iframe>
<pre id=out></pre>
<script>
f.onload = () => {{
  const d = f.contentDocument, e = d.documentElement;
  d.querySelector("details").open = true;
  const inside = x => x.closest(".wide") && !x.matches(".wide");
  const right = x => x.getBoundingClientRect().right;
  const all = [...d.body.querySelectorAll("*")];
  const over = all.filter(x => !inside(x) && right(x) > {width} + 0.5);
  out.textContent = JSON.stringify({{
    scroll: e.scrollWidth, client: e.clientWidth, over: over.map(x => x.tagName),
    images: [...d.images].map(i => i.complete && i.naturalWidth > 0), text: d.body.innerText}});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(page, width):
    folder, _ = page
    frame = folder / f"frame{width}.html"
    frame.write_text(FRAME.format(page="index.html", width=width))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", "--window-size=1400,1000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"]
    command += ["--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    out = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert out and out[1], done.stderr[-2000:]
    seen = json.loads(html.unescape(out[1]))
    assert seen["client"] == width and seen["scroll"] <= width and seen["over"] == []
    assert len(seen["images"]) == len(PICTURES) and all(seen["images"])
    for words in ("loss (nats/token)", "mean loops", "after token", "rank 1", "Left out for plain"):
        assert words in seen["text"]
