"""Answers with a greeting and says which commit is running and where."""

import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

# No caller may hold a connection for longer than this with /slow.
LONGEST_SLOW_MILLISECONDS = 10_000


class Server(ThreadingHTTPServer):
    """A thread for each request; closing waits for all of them."""

    daemon_threads = False  # a daemon thread would be cut off in mid-answer
    request_queue_size = 128  # the default of 5 refuses connections under load

    def __init__(self, address: tuple[str, int], greeting: str) -> None:
        super().__init__(address, Handler)
        self.greeting = greeting


class Handler(BaseHTTPRequestHandler):
    """One request. The HTTP/1.0 of the base class closes after each answer,
    so no idle connection holds up a stop."""

    server: Server
    timeout = 10  # seconds that a silent client may keep a thread

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        if target.path == "/":
            commit = os.environ.get("KARI_COMMIT", "unknown")[:7]
            node = os.environ.get("KARI_NODE", "this machine")
            self.answer(200, f"{self.server.greeting} from Python on {node}, commit {commit}\n")
        elif target.path == "/healthz":
            self.answer(200, "ok\n")
        elif target.path == "/version":
            version = {
                "commit": os.environ.get("KARI_COMMIT", "unknown"),
                "node": os.environ.get("KARI_NODE", "unknown"),
            }
            self.answer(200, json.dumps(version) + "\n", "application/json")
        elif target.path == "/slow":
            self.slow(parse_qs(target.query).get("milliseconds", [""])[0])
        else:
            self.answer(404, "not found\n")

    def slow(self, milliseconds: str) -> None:
        """Stands for real work: a request that is in flight for a while."""
        if not milliseconds.isdecimal() or int(milliseconds) > LONGEST_SLOW_MILLISECONDS:
            self.answer(400, "milliseconds must be a number from 0 to 10000\n")
            return
        time.sleep(int(milliseconds) / 1000)
        self.answer(200, "done\n")

    def answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Not a line for each request: the proxy writes them already."""
