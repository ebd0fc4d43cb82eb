"""A plan to committed shards: the worker, and the engines that give it shards."""
