/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What a pod sends bears its own addresses, or it goes nowhere. */
#pragma once

#include "forward.h"

struct arp {
	__be16 hardware, protocol;
	__u8 hardware_length, protocol_length;
	__be16 operation;
	__u8 sender_mac[6], sender_address[4], target_mac[6], target_address[4];
};

static __always_inline bool is_own_mac(const struct interface *pod, const __u8 *mac)
{
	const __u8 *own = pod->mac;
	bool known = own[0] | own[1] | own[2] | own[3] | own[4] | own[5];

	return !known || !__builtin_memcmp(own, mac, 6);
}

/* Link-local and unspecified sources are for neighbour discovery, which never leaves the link. */
static __always_inline bool is_for_the_link(const struct packet *p)
{
	return !p->ipv4 && p->flow.protocol == IPPROTO_ICMPV6 &&
	       (is_link_local(&p->flow.source) ||
		(!p->flow.source.halves[0] && !p->flow.source.halves[1])) &&
	       (is_multicast(&p->flow.destination) || is_link_local(&p->flow.destination));
}

static __always_inline bool is_honest_arp(struct __sk_buff *ctx, const struct interface *pod)
{
	struct arp arp;
	struct address sender;

	if (load_bytes(ctx, ETH_HLEN, &arp, sizeof(arp)))
		return true; /* not ARP */
	set_ipv4(&sender, *(__be32 *)arp.sender_address);
	/* an address probe (RFC 5227) has no sender yet */
	return is_own_mac(pod, arp.sender_mac) &&
	       (!sender.words[3] || same_address(&sender, &pod->addresses[0]));
}

/* Whether the pod behind this interface may send the packet. A pod that is not known may not. */
static __always_inline bool is_honest(struct __sk_buff *ctx, const struct packet *p)
{
	__u32 key = ctx->ifindex;
	struct interface *pod = bpf_map_lookup_elem(&interfaces, &key);
	__u8 mac[6];

	if (!pod || !(pod->flags & INTERFACE_KNOWN) || load_bytes(ctx, 6, mac, 6) ||
	    !is_own_mac(pod, mac))
		return false;
	if (p->kind == PACKET_FOREIGN)
		return ctx->protocol != bpf_htons(ETH_P_ARP) || is_honest_arp(ctx, pod);
	return same_address(&p->flow.source, &pod->addresses[p->ipv4 ? 0 : 1]) || is_for_the_link(p);
}
