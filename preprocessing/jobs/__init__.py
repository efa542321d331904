"""Work that survives a kill, on any number of processes."""
