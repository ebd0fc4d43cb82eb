"""Looking at what was built."""
