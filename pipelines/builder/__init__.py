"""`build()` and what surrounds it: planning, running, reporting, parts, and what is done with an OUT later."""
