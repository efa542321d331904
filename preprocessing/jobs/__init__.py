"""Work that survives a kill, on any number of processes, and what it shows of itself on the terminal."""
