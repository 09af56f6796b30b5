"""The connection table: reading, statistics, attribution, advice."""
