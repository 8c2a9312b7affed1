"""`python -m virt_bmap`, and the program `virt-bmap`."""

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until there is something to undo, Ctrl-C just ends us: no traceback of an import

from virt_bmap.cli import main

if __name__ == "__main__":
    main()
