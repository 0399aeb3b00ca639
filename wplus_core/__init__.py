"""The method in plain torch: networks, maths and files. Imports neither ComfyUI nor diffusers."""
