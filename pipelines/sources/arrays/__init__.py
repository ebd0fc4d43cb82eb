"""Arrays of pixels as SRC: NumPy's files and CIFAR."""
