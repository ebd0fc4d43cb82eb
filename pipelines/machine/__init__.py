"""What this host can use: GPUs, decoders, cores, and the settings that follow from them."""
