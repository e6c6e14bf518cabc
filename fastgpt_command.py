"""Where the command `fastgpt` begins: before the seconds that torch takes to import, so that Ctrl-C ends these too
without a traceback. All the rest is in fastgpt/__main__.py.
"""

import os
import signal
import sys


def leave(*_):
    os._exit(130)  # the status that a shell gives to what Ctrl-C ended


def main():
    ours = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # and not ignored, as in the background
    if ours:
        signal.signal(signal.SIGINT, leave)
    from fastgpt.__main__ import main

    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
    finally:
        if ours:
            signal.signal(signal.SIGINT, leave)
    sys.exit(status)
