/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What a pod sends bears its own addresses, or it goes nowhere. */
#pragma once

#include "forward.h"

struct arp {
	__be16 hardware, protocol;
	__u8 hardware_length, protocol_length;
	__be16 operation;
	struct mac sender_mac;
	__be16 sender_address[2];
	struct mac target_mac;
	__be16 target_address[2];
};

static __always_inline bool is_own_mac(const struct interface *pod, const struct mac *mac)
{
	const __u16 *own = pod->mac.words;

	if (!(own[0] | own[1] | own[2]))
		return true; /* not known */
	return own[0] == mac->words[0] && own[1] == mac->words[1] && own[2] == mac->words[2];
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
	__be32 address;

	if (load(ctx, ETH_HLEN, &arp))
		return true; /* not ARP */
	__builtin_memcpy(&address, arp.sender_address, 4);
	set_ipv4(&sender, address);
	/* an address probe (RFC 5227) has no sender yet */
	return is_own_mac(pod, &arp.sender_mac) &&
	       (!sender.words[3] || same_address(&sender, &pod->addresses[0]));
}

/* Whether the pod behind an interface may send the packet. A pod that is not known may not. */
static __always_inline bool is_honest(struct __sk_buff *ctx, const struct packet *p,
				      const struct interface *pod)
{
	struct ethernet ethernet;

	if (!pod || !(pod->flags & INTERFACE_KNOWN) || load(ctx, 0, &ethernet) ||
	    !is_own_mac(pod, &ethernet.source))
		return false;
	if (!p->ipv4 && (p->icmp_type == ICMPV6_ROUTER_ADVERTISEMENT || p->icmp_type == ICMPV6_REDIRECT))
		return false; /* no pod is a router (CVE-2020-10749) */
	if (p->kind == PACKET_FOREIGN)
		return ctx->protocol != bpf_htons(ETH_P_ARP) || is_honest_arp(ctx, pod);
	return same_address(&p->flow.source, &pod->addresses[p->ipv4 ? 0 : 1]) || is_for_the_link(p);
}
