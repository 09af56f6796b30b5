/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where a packet goes: to a pod of this node, by the routing table, or up the stack. */
#pragma once

#include "conntrack.h"
#include "rewrite.h"
#ifndef PODWIRE_XDP
#include "overlay.h"
#endif

enum endpoint_flag {
	ENDPOINT_PLAIN = 1, /* as INTERFACE_PLAIN */
};

struct endpoint { /* a pod of this node, found by its address */
	__u32 interface; /* the host's end of its veth */
	struct mac mac, host_mac;
	__u32 flags;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, struct address);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

enum interface_flag {
	INTERFACE_POD = 1, /* sources behind it count as pods (detect-local by interface) */
	INTERFACE_KNOWN = 2, /* a pod whose addresses are known; others may not be used behind it */
	INTERFACE_PLAIN = 4, /* a pod that no policy concerns: its TCP needs no entries (tcx.bpf.c) */
};

struct interface {
	struct address addresses[2]; /* of the pod behind it; zero: none */
	__u32 flags;
	struct mac mac;
	__u8 pad[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct interface);
} interfaces SEC(".maps");

const volatile bool with_pods = false;

static __always_inline struct interface *find_interface(__u32 index)
{
	return bpf_map_lookup_elem(&interfaces, &index);
}

static __always_inline struct endpoint *find_endpoint(const struct address *address)
{
	return with_pods ? bpf_map_lookup_elem(&endpoints, address) : NULL;
}

static __always_inline void set_route(struct bpf_fib_lookup *route, const struct flow *flow, __u32 from)
{
	__builtin_memset(route, 0, sizeof(*route));
	route->ifindex = from;
	if (is_ipv4(&flow->destination)) {
		route->family = AF_INET;
		route->ipv4_src = flow->source.words[3];
		route->ipv4_dst = flow->destination.words[3];
	} else {
		route->family = AF_INET6;
		__builtin_memcpy(route->ipv6_src, &flow->source, 16);
		__builtin_memcpy(route->ipv6_dst, &flow->destination, 16);
	}
}

static __always_inline long find_route(CONTEXT *ctx, struct bpf_fib_lookup *route,
				       const struct flow *flow, __u32 from, __u32 flags)
{
	set_route(route, flow, from);
	return bpf_fib_lookup(ctx, route, sizeof(*route), flags);
}

#ifndef PODWIRE_XDP

static __always_inline int drop(struct __sk_buff *ctx, enum reason reason, const struct flow *flow)
{
	report(reason, ctx->ifindex, flow);
	return TCX_DROP;
}

/* Hand the packet to the node itself as if it had come in on lo, where its own addresses are no
 * martians. */
static __always_inline int to_this_node(struct __sk_buff *ctx)
{
	__u8 zero[12] = {};

	store_bytes(ctx, 0, zero, sizeof(zero));
	return bpf_redirect(LOOPBACK, BPF_F_INGRESS);
}

/* Straight into the pod, without the backlog queue. Only from tcx ingress. */
static __always_inline int to_pod(struct __sk_buff *ctx, const struct packet *p,
				  const struct endpoint *endpoint, bool martian)
{
	if (p->ttl <= 1) /* the stack answers "time exceeded" */
		return martian ? to_this_node(ctx) : TCX_NEXT;
	if (decrement_ttl(ctx, p) || set_macs(ctx, &endpoint->mac, &endpoint->host_mac))
		return drop(ctx, REASON_WRITE_FAILED, &p->flow);
	return bpf_redirect_peer(endpoint->interface, 0);
}

static __always_inline int to_neighbour(const struct bpf_fib_lookup *route)
{
	struct bpf_redir_neigh next = { .nh_family = route->family };

	if (route->family == AF_INET)
		next.ipv4_nh = route->ipv4_dst;
	else
		__builtin_memcpy(next.ipv6_nh, route->ipv6_dst, 16);
	return bpf_redirect_neigh(route->ifindex, &next, sizeof(next), 0);
}

/* How long the IP packets are that this one, which may be a large one of many segments, is on the wire. */
static __always_inline __u16 length_on_wire(struct __sk_buff *ctx, const struct packet *p)
{
	__u16 head = p->transport - p->network;

	if (!ctx->gso_size)
		return head + p->length;
	return head + (p->tcp_words ? p->tcp_words * 4 : 8) + ctx->gso_size; /* TCP or UDP */
}

/* By the routing table, past the stack. `from` is the interface the packet came in by; LOOPBACK: this
 * node sends it, which is no hop. What is for this node, and what the stack must cut or send an error
 * about, goes up the stack, by way of lo when the stack would take it for spoofed. */
static __always_inline int by_route(struct __sk_buff *ctx, const struct packet *p, __u32 from,
				    bool martian)
{
	struct bpf_fib_lookup route;
	long found;

	set_route(&route, &p->flow, from);
	route.tot_len = length_on_wire(ctx, p); /* for an MTU that the route is locked to, too */
	found = bpf_fib_lookup(ctx, &route, sizeof(route), 0);
	if (found == BPF_FIB_LKUP_RET_UNSUPP_LWT)
		found = find_tunnel_route(ctx, &route, &p->flow);
	switch (found) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		break;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		count(REASON_TOO_BIG);
		return martian ? to_this_node(ctx) : TCX_NEXT;
	case BPF_FIB_LKUP_RET_NOT_FWDED:
		return martian ? to_this_node(ctx) : TCX_NEXT;
	default:
		if (!martian)
			return TCX_NEXT;
		return drop(ctx, REASON_NO_ROUTE, &p->flow);
	}
	if (p->ttl <= 1 && from != LOOPBACK)
		return martian ? to_this_node(ctx) : TCX_NEXT;
	if (from != LOOPBACK && decrement_ttl(ctx, p))
		return drop(ctx, REASON_WRITE_FAILED, &p->flow);
	count(REASON_FORWARDED);
	if (found == BPF_FIB_LKUP_RET_NO_NEIGH)
		return to_neighbour(&route);
	if (set_macs(ctx, (struct mac *)route.dmac, (struct mac *)route.smac))
		return drop(ctx, REASON_WRITE_FAILED, &p->flow);
	return bpf_redirect(route.ifindex, 0);
}

#endif
