"""Expert Witness: known, and opened by nothing here.

Sources: libewf, documentation of EWF and EWF2.
"""

from virt_bmap.model.contract import Docs, ImageFormat

FORMAT = ImageFormat(
    "ewf",
    Docs((), ("E01 and Ex01 images: named",), ()),
    refusal="is an Expert Witness image (E01, Ex01), which can't be read directly; use ewfmount (E01) or "
    "ewfexport to get a raw disk first",
)
