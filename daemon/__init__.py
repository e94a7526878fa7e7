"""The drop-folder daemon: from a file in `incoming/` to a result, an overlay and its place."""
