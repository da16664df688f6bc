"""Options: values of every type, their order, the message about a wrong one, and -h."""

import contextlib
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, slow
from hypothesis import example, given
from hypothesis import strategies as st

from configurator import (
    HELP_WIDTH,
    HINTS,
    check_ranges,
    configure,
    find_knob,
    parse,
    read_knobs,
    require,
)

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


class Shape:
    """A source of further options."""

    width: int = 768  # of the model
    n_layer: int = 12
    share: float = 0.0
'''
OWN = {"count": 10, "rate": 1.5, "flag": False, "name": "none", "loops": ()}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def run(script, capsys):
    """A call of configure: what the options set, or (exit code, stdout and stderr)."""

    def run(*arguments):
        scope = {"__file__": str(script), "__doc__": "A script."}
        try:
            config, given_names = configure(scope, (script, "Shape"), argv=list(arguments))
        except SystemExit as stop:
            captured = capsys.readouterr()
            return stop.code, captured.out + captured.err
        assert {name: scope[name] for name in OWN} == {name: config[name] for name in OWN}
        assert "width" not in scope
        return {name: config[name] for name in given_names}

    return run


# -----------------------------------------------------------------------------
# values

VALUES = [
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
    ("--width=64", 64),
    ("--share=0", 0.0),
]


@pytest.mark.parametrize("argument, value", VALUES)
def test_a_value_has_the_type_of_its_knob(run, argument, value):
    [got] = run(argument).values()
    assert got == value and type(got) is type(value)


def test_without_options_every_knob_keeps_its_default(script, run):
    scope = {"__file__": str(script), "__doc__": ""}
    config, given_names = configure(scope, (script, "Shape"), argv=[])
    assert config == {"width": 768, "n_layer": 12, "share": 0.0, **OWN} and given_names == set()


def test_config_files_are_python_and_later_options_win(run, tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import math\n_half = 4\ncount = 2 * _half\nrate = 2\nloops = [1, [2, 3]]\n")
    assert run(str(path)) == {"count": 8, "rate": 2.0, "loops": (1, (2, 3))}
    assert run(str(path), "--count=5")["count"] == 5
    assert run("--count=5", str(path))["count"] == 8


def test_a_relative_source_is_found_beside_the_script(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__file__": str(script), "__doc__": ""}
    assert configure(scope, ("script.py", "Shape"), argv=["--width=5"])[0]["width"] == 5


# -----------------------------------------------------------------------------
# errors

WRONG = [
    ("--cuont=3", ["unknown option 'cuont'", "'count'"]),
    ("--n_layrs=3", ["'n_layer'"]),
    ("--n_layers=3", ["unknown option 'n_layers': here --n_layer\n"]),
    ("--lr=3", ["unknown option 'lr'; -h lists"]),  # this script has no learning_rate
    ("--later=4", ["unknown"]),
    ("--pi=3", ["unknown"]),
    ("--zzzzzz=1", ["unknown", "-h"]),
    ("--count=1.5", ["count=1.5", "whole number"]),
    ("--count=abc", ["count='abc'", "whole"]),
    ("--count=", ["count=''"]),
    ("--count=True", ["whole"]),
    ("--rate=fast", ["rate='fast'", "a number"]),
    ("--rate=1e30", ["rate=1e+30", "a number below 2**64"]),
    ("--rate=nan", ["number"]),
    ("--rate=inf", ["number"]),
    ("--count=" + "9" * 400, ["whole"]),
    ("--count=" + "9" * 5000, ["whole"]),
    ("--flag=yes", ["flag='yes'", "True or False"]),
    ("--loops=[1", ["loops=", "list"]),
    ("--loops=a,b", ["list"]),
    ("--loops={}", ["list"]),
    ("--count", ["--count needs a value", "--count=10"]),
    ("count=3", ["'count=3'", "--name=value"]),
    ("nowhere.py", ["nowhere.py", "No such file"]),
    ("--count=" + "9" * 5000 + "x", ["count=", "..."]),
    ("--" + "x" * 10**6, ["..."]),
    ("--loops=" + "[" * 10**5, ["loops="]),
]


@pytest.mark.parametrize("argument, words", WRONG)
def test_a_wrong_option_is_one_line_and_code_2(run, argument, words):
    code, text = run(argument)
    assert code == 2 and text.count("\n") == 1 and len(text) < 300
    assert all(word in text for word in words), text


WRONG_FILES = [
    ("coutn = 3", ["unknown option 'coutn'", "'count'"]),
    ("count = 'x'", ["count='x'", "whole"]),
    ("rate = True", ["rate=True"]),
    ("name = 3", ["name=3", "text"]),
    ("loops = 3", ["loops=3", "list"]),
    ("count = ", ["SyntaxError"]),
    ("count = 1 / 0", ["ZeroDivisionError"]),
    ("count = none", ["NameError"]),
    ("count = None", ["count=None"]),
    ("raise OverflowError('a\\n' + 'b' * 5000)", ["OverflowError: a b", "b..."]),
]


@pytest.mark.parametrize("source, words", WRONG_FILES)
def test_a_wrong_config_file_is_one_line_that_names_it(run, tmp_path, source, words):
    path = tmp_path / "bad.py"
    path.write_text(source)
    code, text = run(str(path))
    assert code == 2 and text.count("\n") == 1 and len(text) < 900
    assert all(word in text for word in ["bad.py", *words]), text


KNOBS = {**OWN, "width": 768}
names = st.sampled_from(list(KNOBS)) | st.text().filter(lambda name: "=" not in name)
numbers = st.integers() | st.floats() | st.lists(st.integers()) | st.booleans()


@given(names, st.text() | numbers.map(str))
@example("count", "1")
@example("count", "x" * 2000)
@example("count", "\n")
@example("x" * 2000, "")
def test_any_text_is_a_value_of_the_knobs_type_or_one_clear_error(script, name, text):
    scope = {"__file__": str(script), "__doc__": ""}
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config, _ = configure(scope, (script, "Shape"), argv=[f"--{name}={text}"])
    except SystemExit as stop:
        program, _, line = stderr.getvalue().partition(": ")
        assert stop.code == 2 and program == Path(sys.argv[0]).name
        assert line.count("\n") == 1 and line.endswith("\n") and len(line) <= 800
        assert line.startswith(f"{name}=" if name in KNOBS else "unknown option ")
    else:
        assert type(config[name]) is type(KNOBS[name])


# -----------------------------------------------------------------------------
# names of other projects

SCRIPTS = ("train.py", "sample.py", "bench.py", "data/text/prepare.py")


def knobs_of(script):
    """Return the knobs of a script, with those that it takes from other files."""
    knobs = read_knobs(ROOT / script)
    if script in ("train.py", "bench.py"):
        knobs |= read_knobs(ROOT / "model.py", "GPTConfig") | read_knobs(ROOT / "train.py")
    return knobs


@pytest.mark.parametrize("name", HINTS)
def test_every_hint_is_given_by_a_script_and_names_an_option_that_it_takes(name):
    given_hints = set()
    for script in SCRIPTS:
        knobs = knobs_of(script)
        try:
            find_knob(name, knobs)
        except ValueError as error:
            _, here, option = str(error).partition(": here --")
            if here:
                given_hints.add(option)
                knob, _, value = option.partition("=")
                assert parse(value, knobs[knob]) if value else knob in knobs
    assert given_hints == set(HINTS[name])


def test_a_hint_names_what_the_script_at_hand_has():
    hints = {}
    for script in ("train.py", "sample.py"):
        with pytest.raises(ValueError) as caught:
            find_knob("loops", knobs_of(script))
        hints[script] = str(caught.value)
    assert hints["train.py"] == "unknown option 'loops': here --eval_loops"
    assert hints["sample.py"] == "unknown option 'loops': here --n_loop"
    with pytest.raises(ValueError) as caught:
        find_knob("prompt", knobs_of("train.py"))
    assert "here" not in str(caught.value)


# -----------------------------------------------------------------------------
# bare arguments


def configured(script, *arguments, positional="name"):
    scope = {"__file__": str(script), "__doc__": ""}
    config, given_names = configure(scope, argv=list(arguments), positional=positional)
    return {name: config[name] for name in given_names}


def test_the_first_bare_argument_is_the_value_of_the_positional_knob(script, tmp_path):
    config_file = tmp_path / "x.py"
    config_file.write_text("count = 8\n")
    assert configured(script, "out-x") == {"name": "out-x"}
    assert configured(script, "hf:a/b=c") == {"name": "hf:a/b=c"}
    both = {"name": "out-x", "count": 8}
    assert configured(script, str(config_file), "out-x") == both
    assert configured(script, "out-x", str(config_file)) == both
    assert configured(script, "--count=8", "out-x") == both


@pytest.mark.parametrize("arguments", [["a", "b"], ["--name=a", "b"], ["-b"]])
def test_a_second_bare_argument_is_an_error(script, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        configured(script, *arguments)
    words = "b': expected a config file (.py) or --name=value\n"
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(words)


# -----------------------------------------------------------------------------
# validating


def test_require_names_the_option_its_value_and_what_is_allowed():
    require("mode", "b", True, "a or b")
    with pytest.raises(ValueError, match=r"^mode='c': must be a or b$"):
        require("mode", "c", False, "a or b")


RANGES = [  # value, least, most, message
    (0, 1, math.inf, "n=0: must be at least 1"),
    (-0.5, 0, 1, "n=-0.5: must be from 0 to 1"),
    (1.5, 0, 1, "n=1.5: must be from 0 to 1"),
    (math.inf, 0, math.inf, "n=inf: must be a finite number"),
    (math.nan, 0, 1, "n=nan: must be a finite number"),
    (1, 1, math.inf, ""),
    (0, 0, 1, ""),
    (1.0, 0, 1, ""),
    (10**400, 1, math.inf, ""),
]


@pytest.mark.parametrize("value, least, most, message", RANGES)
def test_a_value_outside_its_range_is_refused_in_words(value, least, most, message):
    try:
        check_ranges({"other": 0, "n": value}, {"n": (least, most)})
    except ValueError as error:
        assert str(error) == message
    else:
        assert message == ""


# -----------------------------------------------------------------------------
# help

GROUPED = '''
"""A script with groups."""
# ---------------------------------
plain = 1  # before every group
# the first group
alpha = 1  # first
beta = (
    2  # in brackets
)
# ---------------------------------
# the second group, which has
# a heading of two lines
gamma = 3
delta = 4  # the fourth of the four options, with a help that does not fit in one line of a terminal

