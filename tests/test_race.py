"""nanorecur/race.py: whole runs of two checkouts, with a stand-in for nanoGPT's."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pretrained
from nanorecur import race
from nanorecur.dataset import load_meta, open_split

TRAIN = """
import os, shutil, sys
out = next(part for part in sys.argv if part.startswith("--out_dir="))[10:]
if "fail" in sys.argv:
    sys.exit("train.py: fails as asked")
os.makedirs(out)
shutil.copy({source!r}, out)
open(os.path.join(out, "threads"), "w").write(os.environ.get("OMP_NUM_THREADS", ""))
"""


@pytest.fixture
def checkout(plain_run, corpus, tmp_path, monkeypatch):
    """A folder whose train.py leaves the checkpoint of plain_run, with the same val.bin."""
    folder = tmp_path / "checkout"
    (folder / "data/shakespeare_char").mkdir(parents=True)
    source = str(Path(plain_run[0], "ckpt.pt").resolve())
    (folder / "train.py").write_text(TRAIN.format(source=source))
    shutil.copy(corpus / "val.bin", folder / "data/shakespeare_char")
    monkeypatch.setattr(race, "DATA", corpus)
    monkeypatch.setattr(race, "ROOT", folder)
    return folder


def test_both_run_and_leave_their_checkpoints(checkout, tmp_path):
    ends = race.race(str(checkout), ["--x=1"], tmp_path / "out", threads=1)
    assert list(ends) == ["nanoGPT", "ours"]
    for name, (seconds, path) in ends.items():
        assert seconds > 0
        assert path == tmp_path / "out" / name / "ckpt.pt"
        assert path.exists()
        assert (path.parent / "threads").read_text() == "1"


def test_another_text_and_a_run_that_fails_are_refused(checkout, tmp_path):
    with pytest.raises(ValueError, match="train.py: fails as asked"):
        race.race(str(checkout), ["fail"], tmp_path / "out", threads=0)
    val = checkout / "data/shakespeare_char/val.bin"
    val.write_bytes(val.read_bytes()[:-2])
    with pytest.raises(ValueError, match="prepared from the same text"):
        race.race(str(checkout), [], tmp_path / "out", threads=0)


def test_the_loss_is_that_of_every_validation_token_once(plain_run, corpus, monkeypatch):
    monkeypatch.setattr(race, "DATA", corpus)
    model = pretrained.load(plain_run[0])
    T = model.config.block_size
    tokens = open_split(corpus, "val", load_meta(corpus), T, 256).tokens
    tokens = torch.from_numpy(tokens.astype("int64"))
    nats, count = 0.0, 0
    for first in range(0, len(tokens) - 1 - T, T):
        x, y = tokens[first : first + T], tokens[first + 1 : first + T + 1]
        nats += F.cross_entropy(model(x[None], y[None])[0][0], y, reduction="sum").item()
        count += T
    x, y = tokens[-T - 1 : -1], tokens[-T:]
    left = len(tokens) - 1 - count
    logits = model(x[None], y[None])[0][0]
    nats += F.cross_entropy(logits[-left:], y[-left:], reduction="sum").item()
    assert race.score_run(model) == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
