"""Configs, README and CONTRIBUTING: what they name exists, what they say runs."""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from conftest import ROOT, TRAIN, Run
from torch.distributed.run import get_args_parser

from configurator import read_config_file, read_knobs
from model import GPT, GPTConfig
from nanorecur import checkpoint

README = (ROOT / "README.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

# -----------------------------------------------------------------------------
# configs

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "config").glob("*.py"))
VOCABULARIES = {"shakespeare_char": 65, "pycode": 256, "phop": 6}  # others have GPT-2's


def head_of(path):
    """Return the comment at the top of a config file, as one line."""
    lines = (ROOT / path).read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in lines)
    return " ".join(line.removeprefix("# ") for line in lines)


def base_of(path):
    """Return the config that another one begins with, or None."""
    found = re.search(r"^from config\.(\w+) import \*", (ROOT / path).read_text(), re.M)
    return f"config/{found[1]}.py" if found else None


@cache
def knobs_of_train():
    return read_knobs(ROOT / "model.py", "GPTConfig") | read_knobs(ROOT / "train.py")


def model_of(path):
    """Return (options, the model of a config without weights)."""
    given = read_config_file(str(ROOT / path), knobs_of_train())
    fields = {name: given[name] for name in GPTConfig.__dataclass_fields__ if name in given}
    if given["dataset"] in VOCABULARIES:
        fields["vocab_size"] = VOCABULARIES[given["dataset"]]
    with torch.device("meta"):
        return given, GPT(GPTConfig(**fields))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_parses_and_builds_a_model_of_the_size_that_its_head_names(path):
    given, model = model_of(path)
    own_text = read_knobs(ROOT / "data" / "text" / "prepare.py")["name"].value
    folder = "text" if given["dataset"] == own_text else given["dataset"]
    assert (ROOT / "data" / folder / "prepare.py").exists()
    named = re.search(r"([\d.]+)M(?: parameters|\) on)", head_of(path))
    if named:
        decimals = len(named[1].partition(".")[2])
        assert f"{model.get_num_params() / 1e6:.{decimals}f}" == named[1]


@pytest.mark.parametrize("path", CONFIGS)
def test_the_head_of_a_config_names_command_hardware_time_and_loss(path):
    """Hardware and time of a recipe may stand in the head of the recipe that it begins with."""
    head = head_of(path)
    assert f"train.py {path}" in head
    assert re.search(
        r"Loss to expect: ([^.]*\d\.\d+|the model's own stays|not (yet )?measured)", head
    )
    assert "TBD" not in head
    while (base := base_of(path)) and base.startswith("config/recipe"):
        path = base
        head += head_of(path)
    assert re.search(r"CPU core|GPU", head)
    assert re.search(r"\b(\d+ s|minutes?|hours?|days?)\b", head)


# -----------------------------------------------------------------------------
# README and docstrings: options

SCRIPTS = [
    "train.py",
    "sample.py",
    "eval.py",
    "bench.py",
    "analyze.py",
    "pretrained.py",
    "tests/torture.py",
]
PREPARE = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("data/*/prepare.py"))
SLURMS = {"signal"}
PLACEHOLDER = {"key"}  # of --key=value


@cache
def options_of(script):
    """Return the names of a script's options, as its -h lists them."""
    run = Run(script, "-h")
    assert run.code == 0, run.err
    return set(re.findall(r"^ +--(\w+)=", run.out, re.M))


@cache
def options_of_torchrun():
    actions = get_args_parser()._actions
    return {word.removeprefix("--") for action in actions for word in action.option_strings}


def named_options(text):
    return set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) - PLACEHOLDER


def commands_in(text):
    """Yield (what stands before the script, script, what stands behind it) of our commands."""
    for line in text.splitlines():
        for command in line.split("&&"):
            found = re.search(r"(.*(?:python3?|torchrun)\s.*?)([\w/]+\.py)\b(.*)", command)
            if found and found[2] in SCRIPTS + PREPARE:
                yield found.groups()


def assert_options_are_known(commands):
    for before, script, behind in commands:
        assert named_options(before) <= options_of_torchrun(), (before, script)
        assert named_options(behind) <= options_of(script), (script, behind)


def code_blocks(text, language=""):
    """Return the fenced code blocks of a page that are in a language, or in none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [code for name, code in blocks if name == language]


def without_code_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_each_command_has_options_of_its_own_script_alone(text):
    commands = [command for block in code_blocks(text) for command in commands_in(block)]
    assert commands
    assert_options_are_known(commands)


@pytest.mark.parametrize("path", [*SCRIPTS, *PREPARE])
def test_each_command_of_a_docstring_has_options_of_its_own_script_alone(path):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    commands = list(commands_in(docstring))
    assert commands or path in PREPARE
    assert_options_are_known(commands)


@pytest.mark.parametrize("path", CONFIGS)
def test_options_in_the_head_of_a_config_are_of_the_scripts_that_it_names(path):
    head = head_of(path)
    known = options_of("train.py") | options_of_torchrun()
    for script in SCRIPTS + PREPARE:
        if re.search(rf"(?<![\w/]){script}", head):
            known |= options_of(script)
    assert named_options(head) <= known


def sections(text):
    """Return {heading: text} of the second-level headings of a page."""
    parts = re.split(r"^## (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def scripts_of(section):
    """Return the scripts that a section names; train.py's options are known everywhere."""
    named = {script for script in SCRIPTS if re.search(rf"(?<![\w/]){script}", section)}
    if "prepare.py" in section:
        named |= set(PREPARE)
    return named | {"train.py"}


