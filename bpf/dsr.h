/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Direct server return: a client's packets go to a backend on another node with the client's address
 * kept, and the backend's node answers the client itself, under the Service's address.
 *
 * Which Service was addressed travels in an IPv4 option or an IPv6 destination option, as with Cilium:
 * TCP's and SCTP's in what opens a connection (`is_start`; the backend's node remembers) and in the first
 * packet that this node sees of one, all else's in every packet that has room. A first packet without
 * room is masqueraded, as without DSR.
 *
 * The first node keeps an ordinary pair of entries, of which the answers' is only for ICMP errors. On the
 * backend's node, where the option was taken off, packets look like client → backend, and answers
 * become Service → client. That half works whatever this node itself does with its clients, so that nodes
 * may change their mode one by one.
 */
#pragma once

#include "masquerade.h"

struct dsr4 {
	__u8 type;
	__u8 length;
	__be16 port;
	__be32 address;
};
#define DSR4_TYPE 0x9a /* copied into fragments, control, number 26 */

struct dsr6 {
	__u8 next; /* of the extension header */
	__u8 length;
	__u8 type; /* of its only option */
	__u8 size;
	__be16 port;
	__be16 pad;
	struct address address;
};
#define DSR6_TYPE 0x1b /* whoever does not know it passes it over */
#define DSR6_LENGTH (sizeof(struct dsr6) / 8 - 1)
#define DSR6_SIZE (sizeof(struct dsr6) - 4)

/* An IP header with the option behind it. */
union dsr_head {
	struct {
		struct iphdr ip;
		struct dsr4 option;
	} v4;
	struct {
		struct ipv6hdr ip;
		struct dsr6 option;
	} v6;
};

#define IPV4_HEAD sizeof(struct iphdr)
#define IPV6_HEAD sizeof(struct ipv6hdr)

static __always_inline __u32 plain_head(const struct packet *p)
{
	return p->ipv4 ? IPV4_HEAD : IPV6_HEAD;
}

static __always_inline __u32 dsr_size(const struct packet *p)
{
	return p->ipv4 ? sizeof(struct dsr4) : sizeof(struct dsr6);
}

/* Whether the chosen backend may answer the client itself: it is on another node of this cluster, the
 * client is neither a node nor a pod of it, and the other node will believe us (see `is_believed`). */
static __always_inline bool may_lead(const struct flow *flow, const struct choice *choice)
{
	if (!choice->dsr || network_flags(&flow->source) & NETWORK_MEMBER ||
	    !(network_flags(&choice->backend.address) & (NETWORK_NODE | NETWORK_PODS)))
		return false;
	return !(address_flags(&flow->destination) & ADDRESS_NODE) ||
	       network_flags(&flow->destination) & NETWORK_NODE;
}

static __always_inline bool is_led_away(const struct connection *connection)
{
	return (connection->flags & (CONNECTION_DSR | CONNECTION_REPLY)) == CONNECTION_DSR;
}

/* How long the packet becomes with the option; 0: it has none now but could not take one either. */
static __always_inline __u16 led_length(const struct packet *p)
{
	if (p->fragment != FRAGMENT_NONE || p->transport != p->network + plain_head(p))
		return 0;
	return plain_head(p) + dsr_size(p) + p->length;
}

/* Record that packets like `p` are led to `to`. -ERROR_EXIST: the client uses this port for another
 * connection to the same backend, whose answers would look alike. */
static __always_inline int create_leading(struct creation *c, const struct packet *p, const struct flow *to,
					  __u32 service)
{
	int error;

	begin_creation(c, service, CONNECTION_TRANSLATED | CONNECTION_DSR);
	error = claim_answers(c, &p->flow, to, true);
	if (error)
		return error;
	return create_original(c, p, to) ? -ERROR_INVALID : 0;
}

#ifdef PODWIRE_XDP

#define store_head(ctx, offset, from, size) store_bytes(ctx, offset, from, size)

/* Room behind the IP header, which is written anew: only the Ethernet header has to move. */
static __always_inline int make_room(struct xdp_md *ctx, __u32 size)
{
	struct ethernet ethernet;

	return load_bytes(ctx, 0, &ethernet, sizeof(ethernet)) || bpf_xdp_adjust_head(ctx, -(int)size) ||
	       store_bytes(ctx, 0, &ethernet, sizeof(ethernet));
}

#else

#define ROOM_FLAGS (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET)

static __always_inline int make_room(struct __sk_buff *ctx, __u32 size)
{
	return bpf_skb_adjust_room(ctx, size, BPF_ADJ_ROOM_NET, ROOM_FLAGS);
}

/* Write bytes of the IP header, also for a card that has summed the packet as a whole. */
static __always_inline int store_head(struct __sk_buff *ctx, __u32 offset, const void *from, __u32 size)
{
	return bpf_skb_store_bytes(ctx, offset, from, size, BPF_F_RECOMPUTE_CSUM);
}

/* Whether the option fits into a packet that is to look as `to`. */
static __always_inline bool has_room(struct __sk_buff *ctx, const struct packet *p, const struct flow *to)
{
	struct bpf_fib_lookup route;
	long found;

	set_route(&route, to, ctx->ifindex);
	route.tot_len = led_length(p);
	if (!route.tot_len || ctx->gso_size)
		return false;
	found = bpf_fib_lookup(ctx, &route, sizeof(route), 0);
	return found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH;
}

#endif

/* Give the packet the option. Not 0: drop it. */
__noinline int push_option(CONTEXT *ctx, struct packet *p, union dsr_head *head,
			   const struct flow *service)
{
	if (!p || !head || !service)
		return -ERROR_INVALID;
	p->transport += dsr_size(p);
	if (p->checksum)
		p->checksum += dsr_size(p);
	if (p->ipv4) {
		if (load_bytes(ctx, ETH_HLEN, &head->v4.ip, IPV4_HEAD) ||
		    make_room(ctx, sizeof(struct dsr4)))
			return -ERROR_INVALID;
		head->v4.option = (struct dsr4){ DSR4_TYPE, sizeof(struct dsr4), service->destination_port,
						 service->destination.words[3] };
		head->v4.ip.ihl += sizeof(struct dsr4) / 4;
		head->v4.ip.tot_len = bpf_htons(bpf_ntohs(head->v4.ip.tot_len) + sizeof(struct dsr4));
		head->v4.ip.check = 0;
		head->v4.ip.check = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)head, sizeof(head->v4), 0));
		return store_head(ctx, ETH_HLEN, head, sizeof(head->v4));
	}
	if (load_bytes(ctx, ETH_HLEN, &head->v6.ip, IPV6_HEAD) ||
	    make_room(ctx, sizeof(struct dsr6)))
		return -ERROR_INVALID;
	head->v6.option = (struct dsr6){ head->v6.ip.nexthdr, DSR6_LENGTH, DSR6_TYPE, DSR6_SIZE,
					 service->destination_port, 0, service->destination };
	head->v6.ip.nexthdr = IPPROTO_DSTOPTS;
	head->v6.ip.payload_len = bpf_htons(bpf_ntohs(head->v6.ip.payload_len) + sizeof(struct dsr6));
	return store_head(ctx, ETH_HLEN, head, sizeof(head->v6));
}

