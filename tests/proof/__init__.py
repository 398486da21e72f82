"""The parts of the proof, each against truth made by hand or at random."""
