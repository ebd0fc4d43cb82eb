"""Bytes of SRC, wherever they lie: on a disk, in an object store or on the web."""
