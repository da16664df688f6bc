"""
Everything that can happen to a run, many times over, and a table of what failed:

    python tests/torture.py                       every row at its full count, an hour on two cores
    python tests/torture.py --trials=5            at most so many trials in each row
    python tests/torture.py --rows=killed,locked  some rows

A row is a function that yields a text for each trial: "" where all was as it should be, else what
was not. test_robust.py runs the same functions a few times. Needs Linux (it looks into /proc), and
no GPU.
"""

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import hostile
import torch
from conftest import ROOT, TRAIN, prose
from forked import CONTEXT, PATIENCE, begin, end, kill, start, start_two, tail, wait

from configurator import configure
from nanorecur import checkpoint
from nanorecur.dataset import write_dataset
from nanorecur.objectives import Objective

# -----------------------------------------------------------------------------
trials = 0  # at most so many in each row; 0: each row's own number
rows = ""  # names of rows with commas between them; none: all
seed = 1


def main():
    configure(globals())
    random.seed(seed)
    wanted = rows.split(",") if rows else list(ROWS)
    if not set(wanted) <= set(ROWS):
        sys.exit(f"rows={rows}: must be of {', '.join(ROWS)}")
    table, failed = ["| what | trials | failures | 95 % bound |", "|---|---|---|---|"], False
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder)
        for name in wanted:
            words, row, count = ROWS[name]
            COUNTS.clear()
            done = failures = 0
            begun = time.monotonic()
            for wrong in row(place, min(trials or count, count)):
                done, failures = done + 1, failures + bool(wrong)
                print(f"{name} {done}: {wrong or 'ok'}", flush=True)
            table.append(f"| {words} | {done} | {failures} | {min(1, 3 / done):.3f} |")
            failed = failed or failures > 0
            print(f"{name}: {time.monotonic() - begun:.0f} s, {dict(COUNTS)}", flush=True)
    print("\n" + "\n".join(table))
    sys.exit(failed)


# -----------------------------------------------------------------------------
# the run that is tortured

STEPS = 24
SHORT = [*TRAIN, f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}"]
SHORT += ["--eval_interval=6", "--save_interval=4", "--init_from=auto"]
NOISY = """
    --dropout=0.2 --loop_noise_scale=1 --state_init=noise --loop_sampling=poisson --predict_ahead
    --optimizer=muon --ema_decay=0.9 --spectral_clip_beta=0.5 --eval_loops=1,4 --spike_factor=3
""".split()
CLOCK = ("ms", "tokens_per_second", "mfu", "elapsed")
COUNTS = Counter()  # of a row, for its last line


class Place:
    """A corpus and a folder for runs, with the arguments of train.py that use them."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.data, self.source = self.folder / "data", self.folder / "source"
        self.count = 0
        self.data.mkdir()
        self.source.mkdir()
        texts = {"train": [prose(1, 10000)], "val": [prose(2, 3000)]}
        write_dataset(self.data, {"tokenizer": "bytes"}, texts)
        for part in range(2):
            documents = [prose(random.Random(part * 1000 + i).random(), 30) for i in range(60)]
            lines = [json.dumps({"text": document}) + "\n" for document in documents]
            (self.source / f"{part}.jsonl").write_text("".join(lines))
        script = (ROOT / "data" / "wikipedia" / "prepare.py").read_text()
        script = script.replace('tokenizer = "gpt2"', 'tokenizer = "bytes"')
        script = re.sub("val_share = [0-9.]+", "val_share = 0.2", script)
        (self.source / "prepare.py").write_text(script)

    def new(self):
        """Return (out_dir, file for what is printed) of a new run."""
        self.count += 1
        path = self.folder / f"{self.count}"
        path.mkdir()
        return path / "out", path / "printed"

    def call(self, out, *options, stream=False):
        """Return the arguments of train.py."""
        source = [f"--dataset={self.data}"]
        if stream:
            files = f"--input_files={self.source}/*.jsonl"
            source = [f"--dataset={self.source}", "--stream", files]
        return [*source, *SHORT, f"--out_dir={out}", *options]

    def undisturbed(self, *options, processes=1, stream=False):
        """Return (out_dir, seconds) of a run that is left alone."""
        out, printed = self.new()
        begun = time.monotonic()
        codes = end(begin(printed, processes, self.call(out, *options, stream=stream)))
        assert codes == [0] * processes, tail(printed)
        return out, time.monotonic() - begun


# -----------------------------------------------------------------------------
# what a run leaves


def log(folder):
    """Return the complete lines of a run's log, without the clock."""
    path, entries = Path(folder, "log.jsonl"), []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append({k: v for k, v in json.loads(line).items() if k not in CLOCK})
        except ValueError:  # the last line is being written
            pass
    return entries


