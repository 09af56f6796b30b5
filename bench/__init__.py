"""One script per claim: `python -m bench.NAME` prints a table, writes bench/results/NAME.json."""
