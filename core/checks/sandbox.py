"""Run programs that nobody has read: bubblewrap takes the network, the files and the other processes away, limits take the rest.

A program sees the standard library, a small private /tmp and nothing else: no home, no packages, no data, no network, no process
outside. Its processor time, time, memory, files, processes and output are bounded, system calls that would go round these limits
are refused (seccomp.py), and all it started dies with it. Where bubblewrap cannot do this (not installed, or namespaces are
forbidden), nothing is run unless the caller says `unsafe`.
Namespaces alone, as unshare(1) makes them, would leave every file readable: that is no sandbox, so there is no way round.
"""

import functools
import json
import os
import platform
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .memory import held_by, owned_by
from .seccomp import system_call_filter

INSIDE = Path(__file__).with_name("inside.py")
PREFIXES = tuple(dict.fromkeys(("/usr", sys.base_prefix, os.path.realpath(sys.base_prefix))))
PARTS = ("bin", "sbin", "lib", "lib32", "lib64", "share/zoneinfo")  # of each: an interpreter's folder may hold other environments
Mode = Literal["root", "user", "unsafe"]
SECONDS_BETWEEN_LOOKS = 0.1  # at the memory of a program; most have ended before the first
MOST_SHOWN = 2_000  # bytes of output that an outcome carries
NAMED = {"time": "ran out of time", "memory": "ran out of memory", "output": "wrote too much"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. Processor time and address space are of each process; together `processes` bounds them."""

    cpu_seconds: int = 10
    seconds: float = 30.0  # by the clock: a program that sleeps uses no processor
    memory_mb: int = 512  # address space of a process
    together_mb: int = 1024  # memory that all its processes hold; looked at ten times a second
    processes: int = 8  # threads count
    files_mb: int = 32  # in /tmp, all together
    output_bytes: int = 64 * 1024


@dataclass(frozen=True, slots=True)
class Order:
    """A program to run: alone, or as `candidate` with `tests` beside it. `entry_point` is the function that the tests check."""

    source: str
    role: Literal["program", "candidate", "tests"] = "program"
    entry_point: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: done, wrong (an assertion of tests), error, syntax, ended (before its end), time, memory, output."""

    ended: str
    message: str = ""
    output: str = ""  # its beginning
    attempts: tuple[str, ...] = ()  # what it tried beyond computing, as "network: socket.connect ('10.0.0.1', 80)"


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    output: int  # what it writes
    report: int  # what inside.py says of it
    written: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)
    stopped: str = ""  # why it was ended, where it was

    def stop(self, reason: str) -> None:
        if self.process.poll() is None:  # what has ended by itself has said how
            self.stopped = self.stopped or reason
            self.process.kill()


def available() -> str | None:
    """Say why no sandbox can be had here, in one line; None where one works. What it holds is tried out, once a process."""
    mode, reason = _mode()
    return None if mode else reason


def run(orders: Sequence[Order], limits: Limits | None = None, *, unsafe: bool = False) -> list[Outcome]:
    """Run one program, or a candidate and its tests, each in a sandbox of its own; return how each ended.

    Raises UserError where there is no sandbox; with `unsafe` the programs then run with limits alone, and as the user.
    """
    limits = limits or Limits()
    mode, reason = _mode()
    if mode is None and not unsafe:
        raise UserError(
            f"untrusted programs are not run: {reason}; for programs that are known and harmless, unsafe runs them without a sandbox"
        )
    return _run(orders, limits, mode or "unsafe")


@functools.cache
def _mode() -> tuple[Mode | None, str]:
    if sys.platform != "linux" or shutil.which("bwrap") is None:
        return None, "bubblewrap is not installed: apt-get install bubblewrap (Linux)"
    if system_call_filter() is None:
        return None, f"there is no filter of system calls for this machine ({platform.machine()})"
    reason = ""
    modes: tuple[Mode, ...] = ("root", "user") if os.geteuid() == 0 else ("user",)
    for mode in modes:
        (outcome,) = _run([Order(PROBE.format(home=str(Path.home()), limit=Limits().processes))], Limits(), mode)
        if outcome.ended == "done":
            return mode, ""
        told = ": ".join(each for each in (outcome.message, outcome.output) if each)
        reason = " ".join(told.split())[:160] or outcome.ended
    return None, f"bubblewrap is installed and cannot make a sandbox on this machine ({reason}); allow user namespaces, or use another one"


