"""Arrays of pixels as SRC: NumPy files and CIFAR."""
