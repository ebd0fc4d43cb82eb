"""Folders of images as SRC, on a disk or an object store."""
