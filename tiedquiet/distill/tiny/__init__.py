"""The teacher of the default run: how it was made, what it ships as, what reads its clips."""
