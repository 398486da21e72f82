"""Loads through each door: what is said, kept, repaired and stopped."""
