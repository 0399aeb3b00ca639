"""ComfyUI-WPlus: the W+ adapter as ComfyUI nodes, a core library and a trainer.

ComfyUI loads this folder by its path and asks `comfy_entrypoint` for the nodes; as the installed package
`comfyui_wplus` it needs no ComfyUI.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import WPlusExtension

    return WPlusExtension()
