/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From bytes to a flow. */
#pragma once

#include "address.h"

#ifdef PODWIRE_XDP
#define load_bytes bpf_xdp_load_bytes
#define store_bytes(ctx, offset, from, size) bpf_xdp_store_bytes(ctx, offset, (void *)(from), size)
#else
#define load_bytes bpf_skb_load_bytes
#define store_bytes(ctx, offset, from, size) bpf_skb_store_bytes(ctx, offset, from, size, 0)
#endif

#define HEADERS_END 1024 /* how far into a packet plain loads go */

/* Copy one object of the packet to `*to`: headers are nearly always in the linear part, where a plain
 * load does; the helper reads the rest. Not 0: the packet is too short. */
#define load(ctx, offset, to)                                                                      \
	({                                                                                         \
		__u64 load_at = (offset);                                                          \
		void *load_from;                                                                   \
		int load_error = 0;                                                                \
		asm volatile("" : "+r"(load_at)); /* one register for check and use */             \
		if (load_at < HEADERS_END &&                                                       \
		    (load_from = (void *)(long)(ctx)->data + load_at,                              \
		     load_from + sizeof(*(to)) <= (void *)(long)(ctx)->data_end))                  \
			*(to) = *(typeof(to))load_from;                                            \
		else                                                                               \
			load_error = load_bytes(ctx, load_at, to, sizeof(*(to)));                  \
		load_error;                                                                        \
	})

struct mac {
	__u16 words[3];
};

struct ethernet {
	struct mac destination, source;
	__be16 type;
};

enum packet_kind {
	PACKET_FLOW = 1, /* has ports, or an echo id */
	PACKET_ICMP_ERROR, /* quotes another packet */
	PACKET_OTHER, /* a flow without ports */
	PACKET_FOREIGN, /* not IP: ARP and the like */
	PACKET_CUT, /* TCP or SCTP that ends behind its ports: only a quote may */
	PACKET_BROKEN,
};

enum fragment { FRAGMENT_NONE, FRAGMENT_FIRST, FRAGMENT_LATER };

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct packet {
	struct flow flow;
	__u32 fragment_id;
	__u16 network; /* offset of the IP header */
	__u16 transport; /* offset behind it and its extensions */
	__u16 checksum; /* offset of a checksum that covers the addresses, or 0 */
	__u16 length; /* transport header and payload, in bytes */
	__u8 ipv4;
	__u8 kind;
	__u8 fragment;
	__u8 tcp_flags; /* of SCTP: what its first chunk comes to */
	__u8 ttl;
	__u8 icmp_type;
	__u8 tcp_words; /* of the TCP header */
	__u8 pad;
};

#define VXLAN_PORT 8472 /* of UDP, as `nodes.OVERLAY_PORTS` has them */
#define GENEVE_PORT 6081

static __always_inline bool has_tunnel_port(const struct flow *to)
{
	return to->protocol == IPPROTO_UDP && (to->destination_port == bpf_htons(VXLAN_PORT) ||
					       to->destination_port == bpf_htons(GENEVE_PORT));
}

/* Functions that are not static are verified once, by themselves, and keep what is rare out of the
 * way of what is common. */
__noinline int parse_icmp(CONTEXT *ctx, struct packet *p)
{
	struct { __u8 type, code; __be16 checksum, id, sequence; } icmp;
	bool echo, error;

	if (!p)
		return 0;
	p->kind = PACKET_OTHER;
	if (p->fragment == FRAGMENT_LATER) {
		p->kind = PACKET_FLOW; /* most likely of a long echo */
		return 0;
	}
	if (load_bytes(ctx, p->transport, &icmp, sizeof(icmp))) {
		p->kind = PACKET_BROKEN;
		return 0;
	}
	p->icmp_type = icmp.type;
	if (p->ipv4) {
		echo = icmp.type == ICMP_ECHO || icmp.type == ICMP_ECHO_REPLY;
		error = icmp.type == ICMP_UNREACHABLE || icmp.type == ICMP_TIME_EXCEEDED ||
			icmp.type == ICMP_PARAMETER_PROBLEM;
	} else {
		p->checksum = p->transport + 2;
		echo = icmp.type == ICMPV6_ECHO || icmp.type == ICMPV6_ECHO_REPLY;
		error = icmp.type >= ICMPV6_UNREACHABLE && icmp.type <= ICMPV6_PARAMETER_PROBLEM;
	}
	if (echo) {
		p->kind = PACKET_FLOW;
		p->flow.source_port = p->flow.destination_port = icmp.id;
	} else if (error) {
		p->kind = PACKET_ICMP_ERROR;
	}
	return 0;
}

/* SCTP's first chunk in TCP's words. What opens an association, and what completes its end, comes alone
 * (RFC 9260, 3); an ABORT behind other chunks is missed. */
static __always_inline __u8 flags_of_chunk(__u8 type)
{
	switch (type) {
	case 1: /* INIT */
		return TCP_SYN;
	case 2: /* INIT ACK */
		return TCP_SYN | TCP_ACK;
	case 7: /* SHUTDOWN */
	case 8: /* SHUTDOWN ACK */
		return TCP_FIN;
	case 6: /* ABORT */
	case 14: /* SHUTDOWN COMPLETE */
		return TCP_RST;
	}
	return TCP_ACK;
}

/* Whether it says of itself where in its connection it belongs: `tcp_flags` hold. */
static __always_inline bool is_stream(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_SCTP;
}

