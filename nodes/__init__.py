"""The ComfyUI nodes: thin shells over wplus_core, in ComfyUI's V3 schema."""

from comfy_api.v0_0_2 import ComfyExtension, io

from . import folders

folders.register()  # before the schemas below list the files in them

from .apply import Apply  # noqa: E402
from .directions import FindDirection, GeneratorDirection, LoadDirection, Orthogonalise, SaveDirection  # noqa: E402
from .edit import EditIdentity, EditStack, MoveAttributes  # noqa: E402
from .faces import AlignFace, PasteFace  # noqa: E402
from .identity import (  # noqa: E402
    DecodeIdentity,
    EditInPlace,
    EncodeIdentity,
    IdentityInfo,
    LoadIdentity,
    PlaceIdentity,
    SaveIdentity,
)
from .loaders import LoadAdapter, LoadEncoder, LoadFaceTools  # noqa: E402
from .miniature import LoadMiniature  # noqa: E402
from .mix import BatchIdentities, IdentityFromBatch, MixIdentities, StyleMix, Truncate  # noqa: E402
from .sweep import Grid, Sweep  # noqa: E402

NODES: list[type[io.ComfyNode]] = [
    LoadAdapter,
    LoadEncoder,
    LoadFaceTools,
    LoadMiniature,
    AlignFace,
    EncodeIdentity,
    DecodeIdentity,
    SaveIdentity,
    LoadIdentity,
    PlaceIdentity,
    Apply,
    PasteFace,
    EditIdentity,
    EditStack,
    MoveAttributes,
    EditInPlace,
    MixIdentities,
    StyleMix,
    Truncate,
    BatchIdentities,
    IdentityFromBatch,
    IdentityInfo,
    Sweep,
    Grid,
    LoadDirection,
    Orthogonalise,
    FindDirection,
    GeneratorDirection,
    SaveDirection,
]


class WPlusExtension(ComfyExtension):
    async def on_load(self):
        from .preview import add_routes  # here, since the nodes also run in a process without a server

        add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