def made(folder):
    """Return the last step that the log has, or -1."""
    return max((entry["iter"] for entry in log(folder) if "lr" in entry), default=-1)


def wait_for_step(folder, step, processes):
    """Wait until a run has made a step, or one of its processes has ended."""
    wait(lambda: made(folder) >= step, processes)


def newest(folder):
    """Return the step of the last checkpoint, or 0."""
    return next((entry["iter_num"] for entry in checkpoint.read_manifest(folder)), 0)


def saved_at(folder):
    """Return the step of the checkpoint that loads, or 0."""
    return checkpoint.load(folder)["iter_num"] if checkpoint.exists(folder) else 0


def difference(a, b, where=""):
    """Return the first place where nested dicts, lists and tensors differ by a bit, or "".

    Times may differ.
    """
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return "" if equal else where
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return where
        places = [difference(a[key], b[key], f"{where}.{key}") for key in a if key not in CLOCK]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return where
        places = [difference(x, y, f"{where}.{i}") for i, (x, y) in enumerate(zip(a, b))]
    else:
        both_nan = a != a and b != b
        places = [] if a == b or both_nan else [where]
    return next(filter(None, places), "")


def apart(folder, other):
    """Return where the checkpoints and logs of two runs differ, or ""."""
    a, b = (checkpoint.load(out) for out in (folder, other))
    a["config"] = b["config"] = {}  # it names out_dir
    return difference(a, b, "ckpt") or difference(log(folder), log(other), "log")


def unless_ended_well(codes, printed):
    """Return "" for exit codes that are all 0, else what was printed."""
    return "" if not any(code != 0 for code in codes) else f"ended with {codes}: {tail(printed)}"


# -----------------------------------------------------------------------------
# killed


def killed(place, trials, processes=1):
    """Kill a run at up to three random moments and start it again each time."""
    expected, seconds = place.undisturbed(*NOISY, processes=processes, stream=True)
    for _ in range(trials):
        out, printed = place.new()
        call, moments = place.call(out, *NOISY, stream=True), []
        for aim in random.sample(("anywhere", "save", "evaluation"), 3):
            moments.append(strike(begin(printed, processes, call), out, aim, seconds))
        codes = end(begin(printed, processes, call))
        wrong = unless_ended_well(codes, printed) or apart(expected, out)
        COUNTS["kills"] += sum(map(bool, moments))
        COUNTS["of them in a save"] += sum("save" in moment for moment in moments)
        COUNTS["of them in an evaluation"] += sum("evaluation" in moment for moment in moments)
        yield wrong and f"killed {', '.join(moments)}: {wrong}"


def killed_two(place, trials):
    """Kill one or both of two gloo processes."""
    yield from killed(place, trials, processes=2)


def strike(group, out, aim, seconds):
    """Kill processes at a random moment; return which it was, or "" if the run had ended.

    aim: anywhere, save or evaluation. seconds: what an undisturbed run takes.
    """
    part, path = Path(out, "ckpt.pt.part"), Path(out, "log.jsonl")
    begun, saved = time.time_ns(), newest(out)
    if aim == "anywhere":
        moment = time.monotonic() + random.uniform(0, seconds * (1.2 - saved / STEPS))
        wait(lambda: time.monotonic() > moment, group)
    else:
        every = {"save": 2, "evaluation": 6}[aim]
        steps = [step for step in range(every, STEPS + 1, every) if step > saved]
        step = random.choice(steps or [STEPS])

        def is_there():
            writes = path.exists() and path.stat().st_mtime_ns > begun
            return writes and made(out) >= step - 1

        wait(is_there, group)
        if aim == "save":
            wait(part.exists, group)
        else:
            time.sleep(random.uniform(0, 0.03))
    alive = [process for process in group if process.is_alive()]
    if not alive:
        return ""
    for process in random.sample(alive, random.randint(1, len(alive))):
        process.kill()
    end(group, 60)  # the other one ends by itself
    moment = f"after step {made(out)}"
    if part.exists():
        return moment + " in a save"
    if made(out) in range(5, STEPS, 6) and "lr" in log(out)[-1]:
        return moment + " in an evaluation"
    return moment


