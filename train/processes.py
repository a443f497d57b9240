"""One run on several processes of this machine, one per GPU: the same updates, and so the same losses, as on one.

The parent prepares the rows and finishes the model; between them it starts the processes and watches them. Each takes its share of every
update's packs, with the whole model (train.collective) or a share of that, too (train.sharded). Gradients are added up over
processes and divided by the tokens of the whole update.

torchrun is not asked: it kills what it has told to stop after 30 s, in the middle of a checkpoint, and lets go of the parent's lock.
"""

import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.chat import load_chat
from ..core.errors import Diverged, UserError
from ..core.files import read_json, write_json
from ..core.hardware import usable_cores
from ..core.locks import hold_alone
from ..core.models import ModelRef
from .adapters import adapter_config
from .collective import PATIENCE, over_processes
from .config import TrainConfig
from .data import TrainingData
from .disk import room_on_disk
from .stops import handling_stops

log = logging.getLogger(__name__)

JOB, STATUS, TRAINED = "job.pickle", "status.json", "trained.pt"
FAILED = ("error", "diverged", "memory")
GRACE = 10.0  # seconds to end in where one has failed, in which others may say a reason of their own: they would wait for it for ever
LEAVING = 60.0  # seconds that the others have to end in where one has, after all of them were done
ORPHANED = 600.0  # seconds that processes have whose parent was killed: they end their step and write a checkpoint
STILL_ENDING = "the processes of the last call are still ending: waiting for them"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the processes are told."""

    room: Path
    start: ModelRef
    data: TrainingData
    config: TrainConfig
    device: str
    own: Any  # the number format of the start model
    tokens: int  # of a forward pass
    deadline: float | None  # as time.monotonic() counts, which is the same in all processes of a machine


def train_on_processes(job: Job) -> tuple[Any, bool]:
    """Train on `job.config.gpus` processes; return the trained model, on this one, and whether it was asked to stop meanwhile.

    Raises what a process raised: UserError, OutOfMemoryError, or KeyboardInterrupt where it was stopped, with a checkpoint as a rule.
    """
    folder = job.room / "processes"
    folder.mkdir(exist_ok=True)
    log.info("training on %d processes, %s", job.config.gpus, job.config.parallel)
    with hold_alone(folder / "lock", STILL_ENDING) as lock:
        (folder / STATUS).unlink(missing_ok=True)
        (folder / JOB).write_bytes(pickle.dumps(job))
        asked = run_together(job.config.gpus, [folder], lock)
    return outcome(job, asked=asked), asked


def wait_for_last(room: Path) -> None:
    """Wait for the processes of a killed call, which may still be writing a checkpoint."""
    if (folder := room / "processes").exists():
        with hold_alone(folder / "lock", STILL_ENDING):
            pass


def run_together(count: int, folders: Sequence[Path], *held: int) -> bool:
    """Let `count` processes do the jobs of `folders`, one after another; return whether they were asked to stop.

    They inherit `held`, files that are locked as long as one of them lives. Ctrl-C and SIGTERM are passed on to them, the second one
    kills them. Where one fails, and has not said why, its end is written down.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet
    threads = str(max(1, usable_cores() // count))
    environment = {
        "OMP_NUM_THREADS": threads, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", **os.environ,
        "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",  # they are clients of that store, all of them
    }  # fmt: skip
    command = [sys.executable, "-m", "sftkit.train.processes", str(os.getpid()), *map(str, folders)]
    running: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(number)
        pass_on()

    def pass_on() -> None:
        for each in running:
            if len(came) > 1:
                _kill(each)
            else:
                each.terminate()

    try:
        with handling_stops(stop):
            for rank in map(str, range(count)):
                if not came:
                    own = {**environment, "RANK": rank, "LOCAL_RANK": rank}
                    running.append(subprocess.Popen(command, env=own, start_new_session=True, pass_fds=held))
            if came:  # perhaps while one was started
                pass_on()
            _watch(running, folders)
    finally:
        for each in running:
            _kill(each)
            each.wait()
    return bool(came)


def _watch(running: Sequence[subprocess.Popen[bytes]], folders: Sequence[Path]) -> None:
    """Wait until all have ended; kill those that are left some time after one has failed, or has ended well."""
    last = math.inf
    while True:
        left = [each for each in running if each.poll() is None]
        failed = {rank: each.returncode for rank, each in enumerate(running) if each.returncode}
        if last == math.inf:
            if failed or any(map(_has_failed, folders)):
                last = time.monotonic() + GRACE
            elif len(left) < len(running):  # all is done where one has ended well
                last = time.monotonic() + LEAVING
        if failed:
            rank = min(failed, key=lambda each: failed[each] > 0)  # one that was killed has others lose their connection to it
            how = f"by {signal.Signals(-failed[rank]).name}" if failed[rank] < 0 else f"with exit code {failed[rank]}"
            for folder in [each for each in folders if not (each / STATUS).exists()]:
                write_json(folder / STATUS, {"ended": f"as process {rank} did, {how}"})
        if not left:
            return
        if time.monotonic() > last:
            for each in left:
                _kill(each)
        time.sleep(0.05)


def _has_failed(folder: Path) -> bool:
    """Say whether a process has written down that it failed; it may then wait for others while it ends."""
    return (folder / STATUS).exists() and read_json(folder / STATUS)["ended"] in FAILED


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that has not ended, with those that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def outcome(job: Job, *, asked: bool = False) -> Any:
    """Return the model that a job's processes trained, or raise what a process raised.

    `asked`: to stop. Before they train, and a second time, that ends them without a word.
    """
    import torch

    folder = job.room / "processes"
    status = read_json(folder / STATUS) if (folder / STATUS).exists() else {"ended": "without a word"}
    if status["ended"] in ("error", "diverged"):
        raise (Diverged if status["ended"] == "diverged" else UserError)(status["said"])
    if status["ended"] == "stopped":
        raise KeyboardInterrupt(*([status["said"]] if status["said"] else []))
    if status["ended"] != "done" and asked:
        raise KeyboardInterrupt
    if status["ended"] == "memory":
        raise torch.OutOfMemoryError(status["said"])
    if status["ended"] != "done":
        raise UserError(f"training on {job.config.gpus} processes ended {status['ended']}; what they said stands above; the same command"
                        " goes on from the last checkpoint")  # fmt: skip
    return with_weights(job, torch.load(folder / TRAINED, map_location="cpu", weights_only=True))


def with_weights(job: Job, weights: dict[str, Any]) -> Any:
    """Return the start model with the trained weights in it."""
    from .local import load_start

    model, _ = load_start(job.start, job.config, job.own, job.device)
    if job.config.adapter:
        from peft import get_peft_model

        model = get_peft_model(model, adapter_config(job.config, model))
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    return model if job.config.qlora else model.to(job.device)


def work(parent: int, folders: Sequence[Path]) -> None:
    """Be one of the processes, and do one job after another."""
    import torch

    from ..core.cli import start_talking

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before it trains it ends, as at SIGTERM: no other waits for it then
    threading.Thread(target=_stop_with, args=(parent,), name="sftkit-parent", daemon=True).start()
    start_talking()
    if int(os.environ["RANK"]):
        logging.getLogger("sftkit").setLevel(logging.ERROR)
    jobs: list[Job] = [pickle.loads((folder / JOB).read_bytes()) for folder in folders]
    cpu = jobs[0].device == "cpu"
    if not cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if cpu else "nccl", timeout=PATIENCE)
    for folder, job in zip(folders, jobs, strict=True):
        _do(job, folder)
    torch.distributed.destroy_process_group()


def _stop_with(parent: int) -> None:
    """Ask this process to stop once its parent has ended, and end it where that takes too long: it may wait for one that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHANED)
    os._exit(1)


def _do(job: Job, folder: Path) -> None:
    """Do one process's part of a job; the first of them writes how it ended, and so does each that fails."""
    import torch

    def ended(how: str, said: str = "") -> None:
        write_json(folder / STATUS, {"ended": how, "said": said})

    try:
        how, said = _train(job, folder)
        if torch.distributed.get_rank() == 0:
            ended(how, said)
        over_processes(0)  # wait for all
    except UserError as error:
        ended("diverged" if isinstance(error, Diverged) else "error", str(error))
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        ended("memory", str(error))
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  the parent tells of it
        # where another process, or the parent, has told how it ended, this one has lost its connection to it
        if not (isinstance(error, RuntimeError) and _told(folder)):
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)  # at once: an end may wait on its card for the others, who wait for this one


def _told(folder: Path) -> bool:
    """Say whether it is written down how the processes ended; that may take a moment."""
    for _ in range(20):
        if (folder / STATUS).exists():
            return True
        time.sleep(0.1)
    return False


def _train(job: Job, folder: Path) -> tuple[str, str]:
    """Train; return how that ended, with what is to be said of it. The first process writes the weights."""
    import torch

    from .local import run_trainer
    from .sharded import whole_weights
    from .trainer import unwrapped

    try:
        trainer = run_trainer(
            job.room, job.start, load_chat(job.start), job.data, job.config, job.device, job.own, job.tokens, job.deadline
        )
    except KeyboardInterrupt as stop:  # on which all have agreed
        return "stopped", str(stop)
    weights = whole_weights(unwrapped(trainer), trained=True)
    if torch.distributed.get_rank() == 0:
        with room_on_disk(folder):
            torch.save(weights, folder / TRAINED)
    return "done", ""


if __name__ == "__main__":
    work(int(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
