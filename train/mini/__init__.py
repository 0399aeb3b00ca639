"""The miniature: a procedural world of faces, and a whole W+ pipeline of a few megabytes trained on it."""
