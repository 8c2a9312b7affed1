"""What all else stands on, and which knows nothing of disks' formats: columns and ranges, the arithmetic of
mappings, readers, errors, keys, and how text comes to a terminal.
"""
