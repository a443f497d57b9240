"""The filter of system calls of a sandbox: it refuses what would go round its limits, or make another one inside it.

Memory that belongs to no process's address space (System V segments, memfds, a tmpfs mounted in a new namespace, io_uring's rings)
is counted by no limit, and key rings are shared with whoever started the sandbox. All else is allowed.
"""

import errno
import platform
import struct

# by machine: its audit number, clone, clone3, and what is refused; the numbers are those of Linux's unistd.h
CALLS: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "x86_64": (0xC000003E, 56, 435, {
        "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "pivot_root": 155, "mount": 165, "add_key": 248, "request_key": 249,
        "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308, "memfd_create": 319, "bpf": 321, "userfaultfd": 323,
        "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
        "memfd_secret": 447,
    }),
    "aarch64": (0xC00000B7, 220, 435, {
        "mount": 40, "pivot_root": 41, "unshare": 97, "ptrace": 117, "msgget": 186, "semget": 190, "shmget": 194, "add_key": 217,
        "request_key": 218, "keyctl": 219, "perf_event_open": 241, "setns": 268, "memfd_create": 279, "bpf": 280, "userfaultfd": 282,
        "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
        "memfd_secret": 447,
    }),
}  # fmt: skip
NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW... flags that clone takes
OTHER_ABI = 0x40000000  # x32's calls have numbers from here on
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # where seccomp_data has them
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of classic BPF
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # what the filter returns; the lower half of REFUSE is the error


def system_call_filter() -> bytes | None:
    """Return the filter as bubblewrap's --seccomp takes it; None for a machine whose system calls are not listed here."""
    if platform.machine() not in CALLS:
        return None
    audit, clone, clone3, refused = CALLS[platform.machine()]
    refuse, absent = _instruction(RETURN, REFUSE | errno.EPERM), _instruction(RETURN, REFUSE | errno.ENOSYS)
    steps = [_instruction(LOAD, ARCHITECTURE), _instruction(EQUAL, audit, 1, 0), refuse, _instruction(LOAD, NUMBER)]
    steps += [_instruction(AT_LEAST, OTHER_ABI, 0, 1), refuse]
    steps += [_instruction(EQUAL, clone3, 0, 1), absent]  # its flags cannot be seen; the C library then takes clone
    for number in refused.values():
        steps += [_instruction(EQUAL, number, 0, 1), refuse]
    steps += [_instruction(EQUAL, clone, 0, 3), _instruction(LOAD, FIRST_ARGUMENT), _instruction(ANY_BIT, NEW_NAMESPACES, 0, 1), refuse]
    return b"".join([*steps, _instruction(RETURN, ALLOW)])


def _instruction(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, when_true, when_false, value)
