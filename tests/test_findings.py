"""Findings say what their arrays say, whichever way it turned out."""

import math
import re

import numpy as np
import pytest
from conftest import build, tokens

from model import GPTConfig
from nanorecur import findings, measure


def sweep_of(losses, configured=(4,), configured_loss=None, loops=None):
    """Return a sweep with these losses at 1, 2, 4, 8, ... loops."""
    loops = np.array(loops or [2**i for i in range(len(losses))])
    losses = np.array(losses, dtype=float)
    if configured_loss is None:
        configured_loss = dict(zip(loops, losses)).get(max(configured, default=0))
    own = {"configured": np.array(configured), "configured_loss": configured_loss}
    return {"loops": loops, "loss": losses, **own}


DEPTHS = [  # losses at 1, 2, 4, 8, 16 loops, 4 of them configured
    (
        [1.56, 1.4, 1.34, 1.3405, 1.341],
        "More loops help: validation loss is 1.560 at one loop and 1.340 at 4, "
        "and it stays within 0.1 % of that up to 16.",
    ),
    (
        [1.56, 1.4, 1.34, 1.345, 1.34],
        "More loops help: validation loss is 1.560 at one loop and 1.340 at 4, "
        "and it stays within 0.4 % of that up to 16.",
    ),
    (
        [1.56, 1.4, 1.34, 1.5, 2.1],
        "More loops help: validation loss is 1.560 at one loop and 1.340 at 4, "
        "but it is 2.100 at 16.",
    ),
    (
        [1.56, 1.4, 1.34, 1.2, 1.3],
        "More loops help: validation loss is 1.560 at one loop and 1.340 at 4, "
        "and it falls on, to 1.200 at 8.",
    ),
    (
        [1.34, 1.34, 1.339, 1.339, 1.339],
        "More loops do not help: validation loss is 1.340 at one loop and 1.339 at 4, "
        "and it stays within 0.1 % of that up to 16.",
    ),
    (
        [1.2, 1.3, 1.4, 1.4, 1.4],
        "More loops hurt: validation loss is 1.200 at one loop and 1.400 at 4, "
        "and it stays within 0.1 % of that up to 16.",
    ),
    (
        [2.0, 0.5, 2e-5, 3e-5, 9e-4],
        "More loops help: validation loss is 2.000 at one loop and less than 0.001 at 4, "
        "and it stays as low up to 16.",
    ),
    (
        [2.0, 0.5, 2e-5, 3e-5, 0.01],
        "More loops help: validation loss is 2.000 at one loop and less than 0.001 at 4, "
        "but it is 0.010 at 16.",
    ),
    (
        [2.0, 0.5, 0.05, 0.0505, 0.0509],
        "More loops help: validation loss is 2.000 at one loop and 0.050 at 4, "
        "and it stays within 0.001 nats of that up to 16.",
    ),
    ([1.5, math.nan, 1.4, 1.4, 1.4], "The loss is no finite number at 2 loops."),
]


@pytest.mark.parametrize("losses, words", DEPTHS)
def test_depth_is_said_as_it_is(losses, words):
    assert findings.depth_finding(sweep_of(losses)) == words


def test_depth_of_several_groups_of_one_loop_and_of_none():
    sweep = sweep_of([1.5, 1.4, 1.3, 1.3, 1.3], (3, 2), 1.35, [1, 2, 3, 4, 5])
    words = findings.depth_finding(sweep)
    assert "1.500 at one loop and 1.350 at 3,2" in words and "to 1.300 at 4" in words
    sweep = sweep_of([1.5, 1.4, 1.3], (2, 2), 1.38)
    assert "1.380 at 2," in findings.depth_finding(sweep)
    words = findings.depth_finding(sweep_of([1.5, 1.6, 1.45], (1,)))  # the best is told
    assert words == "More loops help: validation loss is 1.500 at one loop and 1.450 at 4."
    assert findings.depth_finding(sweep_of([], ())) == ""


