"""The ComfyUI nodes: thin shells over wplus_core, in ComfyUI's V3 schema."""

from comfy_api.v0_0_2 import ComfyExtension, io

from . import folders

folders.register()  # before the schemas below list the files in them

from .apply import Apply  # noqa: E402
from .faces import AlignFace, PasteFace  # noqa: E402
from .identity import DecodeIdentity, EncodeIdentity, LoadIdentity, PlaceIdentity, SaveIdentity  # noqa: E402
from .loaders import LoadAdapter, LoadEncoder, LoadFaceTools  # noqa: E402

NODES: list[type[io.ComfyNode]] = [
    LoadAdapter,
    LoadEncoder,
    LoadFaceTools,
    AlignFace,
    EncodeIdentity,
    DecodeIdentity,
    SaveIdentity,
    LoadIdentity,
    PlaceIdentity,
    Apply,
    PasteFace,
]


class WPlusExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