# a remark that no knob follows

epsilon = "a\\nb"  # last
configure(globals())
'''


@pytest.fixture
def grouped(tmp_path):
    path = tmp_path / "grouped.py"
    path.write_text(GROUPED)
    return path


def test_a_comment_line_above_a_knob_is_the_heading_of_those_that_follow(grouped):
    second = "the second group, which has a heading of two lines"
    assert [(knob.name, knob.group) for knob in read_knobs(grouped).values()] == [
        ("plain", ""),
        ("alpha", "the first group"),
        ("beta", "the first group"),
        ("gamma", second),
        ("delta", second),
        ("epsilon", second),
    ]


def test_the_comment_on_a_knobs_lines_is_its_help(grouped):
    knobs = read_knobs(grouped)
    assert [knobs[name].help for name in ("plain", "beta", "gamma", "epsilon")] == [
        "before every group",
        "in brackets",
        "",
        "last",
    ]


HELP = """\
A script with groups.

options, with their defaults:
    --plain=1       before every group

  the first group
    --alpha=1       first
    --beta=2        in brackets

  the second group, which has a heading of two lines
    --gamma=3
    --delta=4       the fourth of the four options, with a help that does not fit in one line of a
                    terminal
    --epsilon=a\\nb  last

fields of Shape (script.py):
    --width=768     of the model
    --n_layer=12
    --share=0.0
"""


def test_help_lists_own_options_by_group_then_those_of_each_source(grouped, script, capsys):
    scope = {"__file__": str(grouped), "__doc__": "\nA script with groups.\n"}
    with pytest.raises(SystemExit) as stop:
        configure(scope, (script, "Shape"), argv=["--plain=3", "-h"])
    assert stop.value.code == 0 and capsys.readouterr().out == HELP


def test_an_option_of_two_files_is_listed_once_with_the_scripts_own_default(script, capsys):
    other = script.with_name("other.py")
    other.write_text("count = 7  # another count\nconfigure(globals())\n")
    with pytest.raises(SystemExit):
        configure({"__file__": str(other), "__doc__": ""}, (script, ""), argv=["-h"])
    text = capsys.readouterr().out
    assert "options of script.py:" in text and text.count("--count=") == 1
    assert "--count=7" in text and "--rate=1.5" in text and "--later" not in text


@pytest.mark.parametrize("path", ["train.py", slow("sample.py"), slow("bench.py")])
def test_scripts_describe_themselves(path):
    command = [sys.executable, ROOT / path, "-h"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    knobs = read_knobs(ROOT / path)
    assert run.returncode == 0 and run.stderr == "" and len(knobs) > 3
    assert all(f"    --{name}=" in run.stdout for name in knobs)
    options = run.stdout.partition("options, with their defaults:")[2]
    assert max(map(len, options.splitlines())) <= HELP_WIDTH


def test_help_into_a_closed_pipe_is_silent():
    """As in `-h | head -1`, where head ends before everything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "data" / "phop" / "prepare.py", "-h"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert run.returncode == 0 and run.stderr == b""
