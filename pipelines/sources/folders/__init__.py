"""Folders of images as SRC, on a disk or in an object store."""
