"""The nftables data path: constant structure, everything else is elements."""
