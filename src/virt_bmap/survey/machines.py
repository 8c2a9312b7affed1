"""Which disks belong to one machine, where several machines' lie side by side: images that are files, or
those that were given where the user says so.

Identity has a machine as its scope. Disks that carry members of one group belong together; two that carry the
same member are clones, of two machines. Then those go together whose state is the same, and whose names begin
alike. What a group has grown from (a btrfs seed) belongs to its machine, too.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from virt_bmap.model.contract import Identity


class Candidate(NamedTuple):
    """A member of something that may span disks: the disk it lies on, by number and name, and who it is."""

    image: int
    name: str
    identity: Identity | None


class Machines:
    """The images of each machine, as far as members have told."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}

    def of(self, image: int) -> int:
        """The number of its machine's first image."""
        while (found := self._of.get(image, image)) != image:
            image = found
        return image

    def sort(self, members: Sequence[Candidate]) -> list[int]:
        """The machine of each member, after all of these were looked at."""
        for together in _together(members, self):
            first = min(self.of(image) for image in together)
            for image in together:
                self._of[self.of(image)] = first
        return [self.of(member.image) for member in members]


def _together(members: Sequence[Candidate], machines: Machines) -> Iterator[list[int]]:
    """Images that carry members of one group, each member once: there are as many machines as copies of the
    member that is there most often, and of each other one the copy that is most like goes to it."""
    groups: dict[str, dict[str, list[Candidate]]] = {}
    for one in members:
        if one.identity:
            groups.setdefault(one.identity.group, {}).setdefault(one.identity.member, []).append(one)
    for copies in groups.values():
        first, *others = sorted(copies.values(), key=len, reverse=True)
        sets = [[one] for one in first]
        for member in others:
            pairs = [(_likeness(one, mine[0], machines), at, n) for at, one in enumerate(member)
                     for n, mine in enumerate(sets)]  # fmt: skip
            done: tuple[set[int], set[int]] = set(), set()
            for _, at, n in sorted(pairs, key=lambda pair: pair[0], reverse=True):
                if at not in done[0] and n not in done[1]:
                    done[0].add(at)
                    done[1].add(n)
                    sets[n].append(member[at])
        for mine in sets:
            yield [one.image for one in mine]
    yield from _grown(members, machines)


def _grown(members: Sequence[Candidate], machines: Machines) -> Iterator[list[int]]:
    """A member, and one of what its group lies on: several groups can lie there, but not two copies of
    one."""
    taken: set[tuple[int, str, str]] = set()
    for one in members:
        for below in sorted(one.identity.below) if one.identity else ():
            assert one.identity
            who = one.identity.group, one.identity.member
            free = [
                other
                for other in members
                if other.identity and other.identity.group == below and (other.image, *who) not in taken
            ]
            if free:
                best = max(free, key=lambda other: _likeness(one, other, machines))
                taken.add((best.image, *who))
                yield [one.image, best.image]


def _likeness(one: Candidate, other: Candidate, machines: Machines) -> tuple[bool, bool, int]:
    assert one.identity
    assert other.identity
    return (
        machines.of(one.image) == machines.of(other.image),
        one.identity.state == other.identity.state,
        alike(one.name, other.name),
    )


def alike(one: str, other: str) -> int:
    """With how many characters that are the same two names begin."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