SETTLING = [
    (
        [0.5, 0.2, 0.04, 0.06, 0.03, 0.02],
        "The loop settles: from loop 6 of 7 on, a loop changes a token's state by at most 3.0 % of "
        "its norm, on average over the tokens.",
    ),
    (
        [0.01, 0.02],
        "The loop settles: from loop 2 of 3 on, a loop changes a token's state by at most 2.0 % of "
        "its norm, on average over the tokens.",
    ),
    (
        [0.5, 0.3, 0.2],
        "The loop slows down without settling: on average loop 2 changes a token's state by 50 % "
        "of its norm, and loop 4 by 20 %.",
    ),
    (
        [0.5, 0.4, 0.45],
        "The loop does not settle: on average loop 2 changes a token's state by 50 % of its norm, "
        "and loop 4 by 45 %.",
    ),
    ([0.5], "The loop does not settle: its second loop changes states by 50 %."),
    ([0.0, 0.0], "The loop changes nothing: the state after 3 loops is that after one."),
    ([], ""),
    ([0.5, math.nan], ""),
]


@pytest.mark.parametrize("mean, words", SETTLING)
def test_settling_is_said_as_it_is(mean, words):
    change = np.stack([np.array(mean), np.zeros(len(mean)), np.ones(len(mean))])
    assert findings.settling_finding(change) == words
    if words:
        of_group = findings.settling_finding(change, "out, group 1")
        assert of_group == words.replace("The loop", "The loop of out, group 1")


def exits_of(fixed, **rules):
    """Return exit curves. rules: of each rule (threshold, mean loops, loss, share by loops)."""
    curves = {"fixed loss": np.array(fixed)}
    for rule, rows in rules.items():
        for name, values in zip(("threshold", "loops", "loss", "share"), zip(*rows)):
            curves[f"{rule} {name}"] = np.array(values)
    return curves


NEVER = (0.0, 4.0, 1.34, [0, 0, 0, 1])


def test_exits_are_the_cheapest_of_all_rules_at_hardly_any_loss():
    kl = [NEVER, (0.02, 1.5, 1.343, [0.5, 0.5, 0, 0]), (0.5, 1.1, 1.4, [0.9, 0.1, 0, 0])]
    state = [NEVER, (0.1, 2.0, 1.34, [0, 1, 0, 0])]
    curves = exits_of([1.56, 1.4, 1.35, 1.34], kl=kl, state=state)
    assert findings.exit_finding(curves) == (
        "Most tokens need few loops: stopped by kl at 0.02, a token takes 1.5 of 4 loops on "
        "average, for a loss of 1.343 (+0.2 %); with 2 for every token it is 1.400."
    )
    assert "1.5 of 4 loops in out, group 1 on" in findings.exit_finding(curves, "out, group 1")
    kl = [NEVER, (0.02, 3.0, 1.3405, [0, 0, 1, 0])]
    assert findings.exit_finding(exits_of([1.56, 1.4, 1.35, 1.34], kl=kl)) == (
        "Early exit saves loops: stopped by kl at 0.02, a token takes 3.0 of 4 loops on average, "
        "for a loss of 1.341 (within 0.001 nats); with 3 for every token it is 1.350."
    )
    kl = [NEVER, (0.02, 1.5, 1.343, [0.5, 0.5, 0, 0])]
    text = findings.exit_finding(exits_of([1.56, 1.343, 1.342, 1.34], kl=kl))
    assert text.startswith("Early exit saves nothing that fewer loops for all would not: ")


def test_the_depth_of_the_measures_is_said_to_be_that_of_most_draws():
    fixed, sampled = GPTConfig(n_block=1), GPTConfig(n_block=1, loop_sampling="poisson")
    assert findings.loops_measured("out", fixed, 4).endswith("up to loop 4, as the config says.")
    assert "loop 11, which 19 in 20 of the draws" in findings.loops_measured("out", sampled, 11)


