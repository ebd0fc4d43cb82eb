"""Reads finished datasets: as arrays, in PyTorch, Keras and TensorFlow, and their preprocessing at inference."""
