"""Ends well if the worker finished a round within the last three intervals."""

import os
import pathlib
import sys
import time

limit = 3 * float(os.environ.get("INTERVAL_SECONDS", "5"))
try:
    age = time.time() - pathlib.Path("/tmp/alive").stat().st_mtime
except FileNotFoundError:
    sys.exit("the worker has not finished its first round")
if age > limit:
    sys.exit(f"the worker's last round was {age:.0f} s ago; the limit is {limit:.0f} s")
