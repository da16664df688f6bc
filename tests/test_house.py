"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import builtins
import re
import sys

import pytest
from conftest import ROOT

from configurator import read_knobs
from model import TABLES

SCRIPTS = {"train", "sample", "eval", "bench", "analyze", "runs"}
LIBRARIES = {"model", "configurator", "decode", "pretrained"}
SHARED = {path.stem for path in (ROOT / "nanorecur").glob("*.py")} - {"__init__"}
SOURCES = sorted(
    path
    for pattern in ("*.py", "nanorecur/*.py", "config/*.py", "data/*/*.py", "tests/*.py")
    for path in ROOT.glob(pattern)
)
PRODUCT = [path for path in SOURCES if path.parent.name != "tests"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_line_is_wider_than_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


def test_at_the_root_stands_what_a_person_runs_or_imports():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS | LIBRARIES
    folders = {path.name for path in (ROOT / "nanorecur").iterdir() if path.is_dir()}
    assert folders <= {"__pycache__"}


def imported_by(path):
    """Return the names of our own modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            if node.module == "nanorecur":
                names |= {f"nanorecur.{alias.name}" for alias in node.names}
    return names


def test_imports_go_down_only():
    assert {name.split(".")[0] for name in imported_by(ROOT / "model.py")} <= {
        "torch",
        *sys.stdlib_module_names,
    }
    for path in PRODUCT:
        imported = imported_by(path)
        assert not imported & SCRIPTS, path
        if path.parent.name == "nanorecur":
            assert not imported & {"decode", "pretrained"} or path.stem == "estimate", path


def test_no_circle_of_imports():
    """Depth first over the shared modules and libraries."""
    files = {f"nanorecur.{name}": ROOT / "nanorecur" / f"{name}.py" for name in SHARED}
    files |= {name: ROOT / f"{name}.py" for name in LIBRARIES | SCRIPTS}
    arrows = {name: imported_by(path) & set(files) for name, path in files.items()}

    def visit(name, above):
        assert name not in above, [*above, name]
        for other in arrows[name]:
            visit(other, [*above, name])

    for name in files:
        visit(name, [])


# -----------------------------------------------------------------------------
# scripts read from top to bottom


def assigned_lines(tree):
    """Return {name: first line} of the names that a script assigns at its top level."""
    lines = {}
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            lines.setdefault(statement.name, 0)  # functions may call each other in any order
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                lines.setdefault(node.id, node.lineno)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    name = (alias.asname or alias.name).split(".")[0]
                    lines.setdefault(name, node.lineno)
    return lines


def read_too_early(tree):
    """Return (function, name) for globals that a function reads and that are assigned below it."""
    lines, found = assigned_lines(tree), set()
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        local = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        local |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        for node in names:
            known = node.id in local or hasattr(builtins, node.id)
            if not known and lines.get(node.id, 0) > function.lineno:
                found.add((function.name, node.id))
    return found


def test_train_reads_no_global_above_its_assignment():
    assert read_too_early(tree_of(ROOT / "train.py")) == set()
    wrong = ast.parse("def f():\n    return x\n\n\nx = 1\n")
    assert read_too_early(wrong) == {("f", "x")}


def test_train_is_a_flat_script():
    source = (ROOT / "train.py").read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert len(functions) <= 12 and len(source.splitlines()) <= 450


def test_model_is_read_in_one_sitting():
    source = (ROOT / "model.py").read_text()
    lines = source.splitlines()
    start = {
        node.name: node.lineno for node in ast.parse(source).body if isinstance(node, ast.ClassDef)
    }
    catalogue = next(i for i, line in enumerate(lines, 1) if line.startswith("# ===="))
    assert start["Loop"] < 320 and start["GPT"] < 450 and catalogue <= 550
    lambdas = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Lambda)]
    assert len(lambdas) <= 8


def test_the_help_of_a_field_names_every_legal_value():
    knobs = read_knobs(ROOT / "model.py", "GPTConfig")
    for field, table in TABLES.items():
        words = re.split(r"[^a-z0-9_]+", knobs[field].help)
        assert set(table) <= set(words), field


def test_no_forward_asks_the_config():
    for node in ast.walk(tree_of(ROOT / "model.py")):
        if isinstance(node, ast.FunctionDef) and node.name in ("forward", "step", "states"):
            branches = [n for n in ast.walk(node) if isinstance(n, (ast.If, ast.IfExp))]
            for branch in branches:
                assert "config" not in ast.unparse(branch.test), ast.unparse(branch.test)


# -----------------------------------------------------------------------------
# words

NO_BEGINNING = "Of What Whether Where Which That Those As In From".split()


def documented(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text:
                yield node, text


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_a_docstring_begins_with_a_verb_or_names_a_thing(path):
    for node, text in documented(path):
        first = text.split()[0].strip(",.:")
        if node.name == "__init__" and ":" in text.split()[0]:
            continue  # a list of arguments
        assert first not in NO_BEGINNING and not text.startswith("The other"), (node.name, text)
        assert first[0].isupper() or not first[0].isalpha(), (node.name, text)
        is_property = any("property" in ast.unparse(d) for d in getattr(node, "decorator_list", []))
        if isinstance(node, ast.FunctionDef) and not is_property:
            assert not re.fullmatch(r"[A-Z][a-z]+(s|ing|ed)", first) or first in VERBS, (
                f"{node.name} in {name_of(path)}: begin with a verb in the imperative, not {first}"
            )


VERBS = {"Pass", "Process", "Discuss", "Feed", "Need", "Embed", "Compress", "Press", "Bring"}


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_no_pronoun_is_an_identifier(path):
    pronouns = {"each", "rest", "same", "whole", "some", "way", "ways", "most_of", "given_one"}
    names = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree_of(path)) if isinstance(node, ast.arg)}
    assert not names & pronouns


def test_public_functions_have_type_hints():
    """Of model.py, decode.py, pretrained.py and the shared modules."""
    bare = []
    for path in [ROOT / f"{name}.py" for name in LIBRARIES] + sorted(
        (ROOT / "nanorecur").glob("*.py")
    ):
        tree = tree_of(path)
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for owner in owners:
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                arguments = [*node.args.args, *node.args.kwonlyargs]
                hinted = node.returns is not None or any(a.annotation for a in arguments)
                if not hinted and [a for a in arguments if a.arg not in ("self", "cls")]:
                    bare.append(f"{name_of(path)}:{node.name}")
    assert bare == []


def test_the_file_maps_name_every_module_once():
    """Of the root in README, of what the scripts share in CONTRIBUTING."""
    for page, names in (("README.md", SCRIPTS | LIBRARIES), ("CONTRIBUTING.md", SHARED)):
        text = (ROOT / page).read_text()
        section = text.split("## Where things are")[1].split("\n## ")[0]
        for name in names:
            assert len(re.findall(rf"^{name}\.py ", section, re.M)) == 1, name
