"""One module or package for each kind of volume: partition tables, volume managers, arrays, encryption;
listed in `virt_bmap.formats.registry`."""
