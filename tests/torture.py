"""
Everything that can happen to a run, many times over, and a table of what failed:

    python tests/torture.py                     every row at its full count, an hour on two busy cores
    python tests/torture.py --trials=5          at most so many trials in each row
    python tests/torture.py --rows=killed,lock  some rows

Each row is a function that yields a text for each trial: "" where all was as it should be, else what was not.
test_robust.py runs the same functions a few times. Needs Linux (it looks into /proc), and no GPU.
"""

import io
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import hostile
import torch
from conftest import TRAIN, prose
from tqdm import tqdm

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
    wanted, table = rows.split(",") if rows else list(ROWS), []
    if not set(wanted) <= set(ROWS):
        sys.exit(f"rows={rows}: must be of {', '.join(ROWS)}")
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
            print(f"{name}: {time.monotonic() - begun:.0f} s, {dict(COUNTS)}", flush=True)
    print("\n| what | trials | failures | 95 % bound |\n|---|---|---|---|\n" + "\n".join(table))
    sys.exit(any(not line.endswith("| 0 |") and "| 0 | " not in line for line in table))


# -----------------------------------------------------------------------------
# the run that is tortured

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
SHORT = [
    *TRAIN,
    f"--max_iters={STEPS}",
    f"--lr_decay_iters={STEPS}",
    "--eval_interval=6",
    "--save_interval=4",
    "--init_from=auto",
]
NOISY = (
    "--dropout=0.2 --loop_noise_scale=1 --state_init=noise --loop_sampling=poisson --predict_ahead --optimizer=muon "
    "--ema_decay=0.9 --spectral_clip_beta=0.5 --eval_loops=1,4 --spike_factor=3"
).split()
CLOCK = ("ms", "tokens_per_second", "mfu")
COUNTS = Counter()  # of a row, for its last line
PATIENCE = 120  # seconds after which a process that should have ended is a failure

# -----------------------------------------------------------------------------
# processes: forked from one that has imported torch, so that a trial costs a second and not six

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torture", "datasets", "torch._dynamo", "torch.distributed", "tqdm"]
)


