"""Reads finished datasets: as arrays, in PyTorch, Keras, TensorFlow and DALI, and their preprocessing at inference."""
