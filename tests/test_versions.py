"""Versions of torch and Python: the range that is accepted, and names that older ones lack."""

import re
import sys

import pytest
import torch
from conftest import ROOT

from nanorecur.hardware import PYTHON_VERSIONS, TORCH_VERSIONS, check_version, check_versions

RANGE = "{}.{} to {}.{}".format(*TORCH_VERSIONS[0], *TORCH_VERSIONS[1])


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu", "2.14.0a0+git12ab"])
def test_versions_within_the_range_say_nothing(version, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", version)
    check_versions()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1", "2.10.0+cpu"])
def test_an_older_torch_is_refused(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ValueError, match=re.escape(f"torch={version!r}: must be {RANGE}")):
        check_versions()


@pytest.mark.parametrize("version", ["2.15.0", "3.0.0+cu140"])
def test_a_newer_torch_is_warned_of_in_one_line_by_one_process(version, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", version)
    check_versions()
    line = f"warning: torch {version} is newer than what was tried, {RANGE}\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "1")
    check_versions()
    assert capsys.readouterr().err == ""


def test_python_has_a_range_too(capsys):
    with pytest.raises(ValueError, match=r"python='3\.10\.4': must be 3\.11 to 3\.13"):
        check_version("python", "3.10.4", (3, 10), *PYTHON_VERSIONS)
    check_version("python", "3.14.0", (3, 14), *PYTHON_VERSIONS)
    assert "python 3.14.0 is newer than what was tried, 3.11 to 3.13" in capsys.readouterr().err


def test_what_the_project_pins_is_within_the_ranges():
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert TORCH_VERSIONS[0] <= tuple(map(int, pinned.groups())) <= TORCH_VERSIONS[1]
    assert (
        f'target-version = "py{"".join(map(str, PYTHON_VERSIONS[0]))}"'
        in (ROOT / "pyproject.toml").read_text()
    )
    assert PYTHON_VERSIONS[0] <= sys.version_info[:2]
