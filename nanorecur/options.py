"""
Legal values of train.py's options, as far as they need neither data nor model.

Values that are wrong are refused. Options without effect are refused where they stand on the
command line and named in a warning where a config file sets them, since one file serves several
runs. A schedule that makes no sense is warned of: short trials of long configs are legal.
"""

import functools
from math import inf
from pathlib import Path

import torch

from configurator import check_ranges, read_knobs, require, show
from model import GPT, LOOP_OFF, GPTConfig
from nanorecur.exit_rules import make_exit
from nanorecur.parallel import Processes
from nanorecur.recompute import RECOMPUTE

ROOT = Path(__file__).parent.parent
RANGES = {  # option: (least, most)
    "eval_interval": (1, inf),
    "save_interval": (0, inf),
    "keep_last": (2, inf),  # one is whole while the other is written
    "keep_every": (0, inf),
    "val_share": (0, 0.5),
    "eval_iters": (1, inf),
    "log_interval": (1, inf),
    "batch_size": (1, inf),
    "gradient_accumulation_steps": (1, inf),
    "entropy_weight": (0, inf),
    "distill_weight": (0, inf),
    "ahead_weight": (0, inf),
    "loss_chunk": (0, inf),
    "max_iters": (0, inf),
    "weight_decay": (0, inf),
    "grad_clip": (0, inf),
    "spike_factor": (0, inf),
    "max_skips": (0, inf),
    "spectral_clip_beta": (0, inf),
    "spectral_clip_interval": (1, inf),
    "warmup_iters": (0, inf),
    "lr_decay_iters": (0, inf),
    "hold_iters": (0, inf),
    "min_lr": (0, inf),
    "loop_start": (0, 1),
    "loop_warmup_iters": (0, inf),
    "level_warmup_iters": (0, inf),
    "loops_beyond": (0, inf),
    "patience": (1, inf),
}
CHOICES = {
    "loss_weighting": ("uniform", "linear"),
    "optimizer": ("adamw", "muon"),
    "lr_schedule": ("cosine", "linear", "wsd", "constant"),
    "loop_warmup": ("linear", "sqrt"),
    "param_dtype": ("float32", "bfloat16"),
    "recompute": RECOMPUTE,
    "backend": ("auto", "nccl", "gloo"),
}


def check_options(config: dict, processes: Processes) -> None:
    """Raise ValueError that names the first option which is wrong. config: train.py's options."""
    check_ranges(config, RANGES)
    check_choices(config)

    def check(name: str, legal: bool, allowed: str) -> None:
        require(name, config[name], legal, allowed)

    for name in ("learning_rate", "muon_learning_rate"):
        check(name, 0 < config[name] < inf, "positive")
    check("ema_decay", 0 <= config["ema_decay"] < 1, "at least 0 and less than 1")
    counts = all(type(n) is int and n >= 1 for n in config["eval_loops"])
    check("eval_loops", counts, "loop counts such as 1,4,16")
    if config["loops_per_row"]:
        next_only = config["objective"] == "next"
        check("loops_per_row", next_only, "False where every loop of a step has its loss")
    check_processes(config, processes)


def check_choices(config: dict) -> None:
    """Raise ValueError where an option that has named values has another one."""
    for name, values in CHOICES.items():
        require(name, config[name], config[name] in values, "one of " + ", ".join(values))


