"""Turn the inputs that a user names into documents, and account for each of them."""
