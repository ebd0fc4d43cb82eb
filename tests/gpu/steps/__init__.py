"""What `tests/gpu/run` does, a module for each subject."""
