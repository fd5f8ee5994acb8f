"""The worker half: does a job every INTERVAL_SECONDS and listens on nothing.

After each round it touches `alive` in /tmp, which is its own. `alive.py`
asks for that file's age, and is the manifest's probe: a worker that hangs is
restarted, one that never begins never takes the place of the one before.
Where it runs as `type: Notify`, it also says itself when it is ready.
"""

import os
import pathlib
import signal
import socket
import threading

ALIVE = pathlib.Path("/tmp/alive")


def notify(message):
    """sd_notify(3): a datagram from the process itself; a child's is not heard."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
        unix.sendto(message.encode(), address)


def main():
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    interval = float(os.environ.get("INTERVAL_SECONDS", "5"))
    done = 0
    while not stopping.is_set():
        done += 1
        print(f"{os.environ.get('TITLE', 'Reports')}: job {done} is done", flush=True)
        ALIVE.touch()
        if done == 1:
            notify("READY=1")
        stopping.wait(interval)
    print("stopped between two jobs", flush=True)


if __name__ == "__main__":
    main()
