"""ComfyUI-WPlus: the W+ adapter as ComfyUI nodes, a core library and a trainer."""
