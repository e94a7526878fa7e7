"""Networks: backbones, heads, lung view, content gate, and the files of their weights."""