@pytest.mark.parametrize("heading", sections(README))
def test_options_in_prose_belong_to_a_script_that_the_section_names(heading):
    section = sections(README)[heading]
    known = set().union(*map(options_of, scripts_of(section)))
    for code in re.findall(r"`([^`]+)`", without_code_blocks(section)):
        if code.startswith("torchrun"):
            assert named_options(code) <= options_of_torchrun() | known, code
        else:
            assert named_options(code) <= known | SLURMS, code


def option_cells(section):
    """Return the first cells of the rows of tables whose first column is headed "option"."""
    cells = []
    for table in re.findall(r"^\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", section, re.M):
        cells += [row.split("|")[1] for row in table.splitlines()]
    return cells


@pytest.mark.parametrize(
    "page, heading, script",
    [
        (README, "Train", "train.py"),
        (OPTIONS, "What is looped, and how", "train.py"),
        (OPTIONS, "How it is trained", "train.py"),
        (OPTIONS, "Sampling", "sample.py"),
    ],
)
def test_the_tables_of_options_name_options(page, heading, script):
    cells = option_cells(sections(page)[heading])
    assert len(cells) >= 4
    known = options_of(script)
    for cell in cells:
        for name in re.findall(r"`(\w+)", cell):
            assert name in known, name


# -----------------------------------------------------------------------------
# README: links, files, the test command, the example in Python


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_links_and_images_exist(text):
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("https://", "http://")):
            assert (ROOT / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", DOCS)
def test_links_and_options_of_the_other_pages_exist(page):
    text = DOCS[page]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("https://", "http://")):
            assert (ROOT / "docs" / target.partition("#")[0]).exists(), target
    known = set().union(*map(options_of, [*SCRIPTS, *PREPARE])) | options_of_torchrun() | SLURMS
    for code in re.findall(r"`([^`]+)`", without_code_blocks(text)):
        assert named_options(code) <= known, code
    for block in code_blocks(text):
        assert_options_are_known(commands_in(block))


def test_the_readme_is_no_manual():
    lines = README.splitlines()
    assert len(lines) <= 300
    assert [line for line in lines if len(line) > 120] == []


def test_pages_show_their_images_and_no_asset_is_forgotten():
    text = "\n".join([README, *DOCS.values()])
    images = set(re.findall(r"!\[[^\]]+\]\((?:\.\./)?(assets/[^)]+)\)", text))
    pictures = {path for path in (ROOT / "assets").iterdir() if path.suffix in (".png", ".svg")}
    assert {ROOT / image for image in images} == pictures


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_modules_and_scripts_that_are_named_exist(text):
    names = set(re.findall(r"(?<![\w/.])[\w*<>/]+\.py\b", text))
    assert len(names) >= 8
    for name in names:
        pattern = re.sub(r"<\w+>", "*", name)
        places = [ROOT, ROOT / "nanorecur"] if "/" not in name else [ROOT]
        if name == "prepare.py":
            pattern = "data/*/prepare.py"
        assert any(list(place.glob(pattern)) for place in places), name


def test_the_readmes_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    lines = [line for block in code_blocks(README) for line in block.splitlines()]
    (command,) = [line for line in lines if "venv" in line and "-m pytest" in line]
    assert command in ci.splitlines()
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "test.yml").read_text()


def test_the_readmes_example_in_python_runs():
    (example,) = code_blocks(README, "python")
    idx = torch.randint(50304, (1, 4))
    scope = dict(GPT=GPT, GPTConfig=GPTConfig, idx=idx, targets=idx)
    scope["embeddings"] = torch.randn(1, 4, 768)
    exec(example, scope)
    assert scope["logits"].shape == (1, 4, 50304)
    assert scope["hidden"].shape == (1, 4, 768)
    assert [len(group) for group in scope["states"]] == [4]


# -----------------------------------------------------------------------------
# CONTRIBUTING's example


def with_the_example(folder):
    """Copy the repository to a folder and add CONTRIBUTING's injection to its model.py."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out*", "wandb", "assets", "*.bin")
    shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)
    injection, entry = code_blocks(CONTRIBUTING, "python")
    source = (folder / "model.py").read_text()
    beginning, separator, end = source.partition("class ZeroState")
    source = f"{beginning}{injection}\n\n{separator}{end}"
    (line,) = re.findall(r'^    "input_injection": \{.*\n', source, re.M)
    (folder / "model.py").write_text(source.replace(line, line + entry))


def run_in(folder, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_contributings_injection_trains_and_passes_the_tests(corpus, tmp_path):
    folder, out = tmp_path / "copy", tmp_path / "out"
    with_the_example(folder)
    options = ("--input_injection=gated", "--max_iters=5", f"--dataset={corpus}")
    run = run_in(folder, "train.py", f"--out_dir={out}", *TRAIN, *options)
    assert run.returncode == 0, run.stderr
    ckpt = checkpoint.load(out)
    assert ckpt["model_args"]["input_injection"] == "gated"
    assert ckpt["model"]["transformer.loops.0.inject.weight"].shape == (32, 32)
    assert ckpt["model"]["transformer.loops.0.inject.bias"].abs().sum() > 0  # it began at 0
    losses = re.findall(r"^iter \d: loss ([\d.]+)", run.stdout, re.M)
    assert len(losses) == 5
    assert all(0 < float(loss) < 10 for loss in losses)
    options = ("--input_injection=typo", f"--dataset={corpus}")
    run = run_in(folder, "train.py", f"--out_dir={tmp_path / 'typo'}", *TRAIN, *options)
    assert re.search(r"input_injection='typo': must be one of .*gated", run.stderr)
    tests = ("-m", "pytest", "-v", "tests/test_model.py", "tests/test_decode.py", "-k", "gated")
    run = run_in(folder, *tests)
    assert run.returncode == 0, run.stdout
    assert " 3 passed" in run.stdout  # it trains; its FLOPs; its cached decoding