def play(arguments, output, environment, prepare):
    """train.py in this process, as from the command line; prepare is called before."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["train.py", *map(str, arguments)]
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore of the system, which a killed process would leave there
    if prepare:
        prepare[0](*prepare[1:])
    runpy.run_path("train.py", run_name="__main__")


def start(output, *arguments, prepare=(), **environment):
    process = CONTEXT.Process(target=play, args=(arguments, output, environment, prepare))
    process.start()
    return process


def start_two(output, *arguments, prepare=()):
    """Two gloo processes as torchrun starts them. prepare: of the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    each = [dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    return [start(output, *arguments, prepare=prepare * rank, **each[rank]) for rank in range(2)]


def begin(output, processes, arguments):
    return start_two(output, *arguments) if processes == 2 else [start(output, *arguments)]


def end(processes, within=PATIENCE):
    """Their exit codes; whoever has not ended by then is killed, None."""
    until, codes = time.monotonic() + within, []
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        codes.append(process.exitcode)
    kill(processes)
    return codes


def kill(processes):
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def wait(condition, processes, within=PATIENCE):
    """Until the condition holds or a process has ended; whether it held."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if condition():
            return True
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.0005)
    return False


# -----------------------------------------------------------------------------
# what a run leaves


def log(folder):
    """The lines of its log that are whole, without the clock."""
    path, entries = Path(folder, "log.jsonl"), []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append({k: v for k, v in json.loads(line).items() if k not in CLOCK})
        except ValueError:  # being written
            pass
    return entries


def made(folder):
    """The last step that the log has, or -1."""
    return max((entry["iter"] for entry in log(folder) if "lr" in entry), default=-1)


def difference(a, b, where=""):
    """The first place where nested dicts, lists and tensors differ, bit for bit, or ""."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return "" if same else where
    if isinstance(a, dict):
        places = (
            [difference(a[key], b[key], f"{where}.{key}") for key in a]
            if a.keys() == getattr(b, "keys", list)()
            else [where]
        )
    elif isinstance(a, (list, tuple)):
        places = (
            [difference(x, y, f"{where}.{i}") for i, (x, y) in enumerate(zip(a, b))]
            if len(a) == len(b)
            else [where]
        )
    else:
        places = [] if a == b or a != a and b != b else [where]  # NaN is NaN
    return next(filter(None, places), "")


def apart(folder, other):
    """Where the checkpoints and logs of two runs differ, or ""."""
    a, b = (
        {k: v for k, v in checkpoint.load(each).items() if k != "config"}
        for each in (folder, other)
    )
    return difference(a, b, "ckpt") or difference(log(folder), log(other), "log")


def newest(folder):
    """The step of its last checkpoint, or 0."""
    return next((entry["iter_num"] for entry in checkpoint.read_manifest(folder)), 0)


def tail(output):
    return Path(output).read_text(errors="replace").strip()[-300:]


class Place:
    """A corpus and a folder for runs, with what they are called with."""

    def __init__(self, folder):
        self.folder, self.data, self.source = (
            Path(folder),
            Path(folder, "data"),
            Path(folder, "source"),
        )
        self.data.mkdir()
        self.source.mkdir()
        texts = {"train": [prose(1, 10000)], "val": [prose(2, 3000)]}
        write_dataset(self.data, {"tokenizer": "bytes"}, texts)
        for part in range(2):
            documents = [prose(random.Random(part * 1000 + i).random(), 30) for i in range(60)]
            lines = [json.dumps({"text": document}) + "\n" for document in documents]
            Path(self.source, f"{part}.jsonl").write_text("".join(lines))
        text = (
            (ROOT / "data" / "wikipedia" / "prepare.py")
            .read_text()
            .replace('tokenizer = "gpt2"', 'tokenizer = "bytes"')
        )
        Path(self.source, "prepare.py").write_text(
            re.sub("val_share = [0-9.]+", "val_share = 0.2", text)
        )
        self.count = 0

    def new(self):
        self.count += 1
        path = self.folder / f"{self.count}"
        path.mkdir()
        return path / "out", path / "printed"

    def call(self, out, *options, stream=False):
        source = [f"--dataset={self.source}", "--stream", f"--input_files={self.source}/*.jsonl"]
        return [
            *(source if stream else [f"--dataset={self.data}"]),
            *SHORT,
            f"--out_dir={out}",
            *options,
        ]

    def undisturbed(self, *options, processes=1, stream=False):
        """(folder, seconds) of a run to its end."""
        out, printed = self.new()
        begun = time.monotonic()
        codes = end(begin(printed, processes, self.call(out, *options, stream=stream)))
        assert codes == [0] * processes, tail(printed)
        return out, time.monotonic() - begun


# -----------------------------------------------------------------------------
# rows: each yields "" or what went wrong, once for each trial


def killed(place, trials, processes=1):
    """Killed at up to three random moments, anywhere, in a save and in an evaluation, and started again each time."""
    whole, seconds = place.undisturbed(*NOISY, processes=processes, stream=True)
    for _ in range(trials):
        out, printed = place.new()
        call, moments = place.call(out, *NOISY, stream=True), []
        for aim in random.sample(("anywhere", "save", "evaluation"), 3):
            moments.append(strike(begin(printed, processes, call), out, aim, seconds))
        codes = end(begin(printed, processes, call))
        wrong = (
            apart(whole, out)
            if codes == [0] * processes
            else f"ended with {codes}: {tail(printed)}"
        )
        COUNTS["kills"] += sum(map(bool, moments))
        COUNTS["of them in a save"] += sum("save" in moment for moment in moments)
        COUNTS["of them in an evaluation"] += sum("evaluation" in moment for moment in moments)
        yield wrong and f"killed {', '.join(moments)}: {wrong}"


def killed_two(place, trials):
    """The same on two gloo processes, of which one or both are killed."""
    yield from killed(place, trials, processes=2)


def strike(group, out, aim, seconds):
    """Kill a group of processes at a random moment; says where that was, or "" if it had ended by itself."""
    part, path, begun, clock = (
        Path(out, "ckpt.pt.part"),
        Path(out, "log.jsonl"),
        time.time_ns(),
        time.monotonic(),
    )
    saved = newest(out)
    every = {"anywhere": STEPS, "save": 2, "evaluation": 6}[aim]
    step = random.choice(
        [step for step in range(every, STEPS + 1, every) if step > saved] or [STEPS]
    )
    if aim == "anywhere":
        moment = clock + random.uniform(0, seconds * (1.2 - saved / STEPS))
        wait(lambda: time.monotonic() > moment, group)
    else:
        wait(
            lambda: path.exists() and path.stat().st_mtime_ns > begun and made(out) >= step - 1,
            group,
        )
        time.sleep(random.uniform(0, 0.03)) if aim == "evaluation" else wait(part.exists, group)
    alive = [process for process in group if process.is_alive()]
    for process in random.sample(alive, random.randint(1, len(alive))) if alive else ():
        process.kill()
    end(group, 60)  # whoever is left ends by itself
    evaluating = made(out) in range(5, STEPS, 6) and "lr" in log(out)[-1]
    inside = " in a save" if part.exists() else " in an evaluation" if evaluating else ""
    return f"after step {made(out)}{inside}" if alive else ""


def damaged(place, trials):
    """One of the files of a run is damaged: it is named, and the one before it is used. trials: of each kind."""
    out, _ = place.undisturbed()
    whole = {path.name: path.read_bytes() for path in out.glob("ckpt*")}
    newest, older = (
        checkpoint.load(out / name)["iter_num"] for name in ("ckpt.pt", "ckpt_prev.pt")
    )
    size = len(whole["ckpt.pt"])
    kinds = {
        "bit": lambda data: flipped(data, random.randrange(8 * len(data))),
        "cut": lambda data: data[: random.randrange(len(data))],
        "longer": lambda data: data + random.randbytes(random.randint(1, 99)),
        "empty": lambda data: b"",
        "gone": lambda data: None,
        "another": lambda data: random.randbytes(random.randint(1, 2 * size)),
    }
    for kind, damage in kinds.items():
        for _ in range(trials if kind in ("bit", "cut") else min(trials, 2)):
            yield after_damage(
                out, whole | {"ckpt.pt": damage(whole["ckpt.pt"])}, older, "ckpt.pt: ", kind
            )
    for (
        kind,
        damage,
    ) in kinds.items():  # the list of the files' hashes: they are taken, unverified if need be
        used = after_damage(
            out,
            whole | {"ckpt.json": damage(whole["ckpt.json"])},
            (newest, older),
            "ckpt",
            f"manifest: {kind}",
        )
        yield used


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def after_damage(out, files, expected, words, kind):
    """What is wrong with how a folder with these files loads."""
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
    expected = expected if isinstance(expected, tuple) else (expected,)
    return (
        ""
        if loaded in expected and (words in said.getvalue() or kind == "manifest: bit")
        else f"{kind}: loaded {loaded}, said {said.getvalue()!r}"
    )


def full(place, trials):
    """No room, or no right to write, from a random moment on: the checkpoint stays, a clear message, not exit code 0;
    with room again the run ends where the undisturbed one ends."""
    whole, _ = place.undisturbed()
    size = Path(whole, "ckpt.pt").stat().st_size
    for trial in range(trials):
        out, printed = place.new()
        call = place.call(out)
        assert end([start(printed, *call, f"--max_iters={random.randint(5, 12)}")]) == [0], tail(
            printed
        )
        before, printed = checkpoint.load(out)["iter_num"], f"{printed}2"
        if trial % 2:
            (code,) = end(
                [start(printed, *call, prepare=(no_room, random.randint(size // 20, size - 1)))]
            )
        else:
            process = start(printed, *call, prepare=(no_rights,))
            wait(lambda: made(out) > before, [process])  # noqa: B023
            out.chmod(0o555)
            (code,) = end([process])
            out.chmod(0o755)
        words = Path(printed).read_text().strip().splitlines()
        clear = "Traceback" not in "".join(words) and re.search(
            "train.py: .*(too large|cannot be written|denied)", words[-1]
        )
        wrong = "" if code == 2 and clear else f"exit code {code}, {words[-3:]}"
        kept = checkpoint.load(out)["iter_num"]
        parts = [path.name for path in out.glob("*.part")]
        wrong = wrong or (
            ""
            if kept >= before and not (parts and trial % 2)
            else f"went from {before} to {kept}, {parts} left"
        )
        yield (
            wrong
            or ("" if end([start(printed, *call)]) == [0] else tail(printed))
            or apart(whole, out)
        )


def no_room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_rights():
    """Root may write everywhere without this: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE, then of what this process has."""
    if os.geteuid() == 0:
        os.seteuid(65534)


def signalled(place, trials, processes=1):
    """SIGTERM, SIGINT and SIGUSR1 at random moments: saved within a step, the right exit code, and resumed exactly."""
    whole, seconds = place.undisturbed(
        *NOISY, "--save_interval=0", "--eval_interval=12", processes=processes
    )
    for trial in range(trials):
        out, printed = place.new()
        call = place.call(out, *NOISY, "--save_interval=0", "--eval_interval=12")
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[trial % 3]
        group, step = begin(printed, processes, call), random.randrange(STEPS - 2)
        wait(lambda: made(out) >= step, group)  # noqa: B023
        time.sleep(random.uniform(0, 0.02))
        os.kill(random.choice(group).pid, number)
        seen = made(out)
        wrong = answer(group, out, number, seen)
        codes = end(begin(printed, processes, call))
        wrong = wrong or ("" if codes == [0] * processes else tail(printed)) or apart(whole, out)
        yield wrong and f"{number.name} after step {seen}: {wrong}"


def signalled_two(place, trials):
    """The same on two gloo processes, of which one gets the signal."""
    yield from signalled(place, trials, processes=2)


def answer(group, out, number, seen):
    """What is wrong with how processes answer to a signal that came when step seen had been made."""
    if number == signal.SIGUSR1:
        wait(
            lambda: (
                (newest(out) > seen and not Path(out, "ckpt.pt.part").exists())
                or made(out) > seen + 2
            ),
            group,
        )
        kill(group)
        expected = [0, -signal.SIGKILL, 1]  # 1: it found the other one dead
    else:
        expected = [128 + number]
    codes = end(group, 60)
    if not set(codes) <= set(expected):
        return f"exit codes {codes}"
    saved = checkpoint.load(out)["iter_num"] if checkpoint.exists(out) else 0
    return "" if seen + 1 <= saved <= seen + 2 or saved == STEPS else f"saved at {saved}"


def interrupted(place, trials):
    """SIGTERM inside a long evaluation, which is not waited for."""
    for _ in range(trials):
        out, printed = place.new()
        end([start(printed, *place.call(out, "--max_iters=4"))])
        call = place.call(
            out, "--eval_interval=5", "--eval_iters=1000", "--eval_loops=64,63,62,61,60"
        )
        process = start(printed, *call, "--save_interval=0")
        wait(lambda: made(out) >= 4, [process])  # noqa: B023
        time.sleep(random.uniform(0, 0.3))
        process.terminate()
        begun = time.monotonic()
        (code,) = end([process])
        took, saved = (
            time.monotonic() - begun,
            checkpoint.load(out)["iter_num"] if checkpoint.exists(out) else 0,
        )
        yield (
            ""
            if code == 143 and took < 5 and saved == 5
            else f"exit code {code} after {took:.1f} s, saved at {saved}: {tail(printed)}"
        )


def restarted(place, trials):
    """torchrun --max-restarts with a killed process: it comes back by itself and ends where the undisturbed one ends."""
    whole, _ = place.undisturbed(*NOISY, processes=2)
    for _ in range(trials):
        out, printed = place.new()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--max-restarts=2",
        ]
        with open(printed, "w") as file:
            job = subprocess.Popen(
                [*command, "train.py", *place.call(out, *NOISY)], cwd=ROOT, stdout=file, stderr=file
            )
        step = random.randrange(STEPS - 6)
        if not wait_for(lambda: made(out) >= step, job):  # noqa: B023
            yield tail(printed)
            continue
        time.sleep(random.uniform(0, 0.05))
        os.kill(random.choice(children(job.pid)), signal.SIGKILL)
        try:
            code = job.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = job.kill()
        yield apart(whole, out) if code == 0 else f"exit code {code}: {tail(printed)}"


def wait_for(condition, job):
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and job.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def dead(place, trials):
    """One of two processes dies, started without torchrun: the other ends within a minute, too."""
    for _ in range(trials):
        out, printed = place.new()
        group = start_two(printed, *place.call(out, "--max_iters=100000", "--log_interval=1"))
        step = random.randrange(40)
        wait(lambda: made(out) >= step, group)  # noqa: B023
        group[random.randrange(2)].kill()
        codes = end(group, 60)
        yield "" if None not in codes and 0 not in codes else f"exit codes {codes}"


def layouts(place, trials):
    """(4 x 2), (8 x 1), (1 x 8) and two processes: the same losses, and from two on to one and back."""
    steady = (
        "--max_iters=20",
        "--learning_rate=1e-3",
        "--min_lr=1e-4",
        "--loop_sampling=poisson",
        "--eval_interval=20",
        "--save_interval=5",
    )
    for trial in range(trials):
        steadily = (*steady, f"--seed={trial}")
        whole, _ = place.undisturbed(*steadily)
        for batch, steps in ((8, 1), (1, 8)):
            other, _ = place.undisturbed(
                *steadily, f"--batch_size={batch}", f"--gradient_accumulation_steps={steps}"
            )
            yield far(whole, other)
        other, _ = place.undisturbed(*steadily, processes=2)
        yield far(whole, other)
        out, printed = place.new()
        for processes, stop in ((2, 7), (1, 13), (2, 20)):
            call = place.call(out, *steadily, f"--max_iters={stop}")
            codes = end(begin(printed, processes, call))
        yield far(whole, out) if codes == [0, 0] else tail(printed)


def far(folder, other):
    """Where the losses of two runs are more than 1e-6 apart, or ""."""
    a, b = (
        {entry["iter"]: entry["loss"] for entry in log(each) if "loss" in entry}
        for each in (folder, other)
    )
    worst = (
        max(abs(a[step] / b[step] - 1) for step in a)
        if a.keys() == b.keys() and len(a) == 20
        else 1
    )
    COUNTS["largest relative difference of a loss"] = max(
        COUNTS["largest relative difference of a loss"], worst
    )
    return "" if worst <= 1e-6 else f"losses differ by {worst:.1e}"


def poisoned(place, trials):
    """NaN, Inf or a spike in one micro-step of one process: all skip that step alike, weights, moments and average stay
    as they were; and from some step on in all: the run stops, and the last checkpoint is good."""
    options = (
        *NOISY,
        "--max_iters=130",
        "--eval_interval=200",
        "--save_interval=1",
        "--keep_last=131",
        "--eval_iters=1",
    )
    for trial in range(trials):
        how, processes = (
            ("nan", "inf", "gradient", "spike")[trial % 4],
            1 + (trial + trial // 4) % 2,
        )
        out, printed = place.new()
        at = random.randint(105, 125) if how == "spike" else random.randint(0, 10)
        stop = () if how == "spike" else ("--max_iters=13",)
        call = place.call(out, *options, "--spike_factor=20", *stop)
        first = () if processes == 2 else (poison, how, 2 * at, 2 * at + 1)
        group = (
            start_two(printed, *call, prepare=(poison, how, at, at + 1))
            if processes == 2
            else [start(printed, *call, prepare=first)]
        )
        codes = end(group)
        wrong = "" if codes == [0] * processes else f"exit codes {codes}: {tail(printed)}"
        yield wrong or skipped_alone(out, at, how) or stays_good(place, how, at)


def poison(how, first, stop):
    """Of the calls of the objective in training, those from first to stop go wrong."""
    whole, calls = Objective.forward, iter(range(10**9))

    def forward(self, *args, **kwargs):
        loss, logged = whole(self, *args, **kwargs)
        if not self.training or not first <= next(calls) < stop:
            return loss, logged
        if how == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        if how == "inf":  # the gradient is as it was
            return loss + float("inf"), logged
        return loss * {"nan": float("nan"), "gradient": 1, "spike": 1e6}[how], logged

    Objective.forward = forward


def skipped_alone(out, at, how):
    """Whether step at, and no other, left everything as it was."""
    skips = [entry["iter"] for entry in log(out) if "skipped" in entry]
    if skips != [at]:
        return f"{how} at step {at}: skipped {skips}"
    saved = {}
    for path in [out / "ckpt.pt", out / "ckpt_prev.pt", *checkpoint.older_than_previous(out)]:
        ckpt = checkpoint.load(path)
        saved[ckpt["iter_num"]] = {
            name: ckpt[name] for name in ("model", "training_model", "optimizer")
        }
    if at and difference(
        saved[at]["optimizer"]["adamw"]["state"], saved[at + 1]["optimizer"]["adamw"]["state"]
    ):
        return f"{how} at step {at}: moments differ"
    if at and (
        where := difference(
            {k: saved[at][k] for k in ("model", "training_model")},
            {k: saved[at + 1][k] for k in ("model", "training_model")},
        )
    ):
        return f"{how} at step {at}: {where} differs"
    return (
        ""
        if difference(saved[at + 1]["model"], saved[at + 2]["model"])
        else f"{how}: step {at + 1} was not made either"
    )


def stays_good(place, how, at):
    """All is poison from step 6 on."""
    if how == "spike":
        return ""
    out, printed = place.new()
    codes = end(
        [
            start(
                printed, *place.call(out, *NOISY, "--max_skips=3"), prepare=(poison, how, 12, 10**9)
            )
        ]
    )
    kept, stopped = checkpoint.load(out), made(out)
    fine = (
        codes == [1] and kept["iter_num"] == 8 and kept["health"]["skipped"] == 2 and stopped == 8
    )
    return (
        ""
        if fine and "skipped" in tail(printed)
        else f"{codes}, saved at {kept['iter_num']}, went to {stopped}: {tail(printed)}"
    )


def long_run(place, trials, steps=2000):
    """Resident memory, open files and temporary files over many steps, with saves and evaluations."""
    for _ in range(trials):
        out, printed = place.new()
        temporary = out.with_name("temporary")
        temporary.mkdir()
        process = start(
            printed,
            *place.call(
                out,
                f"--max_iters={steps}",
                "--eval_interval=50",
                "--save_interval=10",
                "--log_interval=10",
            ),
            TMPDIR=str(temporary),
        )
        early, late = (use_of(process, out, step) for step in (steps // 4, steps - 50))
        codes, files = end([process]), sorted(os.listdir(out))
        wrong = "" if codes == [0] else tail(printed)
        COUNTS["MiB gained after a quarter of the steps"] = round((late[0] - early[0]) / 2**20, 2)
        flat = late[0] - early[0] < 4 * 2**20 and late[1] == early[1] and not os.listdir(temporary)
        expected = ["ckpt.json", "ckpt.pt", "ckpt_prev.pt", "config.json", "lock", "log.jsonl"]
        yield wrong or ("" if flat and files == expected else f"{early}, then {late}, {files}")


def use_of(process, out, step):
    """(bytes resident, open files) of a process when it has made a step."""
    wait(lambda: made(out) >= step or time.sleep(0.05), [process], 600)
    resident = (
        int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * resource.getpagesize()
    )
    return resident, len(os.listdir(f"/proc/{process.pid}/fd"))


def locked(place, trials):
    """Two runs in one folder: the second is refused and changes nothing; killed, the first leaves the folder free."""
    for trial in range(trials):
        out, printed = place.new()
        call = place.call(out, "--max_iters=100000")
        first = start(printed, *call)
        wait(lambda: made(out) >= 2, [first])  # noqa: B023
        (code,) = end(
            [
                start(
                    f"{printed}2", *place.call(out), *(["--init_from=scratch"] if trial % 2 else [])
                )
            ]
        )
        alive, words = first.is_alive(), tail(f"{printed}2")
        kill([first])
        wrong = (
            ""
            if code == 2 and alive and "\n" not in words and "out_dir" in words
            else f"exit code {code}: {words}"
        )
        steps = checkpoint.load(out)["iter_num"] if checkpoint.exists(out) else 0
        again = end([start(printed, *place.call(out, f"--max_iters={steps + 1}"))])
        yield wrong or ("" if again == [0] else tail(printed))


def hostile_files(place, trials):
    """Checkpoints, data, configs, options and prompts that mean no good, or so many drawn from them."""
    yield from apart_from_here(hostile.play, place.folder, trials)


def fuzzed(place, trials):
    """Options, loop groups, meta.json and GPTConfig at random: a clear error, or a model that runs."""
    yield from apart_from_here(hostile.fuzz, place.folder, trials)


def apart_from_here(function, folder, trials):
    """The texts that a generator yields in a process of its own, and one more if it died."""
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
