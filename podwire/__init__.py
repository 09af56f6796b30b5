"""Podwire: Kubernetes networking that you can run, read and trace."""

__version__ = "0.1.0"
