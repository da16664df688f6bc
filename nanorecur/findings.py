"""
Findings about a model: facts, and sentences with their numbers from the arrays of measure.py.

    depth_finding(sweep)  # More loops help: validation loss is 1.465 at one loop and 1.305 at 4 ...

A finding that is not so is said as it is. "" stands for nothing to say: a model without loops has
no depth. Losses are in nats per token.
"""

import math
from pathlib import Path

import numpy as np

from configurator import freeze, show
from model import GPT, GPTConfig
from nanorecur import options, run_table
from nanorecur.run_log import clock

Arrays = dict[str, np.ndarray]

SMALL_SHARE, SMALL_NATS = 0.005, 0.001  # losses that differ by less than either count as equal
SETTLED = 0.05  # share of the norm; a loop that changes the state by less leaves it settled
SOLVED = 0.99  # share of right targets from which a level counts as solved
INDUCTION, SINK = 0.3, 0.5  # share of its attention from which a head counts as doing so

# -----------------------------------------------------------------------------
# numbers in words


def small(loss: float) -> float:
    """Return by how much another loss may differ from this one and count as equal."""
    return max(SMALL_SHARE * loss, SMALL_NATS)


def nats(loss: float) -> str:
    return f"{loss:.3f}" if loss >= SMALL_NATS else "less than 0.001"


def percent(share: float) -> str:
    """Return a share as a percentage, with a digit behind the point below 10 %."""
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def change_of(loss: float, before: float) -> str:
    """Return by how much a loss differs from one before, as +0.2 % or in nats where it is tiny."""
    difference = loss - before
    if abs(difference) <= SMALL_NATS:
        return "within 0.001 nats"
    return f"{100 * difference / before:+.1f} %"


def numbers_in_words(numbers: np.ndarray) -> str:
    """Return ascending numbers, such as 3, or 3 and 4, or 3, 4 and 6, or 8 to 32 for many."""
    words = [str(number) for number in numbers]
    if len(words) > 4:
        return f"{words[0]} to {words[-1]} ({len(words)} of them)"
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def duration_in_words(seconds: float) -> str:
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"


