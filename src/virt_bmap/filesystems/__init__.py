"""One package for each filesystem, listed in `virt_bmap.formats`; docs/adding-a-format.md walks through
`example.py`."""
