"""The pipeline: decoding, inference, overlay, database row and filing of claimed files."""
