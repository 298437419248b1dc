"""What both sides of the federation agree on: settings, message keys, error codes, run files."""
