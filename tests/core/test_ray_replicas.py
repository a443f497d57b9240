"""Engines on a real Ray cluster of this machine: the answers of one, and a run that finishes although an actor is killed."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError

ray = pytest.importorskip("ray")
from sftkit.core.engines.ray_replicas import RayReplicas  # noqa: E402  only with ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
CONFIG = EngineConfig(engine="transformers", dtype="float32", device="cpu", replicas=2, executor="ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a cluster of two workers; return the file that poisons the engine of the tests."""
    poison = tmp_path_factory.mktemp("ray") / "poison"
    poison.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTKIT_TEST_POISON", str(poison))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield poison
        ray.shutdown()


def requests(count: int) -> list[Request]:
    sampling = Sampling(temperature=0.8, max_new_tokens=12)
    return [Request(key=str(n), prompt_ids=(300 + n, *range(5, 14)), messages=[], sampling=sampling, seed=n) for n in range(count)]


def poisoned() -> RayReplicas:
    return RayReplicas("poisoned_engine", "model", CONFIG, revision=None, chat=None)


def hosts() -> list[psutil.Process]:
    """Return the processes of actors that serve an engine."""
    found = []
    for each in psutil.Process().children(recursive=True):  # never those of another cluster on this machine
        try:
            if "_Host" in " ".join(each.cmdline()) or "_Host" in each.name():
                found.append(each)
        except psutil.Error:
            continue
    return found


def test_two_actors_give_the_answers_of_one_engine(cluster: Path, tiny_model: Path) -> None:
    wanted = requests(30)
    alone = EngineConfig(engine="transformers", dtype="float32", device="cpu")
    with closing(open_engine(str(tiny_model), alone)) as engine:
        expected = {each.key: each.text for each in engine.generate(wanted)}
        identity = engine.identity
    with closing(open_engine(str(tiny_model), CONFIG)) as engine:
        assert isinstance(engine, RayReplicas)
        assert engine.identity == identity
        assert {each.key: each.text for each in engine.generate(wanted)} == expected
        actors = [each._ended for each in engine._processes]
    for each in actors:  # Ray would tell the user of any other end as of a crash
        with pytest.raises(ray.exceptions.RayActorError, match=r"killed by `ray\.kill`"):
            ray.get(each)


def test_a_killed_actor_is_replaced_and_its_work_done(cluster: Path) -> None:
    with closing(poisoned()) as engine:
        found = []
        killed = None
        for number, completion in enumerate(engine.generate(requests(3000))):
            found.append(completion.key)
            if number == 40:
                killed = hosts()[0]
                os.kill(killed.pid, signal.SIGKILL)
        assert killed is not None
        assert sorted(found, key=int) == [str(number) for number in range(3000)]


def test_no_cluster_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("nobody\nthere")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"ray: no cluster answers at auto \(nobody there\); start one with `ray start`"):
        RayReplicas("poisoned_engine", "m", EngineConfig(executor="ray", ray_address="auto"), revision=None, chat=None)
