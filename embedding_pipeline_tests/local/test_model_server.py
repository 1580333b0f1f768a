"""The server as a process: what it counts, what it does under load, how it comes and goes."""

import asyncio
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
from typing import Any

import numpy as np
import pytest

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.local import in_use
from embedding_pipeline.local.minilm import MiniLM
from embedding_pipeline.local.model_server import (
    ensure_model_server,
    is_running,
    main,
    stop_model_server,
)
from embedding_pipeline_tests.local.http_calls import call
from embedding_pipeline_tests.local.processes import (
    MODEL_SERVER_USER,
    PACKAGE_ROOT,
    eventually,
    is_alive,
    users,
)

WIDE = "all-minilm-l6-v2-layers"


def pid_of(home: Path) -> int:
    return int(json.loads((home / "model_server" / "address.json").read_text())["pid"])


def stats(url: str) -> Any:
    return call(f"{url}/stats").json


@pytest.fixture
def small(home: Path) -> Iterator[str]:
    """A server started by hand, with small limits."""
    command = [sys.executable, "-m", "embedding_pipeline.local.model_server", str(home)]
    limits = ["--max-concurrent-requests", "8", "--max-client-batch-size", "8"]
    with subprocess.Popen(
        [*command, *limits], cwd=PACKAGE_ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on ")
        yield line.split()[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_stats_count_what_was_embedded_and_nothing_that_was_refused(
    home: Path, model: MiniLM
) -> None:
    url = ensure_model_server(home)
    zero = {"requests": 0, "inputs": 0, "tokens": 0}
    assert stats(url) == {"total": zero, "dialects": {"tei": {}, "openai": {}}}
    texts = ["one", "two words"]
    tokens = sum(model.count_tokens(texts))
    call(f"{url}/embed", {"inputs": texts})
    call(f"{url}/embed", {"inputs": texts})
    call(f"{url}/v1/embeddings", {"model": WIDE, "input": texts})
    call(f"{url}/v1/embeddings", {"model": WIDE, "input": [*texts, "word " * 300]})
    call(f"{url}/embed", {"inputs": [*texts, ""]})
    assert stats(url) == {
        "total": {"requests": 3, "inputs": 6, "tokens": 3 * tokens},
        "dialects": {
            "tei": {"384": {"requests": 2, "inputs": 4, "tokens": 2 * tokens}},
            "openai": {"1536": {"requests": 1, "inputs": 2, "tokens": tokens}},
        },
    }


def test_concurrent_requests_of_both_dialects_each_get_their_own_vectors(
    base_url: str, model: MiniLM
) -> None:
    requests = [[f"text {n} of request {r}" * (1 + n % 7) for n in range(8)] for r in range(24)]

    def ask(number: int) -> list[list[float]]:
        texts = requests[number]
        if number % 2:
            body = {"model": "all-minilm-l6-v2", "input": texts}
            rows = call(f"{base_url}/v1/embeddings", body).json["data"]
            return [row["embedding"] for row in rows]
        rows = call(f"{base_url}/embed", {"inputs": texts}).json
        return list(rows)

    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(ask, range(len(requests))))
    expected = model.embed([text for texts in requests for text in texts])
    np.testing.assert_allclose(np.concatenate(answers), expected, atol=2e-6)


def test_a_full_queue_answers_429_and_every_permit_comes_back(small: str) -> None:
    texts = ["word " * 200] * 8  # all permits, and work enough to see the queue full

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: call(f"{small}/embed", {"inputs": texts}), range(6)))
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers} == {200, 429}
    assert refused[0].json == {"error": "Model is overloaded", "error_type": "Overloaded"}
    served = len(answers) - len(refused)
    assert stats(small)["total"]["inputs"] == 8 * served
    for bad in ({"inputs": ["word " * 300] * 8}, {"inputs": ["x"] * 7 + [""]}):
        assert call(f"{small}/embed", bad).status in (400, 413)
    assert call(f"{small}/embed", {"inputs": texts}).status == 200