/* Whether only the first packet of a connection looks so. */
static __always_inline bool is_opening(const struct packet *p)
{
	return is_stream(p->flow.protocol) && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Whether the packet may be the first of its connection. */
static __always_inline bool is_start(const struct packet *p)
{
	return !is_stream(p->flow.protocol) || p->tcp_flags & TCP_SYN;
}

static __always_inline void parse_transport(CONTEXT *ctx, struct packet *p)
{
	struct { __be16 source, destination; } ports;
	__u16 offset_and_flags;
	__u8 protocol = p->flow.protocol, chunk;

	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_SCTP) {
		p->kind = PACKET_OTHER;
		if (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6)
			parse_icmp(ctx, p);
		return;
	}
	p->kind = PACKET_FLOW;
	if (p->fragment == FRAGMENT_LATER)
		return;
	if (load(ctx, p->transport, &ports)) {
		p->kind = PACKET_BROKEN;
		return;
	}
	p->flow.source_port = ports.source;
	p->flow.destination_port = ports.destination;
	if (protocol == IPPROTO_TCP) {
		if (load(ctx, p->transport + 12, &offset_and_flags)) {
			p->kind = PACKET_CUT;
			return;
		}
		p->tcp_flags = bpf_ntohs(offset_and_flags);
		p->tcp_words = bpf_ntohs(offset_and_flags) >> 12;
		p->checksum = p->transport + 16;
	} else if (protocol == IPPROTO_UDP) {
		p->checksum = p->transport + 6;
	} else if (load(ctx, p->transport + 12, &chunk)) {
		p->kind = PACKET_CUT;
	} else {
		p->tcp_flags = flags_of_chunk(chunk);
	}
}

static __always_inline void parse_ipv4(CONTEXT *ctx, struct packet *p)
{
	struct iphdr ip;
	__u16 fragment;

	if (load(ctx, p->network, &ip) || ip.version != 4 || ip.ihl < 5) {
		p->kind = PACKET_BROKEN;
		return;
	}
	p->ipv4 = 1;
	p->ttl = ip.ttl;
	set_ipv4(&p->flow.source, ip.saddr);
	set_ipv4(&p->flow.destination, ip.daddr);
	p->flow.protocol = ip.protocol;
	p->transport = p->network + ip.ihl * 4;
	p->length = bpf_ntohs(ip.tot_len) - ip.ihl * 4;
	fragment = bpf_ntohs(ip.frag_off) & 0x3fff;
	if (fragment)
		p->fragment = fragment & 0x1fff ? FRAGMENT_LATER : FRAGMENT_FIRST;
	p->fragment_id = ip.id;
	parse_transport(ctx, p);
}

#define IPV6_EXTENSIONS 6

static __always_inline bool is_extension(__u8 protocol)
{
	return protocol == IPPROTO_HOPOPTS || protocol == IPPROTO_ROUTING ||
	       protocol == IPPROTO_DSTOPTS || protocol == IPPROTO_FRAGMENT || protocol == IPPROTO_AH;
}

__noinline int parse_ipv6(CONTEXT *ctx, struct packet *p)
{
	struct ipv6hdr ip;
	struct { __u8 next, length; __be16 offset; __be32 id; } extension;
	__u16 at;
	__u8 next;

	if (!p)
		return 0;
	at = p->network + sizeof(ip);
	if (load(ctx, p->network, &ip) || ip.version != 6) {
		p->kind = PACKET_BROKEN;
		return 0;
	}
	p->ttl = ip.hop_limit;
	__builtin_memcpy(&p->flow.source, &ip.saddr, 16);
	__builtin_memcpy(&p->flow.destination, &ip.daddr, 16);
	/* no map could tell them from IPv4, and nobody may send them (RFC 4291, 2.5.5.2) */
	if (is_ipv4(&p->flow.source) || is_ipv4(&p->flow.destination)) {
		p->kind = PACKET_BROKEN;
		return 0;
	}
	next = ip.nexthdr;
	for (int i = 0; i < IPV6_EXTENSIONS; i++) {
		if (!is_extension(next))
			break;
		if (load_bytes(ctx, at, &extension, sizeof(extension))) {
			p->kind = PACKET_BROKEN;
			return 0;
		}
		if (next == IPPROTO_FRAGMENT) {
			__u16 offset = bpf_ntohs(extension.offset);

			if (offset & 0xfff9)
				p->fragment = offset & 0xfff8 ? FRAGMENT_LATER : FRAGMENT_FIRST;
			p->fragment_id = extension.id;
			at += 8;
		} else if (next == IPPROTO_AH) {
			at += (extension.length + 2) * 4;
		} else {
			at += (extension.length + 1) * 8;
		}
		next = extension.next;
		if (p->fragment == FRAGMENT_LATER)
			break;
	}
	if (is_extension(next) && p->fragment != FRAGMENT_LATER) {
		p->kind = PACKET_BROKEN; /* nobody needs so many but to hide what follows */
		return 0;
	}
	p->flow.protocol = next;
	p->transport = at;
	p->length = bpf_ntohs(ip.payload_len) - (at - p->network - sizeof(ip));
	parse_transport(ctx, p);
	return 0;
}

/* Fill `p` from the packet whose IP header is at `network`. */
static __always_inline void parse_at(CONTEXT *ctx, struct packet *p, __u16 network, bool ipv4)
{
	__builtin_memset(p, 0, sizeof(*p));
	p->network = network;
	if (ipv4)
		parse_ipv4(ctx, p);
	else
		parse_ipv6(ctx, p);
}

static __always_inline void parse(CONTEXT *ctx, struct packet *p)
{
	__be16 type = 0;

	p->kind = PACKET_BROKEN;
	if (load(ctx, 12, &type))
		return;
	if (type == bpf_htons(ETH_P_IP) || type == bpf_htons(ETH_P_IPV6))
		parse_at(ctx, p, ETH_HLEN, type == bpf_htons(ETH_P_IP));
	else
		p->kind = PACKET_FOREIGN;
}
