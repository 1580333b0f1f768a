"""The local model server: against sentence-transformers, against itself in-process, its start."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from benchmarks import corpus
from benchmarks.lab import Lab
from benchmarks.report import Cell, Table, middle, times
from benchmarks.sizes import Sizes
from benchmarks.worker import measure
from embedding_pipeline.local.minilm import model_folder
from embedding_pipeline.local.model_server import ensure_model_server, stop_model_server

REFERENCE = "BENCH_REFERENCE_PYTHON"
"""An interpreter that has sentence-transformers; also `--reference-python`."""

_REFERENCE = """
import json, sys, time
from sentence_transformers import SentenceTransformer
task = json.load(sys.stdin)
model = SentenceTransformer(task["model"], device="cpu")
model.max_seq_length = 256
model.encode(task["texts"][:8])
began, cpu = time.perf_counter(), time.process_time()
vectors = model.encode(task["texts"], batch_size=32, normalize_embeddings=True)
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "first": vectors[:8].tolist()}))
"""


HTTP = "local server over HTTP (TEI dialect)"
INSIDE = "the same model in-process"
THEIRS = "sentence-transformers, in-process"


def local_model(lab: Lab, sizes: Sizes) -> list[Table]:
    """Texts a second over HTTP, in-process and by the reference, in alternating rounds."""
    texts = [corpus.text(number) for number in range(1, sizes.model_texts + 1)]
    seconds: dict[str, list[float]] = {HTTP: [], INSIDE: [], THEIRS: []}
    cpu: dict[str, list[float]] = {HTTP: [], INSIDE: [], THEIRS: []}
    starts: list[float] = []
    memory = 0.0
    reference = os.environ.get(REFERENCE)
    for _ in range(sizes.rounds):
        home = Path(tempfile.mkdtemp(prefix="bench-model-"))
        try:
            began = time.perf_counter()
            url = ensure_model_server(home)
            task = {"job": "model_http", "address": url, "texts": texts}
            _first_vector(url)
            starts.append(time.perf_counter() - began)
            pid = json.loads((home / "model_server" / "address.json").read_text())["pid"]
            before = _cpu_seconds(pid)
            answer = measure(lab, task)
            seconds[HTTP].append(answer.seconds)
            cpu[HTTP].append(_cpu_seconds(pid) - before + answer.client_cpu)
            memory = max(memory, _peak_mb(pid))
        finally:
            stop_model_server(home)
            shutil.rmtree(home, ignore_errors=True)
        inside = measure(lab, {"job": "model_inside", "texts": texts})
        seconds[INSIDE].append(inside.seconds)
        cpu[INSIDE].append(inside.client_cpu)
        _same(answer.result["first"], inside.result["first"], "in-process")
        if reference:
            theirs = _reference(reference, texts)
            seconds[THEIRS].append(theirs["seconds"])
            cpu[THEIRS].append(theirs["cpu"])
            _same(answer.result["first"], theirs["first"], "sentence-transformers")
    rows: list[dict[str, Cell]] = [
        {
            "all-MiniLM-L6-v2, float32": what,
            "texts/s, of in-process": _speed(seconds[INSIDE], seconds[what]),
            "texts/s, of sentence-transformers": _speed(seconds[THEIRS], seconds[what]),
            "CPU-s / 100 texts": 100 * middle(cpu[what]) / len(texts) if cpu[what] else None,
            "start to first vector, s": middle(starts) if what == HTTP else None,
            "memory, MB": memory if what == HTTP else None,
        }
        for what in (HTTP, INSIDE, THEIRS)
    ]
    notes = ["The vectors of all agree (cosine ≥ 0.99999)."]
    if not reference:
        notes.append("sentence-transformers was not measured: not installed (--reference-python).")
    return [
        Table(
            f"Local model server, {len(texts):,} texts of 100 to 200 words",
            list(rows[0]),
            rows,
            notes,
            {f"{what}: texts/s": len(texts) / middle(v) for what, v in seconds.items() if v}
            | {f"start to first vector {i}, s": start for i, start in enumerate(starts, 1)},
        )
    ]


def _speed(of: list[float], mine: list[float]) -> str | None:
    """How much faster `mine` is than `of`, by the median of the rounds; None without either."""
    if not of or not mine:
        return None
    return times(middle(a / b for a, b in zip(of, mine, strict=True)))


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


def _reference(python: str, texts: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-c", _REFERENCE],
        input=json.dumps({"model": str(model_folder()), "texts": texts}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
    )
    if done.returncode:
        raise RuntimeError(f"{python} could not run sentence-transformers:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _same(mine: object, theirs: object, who: str) -> None:
    a, b = np.array(mine), np.array(theirs)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    if cosines.min() < 0.99999:
        raise RuntimeError(f"the vectors of {who} are other ones: cosine {cosines.min():.6f}")
