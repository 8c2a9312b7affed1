"""One module for each image format whose own layer is read; `LAYERS` is the only list of them.

The contract is described in `virt_bmap.formats.images.layer`.
"""

import importlib
from types import ModuleType

HERE = "virt_bmap.formats.images"
LAYERS = {
    "raw": f"{HERE}.raw",
    "qcow2": f"{HERE}.qcow2",
    "vmdk": f"{HERE}.vmdk",
    "vpc": f"{HERE}.vhd",
    "vhdx": f"{HERE}.vhdx",
    "vdi": f"{HERE}.vdi",
}
"""Modules by QEMU's name of the format."""


def load(format: str) -> ModuleType | None:
    """The module that reads this format's layer; None where there is none."""
    return importlib.import_module(LAYERS[format]) if format in LAYERS else None
