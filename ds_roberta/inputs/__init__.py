"""What people bring: paths and data sets to files, and files to rows, for every command that reads text."""
