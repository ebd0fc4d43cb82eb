"""Measuring: always as ratios within one run."""
