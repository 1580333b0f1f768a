"""An alert channel over a real socket: takes what apprise's `json://` sends."""

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Received:
    """One message."""

    title: str
    body: str
    at: float
    """time.monotonic() of its arrival."""

    def line(self, name: str) -> str:
        """What the body says after `name: `."""
        found = [line for line in self.body.splitlines() if line.startswith(f"{name}: ")]
        assert found, f"no line {name!r} in:\n{self.body}"
        return found[0].removeprefix(f"{name}: ")


@dataclass
class Receiver:
    """Keeps every message in order; while `refusing`, answers 500 and keeps none."""

    port: int = 0
    refusing: bool = False
    messages: list[Received] = field(default_factory=list)
    refused: int = 0

    def __enter__(self) -> Self:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body: dict[str, Any] = json.loads(
                    self.rfile.read(int(self.headers["content-length"]))
                )
                if receiver.refusing:
                    receiver.refused += 1
                    self.send_response(500)
                else:
                    receiver.messages.append(
                        Received(body["title"], body["message"], time.monotonic())
                    )
                    self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, secret: str = "") -> str:
        """For ALERT_URLS; with a secret as its password and in its path, as chat services have."""
        login = f"user:{secret}@" if secret else ""
        return f"json://{login}127.0.0.1:{self.port}/hook/{secret}"

    def titles(self) -> list[str]:
        """Of every message, in order."""
        return [message.title for message in self.messages]
