"""The local model server: all-MiniLM-L6-v2 over loopback, in TEI's and OpenAI's dialects.

    base = ensure_model_server(home)     # "http://127.0.0.1:PORT"

starts it when it does not run, and it runs as long as some process that called this lives (see
`in_use`). The server is its own keeper.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.local import in_use


def ensure_model_server(home: Path, *, linger: float = in_use.LINGER_SECONDS) -> str:
    """The base URL of the local model server, started if need be.

    TEI's dialect is at `URL/embed`, OpenAI's at `URL/v1`. This process counts as a user of the
    server until it ends; `linger` is how many seconds a server that this call starts outlives
    its last user. After a crash of the server call it again: the URL is the same where possible.

    Raises PipelineError with the end of the server's log when it cannot start.
    """
    directory = _directory(home)
    return in_use.ensure(
        directory,
        "embedding_pipeline.local.model_server",
        [str(directory.parent), "--linger", str(linger)],
        lambda: _healthy_url(directory),
        what="the local model server",
        log=directory / "log",
        timeout=120.0,
        stale=[directory / "address.json"],
    )


def stop_model_server(home: Path, timeout: float = 30.0) -> None:
    """Stop the server now, whoever uses it; does nothing when it does not run."""
    directory = _directory(home)
    deadline = time.monotonic() + timeout
    while in_use.is_kept(directory):
        address = _address(directory)
        if address is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(address["pid"]), signal.SIGTERM)
        if time.monotonic() > deadline:
            raise PipelineError(f"the local model server of {directory} did not stop")
        time.sleep(0.05)


def is_running(home: Path) -> bool:
    """Whether the server of `home` answers; never starts it."""
    return _healthy_url(_directory(home)) is not None


def _directory(home: Path) -> Path:
    return home.expanduser().resolve() / "model_server"


def _address(directory: Path) -> dict[str, str | int] | None:
    try:
        address: dict[str, str | int] = json.loads((directory / "address.json").read_text())
    except (OSError, ValueError):
        return None
    return address


def _healthy_url(directory: Path) -> str | None:
    address = _address(directory)
    if address is None:
        return None
    url = str(address["url"])
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request("GET", "/health")
        return url if connection.getresponse().status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# -- the server process


def _bind(port: int | None, directory: Path) -> socket.socket:
    """A socket on `port`, else on the last server's port, else on any free one."""
    remembered = directory / "port"
    candidates = [port] if port is not None else []
    if port is None:
        with contextlib.suppress(OSError, ValueError):
            candidates.append(int(remembered.read_text()))
        candidates.append(0)
    problem: OSError | None = None
    for candidate in candidates:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(("127.0.0.1", candidate))
        except OSError as error:
            bound.close()
            problem = error
            continue
        remembered.write_text(str(bound.getsockname()[1]))
        return bound
    raise PipelineError(f"port {port} cannot be used: {problem}; choose another with --port")


async def _serve(options: argparse.Namespace, keeping: in_use.Keeping, directory: Path) -> None:
    import uvicorn

    from embedding_pipeline.local.batcher import Batcher
    from embedding_pipeline.local.dialects import Limits, application
    from embedding_pipeline.local.minilm import MiniLM

    listening = _bind(options.port, directory)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    model = MiniLM(threads=options.threads)
    batcher = Batcher(model)
    limits = Limits(
        max_concurrent_requests=options.max_concurrent_requests,
        max_client_batch_size=options.max_client_batch_size,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            application(model, batcher, limits),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",  # nothing here speaks it, and importing it takes 0.03 s
            timeout_keep_alive=300,  # clients keep connections; a closed one costs them a retry
            timeout_graceful_shutdown=5,
        )
    )

    async def watch() -> None:
        try:
            while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
                await asyncio.sleep(0.005)
            unfinished = directory / "address.json.unfinished"
            unfinished.write_text(json.dumps({"url": url, "pid": os.getpid()}))
            unfinished.replace(directory / "address.json")
            print(f"listening on {url}", flush=True)  # noqa: T201
            while not keeping.is_over():  # noqa: ASYNC110  (nor has a file lock)
                await asyncio.sleep(keeping.pause)
        finally:
            server.should_exit = True

    watching = asyncio.create_task(watch())
    try:
        await server.serve(sockets=[listening])
        if watching.done():
            watching.result()
    finally:
        watching.cancel()
        batcher.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server; `ensure_model_server` starts one when it is needed."""
    parser = argparse.ArgumentParser(
        prog="python -m embedding_pipeline.local.model_server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve all-MiniLM-L6-v2 over loopback. Usually nobody calls this: whatever\n"
        "needs vectors starts it, and it ends when the last user has ended.",
        epilog="""\
what it serves:
  POST /embed          TEI: {"inputs": "text" or ["text", ...], "truncate": false}
                       384 dimensions, sentence-transformers/all-MiniLM-L6-v2
  GET  /info /health   TEI: model and limits; 200 when up
  POST /v1/embeddings  OpenAI: model all-minilm-l6-v2-layers (1536 dimensions)
                       or sentence-transformers/all-MiniLM-L6-v2 (384)
  GET  /v1/models      OpenAI: the models' names
  GET  /stats          requests, inputs and tokens since the start, per dialect and width

try it:
  python -m embedding_pipeline.local.model_server .local --port 8080
  curl -s localhost:8080/embed -H 'content-type: application/json' -d '{"inputs": "hello"}'

Its address is in home/model_server/address.json.""",
    )
    parser.add_argument(
        "home", type=Path, metavar="HOME", help="the folder with everything embedded"
    )
    parser.add_argument("--port", type=int, help="listen here (default: any free port)")
    parser.add_argument(
        "--linger",
        type=float,
        metavar="SECONDS",
        help="stop this long after the last user has ended (default: run until interrupted)",
    )
    parser.add_argument("--threads", type=int, help="cores for the model (default: all)")
    parser.add_argument(
        "--max-client-batch-size",
        type=int,
        default=32,
        metavar="N",
        help="TEI: inputs of one request (default: 32)",
    )
    parser.add_argument(
        "--max-concurrent-requests",
        type=int,
        default=512,
        metavar="N",
        help="TEI: inputs waiting at once before it answers 429 (default: 512)",
    )
    parser.add_argument("--keeper-lock", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 1 <= options.max_client_batch_size <= options.max_concurrent_requests:
        parser.error(
            "--max-client-batch-size must be at least 1 and at most --max-concurrent-requests: "
            "a request takes a permit per input, so a larger one could never be served"
        )

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    directory = _directory(options.home)
    try:
        keeping = in_use.Keeping(directory, options.keeper_lock, options.linger)
        try:
            asyncio.run(_serve(options, keeping, directory))
        finally:
            keeping.end()
    except PipelineError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
