"""Detects the GPUs, decoders and cores of this machine, and derives the tuning of a build from them."""
