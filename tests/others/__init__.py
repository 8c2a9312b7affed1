"""Readers of other projects, on disks that others made."""
