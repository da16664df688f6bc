"""Options: every type both ways, left to right, and what a wrong one is told."""

import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from configurator import configure, read_knobs

SCRIPT = '''
"""A script."""
from math import pi
count = 10  # how many
rate = 1.5  # how fast
flag = False  # whether
name = "none"  # what it is called
loops = ()  # which
configure(globals())
later = 3
'''


@pytest.fixture
def run(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)

    def run(*arguments):
        scope = {"__file__": str(path), "__doc__": "A script."}
        try:
            config, given = configure(scope, (ROOT / "model.py", "GPTConfig"), argv=list(arguments))
        except SystemExit as stop:
            captured = capsys.readouterr()
            return stop.code, captured.out + captured.err
        assert all(
            scope[name] == config[name] for name in ("count", "rate", "flag", "name", "loops")
        )
        assert "n_embd" not in scope
        return {name: config[name] for name in given}

    return run


@pytest.mark.parametrize(
    "argument,value",
    [
        ("--count=3", 3),
        ("--count=1e3", 1000),
        ("--count=-2", -2),
        ("--count=12345678901234567890", 12345678901234567890),
        ("--rate=1", 1.0),
        ("--rate=3e-4", 3e-4),
        ("--rate=-.5", -0.5),
        ("--flag", True),
        ("--flag=true", True),
        ("--flag=False", False),
        ("--flag=1", True),
        ("--flag=0", False),
        ("--name=a=b", "a=b"),
        ("--name=", ""),
        ("--name=4", "4"),
        ("--name=--x", "--x"),
        ("--loops=4,8", (4, 8)),
        ("--loops=4", (4,)),
        ("--loops=", ()),
        ("--loops=()", ()),
        ("--loops=[[0,1],[3]]", ((0, 1), (3,))),
        ("--n_embd=64", 64),
        ("--dropout=0", 0.0),
    ],
)
def test_values_are_read_by_the_type_of_the_knob(run, argument, value):
    (got,) = run(argument).values()
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "argument,words",
    [
        ("--cuont=3", ("unknown option 'cuont'", "'count'")),
        ("--n_layers=3", ("'n_layer'",)),
        ("--later=4", ("unknown",)),
        ("--pi=3", ("unknown",)),
        ("--zzzzzz=1", ("unknown", "-h")),
        ("--count=1.5", ("count=1.5", "whole number")),
        ("--count=abc", ("count='abc'", "whole")),
        ("--count=", ("count=''",)),
        ("--count=True", ("whole",)),
        ("--rate=fast", ("rate='fast'", "a number")),
        ("--rate=nan", ("number",)),
        ("--rate=inf", ("number",)),
        ("--count=" + "9" * 400, ("whole",)),
        ("--count=" + "9" * 5000, ("whole",)),
        ("--flag=yes", ("flag='yes'", "True or False")),
        ("--loops=[1", ("loops=", "list")),
        ("--loops=a,b", ("list",)),
        ("--loops={}", ("list",)),
        ("--count", ("--count needs a value", "--count=10")),
        ("count=3", ("'count=3'", "--name=value")),
        ("nowhere.py", ("nowhere.py", "No such file")),
        ("--count=" + "9" * 5000 + "x", ("count=", "...")),
        ("--" + "x" * 10**6, ("...",)),
        ("--loops=" + "[" * 10**5, ("loops=",)),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(run, argument, words):
    code, text = run(argument)
    assert code == 2 and text.count("\n") == 1 and len(text) < 300
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "source,words",
    [
        ("coutn = 3", ("unknown option 'coutn'", "'count'")),
        ("count = 'x'", ("count='x'", "whole")),
        ("rate = True", ("rate=True",)),
        ("name = 3", ("name=3", "text")),
        ("loops = 3", ("loops=3", "list")),
        ("count = ", ("SyntaxError",)),
        ("count = 1 / 0", ("ZeroDivisionError",)),
        ("count = none", ("NameError",)),
        ("count = None", ("count=None",)),
    ],
)
def test_a_wrong_config_file_is_named(run, tmp_path, source, words):
    path = tmp_path / "bad.py"
    path.write_text(source)
    code, text = run(str(path))
    assert (
        code == 2
        and text.count("\n") == 1
        and "bad.py" in text
        and all(word in text for word in words)
    ), text


def test_config_files_are_python_and_later_wins(run, tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import math\n_half = 4\ncount = 2 * _half\nrate = 2\nloops = [1, [2, 3]]\n")
    assert run(str(path)) == {"count": 8, "rate": 2.0, "loops": (1, (2, 3))}
    assert run(str(path), "--count=5")["count"] == 5
    assert run("--count=5", str(path))["count"] == 8


def test_help_lists_every_knob_with_its_comment(run):
    code, text = run("--count=3", "-h")
    assert (
        code == 0
        and "--count=10" in text
        and "how many" in text
        and "--n_embd=768" in text
        and "residual stream" in text
    )
    assert "later" not in text


@given(st.text(), st.text())
def test_any_text_is_a_value_or_one_clear_error(name, text):
    knobs = read_knobs(ROOT / "model.py", "GPTConfig")
    try:
        configure({"__file__": __file__, "__doc__": ""}, argv=[f"--{name}={text}"])
    except SystemExit as stop:
        assert stop.code in (0, 2)
    assert knobs["n_embd"].value == 768


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py"])
def test_scripts_describe_themselves(script):
    run = subprocess.run(
        [sys.executable, ROOT / script, "-h"], capture_output=True, text=True, timeout=60
    )
    knobs = read_knobs(ROOT / script)
    assert run.returncode == 0 and run.stderr == "" and len(knobs) > 3
    assert all(f"--{name}=" in run.stdout for name in knobs)
