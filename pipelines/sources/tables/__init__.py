"""Tables (CSV, JSON lines, Parquet) as SRC, with paths or with images, and sidecar tables of a folder."""
