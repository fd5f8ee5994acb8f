"""The worker half: does a job every INTERVAL_SECONDS and listens on nothing.

After each round it touches `alive` in /tmp, which is its own. `alive.py`
asks for that file's age, and is the manifest's probe: a worker that hangs is
restarted, one that never begins never takes the place of the one before.
"""

import os
import pathlib
import signal
import threading

ALIVE = pathlib.Path("/tmp/alive")


def main():
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    interval = float(os.environ.get("INTERVAL_SECONDS", "5"))
    done = 0
    while not stopping.is_set():
        done += 1
        print(f"{os.environ.get('TITLE', 'Reports')}: job {done} is done", flush=True)
        ALIVE.touch()
        stopping.wait(interval)
    print("stopped between two jobs", flush=True)


if __name__ == "__main__":
    main()
