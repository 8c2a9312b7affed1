"""From disks to a map: the one recursion, and what it asks of all volumes together."""
