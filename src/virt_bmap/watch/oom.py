"""Where memory runs out: who is to go first.

Sources: proc(5), oom_score_adj.
"""

import contextlib

MORE_THAN_OTHERS = 500
"""As if half of the machine's memory were taken beside what really is."""


def first() -> None:
    """From here on this process, and those that it starts, go before the guest and its disk do: names can be
    done without."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) < MORE_THAN_OTHERS:
            file.seek(0)
            file.write(str(MORE_THAN_OTHERS))
