"""One module for each image format, with its declaration, `FORMAT`; `formats/registry.py` lists them.

What they share lies in `layer`, `inflate` and `backing`.
"""
