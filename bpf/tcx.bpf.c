// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Every packet of the node, at tcx: from and to pods, from and to the network.
 *
 * Ingress sees what comes out of a pod or in from the network; everything is decided there once, for
 * both ends, and kept in the connection table. Egress sees only what the node's own stack sends. The
 * kernel's conntrack is not used.
 */
#include "forward.h"
#include "fragment.h"
#include "icmp.h"
#include "reject.h"
#include "service.h"

char _license[] SEC("license") = "Dual BSD/GPL";

enum place { PLACE_POD, PLACE_NETWORK, PLACE_NODE };

/* More than the 512 bytes of stack that a program has. Ingress and egress never interrupt each other
 * on one CPU: both run with softirqs held off. */
struct work {
	struct packet packet;
	struct packet inner;
	struct flow to;
	struct creation creation;
	struct choice choice;
	struct refusal refusal;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct work);
} scratch SEC(".maps");

static __always_inline bool is_behind_pods(struct __sk_buff *ctx, enum place place)
{
	__u32 key = ctx->ifindex;
	struct interface *interface = bpf_map_lookup_elem(&interfaces, &key);

	return place != PLACE_NODE && interface && interface->flags & INTERFACE_POD;
}

static __always_inline enum origin find_origin(struct __sk_buff *ctx, const struct address *source,
					       enum place place)
{
	const struct settings *current = current_settings();

	if (current && current->detect_local == DETECT_CIDR && prefix_flags(source) & PREFIX_LOCAL_PODS)
		return ORIGIN_POD;
	if (current && current->detect_local == DETECT_INTERFACE && is_behind_pods(ctx, place))
		return ORIGIN_POD;
	if (is_loopback(source) || address_flags(source) & ADDRESS_NODE)
		return ORIGIN_NODE;
	return ORIGIN_OUTSIDE;
}

/* Put this node's address as the source of `to`; false when it has none of the family. */
static __always_inline bool masquerade(struct flow *to, bool ipv4)
{
	const struct settings *current = current_settings();
	const struct address *node;

	if (!current)
		return false;
	node = ipv4 ? &current->node[0] : &current->node[1];
	if (!node->halves[0] && !node->halves[1])
		return false;
	to->source = *node;
	return true;
}

/* Make the packet look as `w->to` and send it on.
 *
 * The stack would take an answer that bears a Service's address, and a packet that bears one of the
 * node's own, for spoofed: whatever got a new source goes by our own look-up. */
static __always_inline int translate(struct __sk_buff *ctx, struct work *w, enum place place)
{
	struct packet *p = &w->packet;
	bool source = !same_address(&p->flow.source, &w->to.source);
	bool destination = !same_address(&p->flow.destination, &w->to.destination);

	if (rewrite(ctx, p, &w->to))
		return drop(ctx, REASON_WRITE_FAILED, &p->flow);
	if (place == PLACE_NODE)
		return destination ? by_route(ctx, p, LOOPBACK) : TCX_NEXT;
	return source ? by_route(ctx, p, ctx->ifindex) : TCX_NEXT;
}

/* The first packet of a connection. */
static __always_inline int begin(struct __sk_buff *ctx, struct work *w, enum place place)
{
	struct packet *p = &w->packet;
	enum origin origin = find_origin(ctx, &p->flow.source, place);
	enum verdict verdict = VERDICT_NONE;
	enum reason reason;
	bool ports = false;

	if (with_services)
		verdict = choose(&p->flow, origin, &p->flow.source, &w->choice);
	if (verdict == VERDICT_NONE)
		return TCX_NEXT;
	if (verdict == VERDICT_REJECT)
		return refuse(ctx, p, &w->refusal, place == PLACE_NODE);
	if (verdict == VERDICT_DROP)
		return drop(ctx, w->choice.reason, &p->flow);

	w->to = p->flow;
	w->to.destination = w->choice.backend.address;
	w->to.destination_port = w->choice.backend.port;
	if (w->choice.masquerade && masquerade(&w->to, p->ipv4))
		ports = !same_address(&w->to.source, &p->flow.source);
	reason = create_connection(&w->creation, p, &w->to, w->choice.service, CONNECTION_TRANSLATED,
				   ports);
	if (reason)
		return drop(ctx, reason, &p->flow);
	count(REASON_TRANSLATED);
	return translate(ctx, w, place);
}

static __always_inline int walk(struct __sk_buff *ctx, enum place place)
{
	__u32 key = 0;
	struct work *w = bpf_map_lookup_elem(&scratch, &key);
	struct connection *connection;
	struct packet *p;
	int error;

	if (!w)
		return TCX_NEXT;
	p = &w->packet;
	parse(ctx, p);
	if (p->kind == PACKET_FOREIGN || is_multicast(&p->flow.destination))
		return TCX_NEXT;
	if (p->kind == PACKET_BROKEN)
		return drop(ctx, REASON_BROKEN, &p->flow);
	if (!p->ipv4 && p->icmp_type >= ICMPV6_ROUTER_SOLICITATION && p->icmp_type <= ICMPV6_REDIRECT)
		return TCX_NEXT;
	if (p->fragment != FRAGMENT_NONE && p->kind == PACKET_FLOW && !complete_fragment(p))
		return address_flags(&p->flow.destination) & ~ADDRESS_NODE ?
			       drop(ctx, REASON_FRAGMENT_LOST, &p->flow) : TCX_NEXT;

	if (p->kind == PACKET_ICMP_ERROR) {
		if (!translate_error(ctx, p, &w->inner, &w->to, &error))
			return TCX_NEXT; /* about nothing that was translated */
		if (error)
			return drop(ctx, REASON_WRITE_FAILED, &p->flow);
		return by_route(ctx, p, place == PLACE_NODE ? LOOPBACK : ctx->ifindex);
	}
	connection = find_connection(&p->flow);
	if (connection && is_reopened(connection, p)) {
		reverse(&w->to, &connection->to);
		forget_connection(&w->to);
		forget_connection(&p->flow);
		connection = NULL;
	}
	if (!connection)
		return begin(ctx, w, place);
	touch(connection, p);
	if (!(connection->flags & CONNECTION_TRANSLATED))
		return TCX_NEXT;
	w->to = connection->to;
	return translate(ctx, w, place);
}

SEC("tc")
int from_pod(struct __sk_buff *ctx)
{
	return walk(ctx, PLACE_POD);
}

SEC("tc")
int from_network(struct __sk_buff *ctx)
{
	return walk(ctx, PLACE_NETWORK);
}

/* On the way out of every interface, lo included: only what the node itself sends. */
SEC("tc")
int from_node(struct __sk_buff *ctx)
{
	if (ctx->ingress_ifindex)
		return TCX_NEXT;
	return walk(ctx, PLACE_NODE);
}