def test_a_client_that_hangs_up_costs_no_further_work(base_url: str) -> None:
    before = stats(base_url)["total"]["inputs"]
    body = json.dumps({"model": WIDE, "input": ["word " * 200] * 300}).encode()
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        eventually(lambda: stats(base_url)["total"]["inputs"] > before, "it has begun")

    def only_the_next_request_is_run() -> bool:
        settled = stats(base_url)["total"]["inputs"]
        assert call(f"{base_url}/embed", {"inputs": "x"}).status == 200
        return bool(stats(base_url)["total"]["inputs"] == settled + 1)

    # each core ends the batch that it is at
    eventually(only_the_next_request_is_run, "the dropped request stands in nobody's way")
    assert stats(base_url)["total"]["inputs"] - before < 100


def test_a_query_does_not_wait_for_a_large_request(base_url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        body = {"model": WIDE, "input": ["word " * 200] * 100, "encoding_format": "base64"}
        before = stats(base_url)["total"]["inputs"]
        large = pool.submit(call, f"{base_url}/v1/embeddings", body)
        eventually(lambda: stats(base_url)["total"]["inputs"] > before, "it has begun")
        assert call(f"{base_url}/embed", {"inputs": "where is it?"}).status == 200
        assert not large.done()
        assert large.result().status == 200


def test_two_processes_share_one_server_and_it_ends_after_the_last(home: Path) -> None:
    with users(MODEL_SERVER_USER, [home, 0.2], [home, 0.2]) as (one, two):
        url = one.answer()
        assert two.answer() == url
        server = pid_of(home)
        one.end()
        two.kill()
        eventually(lambda: not is_alive(server), "the server ends")
    assert not is_running(home)


def test_a_killed_server_comes_back_at_the_same_address(home: Path) -> None:
    url = ensure_model_server(home)
    first = pid_of(home)
    os.kill(first, signal.SIGKILL)
    assert ensure_model_server(home) == url
    assert pid_of(home) != first
    assert call(f"{url}/embed", {"inputs": "x"}).status == 200


def test_two_homes_have_two_servers(home: Path) -> None:
    one, two = home / "one", home / "two"
    try:
        urls = {ensure_model_server(one), ensure_model_server(two)}
        assert len(urls) == 2
        stop_model_server(one)
        assert not is_running(one)
        assert is_running(two)
    finally:
        for each in (one, two):
            in_use.release(each / "model_server")
            stop_model_server(each)


def test_it_is_up_within_seconds_and_answers(home: Path) -> None:
    began = time.monotonic()
    url = ensure_model_server(home)
    assert call(f"{url}/embed", {"inputs": "hello"}).status == 200
    assert time.monotonic() - began < 10  # 1.3 s on 2 idle cores; others may be at work here


def test_a_second_server_by_hand_is_refused(small: str, home: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "embedding_pipeline.local.model_server", str(home)],
        cwd=PACKAGE_ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "another process already keeps" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_a_clear_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(home), "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another with --port" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for word in ("/embed", "/v1/embeddings", "/stats", WIDE, "--linger", "curl"):
        assert word in shown
    assert "keeper-lock" not in shown


def test_limits_under_which_no_full_request_could_be_served_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(home), "--max-client-batch-size", "600"])
    assert "could never be served" in capsys.readouterr().err


def test_a_server_that_cannot_start_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = home / "model_server"
    (directory / "address.json.unfinished").mkdir(parents=True)
    with pytest.raises(PipelineError, match=r"the local model server could not start") as caught:
        ensure_model_server(home)
    assert str(directory / "log") in str(caught.value)


def test_ensuring_in_many_threads_gives_one_server(home: Path) -> None:
    async def ensure_all() -> set[str]:
        calls = [asyncio.to_thread(ensure_model_server, home) for _ in range(8)]
        return set(await asyncio.gather(*calls))

    assert len(asyncio.run(ensure_all())) == 1
