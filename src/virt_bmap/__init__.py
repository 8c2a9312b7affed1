"""Which file does every byte of a disk image belong to?"""
