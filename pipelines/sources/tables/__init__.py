"""Tables as SRC: CSV, JSON lines and Parquet, with paths or with images; and tables beside the images in a folder."""
