"""Checks on finished datasets and on this machine: verify, compare, preview, statistics, parity and doctor."""
