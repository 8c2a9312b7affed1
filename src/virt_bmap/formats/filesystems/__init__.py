"""One package for each filesystem, listed in `virt_bmap.formats.registry`; docs/adding-a-format.md walks
through `example.py`."""
