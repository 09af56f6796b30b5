/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: later ones have no ports; the first one leaves them here. */
#pragma once

#include "packet.h"

struct fragment_key {
	struct address source;
	struct address destination;
	__u32 id;
	__u8 protocol;
	__u8 pad[3];
};

struct fragment_ports {
	__be16 source;
	__be16 destination;
};

/* Least recently used entries go first: a datagram's fragments arrive together or never. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fragment_key);
	__type(value, struct fragment_ports);
} fragments SEC(".maps");

/* Give `p` its ports. False: a later fragment whose first one was not seen. */
static __always_inline bool complete_fragment(struct packet *p)
{
	struct fragment_key key = {
		.source = p->flow.source,
		.destination = p->flow.destination,
		.id = p->fragment_id,
		.protocol = p->flow.protocol,
	};
	struct fragment_ports *found, ports;

	if (p->fragment == FRAGMENT_FIRST) {
		ports.source = p->flow.source_port;
		ports.destination = p->flow.destination_port;
		bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
		return true;
	}
	found = bpf_map_lookup_elem(&fragments, &key);
	if (!found)
		return false;
	p->kind = PACKET_FLOW;
	p->flow.source_port = found->source;
	p->flow.destination_port = found->destination;
	return true;
}
