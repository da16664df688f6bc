"""Watching a run: a page at each new checkpoint, the last one when it has ended."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, Run, assert_refused, train

from nanorecur import watching


class Training:
    """A run in a folder, whose events happen one after the other while the watcher sleeps."""

    def __init__(self, folder, monkeypatch, *events):
        self.folder, self.events, self.made, self.clock = folder, list(events), [], 1
        (folder / "config.json").write_text('{"max_iters": 8}')
        monkeypatch.setattr(watching.time, "sleep", self.sleep)

    def sleep(self, seconds):
        event = self.events.pop(0)  # IndexError: it was watched for too long
        if event is not None:
            event()

    def checkpoint(self):
        path = self.folder / "ckpt.pt"
        path.touch()
        self.clock += 1
        os.utime(path, ns=(self.clock, self.clock))

    def end(self):
        (self.folder / "log.jsonl").write_text('{"iter": 8, "eval": []}\n')

    def interrupt(self):
        raise KeyboardInterrupt

    def make(self, is_live):
        self.made.append((self.clock, is_live))
        return True

    def watched(self):
        watching.watch(self.folder, 30, self.make)
        assert self.events == []
        return self.made


def test_each_checkpoint_makes_one_page_and_the_end_one_without_refresh(tmp_path, monkeypatch):
    run = Training(tmp_path, monkeypatch)
    run.events = [None, run.checkpoint, None, run.checkpoint, run.checkpoint, run.end, None]
    assert run.watched() == [(2, True), (3, True), (4, True), (4, False)]


def test_the_last_checkpoint_is_awaited_after_the_end_is_logged(tmp_path, monkeypatch):
    run = Training(tmp_path, monkeypatch)
    run.events = [run.checkpoint, run.end, run.checkpoint, None]
    assert run.watched() == [(2, True), (3, True), (3, False)]


def test_ctrl_c_ends_the_watching_with_a_page_without_refresh(tmp_path, monkeypatch, capsys):
    run = Training(tmp_path, monkeypatch)
    run.events = [run.checkpoint, run.interrupt]
    assert run.watched() == [(2, True), (2, False)]
    assert "no longer watching" in capsys.readouterr().out


def test_a_page_that_could_not_be_made_is_tried_again(tmp_path, monkeypatch):
    run = Training(tmp_path, monkeypatch)
    run.events = [run.checkpoint, None, run.end, None]
    outcomes = iter([False, True, True])
    monkeypatch.setattr(run, "make", lambda live: run.made.append(live) or next(outcomes))
    assert run.watched() == [True, True, False]


def test_a_command_behind_the_training_says_whether_it_succeeded():
    assert watching.run_behind([sys.executable, "-c", ""])
    assert not watching.run_behind([sys.executable, "-c", "raise SystemExit(2)"])


@pytest.mark.parametrize("options", [["{}/none"], ["{}", "{}"], ["gpt2"]])
def test_what_is_not_one_run_cannot_be_watched(tmp_path, options):
    words = [word.format(tmp_path) for word in options]
    assert_refused(Run("analyze.py", *words, "--watch=5"), "watch=5: must be 0, or with the folder")


@pytest.mark.slow
def test_a_watched_run_with_a_damaged_checkpoint_gets_its_page(corpus, tmp_path):
    """Nothing but analysis/ changes, and the older checkpoint is shown."""
    plain = ["--n_prelude=0", "--n_block=0", "--n_coda=0", "--n_loop=1", "--n_layer=1"]
    run = train(corpus, tmp_path / "run", *plain)
    assert run.code == 0, run.err
    newest = tmp_path / "run" / "ckpt.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    command = [sys.executable, "analyze.py", str(tmp_path / "run"), "--watch=1", "--windows=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "going back to" in done.stderr
    assert done.stdout.count("index.html") == 2
    page = (tmp_path / "run" / "analysis" / "index.html").read_text()
    assert 'http-equiv="refresh"' not in page and "for 4 of 8 steps" in page
    shutil.rmtree(tmp_path / "run" / "analysis")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert json.loads(before["config.json"])["max_iters"] == 8
