"""The header section of a VHDX file: the two headers, and the two region tables.

Sources: Microsoft [MS-VHDX] v7.0 section 2.2 "Header Section"; QEMU block/vhdx.c.
"""

import uuid
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.checksums import ALL_ONES, crc32c_without
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats.images.vhdx.ondisk import (
    AREA,
    BAT,
    HEADER,
    HEADERS,
    MAX_REGIONS,
    METADATA_REGION,
    REGION,
    REGION_TABLE,
    REGION_TABLES,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

Region = tuple[int, int]
"""(offset, bytes) in the file, which holds all of it."""


class Header(NamedTuple):
    """What matters of the current header. `log_guid`: whose entries in the log are not in place yet; zeroes
    if none are."""

    log: Region
    log_guid: bytes
    log_version: int = 0

    @property
    def log_in_use(self) -> bool:
        return any(self.log_guid) and self.log[1] > 0

    def facts(self) -> dict[str, Any]:
        """For people and JSON."""
        return {"version": 1, "dirty": self.log_in_use}


class Regions(NamedTuple):
    """Where the block allocation table and the metadata lie."""

    bat: Region
    metadata: Region


def read_header(image: Reader) -> Header:
    """The header with the higher sequence number of those that have their signature and their checksum: while
    one is written, only the other holds. Raises Corrupt or Unsupported."""
    raw = [image.read_clipped(at, HEADER.itemsize) for at in HEADERS]
    found = [record(data, HEADER) for data in raw if data[:4] == b"head" and is_sound(data)]
    if not found:
        raise Corrupt(
            f"{image.name}: has no VHDX header with a right checksum "
            f"at byte {HEADERS[0]:#x} or at byte {HEADERS[1]:#x}",
            HEADERS[0],
        )
    head = max(found, key=lambda head: int(head["SequenceNumber"]))
    if int(head["Version"]) != 1:
        raise Unsupported(
            f"{image.name}: is VHDX of version {int(head['Version'])}; 1 is supported", HEADERS[0] + 66
        )
    offset, length = int(head["LogOffset"]), int(head["LogLength"])
    _require_inside(image, "log", offset, length, HEADERS[0] + 72)
    current = Header((offset, length), head["LogGuid"].tobytes(), int(head["LogVersion"]))
    if current.log_in_use:
        afford(image, length, "its log")
    return current


def _require_inside(image: Reader, what: str, offset: int, length: int, at: int) -> None:
    """Behind the header section and in the file; `at` is the field that places it."""
    if offset + length > image.size or offset < REGION_TABLES[1] + AREA:
        raise Corrupt(
            f"{image.name}: its VHDX {what} at bytes "
            f"{offset:#x}-{offset + length:#x} does not fit into the file",
            at,
        )


def is_sound(data: bytes) -> bool:
    """Is the CRC-32C at byte 4 that of all of it, taken with zeroes in its place?"""
    is_ = int(crc32c_without(np.frombuffer(data, np.uint8)[None, :], 4)[0]) ^ ALL_ONES
    return is_ == int.from_bytes(data[4:8], "little")


def say_damaged(image: Reader, damage: Damage) -> None:
    """Headers and region tables that are not as they were written, though another one is."""
    for at, size in [(at, HEADER.itemsize) for at in HEADERS] + [(at, AREA) for at in REGION_TABLES]:
        if not is_sound(image.read_clipped(at, size)):
            damage.say(
                "checksum",
                f"the header or region table at byte {at:#x} has a wrong checksum; the other copy is used",
                at,
                severity=WARNING,
            )


def read_regions(image: Reader) -> Regions:
    """By the current region table. Raises Corrupt or Unsupported."""
    regions = _valid_table(image)
    for wanted, name in ((BAT, "block allocation table"), (METADATA_REGION, "metadata region")):
        if wanted not in regions:
            raise Corrupt(
                f"{image.name}: its VHDX region table at byte {REGION_TABLES[0]:#x} names no {name}",
                REGION_TABLES[0],
            )
    return Regions(regions[BAT], regions[METADATA_REGION])


def _valid_table(image: Reader) -> dict[uuid.UUID, Region]:
    """The regions of the first table that has its signature and its checksum."""
    for at in REGION_TABLES:
        raw = image.read_clipped(at, AREA)
        head = record(raw, REGION_TABLE)
        count = int(head["EntryCount"])
        if bytes(head["Signature"]) != b"regi" or count > MAX_REGIONS or not is_sound(raw):
            continue
        found = {}
        for entry in (
            record(raw, REGION, REGION_TABLE.itemsize + nth * REGION.itemsize) for nth in range(count)
        ):
            guid = uuid.UUID(bytes_le=entry["Guid"].tobytes())
            offset = int(entry["FileOffset"])
            length = int(entry["Length"])
            if guid not in (BAT, METADATA_REGION) and entry["Required"]:
                raise Unsupported(f"{image.name}: has a required VHDX region of the unknown kind {guid}", at)
            _require_inside(image, "region", offset, length, at)
            found[guid] = offset, length
        return found
    raise Corrupt(
        f"{image.name}: has no VHDX region table at byte "
        f"{REGION_TABLES[0]:#x} or at byte {REGION_TABLES[1]:#x}",
        REGION_TABLES[0],
    )
