"""From what a user names as input to documents, and an account of what became of each."""
