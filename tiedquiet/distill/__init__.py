"""Distil a Wan text-to-video pipeline into a student with fewer steps or blocks; run `python -m tiedquiet.distill`."""
