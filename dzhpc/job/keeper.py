"""Stands between a rank and the programs it starts: ``python -I -S keeper.py SCRATCH``, a small process of its own.

It starts one program at a time and ends it when its time is up. When a program has ended, or the rank has, whatever killed it, no
process is left below this one; with the rank the folder SCRATCH goes, too. All that a program starts stays below its keeper, even
what has left its process group, since the kernel gives orphans to the next *subreaper* (Linux).

A question is a line of JSON on standard input: {"command", "environment", "folder", "seconds", "pass": open files for it}; the
answer is one on standard output: {"status": as os.waitpid has it}, {"late": true} or {"errno": why it did not start}.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE = 2.0  # seconds between SIGTERM and SIGKILL: srun and mpirun end their ranks meanwhile
STUBBORN = 5.0  # seconds after which a process that even SIGKILL does not end, since its disk does not answer, is given up
OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # for the rank to answer, not for us
PYTHONS = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them, and a program would inherit that


def start(question: dict) -> tuple[int, int]:
    """(process, 0), or (0, errno). The program leads a session.

    Its output goes to stdout.txt and stderr.txt in its folder, or to the last two of the files that it gets.
    """
    read, write = os.pipe()  # closed by a successful exec
    pid = os.fork()
    if pid == 0:
        try:
            for number in (*OURS, *PYTHONS):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.chdir(question["folder"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            names = ("stdout.txt", "stderr.txt")
            output = question["pass"][-2:] or [os.open(name, flags, 0o666) for name in names]
            for number, file in enumerate(output, 1):
                os.dup2(file, number)
            os.execvpe(question["command"][0], question["command"], question["environment"])
        except OSError as error:
            os.write(write, str(error.errno).encode())
        finally:
            os._exit(127)
    for number in (write, *question["pass"]):
        os.close(number)
    said = os.read(read, 16)
    os.close(read)
    if said:
        os.waitpid(pid, 0)
    return (0, int(said)) if said else (pid, 0)


def prctl(option: int, value: int) -> None:
    """Linux only; elsewhere what leaves its process group is not found."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value)


def attend(pid: int, seconds: float, rank: int) -> dict | None:
    """The answer, once the program has ended or its time is up; None where the rank has ended."""
    end, ended = time.monotonic() + seconds, os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    watch = select.poll()
    for number in (0, ended):
        if number is not None:
            watch.register(number, select.POLLIN)
    try:
        while True:
            left = end - time.monotonic()
            found = watch.poll(1e3 * max(0.0, min(left, 0.5 if ended is not None else 0.01)))
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                return {"status": status}
            if any(number == 0 for number, _ in found) or os.getppid() != rank:
                return None  # nothing is asked meanwhile: it is the end of the file
            if left <= 0:
                return {"late": True}
    finally:
        if ended is not None:
            os.close(ended)


def below(pid: int) -> list[int]:
    """All processes that descend from one."""
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                parents.setdefault(int(parent), []).append(int(name))
    found = list(parents.get(pid, ()))
    for each in found:
        found += parents.get(each, ())
    return found


def end_all(leader: int) -> None:
    """End what a program has left, itself included if it still runs."""
    since, told = time.monotonic(), set()
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        alive, spent = below(os.getpid()), time.monotonic() - since
        if not alive or spent > GRACE + STUBBORN:
            return
        number = signal.SIGKILL if spent > GRACE else signal.SIGTERM
        for pid in alive:
            if (pid, number) not in told:
                told.add((pid, number))
                with contextlib.suppress(OSError):
                    os.killpg(pid, number) if pid == leader else os.kill(pid, number)
        time.sleep(0.01)


def childless() -> bool:
    """Whether this process has no child, so that nothing is below it: cheaper than a look at all processes."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def main(scratch: str) -> None:
    """Answer questions until the rank has ended."""
    for number in OURS:
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    rank, pid = os.getppid(), 0
    try:
        for line in sys.stdin.buffer:
            question = json.loads(line)
            pid, failed = start(question)
            answer = {"errno": failed} if failed else attend(pid, question["seconds"], rank)
            if answer is None:
                break
            if not childless():
                end_all(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(1, json.dumps(answer).encode() + b"\n")
    finally:
        if not childless():
            end_all(pid)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
