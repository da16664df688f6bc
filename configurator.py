"""
Config files and --key=value onto a script's knobs, left to right, later wins:

    python train.py config/quickstart.py --learning_rate=1e-3 --eval_loops=1,4,8 --compile=False

A script's knobs are the literals assigned at its top level before it calls configure(), plus the fields of GPTConfig.
Config files are Python and are executed: run only those you trust. A wrong option ends the script with exit code 2 and
one line that names it and what would be right.
"""

import ast
import difflib
import io
import runpy
import sys
import tokenize
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Knob:
    name: str
    value: object  # its type is the knob's type
    help: str


def configure(scope, *sources, argv=None):
    """Apply the command line to the knobs of a script.

    scope: the script's globals(); its own knobs are set there. sources: further files whose knobs count too, as
    (path, class name or ""), for a dataclass's fields or a script's knobs.
    Returns (config, given): every knob's final value, and the names that were set. Exits with 0 on -h, 2 on an error.
    """
    own = read_knobs(scope["__file__"])
    knobs = {**{k: v for path, name in sources for k, v in read_knobs(path, name).items()}, **own}
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(usage(scope, knobs))
        sys.exit(0)
    with clear_errors():
        given = {}
        for argument in argv:
            given.update(read_argument(argument, knobs))
    config = {**{name: knob.value for name, knob in knobs.items()}, **given}
    scope.update({name: config[name] for name in own})
    return config, set(given)


@contextmanager
def clear_errors():
    """Turns a ValueError or OSError inside into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = " ".join(str(error).splitlines())
        sys.stderr.write(
            f"{Path(sys.argv[0]).name}: {line if len(line) < 800 else line[:800] + '...'}\n"
        )
        sys.exit(2)


def check_ranges(scope, limits):
    """ValueError where a knob of a script (scope: its globals()) is outside its range in limits."""
    for name, values in limits.items():
        if scope[name] not in values:
            raise ValueError(
                f"{name}={scope[name]}: must be from {values.start} to {values.stop - 1}"
            )


def read_knobs(path, class_name=""):
    """The knobs of a script, or of a dataclass in it, in order, read from the source without executing it."""
    text = Path(path).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    body = ast.parse(text).body
    if class_name:
        body = next(
            node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name
        )
    knobs = {}
    for node in body:
        if any(isinstance(n, ast.Name) and n.id == "configure" for n in ast.walk(node)):
            break
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name):
            knobs[target.id] = Knob(
                target.id, ast.literal_eval(node.value), comments.get(node.end_lineno, "")
            )
    return knobs


def read_argument(argument, knobs):
    """One command-line argument to {name: value}: a config file, --name=value, or --name for True."""
    if not argument.startswith("--"):
        return read_config_file(argument, knobs)
    name, equals, text = argument[2:].partition("=")
    knob = find(name, knobs, "")
    if not equals and not isinstance(knob.value, bool):
        raise ValueError(f"--{name} needs a value: --{name}={show(knob.value)}")
    return {name: parse(text, knob) if equals else True}


def read_config_file(path, knobs):
    if not path.endswith(".py"):
        raise ValueError(f"{clip(path)!r}: expected a config file (.py) or --name=value")
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    names = {
        k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, type(sys))
    }
    return {
        name: convert(value, find(name, knobs, f"{path}: "), f"{path}: ")
        for name, value in names.items()
    }


def find(name, knobs, where):
    if name not in knobs:
        close = difflib.get_close_matches(name[:100], knobs, 1)
        hint = f", did you mean {close[0]!r}?" if close else "; -h lists them all"
        raise ValueError(f"{where}unknown option {clip(name)!r}{hint}")
    return knobs[name]


def parse(text, knob):
    """The text of an option as a value of the knob's type: 1e3 is an int if whole, 4,8 and [[0,1],[3]] are tuples."""
    kind = type(knob.value)
    if kind is str:
        return text
    if kind is bool:
        return convert(
            {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text), knob
        )
    try:
        if len(text) > 10000:  # to parse it could take all memory
            value = text
        elif kind is tuple:
            value = ast.literal_eval(text if text[:1] in ("[", "(") else f"[{text}]")
        else:
            value = int(text) if text.strip("+-").isdecimal() and len(text) <= 20 else float(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return convert(value, knob)


def convert(value, knob, where=""):
    """value as the knob's type, or ValueError."""
    kind = type(knob.value)
    if kind is tuple and isinstance(value, (tuple, list)) and all(map(is_number, flat(value))):
        return freeze(value)
    if kind in (int, float) and is_number(value) and kind(value) == value:
        return kind(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    kinds = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "text",
        tuple: "a list such as 4,8",
    }
    raise ValueError(f"{where}{knob.name}={clip(value)!r}: must be {kinds[kind]}")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**64


def flat(value):
    """The leaves of nested lists."""
    return (
        [leaf for part in value for leaf in flat(part)]
        if isinstance(value, (tuple, list))
        else [value]
    )


def freeze(value):
    return tuple(map(freeze, value)) if isinstance(value, (tuple, list)) else value


def clip(value):
    """A value short enough for an error line."""
    return value if len(str(value)) <= 60 else str(value)[:57] + "..."


def show(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def usage(scope, knobs):
    lines = [(scope["__doc__"] or "").strip(), "", "options, with their defaults:"]
    for knob in knobs.values():
        lines.append(f"  {'--' + knob.name + '=' + show(knob.value):<38} {knob.help}".rstrip())
    return "\n".join(lines)