def test_exits_that_save_nothing_are_said_to():
    kl = [NEVER, (0.02, 3.8, 1.341, [0, 0, 0.2, 0.8]), (0.5, 2.0, 1.4, [0, 1, 0, 0])]
    assert findings.exit_finding(exits_of([1.56, 1.4, 1.35, 1.34], kl=kl)) == (
        "Tokens need their loops: no exit rule saves a tenth of 4 loops and keeps the loss of "
        "1.340 within 0.5 %."
    )
    assert findings.exit_finding(exits_of([1.5], kl=[(0.0, 1.0, 1.5, [1.0])])) == ""


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_exits_of_a_model_are_those_of_its_curves(spread):
    """The fewest loops of all rules and thresholds whose loss is within 0.5 % of the full one."""
    idx, targets = tokens(), tokens(seed=2)
    model = build(spread=spread)
    curves = measure.exit_curves(model, measure.exit_measures(model, idx, targets, 0, 6))
    allowed = 1.005 * curves["fixed loss"][-1]
    fewest = 6
    for rule in measure.rules_of(model):
        good = curves[f"{rule} loss"] <= allowed
        fewest = min(fewest, curves[f"{rule} loops"][good].min())
    words = findings.exit_finding(curves)
    assert fewest < 5.4 and f"a token takes {fewest:.1f} of 6 loops" in words


def levels_of(accuracy, beyond):
    """Return level curves at 1, 2 and 4 loops of levels 3, 4, ..."""
    accuracy = np.array(accuracy)
    levels = np.arange(3, 3 + len(accuracy))
    return dict(
        levels=levels,
        loops=np.array([1, 2, 4]),
        accuracy=accuracy,
        own=levels,
        beyond=np.array(beyond, dtype=bool),
    )


GOOD, SOON, BAD = [0.5, 0.9, 1.0], [1.0, 1.0, math.nan], [0.5, 0.5, 0.6]
LEVELS = [
    (
        [SOON, GOOD, GOOD, BAD],
        [0, 0, 1, 1],
        "It solves what it was trained on, levels 3 and 4, at least 99 % right with 1 to 4 loops; "
        "beyond training also level 5, with 4 loops, and level 6 is the first that fails (60 %).",
    ),
    (
        [GOOD, GOOD, GOOD],
        [0, 1, 1],
        "It solves what it was trained on, level 3, at least 99 % right with 4 loops; beyond "
        "training also levels 4 and 5, with 4 loops, and no level that was tried fails.",
    ),
    (
        [SOON, BAD, BAD],
        [0, 1, 1],
        "It solves what it was trained on, level 3, at least 99 % right with 1 loop; beyond "
        "training level 4 already fails (60 %).",
    ),
    (
        [GOOD, BAD],
        [0, 0],
        "It solves a part of what it was trained on: 1 of the levels up to 4 (2 in all) reach "
        "99 %, level 4 only 60 %.",
    ),
    (
        [BAD, BAD],
        [0, 1],
        "It does not solve what it was trained on: 0 of the levels up to 3 (1 in all) reach 99 %, "
        "level 3 only 60 %; beyond training level 4 already fails (60 %).",
    ),
    (
        [GOOD],
        [1],
        "No level of training was measured; beyond training also level 3, with 4 loops, and no "
        "level that was tried fails.",
    ),
]


@pytest.mark.parametrize("accuracy, beyond, words", LEVELS)
def test_levels_are_said_as_they_are(accuracy, beyond, words):
    assert findings.levels_finding(levels_of(accuracy, beyond)) == words


def test_many_levels_are_a_range_and_no_levels_say_nothing():
    words = findings.levels_finding(levels_of([GOOD] * 6, [0] * 6))
    assert "levels 3 to 8 (6 of them)" in words
    assert findings.levels_finding({}) == ""


def test_a_loss_stands_beside_that_of_a_uniform_guess():
    sweep = dict(configured_loss=1.341, configured_bits_per_byte=1.9347, configured_accuracy=0.62)
    assert findings.loss_finding(sweep, 256) == (
        "Validation loss is 1.341 (1.935 bits per byte); a uniform guess has 5.545, and the "
        "likeliest token is right in 62 % of all cases."
    )
    sweep["configured_bits_per_byte"] = math.nan
    assert "is 1.341; a uniform" in findings.loss_finding(sweep, 256)


