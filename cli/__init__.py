"""The command line: options to settings, one library call, and printing."""
