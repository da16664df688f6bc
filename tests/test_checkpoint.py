"""Checkpoints: whole or not at all, verified, plain values only; ours and nanoGPT's become models."""

import json
import os
import pickle
import shutil

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


def test_what_is_saved_comes_back(folder):
    loaded, saved = checkpoint.load(folder), state(2)
    assert loaded["iter_num"] == 2 and loaded["model_args"] == saved["model_args"]
    assert all(
        torch.equal(loaded["model"][name], tensor) for name, tensor in saved["model"].items()
    )
    assert checkpoint.load(folder / "ckpt_prev.pt")["iter_num"] == 1
    assert sorted(os.listdir(folder)) == ["ckpt.json", "ckpt.pt", "ckpt_prev.pt"]


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone", "other"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(folder, damage, capsys):
    path = folder / "ckpt.pt"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(
        {"bit": data, "cut": data[:-100], "empty": b"", "gone": b"", "other": b"hello"}[damage]
    )
    if damage == "gone":
        path.unlink()
    assert checkpoint.load(folder)["iter_num"] == 1
    assert str(path) in capsys.readouterr().err
    (folder / "ckpt_prev.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="ckpt.pt: .*; .*ckpt_prev.pt: damaged"):
        checkpoint.load(folder)


def test_a_save_that_dies_leaves_a_whole_checkpoint(folder, monkeypatch):
    """os.replace and the writing of the file fail in turn, as if the process died there."""
    whole = shutil.copytree(folder, folder.parent / "whole")
    for dies_at in range(6):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        calls = iter(range(100))

        def dying(original):
            def call(*args):
                if next(calls) == dies_at:  # noqa: B023
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


def test_nothing_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for name, write in {
        "a.pt": torch.save,
        "b.pt": lambda x, path: path.write_bytes(pickle.dumps(x)),
    }.items():
        write({"model": Payload(), "model_args": {}}, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: not a checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match="ckpt.pt: no such checkpoint"):
        checkpoint.load(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt: not a checkpoint"):
        checkpoint.load(tmp_path / "list.pt")


def test_nanogpts_checkpoint_opens_as_it_is(tmp_path):
    """Its keys, its model_args, and the prefix that torch.compile leaves there."""
    model = build(n_layer=2, bias=False, spread=0.1)
    args = dict(
        n_layer=2, n_head=4, n_embd=32, block_size=16, bias=False, vocab_size=61, dropout=0.0
    )
    weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {
            "model": weights,
            "optimizer": {},
            "model_args": args,
            "iter_num": 5,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "x"},
        },
        tmp_path / "ckpt.pt",
    )
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        assert torch.equal(pretrained.load(source)(tokens())[0], model(tokens())[0])


def test_a_model_loads_with_other_loops_but_not_with_another_shape(folder):
    model = pretrained.load(folder, n_loop=5)
    assert not model.training and torch.equal(
        model(tokens())[0], build(seed=2)(tokens(), n_loop=5)[0]
    )
    with pytest.raises(ValueError, match="n_embd=64 where the checkpoint has 32"):
        pretrained.load(folder, n_embd=64)
    with pytest.raises(ValueError, match="n_head=5"):
        pretrained.load(folder, n_head=5)


def test_model_args_from_elsewhere_are_not_guessed(tmp_path):
    saved = state(1)
    saved["model_args"] = {**saved["model_args"], "n_expert": 8}
    checkpoint.save(tmp_path, saved)
    with pytest.raises(ValueError, match="n_expert"):
        pretrained.load(tmp_path)


def test_the_manifest_is_json_with_the_newest_first(folder):
    entries = json.loads((folder / "ckpt.json").read_text())
    assert [entry["iter_num"] for entry in entries] == [2, 1]
    assert entries[0] == {
        "sha256": checkpoint.sha256(folder / "ckpt.pt"),
        "bytes": (folder / "ckpt.pt").stat().st_size,
        "iter_num": 2,
    }
