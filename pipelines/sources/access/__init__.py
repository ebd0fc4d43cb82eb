"""Access to the bytes of SRC on a disk, an object store or a web server."""
