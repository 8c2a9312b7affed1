"""Watching a guest: its accesses to a served disk, and the objects that they touch.

naming    which map names which access, while the guest changes its filesystems
verdict   the rule by which a name is certain
refresh   the map read again, by another process
sinks     what lines, summary and trace have in common: they take the named accesses
lines, summary, trace   live log, totals, Parquet
activity, cells, screen   what goes on at the moment: sums, their picture as text, the terminal
session   one watched run of a command: all of the above until it ends
plugin    the log taken inside nbdkit, for bmaplogger
oom       who goes first where memory runs out

`serve/` has the disk and its log, `accesses/` the log as columns, objects and traces.
"""
