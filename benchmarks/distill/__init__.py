"""What the example costs: a step, a path, a clip, an update of the second stage, the whole; and how good its students are."""
