"""What runs inside the sandbox, around an untrusted program: limits first, then a watch that names what it tries. Never imported outside.

Its order comes on standard input as JSON. A program and its tests run in two sandboxes that share nothing but a socket, over which
plain values go as JSON: the program never has its tests in its reach, and the tests never execute anything that comes from it.
"""

import builtins
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

OPERATORS = (
    "__len__", "__getitem__", "__setitem__", "__contains__", "__iter__", "__next__", "__str__", "__repr__",
    "__enter__", "__exit__", "__neg__", "__abs__",
)  # fmt: skip
# of two objects of the program, and only in tests that use a class of it: with a value of the tests as the other one, or where tests
# ask for mere values, a program could judge what its answer is held against
BETWEEN_OBJECTS = (
    "__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__sub__", "__mul__", "__matmul__", "__truediv__", "__floordiv__",
    "__mod__", "__and__", "__or__", "__xor__",
)  # fmt: skip
TRIED = {
    "network": ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"),
    "processes": ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn", "os.system", "subprocess.Popen", "pty.spawn"),
    "signals": ("os.kill", "os.killpg", "signal.pthread_kill"),
    "interpreter": ("gc.get_objects", "gc.get_referrers", "gc.get_referents", "ctypes.dlopen", "sys._current_frames"),
    "files": (
        "open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link",
        "os.symlink", "os.truncate", "os.chdir", "shutil.rmtree", "shutil.move", "shutil.copyfile", "os.walk", "glob.glob",
    ),
}  # fmt: skip
KIND = {event: kind for kind, events in TRIED.items() for event in events}
MOST_REPORTS = 20


