"""Encoded images to stored values: decode, resize, normalize."""
