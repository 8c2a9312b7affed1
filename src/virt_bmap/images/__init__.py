"""One file for each way to open a disk image; `open_image` chooses by magic, or by the format that the caller names."""
