"""What a run leaves to read: tables, plots, one self-contained report."""
