"""
Runs on two hosts, which are network namespaces of this machine (tests/nodes.sh): docs/machines.md.

What is not shown: hosts that vanish without closing their connections, NCCL, more than two hosts.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAIN, losses, train, val_losses
from torch.distributed.run import get_args_parser

from configurator import read_argument, read_knobs

PAGE = ROOT / "docs" / "machines.md"
SCRIPT = ROOT / "tests" / "nodes.sh"
LONG = ("--max_iters=300", "--lr_decay_iters=300", "--save_interval=10", "--eval_interval=100")
PATIENCE = 240  # seconds after which a job that should have ended is a failure
# how soon torchrun takes a silent node for gone, and how long it waits for more than the fewest
SOON = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=5"


def namespaces_work():
    """Return whether this process may make network namespaces."""
    try:
        made = subprocess.run(["bash", SCRIPT, "make", "nr-try"], capture_output=True)
        subprocess.run(["bash", SCRIPT, "remove", "nr-try"], capture_output=True)
    except OSError:  # no bash
        return False
    return made.returncode == 0


@pytest.fixture(scope="module")
def pair():
    """Names of the two hosts."""
    if not namespaces_work():
        pytest.skip("network namespaces are not allowed here")
    name = f"nr{os.getpid()}"
    subprocess.run(["bash", SCRIPT, "make", name], check=True)
    yield f"{name}-a", f"{name}-b"
    subprocess.run(["bash", SCRIPT, "remove", name], check=True)


class Job:
    """A run on two hosts, a torchrun with one process on each."""

    def __init__(self, pair, corpus, out, *options, nnodes="2", hosts=2):
        """nnodes: how many hosts the run needs, or fewest:most. hosts: how many begin."""
        self.pair, self.out, self.nnodes = pair, out, nnodes
        self.options = (f"--dataset={corpus}", f"--out_dir={out}", *TRAIN, *options)
        self.printed = [out.with_name(f"{out.name}_{host}") for host in pair]
        self.nodes = [self.start(i) for i in range(hosts)]

    def start(self, i):
        """Start torchrun on host i, where the first one has the rendezvous."""
        is_host = f"is_host={i == 0}"
        command = ["ip", "netns", "exec", self.pair[i], sys.executable, "-m"]
        command += ["torch.distributed.run", f"--nnodes={self.nnodes}", "--nproc_per_node=1"]
        command += ["--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400"]
        command += [f"--rdzv-id={self.out.name}", f"--local-addr=10.77.0.{i + 1}"]
        command += [f"--rdzv-conf={is_host},{SOON}", "train.py", *self.options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "net0"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with open(self.printed[i], "a") as file:
            return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)

    def kill(self, i):
        """Kill all that runs on host i."""
        command = ["ip", "netns", "pids", self.pair[i]]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def worker(self, i):
        """Return the id of the process that trains on host i."""
        pid = self.nodes[i].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def wait_for_step(self, step):
        """Wait until the log has a step."""
        until = time.monotonic() + PATIENCE
        while self.last_step() < step:
            assert time.monotonic() < until, self.printed[0].read_text()[-2000:]
            time.sleep(0.05)

    def last_step(self):
        """Return the last step in the log, 0 if there is none or a line is half written."""
        try:
            return max(losses(self.out), default=0)
        except (FileNotFoundError, json.JSONDecodeError):
            return 0

    def end(self, *hosts, code=0):
        """Check that torchrun ends on these hosts with an exit code."""
        for i in hosts:
            try:
                ended = self.nodes[i].wait(PATIENCE)
            except subprocess.TimeoutExpired:
                ended = "not ended"
            assert ended == code, self.printed[i].read_text()[-2000:]


@pytest.fixture
def job(pair, corpus, tmp_path):
    """Return a function that starts a job; what still runs in the end is killed."""
    jobs = []

    def start(*options, **settings):
        jobs.append(Job(pair, corpus, tmp_path / "two", *options, **settings))
        return jobs[-1]

    yield start
    for started in jobs:
        started.kill(0)
        started.kill(1)
        for node in started.nodes:
            node.wait()


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The folder of the run on one host, undisturbed."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    assert train(corpus, folder, *LONG).code == 0
    return folder


def wait_until_told_to_end(pid):
    """Wait until a stopped process has a pending SIGTERM."""
    until, pending = time.monotonic() + PATIENCE, 0
    while not pending & 1 << signal.SIGTERM - 1:
        assert time.monotonic() < until
        time.sleep(0.05)
        status = Path(f"/proc/{pid}/status").read_text()
        pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)


def assert_alike(ours, theirs):
    """Compare the losses of all steps and evaluations."""
    assert len(losses(theirs)) == 300
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
    assert val_losses(ours) == pytest.approx(val_losses(theirs), rel=1e-6)


@pytest.mark.slow
def test_a_process_and_a_host_that_die_and_come_back_change_nothing(job, alone):
    run = job(*LONG, "--init_from=auto")
    run.wait_for_step(55)
    os.kill(run.worker(1), signal.SIGKILL)
    run.wait_for_step(105)
    run.kill(1)
    run.nodes[1] = run.start(1)
    run.end(0, 1)
    assert_alike(run.out, alone)


@pytest.mark.slow
def test_a_host_that_comes_later_and_leaves_for_good_changes_nothing(job, alone):
    run = job(*LONG, "--init_from=auto", nnodes="1:2", hosts=1)
    run.wait_for_step(55)
    worker = run.worker(0)
    os.kill(worker, signal.SIGSTOP)  # the run would end before the other host has started
    run.nodes.append(run.start(1))
    wait_until_told_to_end(worker)
    os.kill(worker, signal.SIGCONT)
    run.wait_for_step(105)
    assert "2 x cpu" in run.printed[0].read_text()  # it took part
    run.kill(1)
    run.end(0)
    assert_alike(run.out, alone)


@pytest.mark.slow
def test_a_job_that_is_told_to_end_or_loses_its_rendezvous_goes_on_by_the_same_command(job, alone):
    run = job(*LONG, "--init_from=auto", "--save_interval=0", "--eval_interval=1000")
    run.wait_for_step(55)
    for node in run.nodes:
        node.terminate()
    run.end(0, 1, code=1)
    assert 55 < torch.load(run.out / "ckpt.pt", weights_only=True)["iter_num"] < 300
    run.nodes = [run.start(0), run.start(1)]
    run.wait_for_step(105)
    run.kill(0)
    run.end(1, code=1)
    run.nodes = [run.start(0), run.start(1)]
    run.end(0, 1)
    assert losses(run.out) == pytest.approx(losses(alone), rel=1e-6)


# -----------------------------------------------------------------------------
# Slurm


@pytest.mark.parametrize("code, seconds, again", [(0, 700, False), (1, 700, True), (1, 10, False)])
def test_the_slurm_job_calls_torchrun_and_goes_on_until_the_run_has_ended(
    tmp_path, code, seconds, again
):
    """Stand-ins for srun and scontrol print how they were called."""
    (tmp_path / "srun").write_text(f'#!/bin/bash\necho srun "$@"\nexit {code}\n')
    (tmp_path / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = show ] && printf "host0\\nhost1\\n" || echo scontrol "$@"\n'
    )
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    slurm = dict(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="host[0-1]")
    slurm |= dict(SLURM_GPUS_ON_NODE="8", SECONDS=str(seconds))
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "docs" / "train.sbatch", "config/quickstart.py", "--out_dir=x y"]
    job = subprocess.run(command, env=environment, capture_output=True, text=True)
    called = job.stdout.splitlines()
    assert job.returncode == code
    assert called[1:] == (["scontrol requeue 7"] if again else [])
    assert "--nnodes=2 --nproc_per_node=8" in called[0]
    assert "--rdzv-endpoint=host0:20007" in called[0]
    assert called[0].endswith("train.py config/quickstart.py --out_dir=x y --init_from=auto")
    launcher = called[0].partition("torch.distributed.run ")[2]
    parsed = get_args_parser().parse_args(launcher.split())
    assert parsed.training_script == "train.py"


def test_the_torchrun_of_the_page_is_legal():
    """Its options are torchrun's and train.py's, and its processes share the micro-steps."""
    page = PAGE.read_text().replace("\\\n", "")
    block = re.search(r"^torchrun (.*?)\n```", page, re.M | re.S)
    asked = get_args_parser().parse_args(block[1].split())
    assert asked.training_script == "train.py"
    knobs = read_knobs(ROOT / "train.py") | read_knobs(ROOT / "model.py", "GPTConfig")
    given = {}
    for argument in asked.training_script_args:
        given |= read_argument(argument, knobs)
    processes = int(asked.nnodes) * int(asked.nproc_per_node)
    assert given["gradient_accumulation_steps"] % processes == 0
