"""
Going on with a run: its options come from its checkpoint, and only some may change.

What a run was trained with decides what its weights mean, so that an option that is not repeated
is taken from the checkpoint, and one that is given anew must be the same, or one of MAY_CHANGE.
"""

from configurator import freeze, require, show
from nanorecur.options import defaults
from nanorecur.parallel import Processes

NOT_COMPARED = {"init_from", "out_dir", "eval_only"}
OF_THE_MACHINE = {"device", "compile", "backend", "patience", "shard"}  # never from a checkpoint
MAY_CHANGE = OF_THE_MACHINE | {
    "max_iters",
    "learning_rate",
    "muon_learning_rate",
    "decay_lr",
    "warmup_iters",
    "lr_decay_iters",
    "min_lr",
    "lr_schedule",
    "hold_iters",
    "eval_interval",
    "eval_iters",
    "eval_loops",
    "eval_stride",
    "automatic_loop_exit",
    "exit_rule",
    "automatic_loop_exit_threshold",
    "always_save_checkpoint",
    "save_interval",
    "keep_last",
    "keep_every",
    "log_interval",
    "wandb_log",
    "tensorboard",
    "wandb_project",
    "wandb_run_name",
    "wandb_mode",
    "dataset",  # its files are compared by check_data
    "input_files",
    "deterministic",
    "dtype",
    "param_dtype",
    "recompute",
    "loss_chunk",
    "max_skips",
}
ANOTHER_RUN = "--out_dir=<folder> begins another run"
BATCH = ("batch_size", "gradient_accumulation_steps")  # may change where their product stays


def continued(config: dict, given: set[str], ckpt: dict) -> tuple[dict, dict[str, tuple]]:
    """Return (config, changed) of a run that goes on from a checkpoint.

    config: train.py's options; given: those that were set; the others become the checkpoint's.
    changed: {option: (value in the checkpoint, value asked for)}. Raises ValueError that names
    every option that may not change; with eval_only all may.
    """
    before = ckpt["model_args"]
    if "format" in ckpt:  # nanoGPT's own options mean other things; an older run had the defaults
        before = {**defaults(), **ckpt["config"], **ckpt["model_args"]}
    config, changed = dict(config), {}
    for name, old in before.items():
        if name not in config or name in NOT_COMPARED:
            continue
        if name in given:
            if freeze(config[name]) != freeze(old):
                changed[name] = (old, config[name])
        elif name not in OF_THE_MACHINE:
            config[name] = freeze(old)
    fixed = changed.keys() - MAY_CHANGE
    if product(config) == product(before):
        fixed -= set(BATCH)
    if fixed and not config["eval_only"]:
        refuse({name: changed[name] for name in changed if name in fixed}, config["out_dir"])
    return config, changed


def product(config: dict) -> int | None:
    """Return the windows in a step; None where the config does not say."""
    sizes = [config.get(name) for name in BATCH]
    return None if None in sizes else sizes[0] * sizes[1]


def refuse(changed: dict[str, tuple], out_dir: str) -> None:
    """Raise ValueError that lists options which may not change and the three ways out."""
    raise ValueError(
        f"{in_words(changed)}: the run in {out_dir} goes on as it began; {ANOTHER_RUN}, "
        f"--eval_only evaluates this one so, "
        f"--init_from={out_dir} --out_dir=<folder> begins another one with its weights"
    )


def in_words(changed: dict[str, tuple]) -> str:
    """Return "name: a in the checkpoint, b asked for" of each changed option, in one line."""
    lines = []
    for name, (old, new) in changed.items():
        lines.append(f"{name}: {show(old)} in the checkpoint, {show(new)} asked for")
    return "; ".join(lines)


def identity_of(meta: dict) -> dict[str, str]:
    """Return what tells a prepared data set from another one: {split: sha256, or its tokens}.

    Of targets that stand beside the tokens their sha256 too, as "<split> targets".
    """
    splits = meta.get("splits", {})
    found = {name: str(split.get("sha256", split["tokens"])) for name, split in splits.items()}
    digests = meta.get("row", {}).get("targets_sha256", {})
    return found | {f"{name} targets": digest for name, digest in digests.items()}


def check_data(dataset: str, now: dict, ckpt: dict) -> None:
    """Raise ValueError where a run would go on with other tokens than it began with.

    now: what identity_of returns of the tokens that are there, {} for a stream.
    """
    began = ckpt.get("data", now)
    if began != now:
        differing = ", ".join(name for name in began if began[name] != now.get(name)) or "splits"
        raise ValueError(
            f"dataset={dataset!r}: its {differing} tokens are not those that the run began with; "
            f"--eval_only evaluates on them, --init_from=<checkpoint> --out_dir=<folder> fine-tunes"
        )


def check_state(init_from: str, ckpt: dict) -> None:
    """Raise ValueError where a checkpoint has weights alone, from which no run can go on."""
    complete = {"iter_num", "best_val_loss", "optimizer"} <= set(ckpt)
    allowed = "what fine-tunes: the checkpoint in out_dir lacks the run's state"
    require("init_from", init_from, complete, allowed)


def first_line(config: dict, changed: dict[str, tuple], iter_num: int, finished: bool) -> str:
    """Return where a run goes on, and below it what has changed."""
    text = f"{config['out_dir']}: goes on at step {iter_num} of {config['max_iters']}"
    if config["eval_only"]:
        text = f"{config['out_dir']}: evaluated as of step {iter_num}"
    if finished:
        text = f"{config['out_dir']}: already finished at step {iter_num}, evaluated only; "
        text += f"a larger --max_iters goes on, {ANOTHER_RUN}"
    return f"{text}\n{in_words(changed)}" if changed else text


def check_agreement(processes: Processes, out_dir: str, iter_num: int) -> None:
    """Raise ValueError where the processes' folders hold different checkpoints."""
    allowed = "one folder for all processes: another has a newer checkpoint"
    require("out_dir", out_dir, processes.agree(iter_num) == iter_num, allowed)
