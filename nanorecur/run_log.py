"""
The log of a run: lines on the terminal, entries in out_dir/log.jsonl, Weights & Biases.
"""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from configurator import clear_errors
from nanorecur import checkpoint


class RunLog:
    """Writes log entries; of several processes only the first writes."""

    def __init__(self, config: dict, iter_num: int, is_first: bool):
        """Cut log.jsonl back to iter_num, from where a run goes on. config: train.py's options."""
        self.is_first = is_first
        self.path = Path(config["out_dir"], "log.jsonl") if not config["eval_only"] else None
        self.bar = self.wandb = None
        if not is_first:
            return
        if self.path:
            checkpoint.cut_log(self.path, iter_num)
            if sys.stderr.isatty():
                self.bar = tqdm(total=config["max_iters"], initial=iter_num, unit="step")
        if config["wandb_log"]:
            import wandb

            self.wandb = wandb
            wandb.init(
                project=config["wandb_project"],
                name=config["wandb_run_name"],
                mode=config["wandb_mode"],
                config=config,
                dir=config["out_dir"],
            )

    def write(self, entry: dict, text: str) -> None:
        """Print a text and write an entry, which has the key "iter"."""
        if not self.is_first:
            return
        self.print(text)
        if self.path:
            with clear_errors(), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        if self.wandb:
            self.wandb.log(entry, step=entry["iter"])

    def print(self, text: str) -> None:
        """Print a text above the progress bar, if there is one."""
        if not self.is_first:
            return
        if self.bar:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def step_done(self) -> None:
        if self.bar:
            self.bar.update()

    def close(self) -> None:
        if self.bar:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()
