"""The default run's teacher: how it was made, what it ships as, what reads its clips."""
