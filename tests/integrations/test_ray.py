"""Ray: files answered by two workers, one of which is killed; a driver that is killed; the server with two replicas.

One cluster of this machine, on loopback, serves all tests here.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
psutil = pytest.importorskip("psutil", reason="needs psutil, to find Ray's processes: pip install -e '.[test-all]'")

import httpx  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402

from sfs_triton import ArgumentError, FixedSteps, SlowFast, load  # noqa: E402
from sfs_triton.batch.files import Row  # noqa: E402
from sfs_triton.batch.run import BatchError, BatchSettings, answer, in_process, run_batch  # noqa: E402
from sfs_triton.decoding.params import DecodingParams  # noqa: E402
from sfs_triton.integrations import ray as on_ray  # noqa: E402
from sfs_triton.serve.settings import ServeSettings  # noqa: E402

PATIENCE = 100.0  # seconds that a step of a test may take on a busy machine
PARAMS = DecodingParams(gen_length=24, sampler=FixedSteps(temperature=0.7))
SETTINGS = BatchSettings(params=PARAMS, batch=2, device="cpu")
SUMS = "15,44,79,50"


def write(path: Path, count: int) -> Path:
    rows = [{"id": f"row {i}", "prompt": f"{i + 11},44,{i * 3 + 20},50"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "oops\n")
    return path


def wait_for(condition, what: str):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def descendants(pid: int, name: str = "") -> list[psutil.Process]:
    """Processes below a process, of those whose command line starts with ``name``."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(name):
                found.append(process)
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return found


