"""What gives shards to workers."""
