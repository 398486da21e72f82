"""Distil a Wan text-to-video pipeline into a student with fewer blocks; `python -m tiedquiet.distill` shows it."""
