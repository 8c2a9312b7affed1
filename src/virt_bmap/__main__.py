"""`python -m virt_bmap`, and the program `virt-bmap`."""

import os
import signal
import sys

if sys.path and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]  # where python -m puts the current folder, which may be one of extracted evidence

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until there is something to undo, Ctrl-C just ends us: no traceback of an import

from virt_bmap.cli import main

if __name__ == "__main__":
    main()
