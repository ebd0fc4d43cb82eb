"""The shard file: an NPZ that streams out in one pass and reads back row by row."""
