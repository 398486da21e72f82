"""Real classes under damaged files: what a class saves, changed at random; each verdict against what was done to it."""