#ifndef PODWIRE_XDP

/* Whether the packet bears the option; `service` then becomes its flow as the client began it. */
static __always_inline bool read_option(struct __sk_buff *ctx, const struct packet *p, struct flow *service)
{
	struct dsr4 v4;
	struct dsr6 v6;
	__u8 next;

	if (p->transport != p->network + plain_head(p) + dsr_size(p))
		return false;
	*service = p->flow;
	if (p->ipv4) {
		if (load_bytes(ctx, ETH_HLEN + IPV4_HEAD, &v4, sizeof(v4)) || v4.type != DSR4_TYPE ||
		    v4.length != sizeof(v4))
			return false;
		set_ipv4(&service->destination, v4.address);
		service->destination_port = v4.port;
		return true;
	}
	if (load_bytes(ctx, ETH_HLEN + 6, &next, 1) || next != IPPROTO_DSTOPTS ||
	    load_bytes(ctx, ETH_HLEN + IPV6_HEAD, &v6, sizeof(v6)) || v6.length != DSR6_LENGTH ||
	    v6.type != DSR6_TYPE || v6.size != DSR6_SIZE)
		return false;
	service->destination = v6.address;
	service->destination_port = v6.port;
	return true;
}

/* Take the option off. Not 0: drop the packet. */
static __always_inline int pop_option(struct __sk_buff *ctx, struct packet *p)
{
	struct iphdr v4;
	struct ipv6hdr v6;

	p->transport -= dsr_size(p);
	if (p->checksum)
		p->checksum -= dsr_size(p);
	if (p->ipv4) {
		if (load_bytes(ctx, ETH_HLEN, &v4, IPV4_HEAD) ||
		    bpf_skb_adjust_room(ctx, -(int)sizeof(struct dsr4), BPF_ADJ_ROOM_NET, ROOM_FLAGS))
			return -ERROR_INVALID;
		v4.ihl -= sizeof(struct dsr4) / 4;
		v4.tot_len = bpf_htons(bpf_ntohs(v4.tot_len) - sizeof(struct dsr4));
		v4.check = 0;
		v4.check = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)&v4, sizeof(v4), 0));
		return store_head(ctx, ETH_HLEN, &v4, sizeof(v4));
	}
	/* the extension's first byte says what follows it */
	if (load_bytes(ctx, ETH_HLEN, &v6, IPV6_HEAD) ||
	    load_bytes(ctx, ETH_HLEN + IPV6_HEAD, &v6.nexthdr, 1) ||
	    bpf_skb_adjust_room(ctx, -(int)sizeof(struct dsr6), BPF_ADJ_ROOM_NET, ROOM_FLAGS))
		return -ERROR_INVALID;
	v6.payload_len = bpf_htons(bpf_ntohs(v6.payload_len) - sizeof(struct dsr6));
	return store_head(ctx, ETH_HLEN, &v6, sizeof(v6));
}

