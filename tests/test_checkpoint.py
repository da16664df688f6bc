"""Checkpoints: complete or not at all, verified, plain values only; ours and nanoGPT's load."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from conftest import build, tokens

import pretrained
from nanorecur import checkpoint


def state(n):
    model = build(seed=n)
    return {
        "model": model.state_dict(),
        "model_args": vars(model.config),
        "iter_num": n,
        "optimizer": {"a": torch.ones(n)},
    }


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    return tmp_path


# -----------------------------------------------------------------------------
# saving and loading


def test_a_loaded_checkpoint_is_the_one_that_was_saved(folder):
    loaded, saved = checkpoint.load(folder), state(2)
    assert loaded["iter_num"] == 2 and loaded["model_args"] == saved["model_args"]
    assert loaded["model"].keys() == saved["model"].keys()
    for name, tensor in saved["model"].items():
        assert torch.equal(loaded["model"][name], tensor), name
    assert checkpoint.load(folder / "ckpt_prev.pt")["iter_num"] == 1
    assert sorted(os.listdir(folder)) == ["ckpt.json", "ckpt.pt", "ckpt_prev.pt"]


def test_the_manifest_is_json_with_the_newest_first(folder):
    entries = json.loads((folder / "ckpt.json").read_text())
    assert [entry["iter_num"] for entry in entries] == [2, 1]
    path = folder / "ckpt.pt"
    digest = checkpoint.sha256(path)
    assert entries[0] == {"sha256": digest, "bytes": path.stat().st_size, "iter_num": 2}


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "other": lambda path: path.write_bytes(b"hello"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(folder, damage, capsys):
    DAMAGES[damage](folder / "ckpt.pt")
    assert checkpoint.load(folder)["iter_num"] == 1
    assert f"{folder / 'ckpt.pt'}: " in capsys.readouterr().err


def test_where_all_are_damaged_all_are_named(folder):
    (folder / "ckpt.pt").unlink()
    (folder / "ckpt_prev.pt").write_bytes(b"")
    words = "ckpt.pt: no such checkpoint; .*ckpt_prev.pt: damaged"
    with pytest.raises(ValueError, match=words):
        checkpoint.load(folder)


@pytest.mark.parametrize("dies_at", range(6))
def test_a_save_that_dies_leaves_a_complete_checkpoint(folder, monkeypatch, dies_at):
    """The process dies at one after the other of the calls of os.replace and os.fsync in a save."""
    calls = iter(range(100))

    def dying(original):
        def call(*args):
            if next(calls) == dies_at:
                raise KeyboardInterrupt
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(os, "fsync", dying(os.fsync))
        try:
            checkpoint.save(folder, state(3))
        except KeyboardInterrupt:
            pass
        assert next(calls) == min(dies_at + 1, 5)  # a save makes five of these calls
    assert checkpoint.load(folder)["iter_num"] == (2 if dies_at < 5 else 3)
    checkpoint.save(folder, state(4))
    assert checkpoint.load(folder)["iter_num"] == 4
    assert checkpoint.read(folder / "ckpt_prev.pt")["iter_num"] in (2, 3)


def test_a_full_disk_leaves_the_old_checkpoint(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, state(3))
    assert checkpoint.load(folder)["iter_num"] == 2


def test_without_hard_links_the_previous_checkpoint_is_kept_too(folder, monkeypatch):
    def no_links(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.save(folder, state(3))
    assert checkpoint.load(folder)["iter_num"] == 3
    assert checkpoint.load(folder / "ckpt_prev.pt")["iter_num"] == 2


# -----------------------------------------------------------------------------
# files that are no checkpoints


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_is_never_executed(tmp_path, writer):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    content, path = {"model": Payload(), "model_args": {}}, tmp_path / "a.pt"
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="a.pt: not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="ckpt.pt: no such checkpoint"):
        checkpoint.load(tmp_path)


def recurring():
    part = {"w": torch.ones(2)}
    part["itself"] = part
    return part


GOOD = {"model": {"w": torch.ones(2)}, "model_args": {}}
CONTENTS = [  # what a file holds, the message or "" where it is a checkpoint
    ([1, 2], "it holds a list, not a dict"),
    ({"model_args": {}}, "it has no model"),
    ({"model": {}}, "it has no model_args"),
    ({**GOOD, "iter_num": "3"}, "iter_num is of type str"),
    ({**GOOD, "iter_num": -1}, "iter_num is -1, less than 0"),
    ({**GOOD, "best_val_loss": []}, "best_val_loss is of type list"),
    ({**GOOD, "model": {"w": 3}}, "w in model is of type int"),
    ({**GOOD, "model": {"w": torch.tensor([1, float("nan")])}}, "model.w holds NaN or Inf"),
    ({**GOOD, "optimizer": {"m": [torch.ones(1).expand(9)]}}, "optimizer.m.0 is larger than its"),
    ({**GOOD, "optimizer": recurring()}, ""),
    (GOOD, ""),
]


@pytest.mark.parametrize("content, message", CONTENTS)
def test_what_is_wrong_in_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    if message:
        with pytest.raises(ValueError, match=f"a.pt: not a checkpoint .*{message}"):
            checkpoint.load(path)
    else:
        assert checkpoint.load(path).keys() == content.keys()


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({**GOOD, "optimizer": {"x": torch.zeros(10**5)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source:
        with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    assert checkpoint.load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="b.pt: not a checkpoint .*more than its size"):
        checkpoint.load(tmp_path / "b.pt")


# -----------------------------------------------------------------------------
# into optimizers and models


def test_an_optimizer_takes_its_own_state_alone():
    def optimizer(width):
        weight = torch.nn.Parameter(torch.ones(width))
        weight.grad = torch.ones(width)
        adam = torch.optim.AdamW([weight])
        adam.step()
        return adam

    state = optimizer(3).state_dict()
    checkpoint.restore(optimizer(3), state)
    with pytest.raises(ValueError, match="optimizer's state does not fit the model"):
        checkpoint.restore(optimizer(4), state)
    with pytest.raises(ValueError, match="optimizer's state cannot be read"):
        checkpoint.restore(optimizer(3), {"state": state["state"]})


def test_nanogpts_checkpoint_opens_as_it_is(tmp_path):
    """It has nanoGPT's keys and model_args, and the prefix that torch.compile adds to names."""
    model = build(n_layer=2, bias=False, spread=0.1)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 61}
    saved = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": {},
        "model_args": {**shape, "bias": False, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "x"},
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        assert torch.equal(pretrained.load(source)(tokens())[0], model(tokens())[0])


def test_a_model_loads_with_other_loops_but_not_with_another_shape(folder):
    model = pretrained.load(folder, n_loop=5)
    expected = build(seed=2)(tokens(), n_loop=5)[0]
    assert not model.training and torch.equal(model(tokens())[0], expected)
    with pytest.raises(ValueError, match="n_embd=64 where the checkpoint has 32"):
        pretrained.load(folder, n_embd=64)
    with pytest.raises(ValueError, match="n_head=5"):
        pretrained.load(folder, n_head=5)


def test_an_unknown_model_arg_is_refused_and_not_guessed(tmp_path):
    saved = state(1)
    saved["model_args"] = {**saved["model_args"], "n_expert": 8}
    checkpoint.save(tmp_path, saved)
    with pytest.raises(ValueError, match="n_expert"):
        pretrained.load(tmp_path)
