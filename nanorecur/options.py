"""
Legal values of train.py's options, as far as they need neither data nor model.
"""

from math import inf

from configurator import check_ranges, require
from nanorecur.parallel import Processes
from nanorecur.recompute import RECOMPUTE

RANGES = {  # option: (least, most)
    "eval_interval": (1, inf),
    "save_interval": (0, inf),
    "keep_last": (2, inf),  # one is whole while the other is written
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
    "min_lr": (0, inf),
    "loop_warmup_iters": (0, inf),
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
    check_schedule(config)
    check_processes(config, processes)


def check_choices(config: dict) -> None:
    """Raise ValueError where an option that has named values has another one."""
    for name, values in CHOICES.items():
        require(name, config[name], config[name] in values, "one of " + ", ".join(values))


def check_schedule(config: dict) -> None:
    """Raise ValueError where the learning rate's iterations are in no order."""
    warmup, hold, decay = (config[f"{part}_iters"] for part in ("warmup", "hold", "lr_decay"))
    if config["decay_lr"]:
        require("lr_decay_iters", decay, decay > warmup, f"more than warmup_iters={warmup}")
    if config["lr_schedule"] == "wsd":
        allowed = f"from warmup_iters={warmup} to less than lr_decay_iters={decay}"
        require("hold_iters", hold, warmup <= hold < decay, allowed)


def check_processes(config: dict, processes: Processes) -> None:
    """Raise ValueError where options do not go with the number of processes."""
    n, micro_steps = processes.world_size, config["gradient_accumulation_steps"]
    allowed = f"a multiple of the {n} processes"
    require("gradient_accumulation_steps", micro_steps, micro_steps % n == 0, allowed)
    if config["shard"]:
        require("shard", True, n > 1, "False in one process: torchrun starts those that share")
        beta = config["spectral_clip_beta"]
        allowed = "0 with shard: no process has a whole matrix"
        require("spectral_clip_beta", beta, beta == 0, allowed)
        by_row = config["loops_per_row"]
        allowed = "False with shard: all processes gather a block together"
        require("loops_per_row", by_row, not by_row, allowed)


def pad_vocab(n_ids: int) -> int:
    """Return the vocabulary of a new model: a large one is padded to a multiple of 64 for GPUs."""
    return n_ids if n_ids < 1024 else -(-n_ids // 64) * 64