/* Whether the option may be believed: a Service of ours, reached from outside, that leads to this very
 * backend on this node. So whoever forges one gets no more than the Service would have given; only
 * nodes and Services lend their addresses, and cluster members never get any. */
static __always_inline bool is_believed(const struct packet *p, const struct flow *service, __u32 *id)
{
	bool node = network_flags(&service->destination) & NETWORK_NODE;
	struct frontend *frontend = find_frontend(service, node ? ADDRESS_NODE_PORT : 0);

	if (!frontend || !(frontend->flags & FRONTEND_EXTERNAL) ||
	    network_flags(&p->flow.source) & NETWORK_MEMBER)
		return false;
	*id = frontend->service;
	return (!(frontend->flags & FRONTEND_RANGED) || in_ranges(frontend, &service->source)) &&
	       is_member(frontend->service, MEMBER_HERE, &p->flow.destination, p->flow.destination_port);
}

/* Whether packets like `p` are known to have begun as `service`; `*taken`: as something else. */
static __always_inline bool is_remembered(struct flow *scratch, const struct packet *p,
					  const struct flow *service, bool *taken)
{
	struct connection *connection = find_connection(&p->flow);
	struct connection *answers;

	*taken = false;
	if (!connection)
		return false;
	reverse(scratch, &p->flow);
	answers = find_connection(scratch);
	if (is_reopened(connection, p) || !answers) {
		forget_connection(scratch);
		forget_connection(&p->flow);
		return false;
	}
	*taken = !same_address(&answers->to.source, &service->destination) ||
		 answers->to.source_port != service->destination_port;
	return !*taken;
}

/* Record that answers to packets like `p` become those of `service`. 0, or why it cannot be. */
static __always_inline enum reason create_led(struct creation *c, const struct packet *p,
					      const struct flow *service, __u32 id)
{
	int error;

	begin_creation(c, id, CONNECTION_LED | CONNECTION_TRANSLATED);
	error = claim_answers(c, service, &p->flow, true);
	if (error)
		return error == -ERROR_EXIST ? REASON_PORTS_EXHAUSTED : REASON_CONNECTIONS_FULL;
	c->value.flags &= ~CONNECTION_TRANSLATED;
	return create_original(c, p, &p->flow);
}

#endif
