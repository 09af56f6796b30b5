"""The eBPF data path: maps and pinned links."""
