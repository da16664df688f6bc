"""
Scripts in processes of their own, forked from one that has imported torch: a start costs a fraction
of a second, not six.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait as wait_for
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
# huggingface_hub, which datasets imports, reads these once; nothing is fetched here
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
OURS = [str(ROOT / "tests"), str(ROOT)]
sys.path[:0] = OURS

from tqdm import tqdm

CONTEXT = multiprocessing.get_context("forkserver")
# nothing of this repository: a script may be a copy's
PRELOADED = ["datasets", "hypothesis", "pytest", "torch._dynamo", "torch.distributed", "tqdm"]
CONTEXT.set_forkserver_preload(PRELOADED)
PATIENCE = 120  # seconds after which a process that should have ended is a failure


def play(script, arguments, folder, outputs, environment, prepare):
    """Run a script of a folder in this process as from the command line, printing to two files.

    prepare: () or (function, arguments..), which is called before.
    """
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if path not in OURS]
    sys.path[:0] = [str(Path(script).resolve().parent)]
    sys.argv = [script, *map(str, arguments)]
    # tqdm's own lock is a semaphore of the system, which would outlive a killed process
    tqdm.set_lock(threading.RLock())
    if prepare:
        prepare[0](*prepare[1:])
    runpy.run_path(script, run_name="__main__")


def start_script(script, arguments, folder, outputs, environment, prepare=()):
    """Start a script, given relative to the folder that it runs in.

    outputs: files that get what it prints to its standard output and to its standard error.
    """
    settings = (script, arguments, folder, outputs, environment, prepare)
    process = CONTEXT.Process(target=play, args=settings)
    process.start()
    return process


def start(output, *arguments, prepare=(), **environment):
    """Start train.py."""
    return start_script("train.py", arguments, ROOT, (output, output), environment, prepare)


def start_two(output, *arguments, prepare=()):
    """Start two gloo processes as torchrun does. prepare: of the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = []
    for rank in ("0", "1"):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        prepared = prepare if rank == "1" else ()
        group.append(start(output, *arguments, prepare=prepared, **environment))
    return group


def begin(output, processes, arguments):
    """Start one process or two."""
    return start_two(output, *arguments) if processes == 2 else [start(output, *arguments)]


def end(processes, within=PATIENCE):
    """Return the exit codes of processes; those that do not end in time are killed, None."""
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
    """Wait until a condition holds or a process has ended; return whether it held."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if condition():
            return True
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.0005)
    return False


# a program whose script is run by answer(), below; what begins with -m runs as usual
STAND_IN = """#!{python}
import json, os, signal, socket, sys
if sys.argv[1] == "-m":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
server.sendall(json.dumps([os.getpid(), os.getcwd(), *sys.argv[1:]]).encode() + b"\\n")
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
sys.exit(int(answers.readline()))
"""


@contextmanager
def forked_python(program):
    """Make a stand-in for python whose scripts are forked, and yield its path.

    A script prints where the stand-in prints, is told to end when the stand-in is, and is killed
    when it is. Its own processes are forked, too. Without /proc a link to the real python.
    """
    if not Path("/proc/self/fd").exists():
        program.symlink_to(sys.executable)
        yield program
        return
    address = f"\0nanorecur-{uuid.uuid4()}"  # Linux keeps this name out of the file system
    program.write_text(STAND_IN.format(python=sys.executable, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        thread = threading.Thread(target=serve, args=(server, str(program)))
        thread.start()
        try:
            yield program
        finally:
            server.shutdown(socket.SHUT_RDWR)  # accept() ends
            thread.join()


def serve(server, program):
    """Run the scripts that stand-ins ask for until the server is closed."""
    answers = []
    while True:
        try:
            asked, _ = server.accept()
        except OSError:
            break
        answers.append(threading.Thread(target=answer, args=(asked, program)))
        answers[-1].start()
    for thread in answers:
        thread.join()


def answer(asked, program):
    """Run one script and send its exit code."""
    with asked, suppress(ConnectionError):
        pid, folder, script, *arguments = json.loads(asked.makefile().readline())
        outputs = [f"/proc/{pid}/fd/{number}" for number in (1, 2)]
        prepare = (fork_children, program)
        process = start_script(script, arguments, folder, outputs, {}, prepare)
        try:
            asked.sendall(f"{process.pid}\n".encode())
            wait_for([asked, process.sentinel])  # readable: the stand-in has been killed
        finally:
            kill([process])
        asked.sendall(f"{process.exitcode}\n".encode())


def fork_children(program):
    """Let this script start python as the stand-in, and its spawned processes as forks."""
    sys.executable, fork = program, multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: fork


def tail(output):
    """Return the end of what was printed to a file."""
    return Path(output).read_text(errors="replace").strip()[-300:]
