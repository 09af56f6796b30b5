"""The `podwire` command: argument parsing and printing, nothing else."""
