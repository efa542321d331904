"""What can be done with prepared data: check it, count it, look into it, export and import it."""
