"""From the data to the report: one file for each kind of run."""
