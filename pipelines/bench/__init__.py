"""Benchmarks. Their results are ratios within one run, since rates of different runs cannot be compared."""
