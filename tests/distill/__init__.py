"""The example as its users run it, and its parts against values made by hand."""
