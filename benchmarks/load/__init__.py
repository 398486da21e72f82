"""What tiedquiet costs: a load onto a GPU, by the size of the report, at the start of a program."""
