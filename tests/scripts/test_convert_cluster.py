"""Shards made by a cluster that loses a worker in the middle: the bytes that one process writes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

distributed = pytest.importorskip("distributed", reason="needs pip install '.[cluster]'")

from gguf_splitquant.cli import main  # noqa: E402
from gguf_splitquant.errors import OutputError  # noqa: E402
from gguf_splitquant.gguf_io.journal import journal_path  # noqa: E402
from gguf_splitquant.gguf_io.sharding import shard_of  # noqa: E402
from scripts.convert_cluster import convert_on_cluster  # noqa: E402

SHARDS = 4
OPTIONS = ["--recipe", "stock", "--no-calibration"]


@pytest.fixture
def client() -> Iterator[distributed.Client]:
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def worker_at(client: distributed.Client, path: Path) -> str:
    """Address of the worker that makes a shard."""
    (worker,) = (
        w for w, keys in client.processing().items() if any(str(k).startswith(path.name) for k in keys)
    )
    return str(worker)


def test_a_cluster_that_loses_a_worker(stories15m: Path, tmp_path: Path, client: distributed.Client) -> None:
    expected, out = tmp_path / "expected.gguf", tmp_path / "out.gguf"
    assert main(["convert", str(stories15m), str(expected), *OPTIONS, "--shards", str(SHARDS)]) == 0
    processes = client.run(os.getpid)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            convert_on_cluster(client, str(stories15m), out, SHARDS, OPTIONS)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    paths = [shard_of(out, number, SHARDS) for number in range(SHARDS)]
    killed = None
    while thread.is_alive() and killed is None:
        for path in paths:
            journal = journal_path(path)
            if journal.exists() and journal.read_bytes().count(b"\n") > 2:
                killed = worker_at(client, path)
                os.kill(processes[killed], signal.SIGKILL)
                left = journal.exists() and not path.exists()
                break
        time.sleep(0.002)
    thread.join()
    assert not failures
    assert killed is not None and left, "the worker was to die in the middle of its shard"
    assert processes[killed] not in client.run(os.getpid).values()
    for number, path in enumerate(paths):
        assert path.read_bytes() == shard_of(expected, number, SHARDS).read_bytes()
    assert sorted(p.name for p in tmp_path.glob("out*")) == sorted(
        [*(path.name for path in paths), "out.plan.json"]
    )
    with pytest.raises(OutputError, match="exists; delete it"):
        convert_on_cluster(client, str(stories15m), out, SHARDS, OPTIONS)
    assert convert_on_cluster(client, str(stories15m), out, SHARDS, OPTIONS, resume=True) == paths


def test_a_target_gives_the_shards_of_one_machine(
    stories15m: Path, tmp_path: Path, client: distributed.Client
) -> None:
    expected, out = tmp_path / "expected.gguf", tmp_path / "out.gguf"
    options = [*OPTIONS, "--target-bpw", "4.5", "--tensor-type", "attn_v=Q8_0"]
    assert main(["convert", str(stories15m), str(expected), *options, "--shards", "2"]) == 0
    for number, path in enumerate(convert_on_cluster(client, str(stories15m), out, 2, options)):
        assert path.read_bytes() == shard_of(expected, number, 2).read_bytes()


def test_what_is_there_of_another_conversion_is_refused(
    stories15m: Path, tmp_path: Path, client: distributed.Client
) -> None:
    out, model = tmp_path / "out.gguf", str(stories15m)
    paths = convert_on_cluster(client, model, out, 3, OPTIONS)
    shards = [path.read_bytes() for path in paths]
    paths[1].unlink()
    with pytest.raises(OutputError, match=r"cannot be kept.*out-0000[13]-of-00003\.gguf: exists"):
        convert_on_cluster(client, model, out, 3, [*OPTIONS, "--type", "Q8_0"], resume=True)
    with pytest.raises(OutputError, match=r"out\.plan\.json: is the plan of another recipe"):
        convert_on_cluster(client, model, out, 3, [*OPTIONS, "--target-bpw", "6"], resume=True)
    assert not paths[1].exists(), "a shard was added to those of another conversion"
    convert_on_cluster(client, model, out, 3, OPTIONS, resume=True)
    assert [path.read_bytes() for path in paths] == shards
    for path in paths:
        path.unlink()
    with pytest.raises(OutputError, match=r"out\.plan\.json: exists; delete it"):
        convert_on_cluster(client, model, out, 3, OPTIONS)
