"""`python -m virt_bmap` is `virt-bmap`."""

from virt_bmap.cli import main

main()
