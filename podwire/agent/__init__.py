"""The node's daemon: assembles the rooms and owns the main loop."""