def count_in_words(count: float) -> str:
    """Return a large number as 950, 1.2k, 3.40M or 1.10B."""
    for unit, letter, digits in ((1e9, "B", 2), (1e6, "M", 2), (1e3, "k", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f}{letter}"
    return f"{count:.0f}"


# -----------------------------------------------------------------------------
# the run


def run_sentence(name: str, config: GPTConfig, n_params: int, trained: dict) -> str:
    """Return what model a run is, on what data and how long it was trained, in one sentence.

    trained: dataset, steps, max_iters, tokens, seconds; what is unknown is left out of it or None.
    """
    kind = "a looped GPT" if config.groups else "a GPT without loops"
    text = f"{name} is {kind} of {count_in_words(n_params)} parameters, {blocks_in_words(config)}"
    steps, last = trained.get("steps"), trained.get("max_iters")
    if steps is None:
        return f"{text}; how it was trained is not known."
    text += ", trained"
    if trained.get("dataset"):
        text += f" on {Path(trained['dataset']).name}"
    text += f" for {steps:,}{f' of {last:,}' if last and last > steps else ''} steps"
    if trained.get("tokens"):
        text += f", {count_in_words(trained['tokens'])} tokens"
    if trained.get("seconds"):
        text += f", in {duration_in_words(trained['seconds'])}"
    return f"{text}."


def blocks_in_words(config: GPTConfig) -> str:
    """Return the stages of a model, such as 1 block, then 2 blocks looped 4 times."""
    counts, stages = iter(config.counts()), []
    for blocks, looped in config.layout:
        stage = "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"
        if looped:
            n = next(counts)
            stage += " looped once" if n == 1 else f" looped {n} times"
        stages.append(stage)
    text = ", then ".join(stages)
    if config.groups and config.loop_sampling != "fixed":
        text += f" (in training a number drawn from {config.loop_sampling})"
    return text


def facts_of(
    model: GPT, config: dict, steps: int | None, log: list[dict], sessions: list[dict]
) -> dict[str, str]:
    """Return what is known of a run by name, "" for what is not.

    config: train.py's options, {} where they are unknown. log, sessions: entries of log.jsonl and
    sessions.jsonl. steps: of training, None where they are unknown.
    """
    shape, session = model.config, sessions[-1] if sessions else {}
    looped = []
    for blocks, n in zip(shape.groups, shape.counts()):
        looped.append(f"{', '.join(map(str, blocks))} x {n}")
    spent = spent_on(log)
    return {
        "parameters": f"{model.get_num_params() / 1e6:.2f}M",
        "blocks": str(shape.n_physical),
        "looped blocks x loops": "; ".join(looped) or "none",
        "passes through a block": str(shape.n_effective),
        "attention": shape.attention,
        "data": str(config.get("dataset", "")),
        "training steps": "" if steps is None else f"{steps:,}",
        "training tokens": f"{spent['tokens']:,}" if "tokens" in spent else "",
        "training time": clock(spent["elapsed"]) if "elapsed" in spent else "",
        "device": session.get("device", ""),
        "commit": commit_of(session),
        "command": session.get("command", ""),
        "starts of the run": str(len(sessions) or ""),
        "not at their defaults": ", ".join(changed_options(config or vars(shape))),
    }


def spent_on(log: list[dict]) -> dict:
    """Return the last entry of a log about a step, with its tokens and elapsed seconds so far."""
    steps = [entry for entry in log if "loss" in entry]
    return steps[-1] if steps else {}


def commit_of(session: dict) -> str:
    """Return the commit that a run was last started at, and whether files differed from it."""
    changed = " (changed)" if session.get("dirty") else ""
    return f"{session['commit'][:10]}{changed}" if session.get("commit") else ""


def changed_options(config: dict) -> list[str]:
    """Return the options of a run whose values are not the defaults, as name=value."""
    defaults, changed = options.defaults(), []
    for name, value in config.items():
        value = freeze(value)
        default = freeze(defaults.get(name, value))  # an option of another version has none
        if name not in run_table.NAMES_ONLY and value != default:
            changed.append(f"{name}={show(value)}")
    return changed


# -----------------------------------------------------------------------------
# loops


def depth_finding(sweep: Arrays) -> str:
    """Return whether more loops lower the loss, and what happens beyond the config's loops.

    sweep: from depth_sweep, its loops from 1 on.
    """
    loops, losses = sweep["loops"], sweep["loss"]
    if len(loops) < 2:
        return ""
    if not np.isfinite(losses).all():
        return f"The loss is no finite number at {loops[~np.isfinite(losses)][0]} loops."
    n, name, loss = reference_depth(sweep)
    gain = losses[0] - loss
    verdict = "More loops do not help"
    if gain > small(losses[0]):
        verdict = "More loops help"
    if gain < -small(losses[0]):
        verdict = "More loops hurt"
    numbers = f"validation loss is {nats(losses[0])} at one loop and {nats(loss)} at {name}"
    return f"{verdict}: {numbers}{beyond_in_words(loops, losses, n, loss)}."


def reference_depth(sweep: Arrays) -> tuple[int, str, float]:
    """Return (loops, loops in words, loss) at the config's loops, or at the best if that is one."""
    counts = sweep["configured"]
    if counts.max() > 1:
        name = ",".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
        return int(counts.max()), name, float(sweep["configured_loss"])
    best = 1 + sweep["loss"][1:].argmin()
    n = int(sweep["loops"][best])
    return n, str(n), float(sweep["loss"][best])


def beyond_in_words(loops: np.ndarray, losses: np.ndarray, n: int, loss: float) -> str:
    """Return how losses (K,) at more than n loops compare with the loss at n, "" for none."""
    deeper, losses = loops[loops > n], losses[loops > n]
    if len(deeper) == 0:
        return ""
    highest, lowest = losses.argmax(), losses.argmin()
    if losses[highest] > loss + small(loss):
        return f", but it is {nats(losses[highest])} at {deeper[highest]}"
    if losses[lowest] < loss - small(loss):
        return f", and it falls on, to {nats(losses[lowest])} at {deeper[lowest]}"
    if loss < SMALL_NATS:
        return f", and it stays as low up to {deeper[-1]}"
    within = np.abs(losses - loss).max()
    if within > SMALL_SHARE * loss:
        return f", and it stays within {SMALL_NATS} nats of that up to {deeper[-1]}"
    tenths = max(1, math.ceil(1000 * within / loss))  # of a percent, rounded up
    return f", and it stays within {tenths / 10} % of that up to {deeper[-1]}"


def loops_measured(name: str, config: GPTConfig, n: int) -> str:
    """Return up to how many loops states and exits are measured, and why. name: of the group."""
    why = "as the config says"
    if config.loop_sampling != "fixed":
        why = "which 19 in 20 of the draws in training do not exceed"
    return f"{name}: states and exits are measured up to loop {n}, {why}."


def settling_finding(change: np.ndarray, where: str = "") -> str:
    """Return whether the state settles. change: (.., n - 1), its first row the mean over tokens.

    change[0, i]: by how much of the norm loop i + 2 changes the state. where: names the loop.
    """
    loop = f"The loop of {where}" if where else "The loop"
    mean = change[0]
    if len(mean) == 0 or not np.isfinite(mean).all():
        return ""
    n, first, last = len(mean) + 1, mean[0], mean[-1]
    if not mean.any():
        return f"{loop} changes nothing: the state after {n} loops is that after one."
    if last < SETTLED:
        settled = int(np.flatnonzero(mean >= SETTLED).max(initial=-1)) + 1
        most = percent(mean[settled:].max())
        return (
            f"{loop} settles: from loop {settled + 2} of {n} on, a loop changes a token's state "
            f"by at most {most} of its norm, on average over the tokens."
        )
    verdict = "slows down without settling" if last < first / 2 else "does not settle"
    if n == 2:
        return f"{loop} does not settle: its second loop changes states by {percent(last)}."
    return (
        f"{loop} {verdict}: on average loop 2 changes a token's state by {percent(first)} of its "
        f"norm, and loop {n} by {percent(last)}."
    )


def exit_finding(curves: Arrays, where: str = "") -> str:
    """Return how many loops early exit saves at hardly any loss.

    curves: from exit_curves. where: names the loop.
    """
    of_group = f" in {where}" if where else ""
    fixed = curves["fixed loss"]
    n, full = len(fixed), fixed[-1]
    if n == 1:
        return ""
    rule, i = cheapest_exit(curves, full + small(full))
    loops, loss = curves[f"{rule} loops"][i], curves[f"{rule} loss"][i]
    if loops > 0.9 * n:
        return (
            f"Tokens need their loops: no exit rule saves a tenth of {n} loops{of_group} and keeps "
            f"the loss of {nats(full)} within {100 * SMALL_SHARE} %."
        )
    by_half = curves[f"{rule} share"][i][: n // 2].sum()
    verdict = "Most tokens need few loops" if by_half > 0.5 else "Early exit saves loops"
    k = min(n, math.ceil(loops))
    if fixed[k - 1] <= loss:
        verdict = "Early exit saves nothing that fewer loops for all would not"
    return (
        f"{verdict}: stopped by {rule} at {curves[f'{rule} threshold'][i]:.2g}, a token takes "
        f"{loops:.1f} of {n} loops{of_group} on average, for a loss of {nats(loss)} "
        f"({change_of(loss, full)}); with {k} for every token it is {nats(fixed[k - 1])}."
    )


def cheapest_exit(curves: Arrays, most: float) -> tuple[str, int]:
    """Return (rule, number of its threshold) with the fewest mean loops at a loss of at most so."""
    found = []
    for key in curves:
        rule, _, array = key.rpartition(" ")
        if array == "loops":
            good = np.flatnonzero(curves[f"{rule} loss"] <= most)
            found += [(curves[key][i], rule, int(i)) for i in good]
    _, rule, i = min(found)
    return rule, i


# -----------------------------------------------------------------------------
# levels of a task


def levels_finding(data: Arrays) -> str:
    """Return which levels of a task are solved, and at how many loops, in training and beyond it.

    data: from level_curves, {} where nothing was logged.
    """
    if not data:
        return ""
    best = np.nanmax(data["accuracy"], axis=1)  # (levels,)
    beyond, levels = data["beyond"], data["levels"]
    solved = best >= SOLVED
    text = trained_levels_in_words(data, best, solved)
    if not beyond.any():
        return f"{text}."
    if not solved[beyond].any():
        first = np.flatnonzero(beyond)[0]
        return (
            f"{text}; beyond training level {levels[first]} already fails ({percent(best[first])})."
        )
    names, at = level_names(levels[beyond & solved]), loops_that_solve(data, beyond & solved)
    text += f"; beyond training also {names}, {at}"
    failing = np.flatnonzero(beyond & ~solved)
    if len(failing) == 0:
        return f"{text}, and no level that was tried fails."
    first = failing[0]
    return f"{text}, and level {levels[first]} is the first that fails ({percent(best[first])})."


def trained_levels_in_words(data: Arrays, best: np.ndarray, solved: np.ndarray) -> str:
    """Return which of the levels in training are solved."""
    trained = ~data["beyond"]
    levels, of_trained = data["levels"][trained], solved[trained]
    if not trained.any():
        return "No level of training was measured"
    if of_trained.all():
        names = level_names(levels)
        at = loops_that_solve(data, trained)
        return f"It solves what it was trained on, {names}, at least {percent(SOLVED)} right {at}"
    worst = levels[best[trained].argmin()]
    numbers = f"{of_trained.sum()} of the levels up to {levels[-1]} ({len(levels)} in all) reach "
    numbers += f"{percent(SOLVED)}, level {worst} only {percent(best[trained].min())}"
    verdict = "It solves a part of" if of_trained.any() else "It does not solve"
    return f"{verdict} what it was trained on: {numbers}"


def level_names(levels: np.ndarray) -> str:
    return f"{'level' if len(levels) == 1 else 'levels'} {numbers_in_words(levels)}"


def loops_that_solve(data: Arrays, chosen: np.ndarray) -> str:
    """Return the fewest loops that solve each of some solved levels, such as with 4 to 16 loops."""
    loops = [data["loops"][np.argmax(row >= SOLVED)] for row in data["accuracy"][chosen]]
    least, most = min(loops), max(loops)
    if least != most:
        return f"with {least} to {most} loops"
    return f"with {least} {'loop' if least == 1 else 'loops'}"


# -----------------------------------------------------------------------------
# any model


def loss_finding(sweep: Arrays, vocab_size: int) -> str:
    """Return the loss on validation beside that of a uniform guess. sweep: from depth_sweep."""
    bits = sweep["configured_bits_per_byte"]
    per_byte = f" ({bits:.3f} bits per byte)" if np.isfinite(bits) else ""
    return (
        f"Validation loss is {nats(sweep['configured_loss'])}{per_byte}; a uniform guess has "
        f"{math.log(vocab_size):.3f}, and the likeliest token is right in "
        f"{percent(sweep['configured_accuracy'])} of all cases."
    )


def fit_finding(train: float, val: float, best: float) -> str:
    """Return whether training data are fitted better than validation.

    train, val: losses of the last evaluation; best: the lowest on validation of all evaluations.
    """
    numbers = f"the last loss is {nats(val)} on validation and {nats(train)} on training data"
    if val > best + small(best):
        return f"It overfits: {numbers}, after {nats(best)} on validation at its best."
    if val > train + max(0.05 * train, SMALL_NATS):
        return f"It fits training data better than others: {numbers}."
    return f"It does not overfit: {numbers}."


def induction_finding(scores: np.ndarray) -> str:
    """Return how many heads do induction. scores: (P, H), from attention."""
    count = int((scores >= INDUCTION).sum())
    if count == 0:
        return (
            f"No head does induction: at most {percent(scores.max())} of a head's attention goes "
            "to what followed the same token before."
        )
    return (
        f"{count} of {scores.size} heads {'does' if count == 1 else 'do'} induction (counted in "
        f"every pass through a block): from {percent(INDUCTION)} to {percent(scores.max())} of "
        "the attention goes to what followed the same token before."
    )


def first_token_finding(shares: np.ndarray) -> str:
    """Return how many heads rest on the first token. shares: (P, H), from attention."""
    count = int((shares >= SINK).sum())
    if count == 0:
        most = percent(shares.max())
        return f"No head has the first token as a sink: it gets at most {most} of the attention."
    return (
        f"{count} of {shares.size} heads {'has' if count == 1 else 'have'} the first token as a "
        f"sink (counted in every pass through a block): it gets at least {percent(SINK)} of their "
        "attention."
    )


def reach_finding(distances: np.ndarray) -> str:
    """Return how far heads look back. distances: means (P, H) in tokens, from attention."""
    return (
        f"Heads look {distances.mean():.1f} tokens back on average, the nearest "
        f"{distances.min():.1f} and the farthest {distances.max():.1f}."
    )
