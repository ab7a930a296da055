"""Prediction on a Ray cluster of several nodes in this machine: the answers of one process, whatever dies."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medmamba
from medmamba.inference import cluster
from medmamba.inference.cluster import packed, predict_on_ray
from medmamba.inference.predict import Failure, NotFinite, iter_predict

ROOT = Path(medmamba.__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """Forty small pictures; every ninth file is none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(40):
        path = folder / f"{number:03d}.png"
        if number % 9 == 4:
            path.write_text("not a picture")
        else:
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def model():
    return medmamba.MedMamba.from_pretrained(medmamba.DEFAULT_MODEL)


def test_answers_survive_the_way_back(model, images):
    for found in iter_predict(model, images[3:6]):
        assert pickle.loads(packed(found)) == found
    lost = pickle.loads(packed(NotFinite("a", "b", ValueError(open))))  # whose cause cannot be sent
    assert type(lost) is NotFinite and lost == NotFinite("a", "b")


def add_node(found, **options) -> None:
    """Adds a node; Ray gives up after 30 seconds, which a busy machine may need."""
    for last in (*[False] * 4, True):
        try:
            found.add_node(**options)
            return
        except Exception as error:
            if last or "timed out during startup" not in str(error):
                raise


@pytest.fixture(scope="module")
def ray_cluster():
    """A head without cores and two nodes with one each; what they run finds the package of this checkout."""
    pytest.importorskip("ray.data", reason='needs pip install "medmamba[ray]"')
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_DATA_DISABLE_PROGRESS_BARS")}
    os.environ["PYTHONPATH"] = str(ROOT)
    found = Cluster()
    try:
        for cores in (0, 1, 1):
            add_node(found, num_cpus=cores, object_store_memory=80 * 2**20, include_dashboard=False)
        yield found
    finally:
        found.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def same(one, other) -> bool:
    """Equal but for rounding: a block is another batch."""
    if type(one) is not type(other) or one.source != other.source:
        return False
    if isinstance(one, Failure):
        return one.error == other.error
    return one.label == other.label and np.allclose(one.logits, other.logits, atol=1e-5)


@pytest.mark.slow
def test_a_node_killed_in_the_middle_loses_and_doubles_nothing(ray_cluster, model, images, monkeypatch):
    import ray

    monkeypatch.setattr(cluster, "BLOCK", 4)
    monkeypatch.setattr(cluster, "WAVE", 120)  # 100 blocks in four waves
    many = images * 10
    expected = list(iter_predict(model, many, 3))
    answers = predict_on_ray(model, iter(many), 3, address=ray_cluster.address, actors=(2, 2))
    found = list(itertools.islice(answers, 10))
    assert sum(node["Alive"] for node in ray.nodes()) == 3
    mine = ray._private.worker._global_node._raylet_socket_name  # of the node through which this process is connected
    victim = next(node for node in ray_cluster.worker_nodes if node._raylet_socket_name != mine)
    ray_cluster.remove_node(victim, allow_graceful=False)  # SIGKILL to all that runs there
    found += answers
    assert len(found) == len(many)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert not ray.is_initialized()


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_killed(ray_cluster, images, tmp_path):
    """SIGKILL to the command, not to a node; what it has written stays, and nothing is answered twice."""
    folder = tmp_path / "images"
    folder.mkdir()
    for turn in range(10):
        for path in images:
            (folder / f"{turn}-{Path(path).name}").write_bytes(Path(path).read_bytes())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(out: Path, *options: str) -> list[str]:
        return [sys.executable, "-m", "medmamba", "predict", str(folder), "--out", str(out), *options]

    out = tmp_path / "cluster.jsonl"
    on_cluster = command(out, "--ray", ray_cluster.address)
    process = subprocess.Popen(on_cluster, env=environment, cwd=ROOT)
    limit = time.monotonic() + 150
    while not (out.is_file() and out.read_bytes().count(b"\n") > 20):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes().count(b"\n")
    assert before < 400
    found = subprocess.run(on_cluster, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=200)
    assert found.returncode == 1 and f"{before} had been answered before" in found.stderr  # 1: some are no pictures
    subprocess.run(command(tmp_path / "single.jsonl"), env=environment, cwd=ROOT, timeout=240)
    one, other = ([json.loads(line) for line in file.open()] for file in (tmp_path / "single.jsonl", out))
    assert [row["source"] for row in one] == [row["source"] for row in other]
    for row, expected in zip(other, one, strict=True):
        assert row.get("label") == expected.get("label") and row.get("error") == expected.get("error")
        assert np.allclose(row.get("logits", 0), expected.get("logits", 0), atol=1e-5)


@pytest.mark.slow
def test_an_address_without_a_cluster_is_refused(model, images, monkeypatch):
    ray = pytest.importorskip("ray", reason='needs pip install "medmamba[ray]"')

    def refuse(address, **_):
        raise ConnectionError(f"Ray is trying to start at {address}, but it is not running\nmore lines")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError, match=r"no Ray cluster at '10.0.0.1:6379'.*`ray start --head`"):
        next(predict_on_ray(model, images, address="10.0.0.1:6379"))
