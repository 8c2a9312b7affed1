"""Which images belong to one machine: clones of one template side by side, strangers of one name."""

import pytest

from virt_bmap.core.keys import NO_KEYS
from virt_bmap.model.contract import Identity
from virt_bmap.open.disks import NOTHING
from virt_bmap.survey.machines import Candidate, Machines
from virt_bmap.survey.survey import _Survey


def sorted_by_hand(*members: tuple[str, str, str, int]) -> list[list[str]]:
    """Names of (name, group, member, state), machine by machine."""
    candidates = [
        Candidate(number, name, Identity(group, member, state))
        for number, (name, group, member, state) in enumerate(members)
    ]
    machines: dict[int, list[str]] = {}
    for one, machine in zip(candidates, Machines().sort(candidates), strict=True):
        machines.setdefault(machine, []).append(one.name)
    return list(machines.values())


def test_members_of_one_group_belong_together():
    assert sorted_by_hand(("x", "g", "a", 1), ("y", "h", "c", 1), ("z", "g", "b", 1)) == [["x", "z"], ["y"]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1)])
def test_clones_go_together_by_their_state(order):
    """Their names tell nothing."""
    disks = [("1", "g", "a", 5), ("2", "g", "b", 5), ("3", "g", "a", 7), ("4", "g", "b", 7)]
    found = sorted_by_hand(*(disks[at] for at in order))
    assert sorted(map(sorted, found)) == [["1", "2"], ["3", "4"]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1)])
def test_clones_that_were_never_started_go_together_by_their_names(order):
    disks = [
        ("/vm1/a", "g", "a", 5),
        ("/vm1/b", "g", "b", 5),
        ("/vm2/a", "g", "a", 5),
        ("/vm2/b", "g", "b", 5),
    ]
    found = sorted_by_hand(*(disks[at] for at in order))
    assert sorted(map(sorted, found)) == [["/vm1/a", "/vm1/b"], ["/vm2/a", "/vm2/b"]]


def test_no_two_volumes_have_one_name() -> None:
    """Not even where one is called as another would be with a number behind its name."""
    names = ["a", "a#2", "a", "a", "a#2", "b"]
    work = _Survey([], lambda _: None, NO_KEYS, NOTHING)
    own = [work._own_name(name) for name in names]
    assert len(set(own)) == len(names)
    assert [own[0], own[1], own[5]] == ["a", "a#2", "b"]
