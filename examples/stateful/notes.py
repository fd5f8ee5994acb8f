"""Notes in SQLite: POST / adds one, GET / lists them. One writer, one file.

$STATE_DIRECTORY is the only place that outlives a release. The database is
opened by one process at a time: the manifest's Deployment has a state
directory, so that Kari stops the old release before it starts the new one.
"""

import contextlib
import http.server
import os
import pathlib
import signal
import socketserver
import sqlite3
import threading

LONGEST_NOTE = 4096  # bytes
DATABASE = pathlib.Path(os.environ.get("STATE_DIRECTORY", ".")) / "notes.db"


def database():
    return contextlib.closing(sqlite3.connect(DATABASE, timeout=5))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/healthz":
            with database() as connection:
                connection.execute("SELECT count(*) FROM notes").fetchone()
            self.answer(200, "ok\n")
        elif self.path == "/":
            with database() as connection:
                rows = connection.execute("SELECT text FROM notes ORDER BY id").fetchall()
            self.answer(200, "".join(f"{text}\n" for (text,) in rows))
        else:
            self.answer(404, "not found\n")

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LONGEST_NOTE:
            self.close_connection = True
            self.answer(413, f"a note has 1 to {LONGEST_NOTE} bytes\n")
            return
        note = self.rfile.read(length).decode(errors="replace").strip()
        with database() as connection, connection:
            connection.execute("INSERT INTO notes (text) VALUES (?)", (note,))
        self.answer(201, "noted\n")

    def answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 128


def main():
    with database() as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL)")
    server = Server(("127.0.0.1", int(os.environ["PORT"])), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()


if __name__ == "__main__":
    main()
