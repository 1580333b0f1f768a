"""The local model server: against sentence-transformers, against itself in-process, its start."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

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
began = time.perf_counter()
vectors = model.encode(task["texts"], batch_size=32, normalize_embeddings=True)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "first": vectors[:8].tolist()}))
"""


def local_model(lab: Lab, sizes: Sizes) -> list[Table]:
    """Texts a second over HTTP, in-process and by the reference, in alternating rounds."""
    texts = [corpus.text(number) for number in range(1, sizes.model_texts + 1)]
    found: dict[str, list[float]] = {"http": [], "inside": [], "reference": []}
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
            answer = measure(lab, task)
            found["http"].append(answer.seconds)
            pid = json.loads((home / "model_server" / "address.json").read_text())["pid"]
            memory = max(memory, _peak_mb(pid))
        finally:
            stop_model_server(home)
            shutil.rmtree(home, ignore_errors=True)
        inside = measure(lab, {"job": "model_inside", "texts": texts})
        found["inside"].append(inside.seconds)
        _same(answer.result["first"], inside.result["first"], "in-process")
        if reference:
            theirs = _reference(reference, texts)
            found["reference"].append(float(str(theirs["seconds"])))
            _same(answer.result["first"], theirs["first"], "sentence-transformers")
    http = found["http"]
    rows: list[dict[str, Cell]] = [
        {
            "all-MiniLM-L6-v2, float32": "local server over HTTP (TEI dialect)",
            "texts/s": times(1.0),
            "start to first vector, s": middle(starts),
            "memory, MB": memory,
        },
        {
            "all-MiniLM-L6-v2, float32": "the same model in-process",
            "texts/s": times(middle(h / i for h, i in zip(http, found["inside"], strict=True))),
        },
        {
            "all-MiniLM-L6-v2, float32": "sentence-transformers, in-process",
            "texts/s": times(middle(h / r for h, r in zip(http, found["reference"], strict=True)))
            if reference
            else "not measured: not installed (--reference-python)",
        },
    ]
    return [
        Table(
            f"Local model server, {len(texts):,} texts of 100 to 200 words",
            list(rows[0]),
            rows,
            [
                "`texts/s` is relative to the server over HTTP; the vectors of all three agree "
                "(cosine ≥ 0.9999)."
            ],
            {f"{name} texts/s": len(texts) / middle(v) for name, v in found.items() if v},
        )
    ]


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


def _reference(python: str, texts: list[str]) -> dict[str, object]:
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
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def _same(mine: object, theirs: object, who: str) -> None:
    a, b = np.array(mine), np.array(theirs)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    if cosines.min() < 0.9999:
        raise RuntimeError(f"the vectors of {who} are other ones: cosine {cosines.min():.4f}")
