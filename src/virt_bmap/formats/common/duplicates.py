"""A member that is there twice: a clone beside its template, or one disk by two paths.

Only one of the copies can be used, and of every format it is the same one: that which was written last; of
those the larger one, since a copy can be cut short; of those the first that was given. (LVM, mdadm and the
kernel go by the order in which they find devices, or refuse both.) What lies on it is in doubt, and so it is
the one of which that is said.
"""

from collections.abc import Sequence
from typing import NamedTuple

from virt_bmap.core.amounts import human
from virt_bmap.model.contract import Member
from virt_bmap.model.damage import Damage


class Copy(NamedTuple):
    """A member, the state in which it was written last (the higher, the later), and what is said of it."""

    member: Member
    state: int
    damage: Damage


def choose(copies: Sequence[Copy], what: str, counter: str) -> int:
    """The place of the copy that is used. `what` they are, and what counts their states, is for people."""
    first, *others = sorted(
        range(len(copies)),
        key=lambda at: (-copies[at].state, -copies[at].member.reader.size, copies[at].member.number),
    )
    used = copies[first]
    for at in others:
        other = copies[at]
        used.damage.say(
            "duplicate",
            f"{_shown(used.member)} and {_shown(other.member)} are both {what}, clones or one disk by two "
            f"paths: {used.member.name} is used, which {_why(used, other, counter)}; give one of them only, "
            "or say --machines",
        )
        other.damage.say("unused-member", f"a copy of {_shown(used.member)}, which is used instead")
    return first


def _why(used: Copy, other: Copy, counter: str) -> str:
    if other.state != used.state:
        return f"was written last ({counter} {used.state:,}, not {other.state:,})"
    mine, others = used.member.reader.size, other.member.reader.size
    return "was given first" if mine == others else f"is larger ({human(mine)}, not {human(others)})"


def _shown(member: Member) -> str:
    """Its device, and the image in which that lies."""
    where = member.reader.name
    return where if where.startswith(member.name) else f"{member.name} of {where}"