# what a sandbox is for, tried from within
PROBE = """
import os, socket
assert not os.path.exists({home!r}) or not os.listdir({home!r}) or not os.access(os.path.join({home!r}, ".ssh"), os.F_OK), "shows the home"
try:
    socket.create_connection(("192.0.2.1", 9), 1)
    raise SystemExit("has a network")
except OSError as error:
    assert error.errno == 101, f"answers a connection with {{error}}"
try:
    os.memfd_create("x")
    raise SystemExit("has memory that is not counted")
except PermissionError:
    pass
forked = 0
try:
    for _ in range(4 * {limit}):
        if os.fork() == 0:
            os.read(os.pipe()[0], 1)
        forked += 1
    raise SystemExit("does not limit processes")
except BlockingIOError:
    assert 0 < forked <= {limit}
"""


def _run(orders: Sequence[Order], limits: Limits, mode: Mode) -> list[Outcome]:
    with ExitStack() as stack:
        channels: Sequence[socket.socket | None] = [None]
        if len(orders) == 2:
            channels = [stack.enter_context(each) for each in socket.socketpair()]
        running = []
        for order, channel in zip(orders, channels, strict=True):
            running.append(_start(order, channel, limits, mode, stack))
            stack.callback(_end, running[-1].process)
        for channel in channels:
            if channel is not None:
                channel.close()  # theirs alone now: when one ends the other hears of it
        _watch(running, limits)
        for each in running:
            _end(each.process)
        return [_outcome(each) for each in running]


def _start(order: Order, channel: socket.socket | None, limits: Limits, mode: Mode, stack: ExitStack) -> _Running:
    output, output_end = os.pipe()
    report, report_end = os.pipe()
    for each in (output, report):
        stack.callback(os.close, each)
    handed = [report_end, *([channel.fileno()] if channel is not None else [])]
    command = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", INSIDE.read_text(encoding="utf-8")]
    folder = None
    if mode == "unsafe":
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sftkit-program-"))
    else:
        filter_read, filter_end = os.pipe()
        stack.callback(os.close, filter_read)
        with os.fdopen(filter_end, "wb") as file:
            file.write(system_call_filter() or b"")  # short: it fits into the pipe
        handed.append(filter_read)
        command = [*_bubblewrap(limits, mode, filter_read), *command]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=output_end, stderr=output_end, pass_fds=handed, cwd=folder, env={"PATH": "/usr/bin:/bin"}
    )
    for end in (output_end, report_end):
        os.close(end)
    told = {
        "source": order.source,
        "role": order.role,
        "entry_point": order.entry_point,
        "report": report_end,
        "channel": channel.fileno() if channel is not None else None,
        "uid": 20_000 + secrets.randbelow(40_000) if mode == "root" else None,  # its own, so that its processes are counted alone
        "readable": [*PREFIXES, "/lib", "/etc/ld.so", "/dev/urandom", "/proc/self"],
        "limits": _rlimits(limits, mode),
    }
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(told).encode())
        process.stdin.close()
    except BrokenPipeError:  # it did not even start; its output says why
        pass
    return _Running(process, output, report)


