"""The only door to the kernel: netlink, nft, bpf, namespaces, sysctls. Imports nothing of ours."""
