"""Builds the shards of a plan: the worker, and the engines that give shards to workers."""