def _rlimits(limits: Limits, mode: Mode) -> dict[str, int]:
    found = {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory_mb << 20,
        "RLIMIT_FSIZE": limits.files_mb << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    return found if mode == "unsafe" else {**found, "RLIMIT_NPROC": limits.processes}  # outside, all of the user's would count


def _bubblewrap(limits: Limits, mode: Mode, system_calls: int) -> list[str]:
    """Return the command that makes the sandbox: nothing of the machine but its libraries and the interpreter, read-only."""
    command = [
        shutil.which("bwrap") or "bwrap",
        "--seccomp",
        str(system_calls),
        "--die-with-parent",
        "--new-session",
        "--unshare-ipc",
        "--unshare-pid",
    ]
    command += ["--unshare-net", "--unshare-uts"]
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if mode == "root" else ["--unshare-user"]
    command += ["--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    for folder in (f"{prefix}/{part}" for prefix in PREFIXES for part in PARTS if os.path.isdir(f"{prefix}/{part}")):
        for parent in reversed(Path(folder).parents[:-1]):  # bubblewrap would copy the mode of a closed home
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", folder, folder]
    for prefix in PREFIXES:  # packages may hold tests, this one's do
        for packages in sorted((*Path(prefix).glob("lib/python3*/site-packages"), *Path(prefix).glob("lib/python3*/dist-packages"))):
            command += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--perms", "1777", "--size", str(limits.files_mb << 20), "--tmpfs", "/tmp"]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _watch(running: Sequence[_Running], limits: Limits) -> None:
    """Read what the programs write until all have ended, one writes too much, or the time is over."""
    begun = time.monotonic()
    deadline, next_look = begun + limits.seconds, begun + SECONDS_BETWEEN_LOOKS
    with selectors.DefaultSelector() as selector:
        for each in running:
            for number, into in ((each.output, each.written), (each.report, each.said)):
                selector.register(number, selectors.EVENT_READ, (each, into))
        while any(each.process.poll() is None for each in running):
            if running[-1].process.poll() is not None and b'"end": "done"' in running[-1].said:
                running[0].stop("done")  # its tests are through: a thread that goes on is not waited for
                break
            left = deadline - time.monotonic()
            if left <= 0:
                for each in running:
                    each.stop("time")
                return
            if (looked := time.monotonic()) >= next_look:
                if greedy := _holding_too_much(running, limits):
                    for each in running:
                        each.stop("memory" if each in greedy else "")
                    return
                # where the machine has thousands of processes a look takes long: it is to take a tenth of the time at most
                next_look = looked + max(SECONDS_BETWEEN_LOOKS, 10 * (time.monotonic() - looked))
            # a process that ended with its pipes held open by what it started is seen a moment later
            for key, _ in selector.select(min(left, 0.05)):
                each, into = key.data
                if not _take(key.fd, into, limits):
                    selector.unregister(key.fd)
                elif len(into) > limits.output_bytes:
                    for one in running:
                        one.stop("output" if one is each else "")
                    return
    for each in running:  # what stood in the pipes when it ended
        for number, into in ((each.output, each.written), (each.report, each.said)):
            os.set_blocking(number, False)
            while len(into) <= limits.output_bytes and _take(number, into, limits):
                pass


def _holding_too_much(running: Sequence[_Running], limits: Limits) -> list[_Running]:
    most = limits.together_mb << 20
    held = held_by([each.process.pid for each in running])
    return [each for each, own in zip(running, held, strict=True) if sum(own.values()) > most and owned_by(own) > most]


def _take(number: int, into: bytearray, limits: Limits) -> bool:
    try:
        found = os.read(number, 65_536)
    except BlockingIOError:
        return False
    into += found
    return bool(found)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _outcome(each: _Running) -> Outcome:
    lines: list[dict[str, Any]] = []
    for line in bytes(each.said).splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # a program wrote there itself
            continue
        if isinstance(said, dict):
            lines.append(said)
    tried = [f"{said['tried']}: {said.get('what', '')}" for said in lines if "tried" in said]
    ending = next((said for said in reversed(lines) if "end" in said), None)
    output = bytes(each.written[:MOST_SHOWN]).decode("utf-8", "replace")
    if each.stopped:
        ended, message = each.stopped, ""
    elif ending is not None:
        ended, message = str(ending["end"]), str(ending.get("message", ""))
    else:  # 137 and 152: how bubblewrap tells that the kernel ended it, for its processor time most often
        code = each.process.returncode
        ended = "time" if code in (137, 152, -9, -24) else "ended"
        message = "" if ended == "time" else f"it ended by itself, with exit code {code}"
    if ended in NAMED:
        tried.append(f"limits: {NAMED[ended]}")
        message = message or NAMED[ended]
    return Outcome(ended, message, output, tuple(tried))
