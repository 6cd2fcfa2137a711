"""Training from an object store that is slow, refuses, cuts short and lies, and its cache.

pretrain ──▶ Proxy (latency, 503, short and changed bodies, by a seed) ──▶ S3 of moto
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from small import MODEL, final_weights, metrics, train_tokenizer, write_novels

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from data.s3 import s3_server  # noqa: F401

from gristmill.cli import main
from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset

pytestmark = pytest.mark.slow

# What a store without checksums of its own does not say, as most do not.
HIDDEN = ("content-length", "connection", "transfer-encoding")
SEQ_LEN, BATCH, STEPS = 64, 16, 60
BUCKET = "shelf"


class Proxy(ThreadingHTTPServer):
    """A road to a server, with faults that depend on the seed, the object and the try alone.

    `chance` is that of each kind of fault, for every GET; `corrupt` names objects whose bytes are
    changed, and how often. `served` counts the GETs of an object that ended well.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.seed = urlsplit(target).netloc, seed
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.chance, self.latency_s = 0.0, 0.0
        self.corrupt: dict[str, int] = {}
        self.tries: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.guard = threading.Lock()

    def fault(self, path: str) -> tuple[str, float]:
        """What happens to this GET, and how long it waits."""
        name = path.rpartition("/")[2]
        with self.guard:
            self.tries[path] += 1
            rng = random.Random(f"{self.seed} {path} {self.tries[path]}")
            delay, drawn = rng.uniform(0, 2 * self.latency_s), rng.random()
            kind = ""
            if self.corrupt.get(name, 0) > 0:
                self.corrupt[name] -= 1
                kind = "flip"
            elif drawn < self.chance:
                kind = "503"
            elif drawn < 2 * self.chance:
                kind = "cut"
            elif drawn < 3 * self.chance and name.endswith(".bin"):
                kind = "short"
            self.faults[kind] += 1
            self.served[name] += not kind
            return kind, delay


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        kind, delay = self.server.fault(path)
        time.sleep(delay)
        if kind == "503":
            self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Slow</Message></Error>")
            return
        status, headers, body = self.ask()
        if kind == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif kind == "short":
            body = body[: len(body) // 3]
        self.answer(status, headers, body, cut=kind == "cut")

    def do_HEAD(self) -> None:
        status, headers, _ = self.ask()
        self.answer(status, headers, b"", length=headers.get("content-length", "0"))

    def ask(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.target, timeout=30)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False, length=None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in HIDDEN and not name.startswith("x-amz-checksum"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def watched(folder: Path, limit: int) -> Iterator[list[int]]:
    """The sizes that the cache has while the block lasts; none may be above the limit."""
    sizes, stop = [0], threading.Event()

    def listing() -> dict[str, tuple[int, int]]:
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(folder / "chunks"):
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat()
                    found[entry.name] = about.st_ino, about.st_size
        return found

    def watch() -> None:
        before = listing()
        while not stop.wait(0.002):
            now = listing()
            if now == before:  # else something moved while we looked
                sizes.append(sum(dict(now.values()).values()))
            before = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        stop.set()
        watcher.join()
    assert 0 < max(sizes) <= limit


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of many small chunks, both sides, and the run on it from the local folder."""
    root = tmp_path_factory.mktemp("corpus")
    novels = write_novels(root / "novels", files=48, words=1500)
    tokenizer = train_tokenizer(novels, root / "tokenizer")
    words = ["prepare", "textfiles", "--input_dir", str(novels), "--output_dir", str(root / "data")]
    words += ["--tokenizer_dir", str(tokenizer), "--val_fraction", "0.1"]
    assert main([*words, "--chunk_tokens", "1024"]) == 0
    assert main(pretrain(str(root / "data"), root / "run")) == 0
    return root


@pytest.fixture(scope="module")
def server(
    corpus: Path,
    s3_server: str,  # noqa: F811
) -> str:
    """An S3 server that holds the dataset."""
    import s3fs

    store = s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True)
    store.mkdir(BUCKET)
    for path in sorted((corpus / "data").rglob("*")):
        if path.is_file():
            name = path.relative_to(corpus / "data").as_posix()
            store.pipe_file(f"{BUCKET}/data/{name}", path.read_bytes())
    return s3_server


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    """The way to it."""
    proxy = Proxy(server)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield proxy
    proxy.shutdown()
    thread.join()
    proxy.server_close()


def pretrain(data: str, out: Path, *more: str) -> list[str]:
    model = [f"--model_config.{name}={value}" for name, value in MODEL.items()]
    return [
        *("pretrain", *model, "--data", "LitData", "--data.data_path", data),
        *("--out_dir", str(out), "--compile", "off", "--precision", "32-true", "--device", "cpu"),
        *("--train.max_steps", str(STEPS), "--train.global_batch_size", str(BATCH)),
        *("--train.micro_batch_size", str(BATCH), "--train.save_interval", "10"),
        *("--eval.interval", "20", "--eval.max_iters", "3", *more),
    ]


def limit_of(corpus: Path) -> int:
    """Room for the chunks of a window and a few more, not for the whole dataset."""
    sizes = Dataset.open(corpus / "data/train").chunks.sizes
    limit = int(np.sort(sizes)[-64:].sum() + 8 * sizes.max())
    assert limit < 0.8 * sizes.sum()
    return limit


def remote(corpus: Path, out: Path, cache: Path) -> list[str]:
    gigabytes = f"{limit_of(corpus) / 1e9:.9f}"
    more = ("--data.cache_dir", str(cache), "--data.cache_gb", gigabytes)
    return pretrain(f"s3://{BUCKET}/data", out, *more)


def start(words: list[str], proxy: Proxy) -> subprocess.Popen[str]:
    runner = "import sys, torch; torch.set_num_threads(1); from gristmill.cli import main;"
    return subprocess.Popen(
        [sys.executable, "-c", f"{runner} sys.exit(main(sys.argv[1:]))", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "AWS_ENDPOINT_URL": proxy.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def told(out: Path) -> list[dict[str, float]]:
    """What a run says of its samples and losses, without times."""
    names = ("step", "samples", "loss", "val_loss", "grad_norm", "epoch")
    return [{n: row[n] for n in names if n in row} for row in metrics(out)]


def check(corpus: Path, out: Path) -> None:
    assert told(out) == told(corpus / "run")
    assert sum("val_loss" in row for row in told(out)) >= 3
    assert final_weights(out) == final_weights(corpus / "run")


def chunk_names(corpus: Path) -> list[str]:
    return [chunk.name for chunk in Dataset.open(corpus / "data/train").chunks]


def test_a_bad_store_changes_no_sample(corpus: Path, proxy: Proxy, tmp_path: Path) -> None:
    proxy.chance, proxy.latency_s = 0.05, 0.01
    names = chunk_names(corpus)
    proxy.corrupt = {names[0]: 1, names[-1]: 2}
    with watched(tmp_path / "cache", limit_of(corpus)):
        process = start(remote(corpus, tmp_path / "run", tmp_path / "cache"), proxy)
        output = process.communicate(timeout=110)[0]
    assert process.returncode == 0, output
    check(corpus, tmp_path / "run")
    assert all(proxy.faults[kind] for kind in ("503", "cut", "short", "flip")), proxy.faults
    assert proxy.corrupt == {names[0]: 0, names[-1]: 0}
    # Nobody reads any more, and nothing is left half done.
    assert not list((tmp_path / "cache/readers").iterdir())
    assert not list((tmp_path / "cache/chunks").glob("*.part"))


def test_killed_and_resumed_from_a_store(corpus: Path, proxy: Proxy, tmp_path: Path) -> None:
    proxy.chance, proxy.latency_s = 0.03, 0.005
    out = tmp_path / "run"
    words = remote(corpus, out, tmp_path / "cache")
    with watched(tmp_path / "cache", limit_of(corpus)):
        for rows in (14, 37):
            process = start(words, proxy)
            deadline = time.monotonic() + 60
            while not (out / "metrics.jsonl").exists() or len(metrics_of(out)) < rows:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.kill()
            process.communicate()
        process = start(words, proxy)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    check(corpus, out)
    assert not list((tmp_path / "cache/readers").iterdir())


def metrics_of(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines()


def test_a_chunk_that_stays_corrupt_ends_the_run(
    corpus: Path, proxy: Proxy, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stream = TokenStream(Dataset.open(corpus / "data/train"), SEQ_LEN, seed=42)
    # One that the second window begins with: there are checkpoints by then.
    window = stream._orders[0].epoch(0)
    victim = chunk_names(corpus)[int(window.chunks[64])]
    proxy.corrupt = {victim: 10**6}
    words = remote(corpus, out, tmp_path / "cache")
    process = start([*words, "--train.max_steps", "90"], proxy)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 1, output
    error = output[output.index("error:") :]
    assert f"s3://{BUCKET}/data/train/{victim}" in error
    assert "contents are not those" in error
    assert "Traceback" not in output
    advice = f"gristmill data verify s3://{BUCKET}/data/train"
    assert advice in error
    verify = start(advice.split()[1:], proxy)
    assert victim in verify.communicate(timeout=60)[0]
    assert verify.returncode == 1
    # What was saved is whole: once the chunk is mended, the run goes on from there.
    proxy.corrupt = {}
    steps = sorted(p.name for p in out.rglob("step-*"))
    assert steps
    process = start([*words, "--train.max_steps", "90"], proxy)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert main(pretrain(str(corpus / "data"), tmp_path / "local", "--train.max_steps", "90")) == 0
    assert told(out) == told(tmp_path / "local")
    assert final_weights(out) == final_weights(tmp_path / "local")


def two_windows(stream: TokenStream) -> int:
    """Samples until the third window of the first epoch begins, or a batch more."""
    return int(stream._orders[0].epoch(0).window_starts[2])


def read_as_rank(rank: int, url: str, cache: Path, limit: int, log: Path, barrier) -> None:
    from gristmill.data.reading.chunk_cache import ChunkCache

    kept = ChunkCache(cache, limit)
    stream = TokenStream(Dataset.open(url, cache=kept), SEQ_LEN, seed=42)
    ids, sums = [], []
    for start_ in range(0, two_windows(stream), BATCH):
        barrier.wait(60)  # as the exchange of gradients does
        batch = stream.batch(start_, BATCH, rank, 2)
        ids.append(batch.sample_ids[batch.valid].tolist())
        sums.append(batch.tokens.sum(axis=1).tolist())
    log.write_text(json.dumps({"ids": ids, "sums": sums, "downloads": kept.downloads}))
    kept.close()


def test_two_processes_fetch_each_chunk_once(corpus: Path, proxy: Proxy, tmp_path: Path) -> None:
    proxy.latency_s = 0.01
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    # As the limit is when nobody says one: less than the dataset, more than a window of it.
    sizes = Dataset.open(corpus / "data/train").chunks.sizes
    limit = int(2 * np.sort(sizes)[-64:].sum())
    assert limit < 0.8 * sizes.sum()
    url = f"s3://{BUCKET}/data/train"
    logs = [tmp_path / f"{rank}.json" for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch, watched(tmp_path / "cache", limit):
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        shared = (url, tmp_path / "cache", limit)
        ranks = [
            spawn.Process(target=read_as_rank, args=(rank, *shared, log, barrier))
            for rank, log in enumerate(logs)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
    found = [json.loads(log.read_text()) for log in logs]
    local = TokenStream(Dataset.open(corpus / "data/train"), SEQ_LEN, seed=42)
    for number, start_ in enumerate(range(0, two_windows(local), BATCH)):
        batch = local.batch(start_, BATCH)
        assert batch.sample_ids.tolist() == found[0]["ids"][number] + found[1]["ids"][number]
        sums = found[0]["sums"][number] + found[1]["sums"][number]
        assert batch.tokens.sum(axis=1).tolist() == sums
    names, order = chunk_names(corpus), local._orders[0].epoch(0).chunks
    # Each came once through the network, whoever asked for it; of the third window, some did.
    assert [proxy.served[names[chunk]] for chunk in order[:128]] == [1] * 128
    served = [proxy.served[name] for name in names]
    assert set(served) <= {0, 1}
    # At the end some were on their way.
    assert 128 <= sum(rank["downloads"] for rank in found) <= sum(served)
    assert all(rank["downloads"] for rank in found)
