"""What becomes of a block map: one file for each output, all of them consumers of the same tables.

`listing` turns owners into rows with names; `bmap` writes and reads the text map, `parquet` the tables,
`records` JSON lines.
"""
