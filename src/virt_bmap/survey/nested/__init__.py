"""Disk images that are files of a guest's disk, opened as further disks where that is asked for.

A raw image becomes a volume of kind `image`, named DEVICE:PATH; its rows lie in the filesystem's volume, so
all that holds for other layers holds for it: lookups climb into it, and `locate` goes down through it. Its
bytes keep their owner, the file. An image in a format of `formats/images/` becomes two volumes: the file,
DEVICE:PATH:file, whose bytes are the format's own metadata and the places of the disk's clusters, and the
disk in it, DEVICE:PATH. All of it is read here, by the map of the filesystem that holds the file: no name
that such an image carries is ever looked up on the host, and QEMU never sees it.
"""

from dataclasses import dataclass, field

MAX_IMAGES = 256
"""Images opened in one map. A disk can hold a million small files that look like disks."""
MAX_LEVELS = 3
"""Images inside images. A hostile filesystem can have itself as a file, without end."""


@dataclass
class ImageBudget:
    """What was found so far, on all filesystems of a map:
    the paths of images, and how many more may be opened."""

    paths: set[bytes] = field(default_factory=set)
    left: int = MAX_IMAGES
