"""What is measured: each result with its hardware, versions and date."""
