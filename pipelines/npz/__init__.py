"""The shard file: an NPZ that is written in one pass and can be read row by row."""
