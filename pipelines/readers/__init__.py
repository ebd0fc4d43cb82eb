"""Ways from shards into a program."""
