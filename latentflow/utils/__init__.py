"""Helpers that every part may use: files and settings of strangers read safely, memory, checked arguments."""
