"""Encoded images to pixels: one protocol, one module a library."""
