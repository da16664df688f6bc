"""
Apply config files and --key=value options to a script's knobs, left to right, later wins:

    python train.py config/quickstart.py --learning_rate=1e-3 --eval_loops=1,4,8 --compile=False

A script's knobs are the literals assigned at its top level before it calls configure(), plus the
fields of GPTConfig where the script asks for them. The comment on a knob's line is its help in -h;
a comment line alone above a knob is the heading of the knobs that follow.

Config files are Python and are executed: run only those you trust. A wrong option ends the script
with exit code 2 and one line that names the option and says what is allowed.
"""

import ast
import difflib
import io
import math
import os
import runpy
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HELP_WIDTH = 100  # columns of -h
TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    tuple: "a list such as 4,8",
}
HINTS = {  # names of other projects: our options; the first that the script has is named
    "activation_checkpointing": ("recompute",),
    "batch": ("batch_size",),
    "concatenate_initial_representation": ("input_injection=inject",),
    "context_length": ("block_size",),
    "d_model": ("n_embd",),
    "device_batch_size": ("batch_size",),
    "epochs": ("max_iters",),
    "exit_threshold": ("automatic_loop_exit_threshold",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "gradient_checkpointing": ("recompute",),
    "hidden_size": ("n_embd",),
    "inject_random": ("state_init=noise",),
    "input_file": ("input_files",),
    "lm_looped": ("n_block",),
    "lm_n_loops": ("n_loop",),
    "loops": ("eval_loops", "n_loop"),
    "lr": ("learning_rate",),
    "max_lr": ("learning_rate",),
    "mean_recurrence": ("n_loop",),
    "micro_batch_size": ("batch_size",),
    "n_layers": ("n_layer",),
    "n_loops": ("n_loop",),
    "n_recurrence": ("n_loop",),
    "num_heads": ("n_head",),
    "num_layers": ("n_layer",),
    "prompt": ("start",),
    "seq_len": ("block_size",),
    "sequence_length": ("block_size",),
    "wd": ("weight_decay",),
}
BOOLS = {"true": True, "1": True, "false": False, "0": False}


@dataclass
class Knob:
    """An option of a script, as its source declares it."""

    name: str
    value: object  # the default; its type is the option's type
    help: str  # the comment on its line
    group: str = ""  # the heading above it


def configure(
    scope: dict,
    *sources: tuple[str | Path, str],
    argv: list[str] | None = None,
    positional: str = "",
) -> tuple[dict, set]:
    """Apply the command line to the knobs of a script and return (config, given).

    scope: the script's globals(), in which its own knobs are set.
    sources: (path, class name or "") of further files with knobs, either the fields of a dataclass
        or the knobs of another script; a relative path starts at the script's folder.
    positional: name of the knob whose value the first bare argument is, one that is neither *.py
        nor begins with a dash; "": there is none.
    config: the final value of every knob. given: the names that were set.
    Exits with code 0 on -h and with code 2 on a wrong option.
    """
    argv = sys.argv[1:] if argv is None else argv
    script = Path(scope["__file__"])
    own = read_knobs(script)
    sections = {"options, with their defaults": own}
    knobs = {}
    for path, class_name in sources:
        fields = read_knobs(script.parent / path, class_name)
        knobs |= fields
        file = Path(path).name
        heading = f"fields of {class_name} ({file})" if class_name else f"options of {file}"
        sections[heading] = fields
    knobs |= own
    if "-h" in argv or "--help" in argv:
        print_help(scope["__doc__"] or "", sections)
        sys.exit(0)
    given = {}
    with clear_errors():
        for argument in argv:
            bare = not argument.startswith("-") and not argument.endswith(".py")
            if bare and positional and positional not in given:
                argument = f"--{positional}={argument}"
            given |= read_argument(argument, knobs)
    config = {name: knob.value for name, knob in knobs.items()} | given
    for name in own:
        scope[name] = config[name]
    return config, set(given)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Report a ValueError or OSError raised inside in one line on stderr and exit with code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = " ".join(str(error).splitlines())
        if len(line) >= 800:
            line = line[:800] + "..."
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {line}\n")
        sys.exit(2)


# -----------------------------------------------------------------------------
# validating


def require(name: str, value: object, ok: bool, allowed: str) -> None:
    """Raise ValueError that names the option, its value and what is allowed, unless ok."""
    if not ok:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_ranges(values: dict, limits: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError where a value is outside its limits, a pair (least, most), or is not finite.

    values: option names to numbers, such as a script's globals(). most may be math.inf.
    """
    for name, (least, most) in limits.items():
        allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        value = values[name]
        require(name, value, abs(value) < math.inf, "a finite number")
        require(name, value, least <= value <= most, allowed)


# -----------------------------------------------------------------------------
# reading knobs


def read_knobs(path: str | Path, class_name: str = "") -> dict[str, Knob]:
    """Return the knobs of a script, or of a dataclass in it, in order, without executing it."""
    text = Path(path).read_text(encoding="utf-8")
    nodes = knob_nodes(ast.parse(text).body, class_name)
    beside_code, alone = read_comments(text, nodes[-1].end_lineno if nodes else 0)
    knobs, group = {}, ""
    for node in nodes:
        name = node.targets[0].id if isinstance(node, ast.Assign) else node.target.id
        lines = range(node.lineno, node.end_lineno + 1)  # several, where the value is in brackets
        comment = " ".join(beside_code[line] for line in lines if line in beside_code)
        group = heading_above(node.lineno, alone) or group
        knobs[name] = Knob(name, ast.literal_eval(node.value), comment, group)
    return knobs


def knob_nodes(body: list[ast.stmt], class_name: str) -> list[ast.Assign | ast.AnnAssign]:
    """Return the assignments to one name, up to the first statement that mentions configure."""
    if class_name:
        classes = [node for node in body if isinstance(node, ast.ClassDef)]
        body = next(node.body for node in classes if node.name == class_name)
    nodes = []
    for node in body:
        if any(isinstance(n, ast.Name) and n.id == "configure" for n in ast.walk(node)):
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            nodes.append(node)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            nodes.append(node)
    return nodes


def read_comments(text: str, last_line: int) -> tuple[dict[int, str], dict[int, str]]:
    """Return the comments up to a line, by line number: those beside code, those alone."""
    head = "\n".join(text.split("\n")[:last_line])
    beside_code, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(head).readline):
        if token.type == tokenize.COMMENT:
            comments = alone if token.line.strip() == token.string else beside_code
            comments[token.start[0]] = token.string.lstrip("# ")
    return beside_code, alone


def heading_above(line: int, comments: dict[int, str]) -> str:
    """Return the comment lines directly above a line, joined, without rulers of dashes."""
    parts = []
    while line - 1 in comments:
        line -= 1
        if comments[line].strip("-"):
            parts.insert(0, comments[line])
    return " ".join(parts)


# -----------------------------------------------------------------------------
# reading arguments and config files


def read_argument(argument: str, knobs: dict[str, Knob]) -> dict:
    """Return {name: value} of one command-line argument.

    It is a config file, --name=value, or --name for True.
    """
    if not argument.startswith("--"):
        return read_config_file(argument, knobs)
    name, equals, text = argument[2:].partition("=")
    knob = find_knob(name, knobs)
    if equals:
        return {name: parse(text, knob)}
    if isinstance(knob.value, bool):
        return {name: True}
    raise ValueError(f"--{name} needs a value: --{name}={show(knob.value)}")


def read_config_file(path: str, knobs: dict[str, Knob]) -> dict:
    """Execute a config file and return {name: value}, without modules and names that begin with _.

    Raises ValueError that names the file where it cannot be executed or sets what is no option.
    """
    if not path.endswith(".py"):
        raise ValueError(f"{clip(path)!r}: expected a config file (.py) or --name=value")
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    values = {}
    for name, value in names.items():
        if not name.startswith("_") and not isinstance(value, type(sys)):
            knob = find_knob(name, knobs, f"{path}: ")
            values[name] = convert(value, knob, f"{path}: ")
    return values


def find_knob(name: str, knobs: dict[str, Knob], prefix: str = "") -> Knob:
    """Return the knob of that name, or raise ValueError with our name for it, or the closest one.

    prefix: the beginning of the message.
    """
    if name in knobs:
        return knobs[name]
    for option in HINTS.get(name, ()):
        if option.partition("=")[0] in knobs:
            raise ValueError(f"{prefix}unknown option {name!r}: here --{option}")
    close = difflib.get_close_matches(name[:100], knobs, 1)
    hint = f", did you mean {close[0]!r}?" if close else "; -h lists them all"
    raise ValueError(f"{prefix}unknown option {clip(name)!r}{hint}")


def parse(text: str, knob: Knob) -> object:
    """Return the text of an option as a value of the knob's type, or raise ValueError.

    1e3 is an int if whole; 4,8 and [[0,1],[3]] are tuples.
    """
    kind = type(knob.value)
    if kind is str:
        return text
    if kind is bool:
        return convert(BOOLS.get(text.lower(), text), knob)
    if len(text) > 10000:  # literal_eval could take all memory
        return convert(text, knob)
    try:
        value = parse_list(text) if kind is tuple else parse_number(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text  # convert refuses it
    return convert(value, knob)


def parse_list(text: str) -> object:
    return ast.literal_eval(text if text.startswith(("[", "(")) else f"[{text}]")


def parse_number(text: str) -> int | float:
    if text.strip("+-").isdecimal() and len(text) <= 20:
        return int(text)
    return float(text)


def convert(value: object, knob: Knob, prefix: str = "") -> object:
    """Return value as the knob's type, or raise ValueError.

    prefix: the beginning of the message.
    """
    kind = type(knob.value)
    if kind is tuple:
        fits = isinstance(value, (tuple, list)) and all(is_number(leaf) for leaf in leaves(value))
    elif kind in (int, float):
        fits = is_number(value) and kind(value) == value
    else:
        fits = isinstance(value, kind)
    if not fits:
        allowed = TYPE_WORDS[kind]
        if kind in (int, float) and isinstance(value, (int, float)) and abs(value) >= 2**64:
            allowed += " below 2**64"
        raise ValueError(f"{prefix}{knob.name}={clip(value)!r}: must be {allowed}")
    return freeze(value) if kind is tuple else kind(value)


def is_number(value: object) -> bool:
    """Return True for an int or a finite float below 2**64; a bool is not a number here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**64


def leaves(value: object) -> list:
    """Return the values in nested lists, as one flat list."""
    if not isinstance(value, (tuple, list)):
        return [value]
    return [leaf for part in value for leaf in leaves(part)]


def freeze(value: object) -> object:
    """Return nested lists as nested tuples, anything else as it is."""
    return tuple(map(freeze, value)) if isinstance(value, (tuple, list)) else value


# -----------------------------------------------------------------------------
# showing


def clip(value: object) -> object:
    """Return a value short enough for an error line."""
    return value if len(str(value)) <= 60 else str(value)[:57] + "..."


def show(value: object) -> str:
    """Return a value as it is written on the command line; a newline as backslash n."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.replace("\n", "\\n")


def print_help(doc: str, sections: dict[str, dict[str, Knob]]) -> None:
    """Print a script's docstring and its options; sections: a heading to the knobs under it."""
    try:
        print(format_help(doc, sections), flush=True)
    except BrokenPipeError:  # of `-h | head`; a closed stdout would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def format_help(doc: str, sections: dict[str, dict[str, Knob]]) -> str:
    """Return the text of -h; an option that two sections have is listed in the first."""
    options = [option_text(knob) for knobs in sections.values() for knob in knobs.values()]
    column = min(42, 2 + max(map(len, options), default=0))
    lines, listed = [doc.strip()], set()
    for heading, knobs in sections.items():
        lines += ["", f"{heading}:"]
        group = ""
        for name, knob in knobs.items():
            if name in listed:
                continue
            listed.add(name)
            if knob.group != group:
                group = knob.group
                lines += ["", *textwrap.wrap(group, HELP_WIDTH, initial_indent="  ")]
            lines += format_knob(knob, column)
    return "\n".join(lines)


def option_text(knob: Knob) -> str:
    return f"    --{knob.name}={show(knob.value)}"


def format_knob(knob: Knob, column: int) -> list[str]:
    """Return the lines of one option, its help wrapped from a column on."""
    option, indent = option_text(knob), " " * column
    lines = textwrap.wrap(
        knob.help,
        HELP_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    if lines and len(option) + 2 <= column:
        lines[0] = option.ljust(column) + lines[0][column:]
        return lines
    return [option, *lines]
