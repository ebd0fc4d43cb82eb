"""What this machine can use: GPUs, decoders and cores, and the tuning that follows from them."""
