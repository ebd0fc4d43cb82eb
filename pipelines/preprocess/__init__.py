"""Encoded images to stored values: decode, resize, normalize; one module per library."""
