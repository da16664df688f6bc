"""Modules that the scripts share. Nothing is installed: the scripts import them from this folder."""
