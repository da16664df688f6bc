"""Modules that the scripts share. They are imported from this folder; nothing is installed."""
