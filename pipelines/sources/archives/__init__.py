"""Archives as SRC: tars, WebDataset, ImageNet's tars, zips."""
