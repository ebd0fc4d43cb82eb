"""The content of OUT: the files of a build, their names and records, and how they depend on each other."""
