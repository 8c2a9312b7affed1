"""Run by the Python that has libguestfs's binding: takes calls of it as JSON lines on standard input, and
answers them on standard output.

    -> ["pread", ["/etc/fstab", 1048576, 0], {}]        <- {"bytes": 656} and the 656 bytes
    -> ["vfs_type", ["/dev/sda1"], {}]                  <- {"result": "ext4"}
                                                        <- {"error": "vfs_type: /dev/sda1: No such file or
                                                        directory", "ready": true}

`ready`: the virtual machine runs; libguestfs survives its death, and refuses all calls from then on. Standard
library and `guestfs` only: this file is run as it is, by another Python than the rest. It ends, and the
virtual machine with it, when its input does.
"""

import json
import os
import sys
from typing import Any, BinaryIO


def main() -> None:
    """Answer calls until the input ends."""
    import guestfs

    # what libguestfs and its children print must not get between the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    machine = guestfs.GuestFS(python_return_dict=True, close_on_exit=False)
    for line in sys.stdin.buffer:
        name, positional, named = json.loads(line)
        try:
            result = getattr(machine, name)(*positional, **named)
        except Exception as error:
            answer(
                answers,
                {"error": " ".join(str(error).split()) or repr(error), "ready": bool(machine.is_ready())},
            )
            continue
        if isinstance(result, bytes):
            answer(answers, {"bytes": len(result)}, result)
        else:
            answer(answers, {"result": result})
    machine.close()


def answer(answers: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    """One answer; names that are not UTF-8 pass as lone surrogates."""
    answers.write(json.dumps(head).encode() + b"\n" + body)
    answers.flush()


if __name__ == "__main__":
    main()
