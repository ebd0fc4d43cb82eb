"""The command line. Each command turns its options into settings, makes one library call and prints the result."""
