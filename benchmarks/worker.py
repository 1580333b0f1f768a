"""Measured work in a process of its own, so that its CPU time and memory are its alone.

    usage = measure(lab, {"job": "core", …})

starts `python -m benchmarks.worker`, which imports what the job needs and says `ready`; from then
to its result the clocks run. What a job does is in `jobs.py`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lab import Lab

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Usage:
    """What a job took. Of a job that failed there is none."""

    seconds: float
    client_cpu: float
    """CPU-seconds of the process that did it."""
    server_cpu: float
    """CPU-seconds of all of Postgres's processes meanwhile."""
    bare_mb: float
    """The most memory (VmHWM) that the process had taken before the work began."""
    peak_mb: float
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def above_mb(self) -> float:
        """Peak memory above the bare process."""
        return self.peak_mb - self.bare_mb

    def per_thousand(self, rows: int) -> tuple[float, float]:
        """Client and server CPU-seconds per 1,000 rows."""
        return 1000 * self.client_cpu / rows, 1000 * self.server_cpu / rows


def measure(
    lab: Lab, task: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Usage:
    """Run one job in a fresh process. RuntimeError with its words when it fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=dict(environment) if environment is not None else None,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(dict(task)) + "\n")
        process.stdin.flush()
        ready = process.stdout.readline()
        if ready:
            before = lab.cpu_seconds()
            process.stdin.write("go\n")
            process.stdin.flush()
            said = process.stdout.readline()
        # its sessions have ended with it
        _, errors = process.communicate(timeout=60)
        server_cpu = lab.cpu_seconds() - before if ready else 0.0
        if not ready or not said:
            raise RuntimeError(f"job {task['job']} failed:\n{errors.strip()}")
    finally:
        process.kill()
        process.wait()
    found = json.loads(said)
    return Usage(server_cpu=server_cpu, **found)


def peak_memory_mb() -> float:
    """The most memory that this process has held since its start, or since `forget_peak`.

    Not `ru_maxrss`: Linux hands that of the parent on to a child that was forked from it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1024**2 if sys.platform == "darwin" else most / 1024


def main() -> None:
    """The process: a task from standard input, `ready`, the work, its result."""
    from benchmarks import dagster_jobs, jobs

    task = json.loads(sys.stdin.readline())
    job = jobs.JOBS.get(task["job"]) or getattr(dagster_jobs, task["job"])
    work = job(task)
    bare = peak_memory_mb()
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, began = time.process_time(), time.perf_counter()
    result = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    # a job that has to stop the clocks in between says itself what it took
    found = {
        "seconds": result.pop("seconds", seconds),
        "client_cpu": result.pop("cpu", cpu),
        "bare_mb": bare,
        "peak_mb": peak_memory_mb(),
        "result": result,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
