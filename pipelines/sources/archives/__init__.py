"""Archives as SRC: tars, WebDataset, ImageNet's own tars, zips."""
