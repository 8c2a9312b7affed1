"""This machine: its files, devices, programs and signals; what may be read, what may be written, what must
not stay behind.
"""
