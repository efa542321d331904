"""Check, count, show, trace, export and import prepared data."""
