/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses and flows. IPv4 is written IPv4-mapped (::ffff:a.b.c.d), so that one table serves both. */
#pragma once

#include "kernel.h"

struct address {
	union {
		__u8 bytes[16];
		__be32 words[4];
		__u64 halves[2];
	};
};

/* One direction of a connection, as its packets look. ICMP echo has its id in both ports. */
struct flow {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 pad[3];
};

static __always_inline bool same_address(const struct address *a, const struct address *b)
{
	return a->halves[0] == b->halves[0] && a->halves[1] == b->halves[1];
}

static __always_inline bool is_ipv4(const struct address *a)
{
	return a->halves[0] == 0 && a->words[2] == bpf_htonl(0xffff);
}

static __always_inline void set_ipv4(struct address *a, __be32 value)
{
	a->halves[0] = 0;
	a->words[2] = bpf_htonl(0xffff);
	a->words[3] = value;
}

static __always_inline bool is_multicast(const struct address *a)
{
	if (is_ipv4(a))
		return (a->bytes[12] & 0xf0) == 0xe0 || a->words[3] == 0xffffffff;
	return a->bytes[0] == 0xff;
}

static __always_inline bool is_link_local(const struct address *a)
{
	return a->bytes[0] == 0xfe && (a->bytes[1] & 0xc0) == 0x80;
}

static __always_inline bool is_loopback(const struct address *a)
{
	if (is_ipv4(a))
		return a->bytes[12] == 127;
	return a->halves[0] == 0 && a->words[2] == 0 && a->words[3] == bpf_htonl(1);
}

static __always_inline void reverse(struct flow *to, const struct flow *from)
{
	to->source = from->destination;
	to->destination = from->source;
	to->source_port = from->destination_port;
	to->destination_port = from->source_port;
	to->protocol = from->protocol;
	to->pad[0] = to->pad[1] = to->pad[2] = 0;
}
