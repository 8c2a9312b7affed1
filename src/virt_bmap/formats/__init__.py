"""Every format: `filesystems`, `volumes`, `images`, what they share in `common`, what is only recognised in
`foreign`. `registry` lists them all.
"""
