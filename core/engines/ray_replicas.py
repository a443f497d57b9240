"""Engines on several machines: each in an actor that Ray places on its cluster, fed, watched and restarted as those of one machine."""

import contextlib
import logging
import multiprocessing.connection
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from ..errors import UserError, missing_package
from .base import EngineConfig
from .loading import choose
from .replicas import Opening, Place, Process, Replicas, replica_count
from .worker import Worker

log = logging.getLogger(__name__)

SECONDS_TO_CONNECT = 10.0
SECONDS_TO_TELL = 10.0  # for Ray, how an actor has ended


class _Host:
    """The actor: it calls the driver back and serves the engine until that hangs up. The engine lives in its process."""

    def serve(self, address: tuple[str, int], key: bytes) -> None:
        """Serve; the process ends with the connection."""
        connection = Client(address, authkey=key)
        worker = Worker(connection, _end_actor)
        worker.run(*connection.recv())
        worker.leave()


def _end_actor() -> None:
    """End the process of this actor as one that is wanted to end: Ray tells the user of any other end as of a crash."""
    import ray

    try:
        ray.kill(ray.get_runtime_context().current_actor)
        threading.Event().wait(SECONDS_TO_TELL)
    finally:  # whatever Ray says: an actor that stays keeps its card
        os._exit(0)


class RayProcess(Process):
    """One in an actor. Two threads pass messages on between the driver's socket pair and the actor, wherever that is."""

    def __init__(self, opening: Opening, options: dict[str, Any]) -> None:
        import ray

        self._ray = ray
        ours, theirs = socket.socketpair()
        self._near = Connection(theirs.detach())
        self._far: Connection | None = None
        key = secrets.token_bytes(32)
        self._listener = Listener((ray.util.get_node_ip_address(), 0), authkey=key)
        host: Any = ray.remote(**options)(_Host)
        self._actor = host.remote()
        self._ended = self._actor.serve.remote(self._listener.address, key)
        threading.Thread(target=self._connect, name="sftkit-ray", daemon=True).start()
        threading.Thread(target=self._wait, name="sftkit-ray-end", daemon=True).start()
        super().__init__(opening, Connection(ours.detach()))

    def _connect(self) -> None:
        with contextlib.suppress(OSError, EOFError, multiprocessing.AuthenticationError):  # it has ended before it called
            far = self._far = self._listener.accept()
            threading.Thread(target=_pass_on, args=(self._near, far), name="sftkit-ray-out", daemon=True).start()
            _pass_on(far, self._near)

    def _wait(self) -> None:
        """Hang up when the actor has ended, also one that never called."""
        self._ray.wait([self._ended])
        self._hang_up()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.close()
        for each in (self._near, self._far):
            if each is not None:
                _close(each)

    def dump_and_kill(self) -> None:
        """End it. Where it stood is in Ray's logs of the actor, if it can still write."""
        self._ray.kill(self._actor)

    def gone(self, seconds: float) -> str:
        """Wait so long for it to end, then kill it; return how it ended, for people."""
        if not self._ray.wait([self._ended], timeout=seconds)[0]:
            self._ray.kill(self._actor)
        try:
            self._ray.get(self._ended, timeout=SECONDS_TO_TELL)
        except self._ray.exceptions.RayError as error:
            how = f"ended on its machine ({' '.join(str(error).split())[:200]})"
        else:
            how = "ended"
        self._hang_up()
        return how


def _pass_on(source: Connection, target: Connection) -> None:
    """Pass messages on until one of the two hangs up, and let the other know."""
    with contextlib.suppress(OSError, EOFError, TypeError):  # TypeError: it was closed here while a message was awaited
        while True:
            target.send_bytes(source.recv_bytes())
    for each in (source, target):
        _close(each)


def _close(connection: Connection) -> None:
    """Close a connection, and shut it down first: while a thread waits for a message on it, closing alone tells nobody."""
    with contextlib.suppress(OSError):
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        connection.close()


class RayReplicas(Replicas):
    """Processes on the machines of a Ray cluster. The driver alone holds the sample store.

    Every machine needs sftkit and the model under the same name: a Hub id, or a folder that all of them see.
    """

    def _find_places(self, module: str, model: str, config: EngineConfig, revision: str | None) -> list[Place]:
        import ray

        if not ray.is_initialized():
            check_address(config.ray_address or os.environ.get("RAY_ADDRESS", ""))
            try:
                ray.init(address=config.ray_address, log_to_driver=True, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                where = config.ray_address or "this machine"
                raise UserError(
                    f"ray: no cluster answers at {where} ({' '.join(str(error).split())[:200]}); start one with `ray start`"
                ) from None
        gpus = int(ray.cluster_resources().get("GPU", 0))
        size = config.tensor_parallel_size
        if choose(config) == "vllm" and gpus < size:
            raise UserError(f"ray: the cluster has {gpus} GPUs, and the engine vllm needs {size} for each process")
        with_gpus = gpus >= size and config.device != "cpu"
        if config.replicas in (None, "auto"):
            count = gpus // size if with_gpus else sum(node["Alive"] for node in ray.nodes())
        else:
            count = replica_count(config)
        options = {"num_cpus": 1, "num_gpus": size if with_gpus else 0, "runtime_env": {"env_vars": {"PYTHONFAULTHANDLER": "1"}}}
        opening = (module, model, replace(config, replicas=None, executor="local"), revision)
        log.info("ray: %d processes with %s, on %d machines", count, f"{size} GPUs each" if with_gpus else "a CPU each", len(ray.nodes()))
        start: Callable[[], Process] = lambda: RayProcess(opening, options)  # noqa: E731
        return [Place(None, start)] * count


def check_address(address: str) -> None:
    """Raise UserError for HOST:PORT where nobody listens, which Ray itself would look for for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # auto, local, or none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray: nobody listens at {address} ({error}); start a cluster there with `ray start`, or correct the address"
        ) from None


def open_ray_replicas(module: str, model: str, config: EngineConfig, *, revision: str | None = None, talks: bool = True) -> Replicas:
    """Start the processes on a cluster and wait until the first is ready. Raises UserError for a cluster that is not there."""
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise missing_package("ray", "ray")
    from ..chat import load_chat
    from ..models import resolve_model

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # an actor without GPUs keeps what it finds
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports its use to its makers otherwise
    chat = load_chat(resolve_model(model, revision=revision)) if talks else None
    return RayReplicas(module, model, config, revision=revision, chat=chat)
