"""sample.py as a user runs it."""

import copy
import io
import json
import os
import re
import shutil

import pytest
import torch
from conftest import Run, assert_refused, build, few_ids, train

from nanorecur import hardware


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """The out_dir of a tiny run, which tests only read."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run = train(corpus, folder)
    assert run.code == 0, run.err
    return folder


def sample(folder, *arguments, **options):
    return Run("sample.py", f"--out_dir={folder}", "--device=cpu", *arguments, **options)


def test_samples_continue_the_prompt_of_the_command_line_or_of_a_file(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("def step(")
    options = ("--num_samples=2", "--max_new_tokens=30")
    typed = sample(folder, *options, "--start=def step(")
    assert typed.code == 0, typed.err
    first, second, nothing = typed.out.split("\n---------------\n")
    assert first != second
    for text in (first, second):
        assert text.startswith("def step(")
        assert len(text) == len("def step(") + 30
    assert nothing == ""
    read = sample(folder, *options, f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert read.out == typed.out
    assert sample(folder, *options, "--start=def step(", "--seed=2").out != typed.out


def test_n_loop_0_is_the_models_own(folder):
    options = ("--num_samples=1", "--max_new_tokens=30")
    own, two, nine = (sample(folder, *options, f"--n_loop={n}") for n in (0, 2, 9))
    assert own.code == nine.code == 0
    assert own.out == two.out
    assert "loops per token (2,)" in own.err
    assert "loops per token (9,)" in nine.err


WRONG = {
    "--start=\u2603": "; --start= takes another text",
    "--start=": "empty",
    "--start=FILE:nowhere.txt": "nowhere.txt",
    "--start=FILE:empty.txt": "empty",
    "--start=FILE:latin.txt": "alphabet",
    "--start=more than sixteen": "longer than the window",
    "--out_dir=nowhere": "nowhere: no such checkpoint; runs here: none; --source=nowhere takes",
    "--source=nowhere": "nowhere: no such checkpoint",
    "nowhere": "nowhere: no such checkpoint",
    "begun": "begun: this run has not saved a checkpoint yet",
    "--exit_rule=kl": "exit_rule='kl': must be left out, or with --automatic_loop_exit",
    "--min_loops=2": "min_loops=2: must be left out, or with --automatic_loop_exit",
    "--automatic_loop_exit_threshold=1": "threshold=1.0: must be left out, or with --automatic",
    "--draft_loops=1": "draft_loops=1: must be left out, or with --draft_tokens",
    "--n_slot=2": "n_slot=2: must be left out, or with --slots=last or mod",
    "--n_slot=2 --slots=shared": "n_slot=2: must be left out",
    "--chat --jsonl": "jsonl=True: must be left out with --chat",
    "--chat --num_samples=1": "num_samples=1: must be left out with --chat",
    "--chat --start=a": "start='a': must be left out with --chat",
    "--jsonl --color": "color=True: must be left out with --jsonl",
    "--n_loop=-1": "n_loop=-1",
    "--temperature=-1": "temperature",
    "--num_samples=0": "num_samples",
    "--device=tpu": "device=",
    "--tpo_k=1": "top_k",
    "--automatic_loop_exit --exit_rule=gate": "exit_gate",
    "--automatic_loop_exit --automatic_loop_exit_threshold=-1": "threshold=-1",
    "--slots=mod --n_slot=9": "n_slot=9",
    "--slots=some": "full, last",
    "--draft_tokens=2": "heads",
    "--top_p=2": "top_p=2",
    "--stop=FILE:no.txt": "no.txt",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_in_one_line(folder, tmp_path, wrong):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "begun").mkdir()
    for name in ("config.json", "sessions.jsonl"):
        (tmp_path / "begun" / name).write_text("{}")
    arguments = [wrong] if wrong.startswith("--start") else wrong.split()
    run = sample(folder, *arguments, cwd=tmp_path)
    assert_refused(run, WRONG[wrong])
    assert run.out == ""  # not even the prompt


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    model = build(n_layer=1)
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config)}
    torch.save(ckpt, tmp_path / "ckpt.pt")
    assert_refused(sample(tmp_path), "names no tokenizer")


def test_an_exported_folder_writes_the_same_text(folder, tmp_path):
    exported = tmp_path / "model"
    run = Run("pretrained.py", "export", f"--out_dir={folder}", f"--to={exported}")
    assert run.code == 0, run.err
    options = ("--num_samples=1", "--max_new_tokens=20", "--start=def ")
    from_run = sample(folder, *options)
    from_export = Run("sample.py", exported, "--device=cpu", *options)
    assert from_run.code == from_export.code == 0
    assert from_run.out == from_export.out


QUICK = ("--max_new_tokens=30", "--start=def ", "--n_loop=4")
GREEDY = (*QUICK, "--temperature=0")


def test_json_lines_hold_prompt_text_tokens_and_loops(folder):
    plain = sample(folder, *QUICK, "--num_samples=4")
    *texts, nothing = plain.out.split("\n---------------\n")
    run = sample(folder, *QUICK, "--num_samples=4", "--jsonl")
    assert run.code == 0, run.err
    lines = [json.loads(line) for line in run.out.splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == texts
    assert len(set(texts)) == 4
    for line in lines:
        assert line["prompt"] == "def "
        assert line["loops"] == [4] * 30
        assert len(line["tokens"]) == 30


def test_a_sample_ends_before_its_stop_string_drafted_or_not(folder, tmp_path):
    (tmp_path / "stops.txt").write_text("\x00\n \n")
    options = (*GREEDY, "--num_samples=4", "--jsonl", "--repetition_penalty=1.5")
    options += (f"--stop=FILE:{tmp_path / 'stops.txt'}",)
    run = sample(folder, *options)
    lines = [json.loads(line) for line in run.out.splitlines()]
    assert not any(" " in line["text"] for line in lines)
    assert any(len(line["tokens"]) < 30 for line in lines)
    drafted = sample(folder, *options, "--draft_tokens=3", "--draft_loops=2")
    assert drafted.out == run.out
    assert "drafts accepted" in drafted.err and "drafts" not in run.err


def test_nothing_of_a_stop_string_is_printed(folder):
    """Not even its beginning, which is held back until it is known how it goes on."""
    run = sample(folder, *QUICK, "--num_samples=2", "--jsonl")
    text = json.loads(run.out.splitlines()[0])["text"]
    stop = text[10:14]
    stopped = sample(folder, *QUICK, "--num_samples=2", f"--stop={stop}")
    printed, _, _ = stopped.out.split("\n---------------\n")
    assert printed == "def " + text[: text.find(stop)]


def test_color_follows_the_loops(folder):
    exit_early = ("--automatic_loop_exit", "--automatic_loop_exit_threshold=0.3")
    options = (*QUICK, "--num_samples=2", *exit_early)
    plain, color = sample(folder, *options).out, sample(folder, *options, "--color").out
    assert re.sub(r"\x1b\[[0-9;]*m", "", color) == plain
    assert color.count("\x1b[30;48;5;") >= 60
    assert len(set(re.findall(r"48;5;(\d+)m", color))) > 1


def test_color_prints_its_key_to_stderr(folder):
    run = sample(folder, *QUICK, "--color")
    key = re.sub(r"\x1b\[[0-9;]*m", "", run.err.splitlines()[0])
    assert key == "loops of a token, from few to all:  1  to  4 "
    assert "48;5;82m 1 " not in run.err and "48;5;118m 1 " in run.err and "48;5;196m 4 " in run.err
    assert "from few" not in sample(folder, *QUICK).err


def test_loops_used_are_those_of_all_groups_together(tmp_path):
    """A threshold that no state reaches before the last loop leaves all loops to each token."""
    two_groups = tmp_path / "groups"
    groups = dict(n_layer=4, loop_groups=((0, 1), (3,)), loop_counts=(3, 2))
    model = build(**groups, vocab_size=256, spread=0.1)
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config)}
    two_groups.mkdir()
    torch.save({**ckpt, "tokenizer": {"tokenizer": "bytes"}}, two_groups / "ckpt.pt")
    exits = ("--automatic_loop_exit", "--automatic_loop_exit_threshold=1e-9")
    run = sample(two_groups, "--max_new_tokens=4", *exits)
    assert run.code == 0, run.err
    assert "loops used 5.00 of 5\n" in run.err and "drafts" not in run.err


def test_loops_are_refused_where_nothing_is_looped(tmp_path):
    model = build(n_layer=1, vocab_size=256)
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config)}
    torch.save({**ckpt, "tokenizer": {"tokenizer": "bytes"}}, tmp_path / "ckpt.pt")
    assert sample(tmp_path, "--max_new_tokens=4").code == 0
    refused = sample(tmp_path, "--n_loop=8")
    assert_refused(refused, "n_loop=8: must be 0 where nothing is looped")


def test_without_a_run_named_the_runs_that_lie_here_are(folder, tmp_path):
    for age, name in enumerate(["out-old", "out-new"]):
        shutil.copytree(folder, tmp_path / name)
        os.utime(tmp_path / name / "ckpt.pt", (age, age))
    run = Run("sample.py", "--device=cpu", cwd=tmp_path)
    assert_refused(run, "out: no such checkpoint; runs here: out-new, out-old;")
    named = Run("sample.py", "out-old", "--device=cpu", "--max_new_tokens=4", cwd=tmp_path)
    assert named.code == 0, named.err
    again = Run("sample.py", "--source=out-old", "--device=cpu", "--max_new_tokens=4", cwd=tmp_path)
    assert again.out == named.out


def test_chat_goes_on_from_each_line(folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(x):\nreturn a long line\n"))
    run = sample(folder, "--max_new_tokens=30", "--n_loop=4", "--chat")
    assert run.code == 0, run.err
    first, second = run.out.split("> ")[1:3]
    assert len(first) == len(second) == 31
    alone = sample(folder, *QUICK, "--num_samples=1", "--start=def f(x):\n")
    assert alone.out.startswith("def f(x):\n" + first)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
@torch.no_grad()
def test_packed_weights_compute_the_same(dtype, near, shape):
    model, idx = build(spread=0.1, attention="mla", tie_weights=False), few_ids(*shape)
    want = model(idx, idx)[0]
    packed = copy.deepcopy(model)
    if "packed" not in hardware.usable_layouts(dtype):
        pytest.skip("this CPU has no packed products of this type")
    hardware.lay_out(packed, dtype, "packed")
    assert (packed(idx, idx)[0] - want).abs().max() < near * want.abs().max()
    assert torch.equal(model(idx, idx)[0], want)
