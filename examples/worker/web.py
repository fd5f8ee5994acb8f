"""The web half: a page for people.

It shares nothing with the worker but the commit and the configuration: two
processes of one Deployment are two services, each in a jail of its own.
"""

import http.server
import os
import signal
import socketserver
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path not in ("/", "/healthz"):
            self.send_error(404)
            return
        text = "ok\n" if self.path == "/healthz" else f"{os.environ.get('TITLE', 'Reports')} from the web half\n"
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass  # the proxy has the requests


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 128


def main():
    server = Server(("127.0.0.1", int(os.environ["PORT"])), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()


if __name__ == "__main__":
    main()