def decay_span(config: dict) -> tuple[int, int]:
    """Return the steps at which the learning rate begins to fall and at which it is min_lr."""
    end = config["lr_decay_iters"] or config["max_iters"]
    start = config["warmup_iters"]
    if config["lr_schedule"] == "wsd":
        start = max(start, config["hold_iters"] or 2 * end // 3)
    return start, end


def schedule_warnings(config: dict) -> list[str]:
    """Return what of the learning rate's schedule makes little sense, in words."""
    if not config["decay_lr"]:
        return []
    max_iters, warmup = config["max_iters"], config["warmup_iters"]
    start, end = decay_span(config)
    if warmup >= max_iters > 0:
        return [f"the run ends in its warm-up: max_iters={max_iters}, warmup_iters={warmup}"]
    if config["lr_schedule"] == "constant":
        return []
    warnings = []
    if start >= max_iters > 0:
        warnings.append(f"the rate never falls: hold_iters={start}, max_iters={max_iters}")
    elif end <= start:
        words = f"the rate falls to min_lr at once after step {start}: lr_decay_iters={end}"
        warnings.append(words)
    if config["min_lr"] == 0 and max(start, end) < max_iters:
        words = f"the rate is 0 from step {max(start, end)} of {max_iters}: lr_decay_iters={end}"
        warnings.append(words)
    return warnings


def check_processes(config: dict, processes: Processes) -> None:
    """Raise ValueError where options do not go with the number of processes."""
    n, micro_steps = processes.world_size, config["gradient_accumulation_steps"]
    allowed = f"a multiple of the {n} processes"
    require("gradient_accumulation_steps", micro_steps, micro_steps % n == 0, allowed)
    has_cuda = torch.cuda.is_available()
    if config["backend"] == "nccl":
        require("backend", "nccl", has_cuda, "auto or gloo where there is no CUDA GPU")
    if processes.distributed and has_cuda and config["device"] in ("auto", "cuda"):
        n_gpus = torch.cuda.device_count()
        allowed = f"at most {n_gpus}, the GPUs here; --device=cpu uses none"
        require("nproc_per_node", processes.local_rank + 1, processes.local_rank < n_gpus, allowed)
    if config["shard"]:
        require("shard", True, n > 1, "False in one process: torchrun starts those that share")
        beta = config["spectral_clip_beta"]
        allowed = "0 with shard: no process has a whole matrix"
        require("spectral_clip_beta", beta, beta == 0, allowed)
        by_row = config["loops_per_row"]
        allowed = "False with shard: all processes gather a block together"
        require("loops_per_row", by_row, not by_row, allowed)


def check_against_model(config: dict, model: GPT) -> None:
    """Raise ValueError where options do not go with the model. config: also that of the model."""
    if config["automatic_loop_exit"]:
        make_exit(model, config["exit_rule"], config["automatic_loop_exit_threshold"])
    stride, block_size = config["eval_stride"], config["block_size"]
    allowed = f"from 0 to block_size={block_size}"
    require("eval_stride", stride, 0 <= stride <= block_size, allowed)
    if config["predict_ahead"]:
        shift = config["max_shift"]
        require("max_shift", shift, shift <= block_size, f"at most block_size={block_size}")


def pad_vocab(n_ids: int) -> int:
    """Return the vocabulary of a new model: a large one is padded to a multiple of 64 for GPUs."""
    return n_ids if n_ids < 1024 else -(-n_ids // 64) * 64


# -----------------------------------------------------------------------------
# options without effect


def without_effect(config: dict, looped: bool) -> dict[str, str]:
    """Return {option: why it has no effect} for all that have none beside the others' values."""
    reasons = {}

    def need(condition: object, reason: str, *names: str) -> None:
        if not condition:
            reasons.update(dict.fromkeys(names, reason))

    plain = "nothing is looped (n_block=0 and no loop_groups)"
    need(looped, plain, "bptt_k", "loop_sampling", "loop_noise_scale", "eval_loops")
    need(looped, plain, "loop_start", "loop_warmup_iters", "loops_per_row", "automatic_loop_exit")
    need(config["loops_of_level"], "loops_of_level=()", "loops_beyond")
    given_by_level = "loops_of_level says how often a step loops"
    need(not config["loops_of_level"], given_by_level, "loop_start", "loop_warmup_iters")
    need(config["loop_warmup_iters"], "loop_warmup_iters=0", "loop_warmup")
    need(looped or config["spectral_clip_all"], plain, "spectral_clip_beta")
    clip = ("spectral_clip_interval", "spectral_clip_all")
    need(config["spectral_clip_beta"], "spectral_clip_beta=0", *clip)
    exits = ("exit_rule", "automatic_loop_exit_threshold")
    need(config["automatic_loop_exit"], "automatic_loop_exit=False", *exits)
    muon = ("muon_learning_rate", "muon_row_norm")
    need(config["optimizer"] == "muon", "optimizer is not muon", *muon)
    need(config["lr_schedule"] == "wsd", "lr_schedule is not wsd", "hold_iters")
    need(config["objective"] == "deep", "objective is not deep", "loss_weighting")
    need(config["objective"] == "exit", "objective is not exit", "entropy_weight")
    need(config["objective"] == "distill", "objective is not distill", "distill_weight")
    need(config["n_ahead"] > 1, "n_ahead=1", "ahead_weight")
    need(config["predict_ahead"], "predict_ahead=False", "max_shift", "label_shift_prob")
    need(config["stream"], "stream=False", "input_files", "val_share")
    need(config["wandb_log"], "wandb_log=False", "wandb_project", "wandb_run_name", "wandb_mode")
    from_scratch = config["init_from"] == "scratch"
    new = ("layers", "drop_weights", "allow_other_tokenizer")
    need(not from_scratch, "init_from=scratch takes no weights", *new)
    return reasons


@functools.cache
def defaults() -> dict:
    """Return the default of every option of train.py and every field of GPTConfig."""
    knobs = {**read_knobs(ROOT / "model.py", "GPTConfig"), **read_knobs(ROOT / "train.py")}
    return {name: knob.value for name, knob in knobs.items()}


def check_effects(config: dict, given: set[str], argv: list[str], looped: bool) -> list[str]:
    """Return warnings of options in config files without effect; ValueError for argv's.

    given: the options that were set. With use_model_baseline those of loops are no mistake.
    """
    reasons = without_effect(config, looped or config["use_model_baseline"])
    idle = [name for name in reasons if name in given and config[name] != defaults()[name]]
    typed = {argument.removeprefix("--").split("=")[0] for argument in argv}
    for name in idle:
        if name in typed:
            raise ValueError(f"{name}={show(config[name])}: has no effect, {reasons[name]}")
    if not idle:
        return []
    return ["without effect: " + ", ".join(f"{name} ({reasons[name]})" for name in idle)]


def warnings_of(config: dict, given: set[str], argv: list[str], model: GPTConfig) -> list[str]:
    """Return all that is legal and yet worth a line when a run starts."""
    warnings = check_effects(config, given, argv, looped=bool(model.groups))
    if objective_of(config) != config["objective"]:
        warnings.append(f"objective={config['objective']} needs loops; the baseline trains next")
    return warnings + schedule_warnings(config) + plain_gpt_hints(model)


def plain_gpt_hints(config: GPTConfig) -> list[str]:
    """Return what to say of a core that is looped once: it has parts that a plain GPT has not."""
    off = all(getattr(config, name) == value for name, value in LOOP_OFF.items())
    if not config.groups or max(config.counts()) > 1 or config.loop_sampling != "fixed" or off:
        return []
    plain = f"--n_layer={config.n_physical} or --use_model_baseline"
    return [f"one loop of a core with an injection and a norm is no plain GPT; {plain} is"]


def objective_of(config: dict) -> str:
    """Return the objective that is trained; of the baseline of a looped config "next"."""
    baseline = config["use_model_baseline"] and config["objective"] != "next"
    if not baseline:
        return config["objective"]
    allowed = "another one with use_model_baseline: nothing but the exit gate would be trained"
    require("objective", config["objective"], config["objective"] != "exit_gate", allowed)
    return "next"
