"""Compiled stages: the numbers of eager ones, and no new graph for another number of loops."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, build, tokens
from torch.testing import assert_close

from nanorecur.compilation import compile_parts
from nanorecur.exit_rules import exit_evaluation, make_exit
from nanorecur.objectives import Objective

COUNTERS = torch._dynamo.utils.counters
TWO_GROUPS = dict(n_prelude=0, n_block=0, n_coda=0, n_layer=4, loop_groups=[[0, 1], [3]])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


def compiled_beside_eager(name="next", backend="eager", by_block=False, **options):
    """Return two objectives of one set of weights, of which the first is compiled."""
    ours, theirs = (Objective(build(**options).train(), name) for _ in range(2))
    compile_parts(ours, by_block=by_block, backend=backend)
    return ours, theirs


def train_both(ours, theirs, idx, n_loop):
    """Make a forward and a backward pass of both; compare losses and gradients."""
    losses = []
    for objective in (ours, theirs):
        objective.zero_grad()
        loss, _ = objective(idx, idx, n_loop)
        loss.backward()
        losses.append(loss)
    assert_close(*losses)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def graphs():
    return COUNTERS["stats"]["unique_graphs"]


LOADS = """
import sys, decode, pretrained, nanorecur.evaluation, nanorecur.findings, nanorecur.training_step
pretrained.model_without_weights(pretrained.GPTConfig(n_block=1, input_injection="diagonal"))
sys.exit("torch._dynamo" in sys.modules)
"""


def test_neither_imports_nor_a_model_without_weights_load_the_compiler():
    """It takes nearly as long to load as the rest of torch."""
    assert subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT).returncode == 0


DIAGONAL = dict(input_injection="diagonal", state_init="zero")
MLA = dict(position="rope", attention="mla")
KINDS = [
    dict(bptt_k=2),
    dict(loop_embedding="learned"),
    dict(loop_embedding="sinusoidal", bptt_k=1),
    DIAGONAL,
    MLA,
    dict(document_separator=1),
    dict(attention_window=3),
    dict(**TWO_GROUPS),
    dict(n_block=0, n_prelude=0, n_coda=0, n_loop=1, n_layer=3),
]
GENERATED = [  # code as well as graphs, which takes a CPU half a minute each
    dict(**DIAGONAL, loop_embedding="sinusoidal", bptt_k=2),
    dict(**MLA, document_separator=1),
]
SLOW = [pytest.param(kind, "inductor", marks=pytest.mark.slow) for kind in GENERATED]


@pytest.mark.parametrize("options, backend", [*((kind, "eager") for kind in KINDS), *SLOW], ids=str)
def test_compiled_stages_compute_the_same_and_no_loop_count_recompiles(options, backend):
    ours, theirs = compiled_beside_eager(backend=backend, **options)
    idx, counts = tokens(2, 16), [3, 1, 4, 2, 6, 7, 5, 1]
    if not ours.model.config.groups:
        counts = [None] * 2
    train_both(ours, theirs, idx, counts[0])
    for n in counts[1:3]:  # one loop alone, and more loops than carry a gradient
        train_both(ours, theirs, idx, n)
    before = graphs()
    assert before > 0
    for n in counts[3:]:
        train_both(ours, theirs, idx, n)
    assert graphs() == before


@pytest.mark.slow
def test_evaluations_and_rows_of_their_own_depth_end_with_a_bounded_number_of_graphs():
    ours, theirs = compiled_beside_eager(bptt_k=2)
    idx, seen = tokens(4, 16), []
    for n in (3, 1, 5, 8):
        train_both(ours, theirs, idx, n)
        with torch.no_grad():
            assert_close(ours.model(idx, idx, n)[1], theirs.model(idx, idx, n)[1])
        train_both(ours, theirs, idx, (torch.tensor([n, 1, 2, n]),))
        seen.append(graphs())
    for rows in ([2, 7, 4, 4], [1, 1, 1, 6], [5, 6, 7, 8]):
        train_both(ours, theirs, idx, (torch.tensor(rows),))
        seen.append(graphs())
    assert seen[-1] == seen[-2] == seen[-3] <= 12, seen


def test_the_names_of_parameters_stay():
    ours, theirs = compiled_beside_eager()
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_blocks_alone_are_compiled_where_something_happens_between_them():
    ours, theirs = compiled_beside_eager(by_block=True)
    assert all(block._compiled_call_impl for block in ours.model.transformer.h)
    train_both(ours, theirs, tokens(2, 16), 3)
    before = graphs()
    train_both(ours, theirs, tokens(2, 16), 6)
    assert graphs() == before > 0


@pytest.mark.parametrize("n_block", [1, 4])
def test_an_evaluation_with_exit_leaves_training_compiled(n_block):
    """Its cache is an object that changes: each of its calls would be one more graph."""
    ours, theirs = compiled_beside_eager(n_block=n_block, n_loop=3)
    idx = tokens(2, 16)
    rule = make_exit(ours.model, "state", 0.1)
    for _ in range(3):
        exit_evaluation(ours.model, idx, idx, rule)
    assert graphs() == 0
    train_both(ours, theirs, idx, 3)
    before = graphs()
    exit_evaluation(ours.model, idx, idx, rule)
    train_both(ours, theirs, idx, 2)
    assert graphs() == before > 0
