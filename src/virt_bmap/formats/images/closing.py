"""Images that were not closed: the program that wrote them is at work, or broke down."""

from virt_bmap.core.reader import Mark, Reader


def not_closed(image: Reader, told_by: str, advice: str) -> Mark:
    """What is said of an image whose header has a mark for that; `advice`: what repairs it."""
    words = (
        f"{image.name}: was not closed ({told_by}): it is in use, or the program that wrote it broke down; "
        f"what was written last may be missing or wrong: {advice}"
    )
    return Mark("unclean", words)