def main() -> None:
    """Do what the order says, and report how it ended."""
    order = json.loads(sys.stdin.buffer.read())
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    if order["uid"] is not None:  # the sandbox was made by root, whom no limit of processes holds
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
    for name, limit in order["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.set_int_max_str_digits(0)
    report = _reporter(order["report"])
    watch = order["role"] != "tests"
    try:
        code = compile(order["source"], "<program>" if watch else "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        report({"end": "syntax", "message": _told(error)})
        return
    if watch:
        sys.addaudithook(_watch(report, tuple(order["readable"])))
    try:
        if order["role"] == "candidate":
            Program(order["channel"]).serve(code)
        elif order["role"] == "tests":
            run_tests(Peer(order["channel"]), code, order["entry_point"])
        else:
            exec(code, {"__name__": "__main__"})
    except MemoryError as error:
        report({"end": "memory", "message": _told(error)})
    except BaseException as error:  # noqa: BLE001  whatever a program raises is its result
        kind = "wrong" if isinstance(error, AssertionError) and not watch else "memory" if _name(error) == "MemoryError" else "error"
        report({"end": kind, "message": _told(error)})
    else:
        report({"end": "done", "message": ""})


def _told(error: BaseException) -> str:
    return f"{_name(error)}: {error}"[:300].rstrip(": ")


def _name(error: BaseException) -> str:
    return str(getattr(error, "remote_name", type(error).__name__))


def _reporter(channel: int) -> Callable[[dict[str, Any]], None]:
    def report(said: dict[str, Any]) -> None:
        os.write(channel, json.dumps(said).encode() + b"\n")

    return report


def _watch(report: Callable[[dict[str, Any]], None], readable: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that reports what a program tries. It stops nothing: the sandbox does."""
    own = os.getcwd()
    seen: set[tuple[str, str]] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        kind = KIND.get(event)
        if kind is None or len(seen) >= MOST_REPORTS:
            return
        what = event
        if kind == "files":
            path = arguments[0] if arguments else None
            if not isinstance(path, (str, bytes, os.PathLike)):
                return
            place = os.path.abspath(os.fsdecode(path))
            writing = event not in ("open", "os.listdir", "os.scandir", "os.walk", "glob.glob", "os.chdir")
            if event == "open" and isinstance(arguments[2], int):
                writing = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if place == own or place.startswith((own + "/", "/dev/null")):
                if writing or os.path.exists(place):
                    return
            elif not writing and place.startswith(readable):
                return
            what = f"{'write' if writing else 'read'} {place}"
        elif kind in ("network", "processes"):
            what = f"{event} {arguments[-1] if kind == 'network' else ''}".rstrip()
        key = (kind, what[:120])
        if key not in seen:
            seen.add(key)
            report({"tried": kind, "what": key[1]})

    return hook


class Channel:
    """Lines of JSON both ways."""

    def __init__(self, number: int) -> None:
        self._read = os.fdopen(os.dup(number), "rb")
        self._write = os.fdopen(number, "wb", buffering=0)

    def send(self, value: Any) -> None:
        self._write.write(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        line = self._read.readline()
        if not line:
            raise EOFError("the program ended before its tests did")
        return json.loads(line)


def packed(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return a value as JSON: scalars as they are, containers as [kind, items], all else as `refer` has it."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value if type(value) in (type(None), bool, str, int, float) else _plain(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = next(each for each in (list, tuple, set, frozenset) if isinstance(value, each)).__name__
        return [kind, [packed(each, refer) for each in value]]
    if isinstance(value, dict):
        return ["dict", [[packed(key, refer), packed(each, refer)] for key, each in value.items()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.decode("latin-1")]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if value is NotImplemented:
        return ["notimplemented", None]
    return refer(value)


def _plain(value: Any) -> Any:
    return next(kind(value) for kind in (str, int, float) if isinstance(value, kind))


def unpacked(value: Any, referred: Callable[[int], Any]) -> Any:
    """Undo `packed`."""
    if not isinstance(value, list):
        return value
    kind, items = value
    if kind == "dict":
        return {unpacked(key, referred): unpacked(each, referred) for key, each in items}
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(unpacked(each, referred) for each in items)
    if kind == "bytes":
        return items.encode("latin-1")
    if kind == "complex":
        return complex(*items)
    return NotImplemented if kind == "notimplemented" else referred(items)


class Program:
    """The program's side: runs it, then answers what the tests ask of what it made."""

    def __init__(self, number: int) -> None:
        self._channel = Channel(number)
        self._objects: list[Any] = []

    def serve(self, code: Any) -> None:
        """Execute the program, tell the names it defines, and answer until the tests hang up. Its errors are answers."""
        names: dict[str, Any] = {"__name__": "program"}
        try:
            exec(code, names)
        except BaseException as error:
            self._channel.send({"raised": _name(error), "message": str(error)[:300]})
            raise
        public = {name: value for name, value in names.items() if not name.startswith("__") and not isinstance(value, type(sys))}
        self._channel.send({"value": packed(public, self._refer)})
        while True:
            try:
                asked = self._channel.receive()
            except EOFError:
                return
            self._channel.send(self._answer(asked))

    def _refer(self, value: Any) -> Any:
        self._objects.append(value)
        return ["object", len(self._objects) - 1]

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            target = self._objects[asked["object"]]
            arguments = unpacked(asked["arguments"], self._objects.__getitem__)
            named = unpacked(asked["named"], self._objects.__getitem__)
            call = target if asked["method"] == "__call__" else getattr(target, asked["method"]) if asked["call"] else None
            value = getattr(target, asked["method"]) if call is None else call(*arguments, **named)
            answer = {"value": packed(value, self._refer)}
            after = packed(arguments, self._refer) if asked["call"] else asked["arguments"]
            return answer if after == asked["arguments"] else {**answer, "arguments": after}
        except BaseException as error:  # noqa: BLE001  the tests are to see it
            return {"raised": _name(error), "message": str(error)[:300]}


class Peer:
    """The tests' side: asks the program, and gives back plain values or objects that stay there."""

    def __init__(self, number: int) -> None:
        self._channel = Channel(number)
        self.used_class = False  # whether the tests have used a class of the program

    def names(self) -> dict[str, Any]:
        """Return what the program defines."""
        found = self._result(self._channel.receive())
        assert isinstance(found, dict)
        return found

    def ask(self, number: int, method: str, arguments: tuple[Any, ...], named: dict[str, Any], *, call: bool = True) -> Any:
        """Ask for a call or an attribute. What the program changes in its arguments is changed here too."""
        said = {"object": number, "method": method, "call": call}
        self._channel.send({**said, "arguments": packed(arguments, _refer), "named": packed(named, _refer)})
        answer = self._channel.receive()
        for mine, changed in zip(arguments, self._unpacked(answer.get("arguments")) or (), strict=False):
            if isinstance(mine, list):
                mine[:] = changed
            elif isinstance(mine, (dict, set)):
                mine.clear()
                mine.update(changed)
        return self._result(answer)

    def _unpacked(self, value: Any) -> Any:
        return unpacked(value, lambda number: Remote(self, number))

    def _result(self, answer: dict[str, Any]) -> Any:
        if "raised" not in answer:
            return self._unpacked(answer["value"])
        kind = getattr(builtins, answer["raised"], None)
        sound = isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError
        try:
            error: Any = kind(answer["message"]) if sound and kind else RuntimeError(answer["message"])
        except TypeError:  # of the few that want more than a message
            error = RuntimeError(answer["message"])
        error.remote_name = answer["raised"]
        raise error


class Remote:
    """An object that lives in the program's sandbox."""

    __slots__ = ("_is_class", "_number", "_peer")
    __hash__ = object.__hash__

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self._number, self._is_class = peer, number, False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._peer.used_class |= self._is_class
        return self._peer.ask(self._number, "__call__", arguments, named)

    def __getattr__(self, name: str) -> Any:
        self._peer.used_class |= self._is_class
        return self._peer.ask(self._number, name, (), {}, call=False)

    def __bool__(self) -> bool:
        for name in ("__bool__", "__len__"):
            try:
                return bool(self._peer.ask(self._number, name, (), {}))
            except AttributeError:
                continue
        return True


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Remote, *arguments: Any) -> Any:
        if name in BETWEEN_OBJECTS and not (self._peer.used_class and isinstance(arguments[0], Remote)):
            return NotImplemented
        try:
            return self._peer.ask(self._number, name, arguments, {})
        except AttributeError as error:
            raise TypeError(str(error)) from None  # what Python says of an object without the operator

    return operator


for _each in (*OPERATORS, *BETWEEN_OBJECTS):
    setattr(Remote, _each, _operator(_each))


def _refer(value: Any) -> Any:
    if isinstance(value, Remote):
        return ["object", value._number]
    raise TypeError(f"a test hands the program a {type(value).__name__}, and only plain values can cross")


def run_tests(peer: Peer, code: Any, entry_point: str | None) -> None:
    """Run tests that name what the program defines: plain asserts, `check(candidate)` for an entry point, functions test_*."""
    found = peer.names()
    if entry_point is not None and entry_point not in found:
        raise AssertionError(f"the program defines no {entry_point}")
    defined = _handed(found, code, entry_point)
    for name, value in defined.items():
        if isinstance(value, Remote):  # by the name that the tests have for it: the program would call any function of theirs a class
            value._is_class = name.lstrip("_")[:1].isupper()
    names: dict[str, Any] = {"__name__": "tests", **defined}
    exec(code, names)
    own = {name: value for name, value in names.items() if callable(value) and value is not defined.get(name)}
    if entry_point is not None and "check" in own:
        own["check"](found[entry_point])
    functions = [value for name, value in own.items() if name.startswith("test_")]
    for each in functions:
        each()
    if not functions and not (entry_point is not None and "check" in own) and not defined.keys() & set(code.co_names):
        raise AssertionError("the tests check nothing: they are no asserts on what the program defines, test_* or check(candidate)")


def _handed(found: dict[str, Any], code: Any, entry_point: str | None) -> dict[str, Any]:
    """Return what tests get to see of a program: it does not judge itself by an abs or a __builtins__ of its own.

    Without an entry point, a function that has the name of a built-in one is seen where the tests name nothing else of the program.
    """
    named = {name for name in found if not name.startswith("__")}
    built_in = {name for name in named if hasattr(builtins, name)} - {entry_point}
    if entry_point is None and not (named - built_in) & _mentioned(code):
        built_in = set()
    return {name: found[name] for name in named - built_in}


def _mentioned(code: Any) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, type(code))]
    return set(code.co_names).union(*map(_mentioned, inner))


if __name__ == "__main__":
    main()
