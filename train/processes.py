"""One run on several processes of this machine, one per GPU: the same updates, and so the same losses, as on one.

The parent prepares the rows and finishes the model; between them torchrun starts the processes, each of which takes its share of every
update's packs, with the whole model (train.collective) or a share of that, too (train.sharded). Gradients are added up over
processes and divided by the tokens of the whole update.
"""

import fcntl
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..core.chat import load_chat
from ..core.errors import Diverged, UserError
from ..core.files import read_json, write_json
from ..core.models import ModelRef
from .adapters import adapter_config
from .collective import PATIENCE, over_processes
from .config import TrainConfig
from .data import TrainingData
from .rendering import end_with_parent
from .stops import handling_stops

log = logging.getLogger(__name__)

JOB, STATUS, TRAINED = "job.pickle", "status.json", "trained.pt"


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
    command = [sys.executable, "-m", "sftkit.train.processes", "start", str(job.config.gpus), str(folder)]
    threads = str(max(1, (os.cpu_count() or 1) // job.config.gpus))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    log.info("training on %d processes, %s", job.config.gpus, job.config.parallel)
    with _alone(folder) as lock:
        (folder / STATUS).unlink(missing_ok=True)
        (folder / JOB).write_bytes(pickle.dumps(job))
        process = subprocess.Popen(
            command,
            env=environment, preexec_fn=end_with_parent, start_new_session=True, pass_fds=(lock,),
        )  # fmt: skip
        with _passing_stops_on(process) as asked:
            code = process.wait()
    return outcome(job, code, asked=bool(asked)), bool(asked)


@contextmanager
def _passing_stops_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the processes that torchrun began, and yield a list of those that came; the second one kills.

    Not to torchrun, which gives them 30 s and then kills them in the middle of a checkpoint.
    """
    came: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(number)
        with suppress(psutil.NoSuchProcess):
            whole, again = psutil.Process(process.pid), len(came) > 1
            for each in [*whole.children(recursive=again), *([whole] if again else [])] or [whole]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    with handling_stops(stop):
        yield came


def outcome(job: Job, code: int, *, asked: bool = False) -> Any:
    """Return the model that a job's processes trained, given torchrun's exit code, or raise what a process raised.

    `asked`: to stop. Before they train, and a second time, that ends them without a word.
    """
    import torch

    folder = job.room / "processes"
    status = read_json(folder / STATUS) if (folder / STATUS).exists() else {"ended": f"with exit code {code}"}
    if status["ended"] in ("error", "diverged"):
        raise (Diverged if status["ended"] == "diverged" else UserError)(status["said"])
    if status["ended"] == "memory":
        raise torch.OutOfMemoryError(status["said"])
    if status["ended"] == "stopped":
        raise KeyboardInterrupt(*([status["said"]] if status["said"] else []))
    if status["ended"] != "done" and asked:
        raise KeyboardInterrupt
    if status["ended"] != "done":
        raise UserError(f"training on {job.config.gpus} processes ended {status['ended']}; what they said stands above")
    return with_weights(job, torch.load(folder / TRAINED, map_location="cpu", weights_only=True))


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Yield a lock that torchrun holds on to: where its parent was killed, it still writes a checkpoint, which is waited for."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("the processes of the last call are still ending: waiting for them")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def wait_for_last(room: Path) -> None:
    """Wait for the processes of a killed call, which may still be writing a checkpoint."""
    if (folder := room / "processes").exists():
        with _alone(folder):
            pass


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


def start(count: int, folders: Sequence[Path]) -> None:
    """Be torchrun, whose traceback says nothing that a process has not said: only how one ended that was killed is written down."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", "--nproc-per-node", str(count), "-m", "sftkit.train.processes", "work", *map(str, folders)])
    except SignalException:
        sys.exit(1)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"by {failure.signal_name()}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
        for folder in [each for each in folders if not (each / STATUS).exists()]:
            write_json(folder / STATUS, {"ended": f"as process {rank} did, {how}"})
        sys.exit(1)


def work(folders: Sequence[Path]) -> None:
    """Be one of the processes, and do one job after another."""
    import torch

    from ..core.cli import start_talking

    end_with_parent()  # with a checkpoint, where torchrun was killed
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
        over_processes(0)  # wait for all
    torch.distributed.destroy_process_group()


def _do(job: Job, folder: Path) -> None:
    """Do one process's part of a job; the first of them writes how it ended."""
    import torch

    from .local import run_trainer
    from .sharded import whole_weights
    from .trainer import unwrapped

    rank = torch.distributed.get_rank()

    def ended(how: str, said: str = "") -> None:
        if not rank or how in ("error", "diverged", "memory"):
            write_json(folder / STATUS, {"ended": how, "said": said})

    try:
        trainer = run_trainer(
            job.room, job.start, load_chat(job.start), job.data, job.config, job.device, job.own, job.tokens, job.deadline
        )
    except UserError as error:
        ended("diverged" if isinstance(error, Diverged) else "error", str(error))
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        ended("memory", str(error))
        sys.exit(1)
    except RuntimeError:
        if (folder / STATUS).exists():  # another process has said how it ended; this one has lost its connection to it
            sys.exit(1)
        raise
    except KeyboardInterrupt as stop:
        ended("stopped", str(stop))
    else:
        weights = whole_weights(unwrapped(trainer), trained=True)
        if not rank:
            torch.save(weights, folder / TRAINED)
        ended("done")


if __name__ == "__main__":
    if sys.argv[1] == "start":
        start(int(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
    else:
        work([Path(each) for each in sys.argv[2:]])
