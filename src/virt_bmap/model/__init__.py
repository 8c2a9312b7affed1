"""What a map is: the tables and their columns, the block map that answers both questions, paths, listings,
and the contract that every format keeps.
"""
