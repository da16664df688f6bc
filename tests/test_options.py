"""Legal values of train.py's options, without starting a run."""

import math

import pytest
from conftest import ROOT

from configurator import read_knobs
from model import GPTConfig
from nanorecur.options import (
    CHOICES,
    RANGES,
    check_effects,
    check_options,
    objective_of,
    pad_vocab,
    plain_gpt_hints,
    schedule_warnings,
)
from nanorecur.parallel import Processes

KNOBS = {**read_knobs(ROOT / "model.py", "GPTConfig"), **read_knobs(ROOT / "train.py")}
DEFAULTS = {name: knob.value for name, knob in KNOBS.items()}


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
def test_a_choice_is_one_of_its_names(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # for backend=nccl
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
    dict(world_size=8, shard=True),
]


@pytest.mark.parametrize("options", FITTING, ids=str)
def test_options_that_go_together_are_taken(options):
    check(**options)


SCHEDULES = [  # changes of a schedule of 900 steps with 50 of warm-up -> the warning, if any
    (dict(), None),
    (dict(max_iters=40), "the run ends in its warm-up: max_iters=40, warmup_iters=50"),
    (dict(max_iters=40, decay_lr=False), None),
    (
        dict(lr_decay_iters=800, min_lr=0.0),
        "the rate is 0 from step 800 of 900: lr_decay_iters=800",
    ),
    (dict(lr_decay_iters=800, min_lr=0.1), None),
    (dict(lr_decay_iters=800, min_lr=0.0, lr_schedule="constant"), None),
    (dict(lr_decay_iters=40), "the rate falls to min_lr at once after step 50: lr_decay_iters=40"),
    (dict(lr_schedule="wsd"), None),
    (
        dict(lr_schedule="wsd", hold_iters=900),
        "the rate never falls: hold_iters=900, max_iters=900",
    ),
    (dict(lr_decay_iters=2000), None),
]


@pytest.mark.parametrize("options, warning", SCHEDULES, ids=str)
def test_a_schedule_that_makes_no_sense_is_warned_of(options, warning):
    config = {**DEFAULTS, "max_iters": 900, "warmup_iters": 50, **options}
    assert schedule_warnings(config) == ([warning] if warning else [])


WITHOUT = [
    ("bptt_k", 2, {}),
    ("loop_sampling", "poisson", {}),
    ("eval_loops", (1, 4), {}),
    ("loops_per_row", True, {}),
    ("loop_start", 0.5, {}),
    ("automatic_loop_exit", True, {}),
    ("spectral_clip_beta", 1.0, {}),
    ("spectral_clip_interval", 5, {}),
    ("exit_rule", "kl", {}),
    ("muon_learning_rate", 0.01, {}),
    ("muon_row_norm", True, {}),
    ("hold_iters", 10, {}),
    ("entropy_weight", 0.2, dict(objective="deep")),
    ("loss_weighting", "linear", {}),
    ("ahead_weight", 0.1, {}),
    ("max_shift", 3, {}),
    ("input_files", "a.txt", {}),
    ("wandb_project", "p", {}),
    ("layers", (1, 2), {}),
]


@pytest.mark.parametrize("name, value, more", WITHOUT, ids=str)
def test_an_option_without_effect_is_refused_if_typed_and_named_if_in_a_file(name, value, more):
    config = {**DEFAULTS, **more, name: value}
    with pytest.raises(ValueError, match=f"{name}=.*: has no effect, "):
        check_effects(config, {name}, [f"--{name}={value}"], looped=False)
    (warning,) = check_effects(config, {name}, ["config/x.py"], looped=False)
    assert warning.startswith(f"without effect: {name} (")
    assert check_effects(DEFAULTS, {name}, [f"--{name}"], looped=False) == []


@pytest.mark.parametrize("name, value", [("loop_start", 0.5), ("loop_warmup_iters", 5)])
def test_options_of_loops_are_refused_where_the_level_of_a_row_says_them(name, value):
    config = {**DEFAULTS, name: value}
    assert check_effects(config, {name}, [f"--{name}={value}"], looped=True) == []
    with pytest.raises(ValueError, match=f"{name}=.*: has no effect, loops_of_level says"):
        by_level = {**config, "loops_of_level": (1, 0)}
        check_effects(by_level, {name}, [f"--{name}={value}"], looped=True)


def test_more_processes_than_gpus_and_nccl_without_one_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_named("backend", "nccl")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    processes = Processes()
    processes.world_size, processes.distributed = 8, True
    for processes.local_rank in (0, 1):
        check_options(DEFAULTS, processes)
    processes.local_rank = 2
    with pytest.raises(ValueError, match="nproc_per_node=3: must be at most 2"):
        check_options(DEFAULTS, processes)
    check_options({**DEFAULTS, "device": "cpu"}, processes)


def test_the_baseline_of_a_looped_config_is_silent_on_loops():
    config = {**DEFAULTS, "use_model_baseline": True, "bptt_k": 2, "eval_loops": (1, 4)}
    assert check_effects(config, {"bptt_k", "eval_loops"}, ["--bptt_k=2"], looped=False) == []


def test_the_baseline_trains_the_next_token_whatever_the_objective():
    for objective in ("deep", "distill", "exit", "confidence"):
        config = {"objective": objective, "use_model_baseline": True}
        assert objective_of(config) == "next"
        assert objective_of({**config, "use_model_baseline": False}) == objective


HINTED = [
    (dict(n_block=4), True),
    (dict(n_block=4, n_loop=2), False),
    (dict(n_block=4, loop_sampling="poisson"), False),
    (dict(n_block=4, input_injection="passthrough", loop_norm="none"), False),
    (dict(n_block=4, use_model_baseline=True), False),
    (dict(n_layer=4), False),
]


@pytest.mark.parametrize("options, hinted", HINTED, ids=str)
def test_a_core_of_one_loop_is_said_to_be_no_plain_gpt(options, hinted):
    hints = plain_gpt_hints(GPTConfig(**options))
    assert [("--n_layer=4 or --use_model_baseline" in hint) for hint in hints] == [True] * hinted


def test_large_vocabularies_are_padded_to_a_multiple_of_64():
    assert [pad_vocab(n) for n in (65, 1023, 1024, 1025, 50257)] == [65, 1023, 1024, 1088, 50304]