def ended(process: psutil.Process) -> bool:
    """Return True if a process has ended; an orphan stays as a zombie where no init collects it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    before = {process.pid for process in descendants(os.getpid())}  # of other tests in this process

    def rays() -> list[psutil.Process]:
        """Without what renders the engine's templates, which has Ray's folders on its path."""
        lines = ((p, " ".join(p.cmdline())) for p in descendants(os.getpid()) if p.pid not in before)
        return [p for p, line in lines if ("/ray/" in line or "ray::" in line) and "template_worker" not in line]

    on_ray.start(2, object_store_memory=100 * 2**20)
    mine = rays()
    assert any("raylet" in p.name() for p in mine)
    yield
    serve.shutdown()
    mine += rays()
    ray.shutdown()
    wait_for(lambda: all(map(ended, mine)), f"Ray's processes stayed behind: {mine}")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("prompts") / "in.jsonl", 14)


@pytest.fixture(scope="module")
def whole(source, embedded) -> bytes:
    """The output of a run in this process."""
    out = source.with_name("whole.jsonl")
    run_batch(source, out, SETTINGS, in_process(SETTINGS, embedded))
    return out.read_bytes()


@pytest.mark.slow
def test_a_worker_is_killed_and_no_prompt_is_lost_or_doubled(cluster, source, whole, tmp_path, embedded):
    killed, told = [], []

    def on_progress(done: int, rows: int) -> None:
        told.append(done)
        if not killed:
            workers = descendants(os.getpid(), "ray::MapWorker")
            assert workers
            workers[0].send_signal(signal.SIGKILL)
            killed.append((workers[0], done))

    out = tmp_path / "out.jsonl"
    done = on_ray.run_batch(source, out, SETTINGS, workers=2, on_progress=on_progress)
    assert (done.rows, done.errors, done.kept) == (15, 1, 0)
    (victim, at), *_ = killed
    assert at < 15 and told[-1] == 15 and not victim.is_running()
    assert told == sorted(set(told)), "a chunk came twice"
    assert out.read_bytes() == whole
    prompts = [json.loads(line)["prompt"] for line in source.read_text().splitlines()[:-1]]
    wanted = embedded.generate(prompts, PARAMS)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [*(f"row {i}" for i in range(14)), 15]
    assert [row["text"] for row in rows[:-1]] == [w.text for w in wanted] and "is not JSON" in rows[-1]["error"]
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl"}


@pytest.mark.slow
def test_parquet_and_rows_that_were_finished_before(cluster, tmp_path, embedded):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    settings = BatchSettings(params=DecodingParams(gen_length=16), batch=2, device="cpu")
    parquet.write_table(
        arrow.table({"id": [5, 6, 7, 8], "prompt": [SUMS, "1,2," * 500, "", SUMS]}), tmp_path / "in.parquet"
    )
    paths = tmp_path / "in.parquet", tmp_path / "out.parquet"

    def stopped(chunks):
        yield answer(embedded, settings, next(chunks))
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run_batch(*paths, settings, stopped)
    done = on_ray.run_batch(*paths, settings, workers=1)
    assert (done.rows, done.errors, done.kept) == (4, 2, 2)
    rows = parquet.read_table(paths[1]).to_pylist()
    wanted = embedded.generate(SUMS, gen_length=16).text
    assert [row["id"] for row in rows] == [5, 6, 7, 8] and [row["text"] for row in rows] == [wanted, None, None, wanted]
    assert "the model allows 512" in rows[1]["error"] and "prompt is empty" in rows[2]["error"]


def test_what_a_worker_cannot_do_ends_the_run(cluster, source, tmp_path):
    with pytest.raises(BatchError, match="'/no/such/model' is a path, and does not exist"):
        on_ray.run_batch(source, tmp_path / "out.jsonl", BatchSettings(model="/no/such/model"), workers=1)
    with pytest.raises(ArgumentError, match="workers=3 need 3 CPUs, the cluster has 2"):
        on_ray.run_batch(source, tmp_path / "out.jsonl", SETTINGS, workers=3)
    with pytest.raises(ArgumentError, match="workers=0"):
        on_ray.run_batch(source, tmp_path / "out.jsonl", SETTINGS, workers=0)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_chunk_that_kills_its_workers_is_not_tried_for_ever(cluster):
    """Attempts are counted outside of workers. Here those are in this process, and their deaths pretended."""
    attempts = ray.remote(num_cpus=0)(on_ray.Attempts).remote()
    piece = json.dumps([vars(Row(line, line, SUMS)) for line in (3, 4)])
    for _ in range(on_ray.RETRIES + 1):
        ray.get(attempts.begin.remote("lines 3 to 4"))
    (came,) = on_ray.Worker(SETTINGS, attempts, 5)({"rows": [piece]})["finished"]
    assert json.loads(came) == {"refusal": "4 workers died at lines 3 to 4"}
    ray.get(attempts.done.remote("lines 3 to 4"))
    (came,) = on_ray.Worker(SETTINGS, attempts, 5)({"rows": [piece]})["finished"]
    assert [row["id"] for _, row in json.loads(came)["finished"]] == [3, 4]
    for _ in range(5):
        ray.get(attempts.begin.remote("start"))
    (came,) = on_ray.Worker(SETTINGS, attempts, 5)({"rows": [piece]})["finished"]
    assert json.loads(came) == {"refusal": "workers died again and again while they started"}


def test_processes_listen_on_loopback_only(cluster):
    listening = [
        connection.laddr.ip
        for process in descendants(os.getpid())
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


@pytest.mark.slow
def test_a_driver_is_killed_and_the_run_goes_on(source, whole, tmp_path, embedded):
    """Its workers end with it, and their finished work stays."""
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    options = ["--workers", "2", "--batch", "2", "--gen-length", str(PARAMS.gen_length), "--device", "cpu"]
    options += ["--sampler", "vanilla", "--temperature", "0.7"]
    command = [sys.executable, "-m", "sfs_triton.cli", "batch", str(source), str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: process.poll() is not None or list(parts.glob("part-*.jsonl")), "no part was finished")
            theirs = descendants(process.pid) if process.poll() is None else []
        finally:
            process.send_signal(signal.SIGKILL)
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == -signal.SIGKILL, said
    assert [p for p in theirs if "raylet" in p.name()], "there was no cluster"
    wait_for(lambda: all(map(ended, theirs)), "processes outlived the driver")
    kept = 2 * len(list(parts.glob("part-*.jsonl")))
    assert 2 <= kept < 14 and not out.exists()
    done = run_batch(source, out, SETTINGS, in_process(SETTINGS, embedded))
    assert (done.rows, done.errors, done.kept) == (15, 1, kept) and out.read_bytes() == whole


# ---------------------------------------------------------------------------------------------------------------- serve


@pytest.mark.parametrize(
    ("there", "device", "wanted"),
    [(8, None, 1.0), (8, "cuda", 1.0), (8, "cpu", 0.0), (0, None, 0.0), (None, None, 0.0), (None, "cuda:1", 1.0)],
)
def test_a_replica_takes_a_gpu_where_the_cluster_has_some(monkeypatch, there, device, wanted):
    """Ray hides the GPUs from those that ask for none. None: no cluster is connected yet."""
    monkeypatch.setattr(ray, "is_initialized", lambda: there is not None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": float(there)} if there else {}))
    options = on_ray.deployment("embedded", device=device)._bound_deployment.ray_actor_options
    assert options["num_gpus"] == wanted


def test_a_replica_takes_all_that_load_takes(monkeypatch):
    names = inspect.signature(load).parameters.keys() - {"path_or_hub_id", "tensor_parallel", "unknown"}
    given = {name: f"the {name}" for name in names}
    made: list[dict] = []
    monkeypatch.setattr(on_ray, "load", lambda **options: made.append(options) or 1 / 0)
    deployed = on_ray.deployment("embedded", gpus=0, **given)._bound_deployment
    with pytest.raises(ZeroDivisionError):
        on_ray.Replica(*deployed.init_args)
    assert made == [{"path_or_hub_id": "embedded", **given}]


@pytest.fixture(scope="module")
def server(cluster) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = ServeSettings(port=port, sampler=SlowFast(), max_tokens=64, grace=5)
    application = on_ray.deployment("embedded", replicas=2, settings=settings, device="cpu")
    yield on_ray.serve_on(application, settings)
    serve.shutdown()


def chat(**more) -> dict:
    return {"messages": [{"role": "user", "content": SUMS}], "max_tokens": 32, **more}


@pytest.mark.slow
def test_two_replicas_answer(server, embedded):
    assert server.startswith("http://127.0.0.1:")
    wanted = embedded.generate(SUMS, gen_length=32)
    assert len(descendants(os.getpid(), "ray::ServeReplica")) == 2

    def ask(number: int) -> tuple[int, str]:
        done = httpx.post(server + "/v1/chat/completions", json=chat(seed=number), timeout=PATIENCE)
        return done.status_code, done.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    assert answers == [(200, wanted.text)] * 24
    busy = {p.pid for p in descendants(os.getpid(), "ray::ServeReplica") if p.cpu_times().user > 0}
    assert len(busy) == 2
    assert httpx.get(server + "/ready", timeout=PATIENCE).json() == {"status": "ready"}
    refused = httpx.post(server + "/v1/chat/completions", json=chat(max_tokens=65), timeout=PATIENCE)
    assert refused.status_code == 400 and "max_tokens" in refused.json()["error"]["message"]
    other = httpx.get(server + "/ready", headers={"Host": "evil.example"}, timeout=PATIENCE)
    assert other.status_code == 421


@pytest.mark.slow
def test_replicas_stream(server, embedded):
    wanted = embedded.generate(SUMS, gen_length=64, sampler=FixedSteps())
    body, arrived, text = chat(max_tokens=64, stream=True, sampler="vanilla", frames=True), [], ""
    last = ""
    with httpx.stream("POST", server + "/v1/chat/completions", json=body, timeout=PATIENCE) as answered:
        assert answered.headers["content-type"].startswith("text/event-stream")
        for line in answered.iter_lines():
            if line.startswith("data: {"):
                arrived.append(time.monotonic())
                choices = json.loads(line[6:])["choices"]
                text += choices[0]["delta"].get("content") or "" if choices else ""
            last = line or last
    assert last == "data: [DONE]" and text == wanted.text
    assert len(arrived) > wanted.nfe and arrived[-1] - arrived[0] > 0.01, "it came in one piece"
