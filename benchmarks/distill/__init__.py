"""What the example costs: a step, a path, a clip, a second-stage update, the whole; and how good its students are."""
