"""Copies a finished dataset into the formats of other tools: one .npz or .npy, folders of images, WebDataset tars."""
