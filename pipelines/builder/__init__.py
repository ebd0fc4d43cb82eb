"""`build()` and its surroundings: planning, running, reporting, parts, and maintenance of an existing OUT."""
