"""Several processes: who belongs together, what is joined how, and who divides parameters."""
