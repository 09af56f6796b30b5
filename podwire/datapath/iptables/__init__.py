"""The iptables data path: iptables-restore and ipset."""
