"""What an image is, by its name and its magic: light enough to be asked for every image."""

from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.core.reader import Reader
from virt_bmap.formats import registry as formats
from virt_bmap.model.contract import RAW, ImageFormat

FORMATS = formats.IMAGE_TYPES
"""What `--format` takes."""
SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")


def recognise(reader: Reader) -> str:
    """The name of the format whose magic the file carries; RAW where there is none.

    ImageError for image formats that nothing here opens.
    """
    found = formats.image_on(reader)
    if found and found.refusal:
        raise ImageError(f"{reader.name}: {found.refusal}")
    return found.name if found else RAW


def known(format: str) -> ImageFormat:
    """The format of this name. Raises UsageError where there is none."""
    found = formats.image(format)
    if found is None:
        raise UsageError(f"unknown image format {format!r}; there are: {', '.join(FORMATS)}")
    return found


def is_uri(image: str) -> bool:
    """Does this name an NBD server rather than a file? A file of such a name is given as ./nbd:..."""
    return image.split(":", 1)[0] in SCHEMES and ":" in image
