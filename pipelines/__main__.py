"""`python -m gpu_npz` is the command `gpu-npz`."""

from .cli.start import main

if __name__ == "__main__":
    main()
