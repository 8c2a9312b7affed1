"""What of a direct map an observation could add. Light: every map asks."""

from collections.abc import Iterator

from virt_bmap.core.escape import escape
from virt_bmap.formats import foreign
from virt_bmap.formats import registry as formats
from virt_bmap.formats.common.sessions import sector_of
from virt_bmap.model.blockmap import BlockMap

INSTALL = "apt-get install python3-guestfs linux-image-amd64, or dnf install python3-libguestfs"


def mount_options(type: str, features: str | None = None) -> str | None:
    """What a kernel is told beside the type, to show all of a filesystem whose map has these features; None
    where it holds no files."""
    if format := formats.filesystem(type):
        sector = sector_of(features)
        return f"{format.session}={sector}" if format.session and sector else format.mount
    return None if formats.volume(type) or type in foreign.HOLDERS else ""


def advice(bmap: BlockMap) -> Iterator[str]:
    """A line for each volume whose filesystem no reader reads, or refuses to, but a kernel mounts."""
    problems = bmap.problems.select(["volume", "code"]).to_pylist()
    refused = {row["volume"] for row in problems if row["code"] == "unsupported"}
    for row in bmap.volumes.to_pylist():
        format = formats.filesystem(row["type"]) if row["volume"] in refused else None
        if row["type"] in foreign.MOUNTED or (format and format.mount is not None):
            name = escape(row["name"].encode(errors="surrogateescape"))
            yield (
                f"{name}: {row['type']} is taken as one piece; --method observe "
                f"maps it by reading its files through a kernel ({INSTALL})"
            )