def restarted(place, trials):
    """Kill a process of torchrun --max-restarts: the run comes back by itself and ends well."""
    expected, _ = place.undisturbed(*NOISY, processes=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node=2", "--max-restarts=2", "train.py"]
    for _ in range(trials):
        out, printed = place.new()
        command = [*launcher, *place.call(out, *NOISY)]
        with open(printed, "w") as file:
            job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        step = random.randrange(STEPS - 6)
        if not wait_for_job(out, step, job):
            yield tail(printed)
            continue
        time.sleep(random.uniform(0, 0.05))
        os.kill(random.choice(children(job.pid)), signal.SIGKILL)
        try:
            code = job.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = job.kill()
        yield unless_ended_well([code], printed) or apart(expected, out)


def wait_for_job(out, step, job):
    """Wait until a run has made a step or its subprocess has ended; return whether it has."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and job.poll() is None:
        if made(out) >= step:
            return True
        time.sleep(0.001)
    return False


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def dead(place, trials):
    """Kill one of two processes without torchrun: the other ends within a minute, too."""
    for _ in range(trials):
        out, printed = place.new()
        group = start_two(printed, *place.call(out, "--max_iters=100000", "--log_interval=1"))
        step = random.randrange(40)
        wait_for_step(out, step, group)
        group[random.randrange(2)].kill()
        codes = end(group, 60)
        yield f"exit codes {codes}" if None in codes or 0 in codes else ""


# -----------------------------------------------------------------------------
# damaged files, full disks


def damaged(place, trials):
    """Damage a file of a run: it is named, and the one before it used. trials: of each kind."""
    out, _ = place.undisturbed()
    files = {path.name: path.read_bytes() for path in out.glob("ckpt*")}
    steps = [checkpoint.load(out / name)["iter_num"] for name in ("ckpt.pt", "ckpt_prev.pt")]
    for kind, damage in DAMAGES.items():
        for _ in range(trials if kind in ("bit", "cut") else min(trials, 2)):
            torn = files | {"ckpt.pt": damage(files["ckpt.pt"])}
            yield after_damage(out, torn, steps[1:], "ckpt.pt: ", kind)
    for kind, damage in DAMAGES.items():  # the checkpoints are used, unverified if need be
        torn = files | {"ckpt.json": damage(files["ckpt.json"])}
        yield after_damage(out, torn, steps, "ckpt", f"manifest: {kind}")


def with_a_bit_flipped(data):
    bit, data = random.randrange(8 * len(data)), bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


DAMAGES = {
    "bit": with_a_bit_flipped,
    "cut": lambda data: data[: random.randrange(len(data))],
    "longer": lambda data: data + random.randbytes(random.randint(1, 99)),
    "empty": lambda data: b"",
    "gone": lambda data: None,
    "another": lambda data: random.randbytes(random.randint(1, 2 * len(data))),
}


def after_damage(out, files, expected, words, kind):
    """Return what is wrong with how a folder with these files loads, or "".

    expected: steps of which one is loaded. words: what is said of it on stderr.
    """
    for name, data in files.items():
        Path(out, name).unlink(missing_ok=True)
        if data is not None:
            Path(out, name).write_bytes(data)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            loaded = checkpoint.load(out)["iter_num"]
    except ValueError as error:
        return f"{kind}: {error}"
    is_named = words in said.getvalue() or kind == "manifest: bit"  # it may be in a hash or not
    if loaded in expected and is_named:
        return ""
    return f"{kind}: loaded {loaded}, said {said.getvalue()!r}"


def full(place, trials):
    """Take room, or the right to write, from a run at a random moment.

    The checkpoint stays, the message is clear, the exit code 2; with room again the run ends well.
    """
    expected, _ = place.undisturbed()
    size = Path(expected, "ckpt.pt").stat().st_size
    for trial in range(trials):
        out, printed = place.new()
        call = place.call(out)
        first = end([start(printed, *call, f"--max_iters={random.randint(5, 12)}")])
        assert first == [0], tail(printed)
        before, printed = saved_at(out), f"{printed}2"
        if trial % 2:
            limit = random.randint(size // 20, size - 1)
            codes = end([start(printed, *call, prepare=(limit_file_size, limit))])
        else:
            process = start(printed, *call, prepare=(give_up_rights,))
            wait_for_step(out, before + 1, [process])
            out.chmod(0o555)
            codes = end([process])
            out.chmod(0o755)
        wrong = after_full(codes, printed, out, before, no_parts=bool(trial % 2))
        codes = end([start(printed, *call)])
        yield wrong or unless_ended_well(codes, printed) or apart(expected, out)


def after_full(codes, printed, out, before, no_parts):
    """Return what is wrong with how a run ended that could not write, or "".

    before: the step that it went on from. no_parts: whether half-written files must be gone.
    """
    lines = Path(printed).read_text().strip().splitlines()
    reason = re.search("train.py: .*(too large|cannot be written|denied)", lines[-1])
    if codes != [2] or "Traceback" in "".join(lines) or not reason:
        return f"exit codes {codes}, {lines[-3:]}"
    parts = [path.name for path in out.glob("*.part")]
    if saved_at(out) < before or (parts and no_parts):
        return f"went from {before} to {saved_at(out)}, {parts} left"
    return ""


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def give_up_rights():
    """Become nobody: root may write everywhere."""
    if os.geteuid() == 0:
        os.seteuid(65534)


# -----------------------------------------------------------------------------
# signals


def signalled(place, trials, processes=1):
    """Send SIGTERM, SIGINT or SIGUSR1 at a random moment.

    The run is saved within a step, has the right exit code, and goes on exactly.
    """
    options = (*NOISY, "--save_interval=0", "--eval_interval=12")
    expected, _ = place.undisturbed(*options, processes=processes)
    for trial in range(trials):
        out, printed = place.new()
        call = place.call(out, *options)
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[trial % 3]
        group, step = begin(printed, processes, call), random.randrange(STEPS - 2)
        wait_for_step(out, step, group)
        time.sleep(random.uniform(0, 0.02))
        os.kill(random.choice(group).pid, number)
        seen = made(out)
        wrong = answer(group, out, number, seen)
        codes = end(begin(printed, processes, call))
        wrong = wrong or unless_ended_well(codes, printed) or apart(expected, out)
        yield wrong and f"{number.name} after step {seen}: {wrong}"


def signalled_two(place, trials):
    """Send a signal to one of two gloo processes."""
    yield from signalled(place, trials, processes=2)


def answer(group, out, number, seen):
    """Return what is wrong with how processes answer to a signal after step seen, or ""."""
    expected = [128 + number]
    if number == signal.SIGUSR1:
        part = Path(out, "ckpt.pt.part")

        def saved_or_not():
            return (newest(out) > seen and not part.exists()) or made(out) > seen + 2

        wait(saved_or_not, group)
        kill(group)
        expected = [0, -signal.SIGKILL, 1]  # 1: it found the other one dead
    codes = end(group, 60)
    if not set(codes) <= set(expected):
        return f"exit codes {codes}"
    saved = saved_at(out)
    return "" if seen + 1 <= saved <= seen + 2 or saved == STEPS else f"saved at {saved}"


def interrupted(place, trials):
    """Send SIGTERM in a long evaluation, which is not waited for."""
    long = ("--eval_interval=5", "--eval_iters=1000", "--eval_loops=64,63,62,61,60")
    for _ in range(trials):
        out, printed = place.new()
        end([start(printed, *place.call(out, "--max_iters=4"))])
        process = start(printed, *place.call(out, *long), "--save_interval=0")
        wait_for_step(out, 4, [process])
        time.sleep(random.uniform(0, 0.3))
        process.terminate()
        begun = time.monotonic()
        (code,) = end([process])
        took, saved = time.monotonic() - begun, saved_at(out)
        if code == 143 and took < 5 and saved == 5:
            yield ""
        else:
            yield f"exit code {code} after {took:.1f} s, saved at {saved}: {tail(printed)}"


# -----------------------------------------------------------------------------
# layouts


def layouts(place, trials):
    """Compare (4 x 2), (8 x 1), (1 x 8) and two processes, and go from two to one and back."""
    options = ("--max_iters=20", "--eval_interval=20", "--save_interval=5")
    options += ("--learning_rate=1e-3", "--min_lr=1e-4", "--loop_sampling=poisson")
    for trial in range(trials):
        seeded = (*options, f"--seed={trial}")
        expected, _ = place.undisturbed(*seeded)
        for batch, steps in ((8, 1), (1, 8)):
            layout = (f"--batch_size={batch}", f"--gradient_accumulation_steps={steps}")
            other, _ = place.undisturbed(*seeded, *layout)
            yield far(expected, other)
        other, _ = place.undisturbed(*seeded, processes=2)
        yield far(expected, other)
        out, printed = place.new()
        for processes, stop in ((2, 7), (1, 13), (2, 20)):
            call = place.call(out, *seeded, f"--max_iters={stop}")
            codes = end(begin(printed, processes, call))
        yield unless_ended_well(codes, printed) or far(expected, out)


def far(folder, other):
    """Return "" where the 20 losses of two runs are within 1e-6, else how far apart they are."""
    a, b = (
        {entry["iter"]: entry["loss"] for entry in log(out) if "loss" in entry}
        for out in (folder, other)
    )
    if a.keys() != b.keys() or len(a) != 20:
        return f"steps {[*a]} and {[*b]}"
    worst = max(abs(a[step] / b[step] - 1) for step in a)
    name = "largest relative difference of a loss"
    COUNTS[name] = max(COUNTS[name], worst)
    return "" if worst <= 1e-6 else f"losses differ by {worst:.1e}"


# -----------------------------------------------------------------------------
# bad gradients


def poisoned(place, trials):
    """Put NaN, Inf or a spike into one micro-step of one process, then into all micro-steps.

    All processes skip that step alike, and weights, moments and average stay as they were; at last
    the run stops, and its last checkpoint is good.
    """
    options = (*NOISY, "--max_iters=130", "--eval_interval=200", "--eval_iters=1")
    options += ("--save_interval=1", "--keep_last=131", "--spike_factor=20")
    for trial in range(trials):
        how = ("nan", "inf", "gradient", "spike")[trial % 4]
        processes = 1 + (trial + trial // 4) % 2
        out, printed = place.new()
        at = random.randint(105, 125) if how == "spike" else random.randint(0, 10)
        stop = () if how == "spike" else ("--max_iters=13",)
        call = place.call(out, *options, *stop)
        if processes == 2:  # one micro-step of each process in a step
            group = start_two(printed, *call, prepare=(poison, how, at, at + 1))
        else:
            group = [start(printed, *call, prepare=(poison, how, 2 * at, 2 * at + 1))]
        wrong = unless_ended_well(end(group), printed)
        yield wrong or skipped_alone(out, at, how) or stays_good(place, how)


def poison(how, first, stop):
    """Let the calls of the objective in training from number first to stop go wrong."""
    forward, calls = Objective.forward, iter(range(10**9))

    def poisoned_forward(self, *args, **kwargs):
        loss, logged = forward(self, *args, **kwargs)
        if not self.training or not first <= next(calls) < stop:
            return loss, logged
        if how == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, logged
        if how == "inf":  # the gradient is as it was
            return loss + float("inf"), logged
        return loss * {"nan": float("nan"), "spike": 1e6}[how], logged

    Objective.forward = poisoned_forward


def skipped_alone(out, at, how):
    """Return "" where step at, and no other, left everything as it was, else what is wrong."""
    skips = [entry["iter"] for entry in log(out) if "skipped" in entry]
    if skips != [at]:
        return f"{how} at step {at}: skipped {skips}"
    saved = {}
    for path in [out / "ckpt.pt", out / "ckpt_prev.pt", *checkpoint.older_than_previous(out)]:
        ckpt = checkpoint.load(path)
        moments = ckpt["optimizer"]["adamw"]["state"]
        parts = {"model": ckpt["model"], "training_model": ckpt["training_model"]}
        saved[ckpt["iter_num"]] = {**parts, "moments": moments}
    if at:
        where = difference(saved[at], saved[at + 1])
        if where:
            return f"{how} at step {at}: {where} differs"
    if not difference(saved[at + 1]["model"], saved[at + 2]["model"]):
        return f"{how}: step {at + 1} was not made either"
    return ""


def stays_good(place, how):
    """Return what is wrong with a run in which all is poison from step 6 on, or ""."""
    if how == "spike":
        return ""
    out, printed = place.new()
    call = place.call(out, *NOISY, "--max_skips=3")
    codes = end([start(printed, *call, prepare=(poison, how, 12, 10**9))])
    kept, stopped = checkpoint.load(out), made(out)
    good = kept["iter_num"] == stopped == 8 and kept["health"]["skipped"] == 2
    if codes == [1] and good and "skipped" in tail(printed):
        return ""
    return f"{codes}, saved at {kept['iter_num']}, went to {stopped}: {tail(printed)}"


# -----------------------------------------------------------------------------
# resources, locks, hostile files


def long_run(place, trials, steps=2000):
    """Compare memory, open files and temporary files early and late in a run of many steps."""
    options = (f"--max_iters={steps}", "--eval_interval=50", "--save_interval=10")
    options += ("--log_interval=10",)
    for _ in range(trials):
        out, printed = place.new()
        temporary = out.with_name("temporary")
        temporary.mkdir()
        process = start(printed, *place.call(out, *options), TMPDIR=str(temporary))
        early, late = (use_of(process, out, step) for step in (steps // 4, steps - 50))
        codes, files = end([process]), sorted(os.listdir(out))
        COUNTS["MiB gained after a quarter of the steps"] = round((late[0] - early[0]) / 2**20, 2)
        flat = late[0] - early[0] < 4 * 2**20 and late[1] == early[1] and not os.listdir(temporary)
        expected = ["ckpt.json", "ckpt.pt", "ckpt_prev.pt", "config.json", "lock", "log.jsonl"]
        expected.append("sessions.jsonl")
        wrong = "" if flat and files == expected else f"{early}, then {late}, {files}"
        yield unless_ended_well(codes, printed) or wrong


def use_of(process, out, step):
    """Return (bytes resident, open files) of a process when it has made a step."""
    wait(lambda: made(out) >= step or time.sleep(0.05), [process], 600)
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize(), len(os.listdir(f"/proc/{process.pid}/fd"))


def locked(place, trials):
    """Start a second run in the folder of a first: it is refused and changes nothing.

    When the first is killed, the folder is free.
    """
    for trial in range(trials):
        out, printed = place.new()
        first = start(printed, *place.call(out, "--max_iters=100000"))
        wait_for_step(out, 2, [first])
        fresh = ["--init_from=scratch"] if trial % 2 else []
        codes = end([start(f"{printed}2", *place.call(out), *fresh)])
        alive, words = first.is_alive(), tail(f"{printed}2")
        kill([first])
        refused = codes == [2] and "\n" not in words and "out_dir" in words
        wrong = "" if refused and alive else f"exit codes {codes}: {words}"
        again = end([start(printed, *place.call(out, f"--max_iters={saved_at(out) + 1}"))])
        yield wrong or unless_ended_well(again, printed)


def hostile_files(place, trials):
    """Try files, options and prompts that mean no good."""
    yield from in_a_process(hostile.play, place.folder, trials)


def fuzzed(place, trials):
    """Try options, loop groups, meta.json and GPTConfig at random."""
    yield from in_a_process(hostile.fuzz, place.folder, trials)


def in_a_process(function, folder, trials):
    """Yield what a generator yields in a process of its own, and one more text if it died."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=send_all, args=(function, folder, trials, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            yield ours.recv()
    except EOFError:
        process.join()
    if process.exitcode:
        yield f"the process ended with {process.exitcode}"


def send_all(function, folder, trials, pipe):
    for text in function(folder, trials):
        pipe.send(text)


# -----------------------------------------------------------------------------
ROWS = {  # name: (what the table says, the row, trials)
    "killed": ("SIGKILL at up to 3 moments of a run: resumed bit for bit", killed, 50),
    "killed_two": ("the same on 2 processes", killed_two, 50),
    "damaged": ("a damaged file: named, the one before it used", damaged, 20),
    "full": ("disk full or read-only in a save", full, 20),
    "signalled": ("SIGTERM, SIGINT, SIGUSR1", signalled, 30),
    "signalled_two": ("the same on 2 processes", signalled_two, 15),
    "interrupted": ("SIGTERM inside an evaluation", interrupted, 10),
    "restarted": ("torchrun --max-restarts, one process killed", restarted, 10),
    "dead": ("one of 2 processes dies: the other ends within a minute", dead, 10),
    "layouts": ("other layouts: losses within 1e-6 after 20 steps", layouts, 3),
    "poisoned": ("NaN, Inf, spikes: skipped alike, never saved", poisoned, 16),
    "long": ("memory and open files over 2,000 steps", long_run, 1),
    "hostile": ("hostile files", hostile_files, 1000),
    "fuzzed": ("fuzzing: a clear error or a model that runs", fuzzed, 300),
    "locked": ("two runs in one folder", locked, 10),
}


if __name__ == "__main__":
    main()
