"""Giving the free space of disk images back to their host.

plan.py       what may be given back: what allocator and map both call free
estimate.py   how much that is, without writing anything
in_place.py   punching holes into an image, or trimming it
copying.py    a new image without the free space
"""
