"""The local model server: against sentence-transformers, against itself in-process, its start."""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]

from benchmarks import corpus
from benchmarks.endpoint import MODEL_TEI
from benchmarks.lab import Lab
from benchmarks.report import Cell, Table, middle, times
from benchmarks.sizes import Sizes
from embedding_pipeline.embedders import Endpoint, create_embedder
from embedding_pipeline.local.minilm import MiniLM, Vectors, model_folder
from embedding_pipeline.local.model_server import ensure_model_server, stop_model_server

REFERENCE = "BENCH_REFERENCE_PYTHON"
"""An interpreter that has sentence-transformers; also `--reference-python`."""

_REFERENCE = """
import json, sys, time
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
model.max_seq_length = 256
model.encode(["the first call prepares what the others use"])
print("ready", flush=True)
for line in sys.stdin:
    texts = json.loads(line)
    began, cpu = time.perf_counter(), time.process_time()
    vectors = model.encode(texts, batch_size=32, normalize_embeddings=True)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "vectors": vectors.tolist()}), flush=True)
"""

HTTP = "local server over HTTP (TEI dialect)"
INSIDE = "the same model in-process"
THEIRS = "sentence-transformers, in-process"

TURN = 64
"""Texts that each embeds before the next has its turn: seconds, so that other work on the machine
meets all alike."""


@dataclass(frozen=True)
class Answer:
    """What one of them made of a turn's texts."""

    seconds: float
    cpu: float
    vectors: Vectors


Ask = Callable[[list[str]], Answer]


def local_model(lab: Lab, sizes: Sizes) -> list[Table]:
    """Texts a second over HTTP, in-process and by the reference, in turns."""
    texts = [corpus.text(number) for number in range(1, sizes.model_texts + 1)]
    starts: list[float] = []
    turns: list[dict[str, Answer]] = []
    reference = os.environ.get(REFERENCE)
    with ExitStack() as stack:
        for _ in range(sizes.rounds - 1):
            with _server() as (_, _, seconds):
                starts.append(seconds)
        url, pid, seconds = stack.enter_context(_server())
        starts.append(seconds)
        those: dict[str, Ask] = {
            HTTP: stack.enter_context(_over_http(url, pid)),
            INSIDE: _inside,
        }
        if reference:
            those[THEIRS] = stack.enter_context(_reference(reference))
        for ask in those.values():
            ask(texts[:8])
        order = list(those)
        for _ in range(sizes.rounds):
            for first in range(0, len(texts), TURN):
                turn = {who: those[who](texts[first : first + TURN]) for who in order}
                for who, answer in turn.items():
                    _same(turn[HTTP].vectors, answer.vectors, who)
                turns.append(turn)
            order = [*order[1:], order[0]]
        memory = _peak_mb(pid)
    return [_table(len(texts), turns, starts, memory)]


def _table(texts: int, turns: list[dict[str, Answer]], starts: list[float], memory: float) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "all-MiniLM-L6-v2, float32": who,
            "texts/s, of in-process": _speed(turns, who, INSIDE),
            "texts/s, of sentence-transformers": _speed(turns, who, THEIRS),
            "CPU time, of sentence-transformers": _cpu(turns, who),
            "start to first vector, s": middle(starts) if who == HTTP else None,
            "memory, MB": memory if who == HTTP else None,
        }
        for who in (HTTP, INSIDE, THEIRS)
    ]
    notes = ["The vectors of all agree (cosine ≥ 0.99999)."]
    if THEIRS not in turns[0]:
        notes.append("sentence-transformers was not measured: not installed (--reference-python).")
    figures: dict[str, Cell] = {
        f"{who}: seconds a turn": middle(turn[who].seconds for turn in turns) for who in turns[0]
    }
    return Table(
        f"Local model server, {texts:,} texts of 100 to 200 words in turns of {TURN}",
        list(rows[0]),
        rows,
        notes,
        figures | {f"start to first vector {i}, s": start for i, start in enumerate(starts, 1)},
    )


def _speed(turns: list[dict[str, Answer]], who: str, other: str) -> str | None:
    """How much faster `who` was than `other`, the median of the turns; None without either."""
    if not {who, other} <= set(turns[0]):
        return None
    return times(middle(turn[other].seconds / turn[who].seconds for turn in turns))


def _cpu(turns: list[dict[str, Answer]], who: str) -> str | None:
    if not {who, THEIRS} <= set(turns[0]):
        return None
    return times(middle(turn[who].cpu / turn[THEIRS].cpu for turn in turns))


@contextmanager
def _server() -> Iterator[tuple[str, int, float]]:
    """A server of its own: its URL, its process, and seconds from start to first vector."""
    home = Path(tempfile.mkdtemp(prefix="bench-model-"))
    try:
        began = time.perf_counter()
        url = ensure_model_server(home)
        _first_vector(url)
        seconds = time.perf_counter() - began
        yield (
            url,
            int(json.loads((home / "model_server" / "address.json").read_text())["pid"]),
            seconds,
        )
    finally:
        stop_model_server(home)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _over_http(url: str, pid: int) -> Iterator[Ask]:
    """Through the product's own adapter; its CPU time is the client's and the server's."""
    provider = Endpoint(name="tei", dialect="tei", base_url=url, concurrency=8)
    embedder = create_embedder(provider, MODEL_TEI, 384)
    with asyncio.Runner() as runner:
        runner.run(embedder.start())

        def ask(texts: list[str]) -> Answer:
            before = _cpu_seconds(pid) + time.process_time()
            began = time.perf_counter()
            vectors = runner.run(embedder.embed(texts)).vectors
            seconds = time.perf_counter() - began
            return Answer(seconds, _cpu_seconds(pid) + time.process_time() - before, vectors)

        try:
            yield ask
        finally:
            runner.run(embedder.aclose())


@cache
def _model() -> MiniLM:
    return MiniLM()


def _inside(texts: list[str]) -> Answer:
    model = _model()
    began, cpu = time.perf_counter(), time.process_time()
    vectors = model.embed(texts)
    return Answer(time.perf_counter() - began, time.process_time() - cpu, vectors)


def _cpu_seconds(pid: int) -> float:
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def _first_vector(url: str) -> None:
    import urllib.request

    request = urllib.request.Request(
        f"{url}/embed",
        data=json.dumps({"inputs": ["hello"]}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert len(json.load(answer)[0]) == 384


def _peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return float(psutil.Process(pid).memory_info().rss) / 1024**2


@contextmanager
def _reference(python: str) -> Iterator[Ask]:
    """sentence-transformers in a process of another interpreter."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [python, "-c", _REFERENCE, str(model_folder())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        source, sink = process.stdout, process.stdin

        def said() -> str:
            if line := source.readline():
                return line
            errors.seek(0)
            raise RuntimeError(
                f"{python} could not run sentence-transformers:\n{errors.read()[-2000:]}"
            )

        def ask(texts: list[str]) -> Answer:
            sink.write(json.dumps(texts) + "\n")
            sink.flush()
            found = json.loads(said())
            vectors = np.array(found["vectors"], dtype=np.float32)
            return Answer(found["seconds"], found["cpu"], vectors)

        try:
            said()  # it is ready
            yield ask
        finally:
            process.kill()


def _same(mine: Vectors, theirs: Vectors, who: str) -> None:
    lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (mine * theirs).sum(1) / lengths
    if cosines.min() < 0.99999:
        raise RuntimeError(f"the vectors of {who} are other ones: cosine {cosines.min():.6f}")
