"""What tiedquiet costs: for a load onto a GPU, by the size of the report, for a resume, at start-up."""