@pytest.mark.parametrize(
    "train, val, best, words",
    [
        (1.33, 1.34, 1.34, "It does not overfit: the last loss is 1.340 on validation and 1.330"),
        (1.40, 1.34, 1.34, "It does not overfit: "),
        (1.10, 1.34, 1.34, "It fits training data better than others: "),
        (1.10, 1.34, 1.30, "It overfits: .*, after 1.300 on validation at its best."),
    ],
)
def test_fit_is_said_as_it_is(train, val, best, words):
    assert re.match(words, findings.fit_finding(train, val, best))


def test_heads_are_counted():
    scores = np.array([[0.1, 0.3], [0.8, 0.0]])
    assert findings.induction_finding(scores).startswith("2 of 4 heads do induction")
    assert "from 30 % to 80 % of" in findings.induction_finding(scores)
    assert findings.induction_finding(scores[:, :1]).startswith("1 of 2 heads does induction")
    assert findings.induction_finding(scores[:1] / 2) == (
        "No head does induction: at most 15 % of a head's attention goes to what followed the same "
        "token before."
    )
    assert findings.first_token_finding(scores).startswith("1 of 4 heads has the first token")
    assert findings.first_token_finding(scores + 0.2).startswith("2 of 4 heads have the first")
    words = "No head has the first token as a sink: it gets at most 30 % of the attention."
    assert findings.first_token_finding(scores[:1]) == words
    words = "Heads look 2.0 tokens back on average, the nearest 0.5 and the farthest 4.5."
    assert findings.reach_finding(np.array([[0.5, 1.0, 4.5]])) == words


def test_a_run_in_a_sentence():
    looped = GPTConfig(n_prelude=1, n_block=2, n_coda=1, n_loop=4, loop_sampling="poisson")
    trained = dict(dataset="/data/pycode", steps=800, max_iters=800, tokens=1.23e6, seconds=200)
    assert findings.run_sentence("out", looped, 443264, trained) == (
        "out is a looped GPT of 443.3k parameters, 1 block, then 2 blocks looped 4 times, then 1 "
        "block (in training a number drawn from poisson), trained on pycode for 800 steps, 1.23M "
        "tokens, in 3.3 minutes."
    )
    plain = GPTConfig(n_layer=12)
    trained = dict(steps=5, max_iters=800, tokens=None, dataset=None, seconds=None)
    assert findings.run_sentence("gpt2", plain, 124e6, trained) == (
        "gpt2 is a GPT without loops of 124.00M parameters, 12 blocks, trained for 5 of 800 steps."
    )
    assert findings.run_sentence("gpt2", plain, 1.5e9, {}) == (
        "gpt2 is a GPT without loops of 1.50B parameters, 12 blocks; how it was trained is not "
        "known."
    )


def test_facts_name_the_options_that_are_not_at_their_defaults():
    config = {"n_block": 2, "bias": True, "eval_loops": [1, 4], "out_dir": "x", "unknown": 3}
    assert findings.changed_options(config) == ["n_block=2", "eval_loops=1,4"]
    facts = findings.facts_of(build(), {}, None, [], [])
    assert facts["training steps"] == facts["commit"] == facts["command"] == ""
    assert facts["looped blocks x loops"] == "1, 2 x 3" and "n_loop=3" in facts.popitem()[1]


def test_numbers_in_words():
    assert [findings.percent(x) for x in (0, 1e-4, 0.0012, 0.0994, 0.0996, 0.4, 1)] == [
        "0.0 %",
        "less than 0.1 %",
        "0.1 %",
        "9.9 %",
        "10 %",
        "40 %",
        "100 %",
    ]
    durations = [findings.duration_in_words(x) for x in (34.4, 464, 7300)]
    assert durations == ["34 seconds", "7.7 minutes", "2.0 hours"]
    assert [findings.count_in_words(x) for x in (950, 1234, 5e6)] == ["950", "1.2k", "5.00M"]
    assert findings.numbers_in_words(np.array([3])) == "3"
    assert findings.numbers_in_words(np.array([3, 4, 6])) == "3, 4 and 6"
