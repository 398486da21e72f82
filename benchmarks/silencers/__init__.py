"""What each way of silencing the loading report hides, and who notices a model that does not hold its file."""
