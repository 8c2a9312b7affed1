"""Watching a guest: its accesses to a served disk, and the objects that they touch.

serve     nbdkit in front of the disk, its log followed          plugin      the same inside nbdkit, for bmaplogger
accesses  the log as columns                                     bmaplogger  the program around it
resolve   accesses -> objects of the block map, in batches
naming    which map names which access, while the guest changes its filesystems
refresh   the map read again, by another process
sinks     what lines, summary and trace have in common: they take the named accesses
lines, summary, trace   live log, totals, Parquet
activity, cells, screen   what goes on at the moment: sums, their picture as text, the terminal
session   one watched run of a command: all of the above until it ends
"""
