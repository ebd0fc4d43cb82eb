"""What a build keeps in OUT: its files, their names, their records, and how they belong together."""
