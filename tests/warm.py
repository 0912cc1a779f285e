"""Further Python processes that have torch and Megatron at once: forks of one that imported them.

Importing takes 5.5 s of a core, more than most tests that want a process of their own. `python` is
``subprocess.run([sys.executable, ...])`` and `ranks` is torchrun for such tests; both fork a process that has
imported everything and done nothing else. It has one thread and has started no run.

What a fork cannot show takes a cold process: what an import loads or prints, an environment variable that is read at
an import, torchrun itself.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What is imported before the first fork; diffusers (10 s) is left to those who need it.
IMPORTS = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "megatron.training",
    "megatron_mimo.training.pretraining.loop",
    "megatron_mimo.training.trainer",
    "tests.tiny",
)
# How long the other ranks may go on once one has failed, to say what they saw.
GRACE_S = 2.0


@dataclass(frozen=True)
class Done:
    """What `subprocess.CompletedProcess` says, of all ranks together."""

    returncode: int
    stdout: str
    stderr: str


def python(
    *command: object,
    cwd: Path | str = ROOT,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 180.0,
) -> Done:
    """Runs ``python *command`` (``-m module ...``, ``-c code`` or ``file ...``) in a warm process.

    Args:
        command: as for the interpreter.
        cwd: where.
        env: the whole environment; by default this process's.
        stdin: what it reads.
        timeout: seconds after which it is killed, and TimeoutError raised.
    """
    return _run([str(part) for part in command], [{}], cwd, env, stdin, timeout)


def ranks(
    count: int,
    *command: object,
    cwd: Path | str = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 240.0,
) -> Done:
    """Runs `command` on `count` ranks as torchrun would: when one fails, the others are ended."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    changes = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _run([str(part) for part in command], changes, cwd, env, "", timeout)


def _free_port() -> int:
    """Of those below what Linux gives to connections, which could take another before a rank listens on it."""
    while True:
        port = secrets.choice(range(20_000, 32_768))
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _run(
    command: Sequence[str],
    changes: Sequence[Mapping[str, str]],
    cwd: Path | str,
    env: Mapping[str, str] | None,
    stdin: str,
    timeout: float,
) -> Done:
    with tempfile.TemporaryDirectory(prefix="mimo-warm-") as directory:
        files = {name: str(Path(directory) / name) for name in ("stdin", "stdout", "stderr")}
        Path(files["stdin"]).write_text(stdin)
        request = {
            "command": list(command),
            "cwd": str(cwd),
            "environments": [dict(os.environ if env is None else env) | dict(change) for change in changes],
            "files": files,
        }
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_server())
            connection.settimeout(timeout)
            with connection.makefile("rw") as lines:
                print(json.dumps(request), file=lines, flush=True)
                group = int(lines.readline())
                try:
                    answer = lines.readline()
                except TimeoutError:
                    os.killpg(group, signal.SIGKILL)
                    printed = Path(files["stderr"]).read_text()[-4000:]
                    raise TimeoutError(f"{command} ran longer than {timeout:.0f} s. It printed:\n{printed}") from None
        # A keeper that was killed answers nothing.
        returncode = int(answer or -signal.SIGKILL)
        return Done(returncode, Path(files["stdout"]).read_text(), Path(files["stderr"]).read_text())


@cache
def _server() -> str:
    """The address of this session's warm process, which ends with it."""
    directory = tempfile.mkdtemp(prefix="mimo-warm-")
    address = str(Path(directory) / "socket")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(Path(directory) / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", address],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdin=subprocess.PIPE,  # its end is the end of this session
            stdout=log,
            stderr=log,
        )
    _kept.append(process)
    while not os.path.exists(address):
        if process.poll() is not None:
            raise RuntimeError(f"the warm process ended:\n{(Path(directory) / 'log').read_text()}")
        time.sleep(0.05)
    return address


_kept: list[subprocess.Popen] = []


def stop() -> None:
    """Ends the warm process and with it whatever it runs."""
    for process in _kept:
        process.stdin.close()
        process.wait()
    _kept.clear()
    _server.cache_clear()


# The warm process -------------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Imports, then forks a keeper for each request until standard input ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTS:
            importlib.import_module(name)
        importlib.import_module("tests.distributed.harness").all_cases()
    gc.freeze()  # forks need not look through what they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's to wait for
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".starting")
    listener.listen(64)
    os.rename(address + ".starting", address)
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(sys.stdin, selectors.EVENT_READ)
        while all(key.fileobj is listener for key, _ in ready.select()):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                keep(connection)
            connection.close()


def keep(connection: socket.socket) -> None:
    """Forks the ranks of one request, waits for them, answers, and ends; in a rank it runs the command instead."""
    os.setsid()
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    lines = connection.makefile("rw")
    request = json.loads(lines.readline())
    print(os.getpid(), file=lines, flush=True)
    running = set()
    for environment in request["environments"]:
        child = os.fork()
        if child == 0:
            end_with_parent()
            connection.close()
            become(request, environment)
            os._exit(run(request["command"]))
        running.add(child)
    print(wait(running), file=lines, flush=True)
    os._exit(0)


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent ends: PR_SET_PDEATHSIG of prctl(2)."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))


def wait(running: set[int]) -> int:
    """The first exit status of a rank that is not zero; the ranks that go on are then ended."""
    while running:
        child, status = os.wait()
        running.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            time.sleep(GRACE_S if running else 0)
            for other in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            return code
    return 0


def become(request: Mapping, environment: Mapping[str, str]) -> None:
    """Takes the environment, the directory and the files of a request."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    for descriptor, (name, flags) in enumerate(
        {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY, "stderr": os.O_WRONLY}.items()
    ):
        opened = os.open(request["files"][name], flags | os.O_CREAT | (os.O_APPEND if descriptor else 0), 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)


def run(command: Sequence[str]) -> int:
    """The exit status of ``python *command``, with what it leaves for the interpreter's end done."""
    try:
        execute(command)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def execute(command: Sequence[str]) -> None:
    """Runs ``-m module ...``, ``-c code`` or ``file ...`` as the interpreter's main module."""
    first, *rest = command
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in sys.path[1:] if path not in added]
    if first == "-c":
        sys.argv, sys.path[:] = ["-c", *rest[1:]], ["", *filter(None, added), *kept]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[:] = [rest[0], *rest[1:]], [os.getcwd(), *filter(None, added), *kept]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:] = [first, *rest], [str(Path(first).resolve().parent), *filter(None, added), *kept]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
