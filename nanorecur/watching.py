"""
Looking at a run while it is at work: something is made again whenever there is a new checkpoint.

    watch(Path("out"), 30, make)  # make(True) at each new checkpoint, make(False) at the end

Only reads the run's folder.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from nanorecur import checkpoint


def watch(folder: Path, seconds: float, make: Callable[[bool], bool]) -> None:
    """Call make(True) at each new checkpoint of a run, and make(False) when the run has ended.

    make: returns whether it could; where not it is asked again after so many seconds. Ctrl-C ends
    the watching as the end of the run does.
    """
    shown, had_ended = None, False
    try:
        while True:  # the end is logged before the last checkpoint is written: look twice
            ended, newest = has_ended(folder), time_of_checkpoint(folder)
            if newest != shown and make(True):
                shown = newest
            elif had_ended:
                break
            had_ended = ended
            time.sleep(seconds)
    except KeyboardInterrupt:
        print(f"no longer watching {folder}, once more")
    make(False)


def has_ended(folder: Path) -> bool:
    """Return True where a run has logged its last evaluation."""
    max_iters = json.loads((folder / "config.json").read_text())["max_iters"]
    return checkpoint.is_finished(folder, max_iters, max_iters)


def time_of_checkpoint(folder: Path) -> int | None:
    """Return when the newest checkpoint was written, None before the first."""
    try:
        return (folder / checkpoint.NEWEST).stat().st_mtime_ns
    except FileNotFoundError:  # also for a moment where the file system has no hard links
        return None


def run_behind(command: list[str]) -> bool:
    """Run a command that leaves the processor to the training; return whether it succeeded."""
    if shutil.which("nice"):
        command = ["nice", *command]
    # in a session of its own Ctrl-C does not reach it: whoever waits here ends it
    return subprocess.run(command, start_new_session=True).returncode == 0
