"""Runs the service until SIGTERM. Configuration comes from the environment:
PORT is set by Kari, GREETING by the manifest."""

import os
import signal
import sys
import threading

from hello.server import Server


def main() -> None:
    port = os.environ.get("PORT")
    if port is None or not port.isdecimal():
        sys.exit("PORT is not set: run as PORT=8080 python3 -m hello")
    server = Server(("127.0.0.1", int(port)), os.environ.get("GREETING", "Hello"))

    def stop(_signal: int, _frame: object) -> None:
        print("stopping: finishing the requests in flight", flush=True)
        # Not from this thread: shutdown() waits for serve_forever(), which runs in it.
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"listening on 127.0.0.1:{port}", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.server_close()  # waits for the threads of the requests in flight
    print("stopped", flush=True)


main()
