"""Legal values of train.py's options, without starting a run."""

import math

import pytest
from conftest import ROOT

from configurator import read_knobs
from nanorecur.options import CHOICES, RANGES, check_options, pad_vocab
from nanorecur.parallel import Processes

DEFAULTS = {name: knob.value for name, knob in read_knobs(ROOT / "train.py").items()}


def check(world_size=1, **options):
    """Check train.py's defaults with some options changed, in so many processes."""
    processes = Processes()
    processes.world_size = world_size
    check_options({**DEFAULTS, **options}, processes)


def assert_named(name, value, **more):
    """Check that the error names the option, its value and what is allowed."""
    with pytest.raises(ValueError) as error:
        check(**more, **{name: value})
    assert str(error.value).startswith(f"{name}={value!r}: must be ")


def test_the_defaults_are_legal():
    check()


@pytest.mark.parametrize("name", RANGES)
def test_a_number_below_its_range_is_refused_and_its_least_value_taken(name):
    least, _ = RANGES[name]
    check(**{name: least})
    assert_named(name, least - 1)
    assert_named(name, -1)
    assert_named(name, math.nan)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_its_names(name):
    for value in CHOICES[name]:
        check(**{name: value})
    assert_named(name, "typo")


WRONG = [
    ("learning_rate", 0.0, {}),
    ("learning_rate", math.inf, {}),
    ("muon_learning_rate", -1.0, {}),
    ("ema_decay", 1.0, {}),
    ("eval_loops", (0,), {}),
    ("eval_loops", (1.5,), {}),
    ("loops_per_row", True, dict(objective="deep")),
    ("lr_decay_iters", 2000, {}),  # warmup_iters
    ("hold_iters", 1999, dict(lr_schedule="wsd")),
    ("hold_iters", 600000, dict(lr_schedule="wsd")),
    ("gradient_accumulation_steps", 9, dict(world_size=2)),
    ("shard", True, {}),
    ("spectral_clip_beta", 1.0, dict(world_size=2, shard=True)),
    ("loops_per_row", True, dict(world_size=2, shard=True)),
]


@pytest.mark.parametrize("name, value, more", WRONG, ids=str)
def test_options_that_do_not_go_together_are_refused(name, value, more):
    assert_named(name, value, **more)


FITTING = [
    dict(loops_per_row=True),
    dict(lr_decay_iters=1, decay_lr=False),
    dict(lr_schedule="wsd", hold_iters=2000),
    dict(world_size=8, shard=True),
]


@pytest.mark.parametrize("options", FITTING, ids=str)
def test_options_that_go_together_are_taken(options):
    check(**options)


def test_large_vocabularies_are_padded_to_a_multiple_of_64():
    assert [pad_vocab(n) for n in (65, 1023, 1024, 1025, 50257)] == [65, 1023, 1024, 1088, 50304]
