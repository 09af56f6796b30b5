"""Addresses for pods: host-scope pools and the VPC's warm pool, one SQLite file for both."""
