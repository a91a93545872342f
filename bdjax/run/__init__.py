"""What every run has: its settings and presets, its folder, its log, its command line."""
