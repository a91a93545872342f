"""Shared by every run: settings and presets, folder, log, command line."""
