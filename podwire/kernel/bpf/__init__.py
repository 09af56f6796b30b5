"""bpf(2) and libbpf: parsed objects, loaded objects, maps, links, ring buffers, probes."""
