"""Observed maps: a real kernel reads each file, and the blocks that it touches become the file's ranges.

appliance   libguestfs's small virtual machine, spoken to through a process of the Python that has its
            binding (guest.py)
disks       the disks as that machine sees them, every read of it noted
trace       which of the bytes that were read are the content of a file? NumPy and bytes only
files       the files of one filesystem as the kernel lists them
engine      all of it, file by file            journal   what was observed so far, on disk
build       a block map of it                  judge     the same files in a direct map: do the two agree?
"""
