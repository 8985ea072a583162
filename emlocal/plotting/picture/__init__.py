"""Pictures in files, by matplotlib."""
