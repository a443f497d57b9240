"""How much memory processes and all that they started hold: what no limit of the kernel bounds without a cgroup of one's own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
KIBIBYTE = 1024


def held_by(roots: Sequence[int]) -> list[dict[int, int]]:
    """Return for each root the bytes that it and its descendants hold of their own, files that they map not among them, by process.

    A page that processes share since a fork counts for each of them: see `owned_by`. One that ended meanwhile holds nothing.
    Takes some milliseconds for each hundred processes of the machine.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _read(f"/proc/{name}/stat")):
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(name))  # its name may hold anything, even ")"
    return [_of_tree(root, children) for root in roots]


def _of_tree(root: int, children: Mapping[int, list[int]]) -> dict[int, int]:
    found, waiting = {}, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        if parts := _read(f"/proc/{process}/statm").split():
            found[process] = (int(parts[1]) - int(parts[2])) * PAGE
    return found


def owned_by(held: Mapping[int, int]) -> int:
    """Return the bytes that processes hold together, a shared page once: what the kernel takes milliseconds to count.

    Of a process whose pages this user may not look at, all that it holds counts.
    """
    total = 0
    for process, most in held.items():
        lines = dict(line.split(":", 1) for line in _read(f"/proc/{process}/smaps_rollup").splitlines() if line.startswith("Pss_Anon:"))
        total += int(lines["Pss_Anon"].split()[0]) * KIBIBYTE if lines else most
    return total


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended, or may not be looked at
        return ""
