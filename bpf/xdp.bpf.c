// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Services at the driver of the uplink: a packet for a NodePort, externalIP or load balancer IP whose
 * backend is on another node leaves by the interface it came in, and never becomes an skb; so do the
 * answers. Everything else is passed on untouched, and tcx decides: what has no room for DSR's option,
 * too.
 */
#define PODWIRE_XDP
#include "dsr.h"

char _license[] SEC("license") = "Dual BSD/GPL";

struct xdp_work {
	struct packet packet;
	struct flow to;
	struct flow service; /* as in struct work of tcx.bpf.c */
	union dsr_head head;
	bool tell;
	struct creation creation;
	struct choice choice;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct xdp_work);
} xdp_scratch SEC(".maps");

/* Senders on this machine may leave the checksum to whoever comes last, and the sum of the addresses in its
 * place, which XDP is not told. One in 65,536 others looks like that; tcx, which knows, takes it as well. */
static __always_inline bool seems_partial(struct xdp_md *ctx, const struct packet *p)
{
	__u16 sum;

	if (!p->checksum || load_bytes(ctx, p->checksum, &sum, sizeof(sum)))
		return false;
	return sum == fold(bpf_csum_diff(NULL, 0, (__be32 *)p->flow.source.words, 32,
					 bpf_htonl(p->length + p->flow.protocol)));
}

/* A promiscuous link brings packets of others, too; the way out by the same link says who we are. */
static __always_inline bool is_for_us(struct xdp_md *ctx, const struct bpf_fib_lookup *route)
{
	const struct mac *own = (const struct mac *)route->smac;
	struct ethernet *ethernet = (void *)(long)ctx->data;

	return (void *)(ethernet + 1) <= (void *)(long)ctx->data_end &&
	       ethernet->destination.words[0] == own->words[0] &&
	       ethernet->destination.words[1] == own->words[1] &&
	       ethernet->destination.words[2] == own->words[2];
}

/* Whether the packet leaves by this link as `w->to`, the option included that it may get. */
static __always_inline bool leaves_here(struct xdp_md *ctx, const struct xdp_work *w,
					struct bpf_fib_lookup *route)
{
	set_route(route, &w->to, ctx->ingress_ifindex);
	if (w->tell)
		route->tot_len = led_length(&w->packet);
	if (w->tell && !route->tot_len)
		return false;
	return bpf_fib_lookup(ctx, route, sizeof(*route), 0) == BPF_FIB_LKUP_RET_SUCCESS &&
	       route->ifindex == ctx->ingress_ifindex && is_for_us(ctx, route);
}

static __always_inline int bounce(struct xdp_md *ctx, struct xdp_work *w,
				  const struct bpf_fib_lookup *route)
{
	struct packet *p = &w->packet;

	w->service = p->flow;
	if (rewrite(ctx, p, &w->to) ||
	    (w->tell && push_option(ctx, p, &w->head, &w->service)) || decrement_ttl(ctx, p) ||
	    set_macs(ctx, (struct mac *)route->dmac, (struct mac *)route->smac)) {
		report(REASON_WRITE_FAILED, ctx->ingress_ifindex, &p->flow);
		return XDP_DROP;
	}
	count(REASON_FORWARDED);
	return XDP_TX;
}

/* The first packet of a connection: only what is masqueraded and goes on to another node. */
__noinline int xdp_begin(struct xdp_md *ctx, struct xdp_work *w)
{
	struct frontend *frontend = NULL;
	struct bpf_fib_lookup route;
	struct packet *p;
	__u32 reason;
	int error;

	if (!w)
		return XDP_PASS;
	p = &w->packet;
	if (find_service(&p->flow, &frontend, &reason) != VERDICT_TRANSLATE || !frontend ||
	    choose(&p->flow, frontend, origin_of(&p->flow.source, false), &p->flow.source, &w->choice) !=
		    VERDICT_TRANSLATE ||
	    !w->choice.masquerade)
		return XDP_PASS;
	w->to = p->flow;
	w->to.destination = w->choice.backend.address;
	w->to.destination_port = w->choice.backend.port;
	w->tell = may_lead(&p->flow, &w->choice);
	if (has_tunnel_port(&w->to) || !leaves_here(ctx, w, &route))
		return XDP_PASS;
	if (w->tell) {
		error = create_leading(&w->creation, p, &w->to, w->choice.service);
		if (error == -ERROR_EXIST)
			return XDP_PASS; /* it has to be masqueraded */
		reason = error ? REASON_CONNECTIONS_FULL : 0;
	} else {
		if (!masquerade(ctx, &w->to, ctx->ingress_ifindex))
			return XDP_PASS;
		reason = create_connection(&w->creation, p, &w->to, w->choice.service,
					   CONNECTION_TRANSLATED, true);
	}
	if (reason) {
		report(reason, ctx->ingress_ifindex, &p->flow);
		return XDP_DROP;
	}
	count(REASON_TRANSLATED);
	hit(&p->flow, frontend);
	hit_backend(&w->choice, p->flow.protocol);
	return bounce(ctx, w, &route);
}

SEC("xdp")
int from_driver(struct xdp_md *ctx)
{
	__u32 key = 0;
	struct xdp_work *w = bpf_map_lookup_elem(&xdp_scratch, &key);
	const struct settings *current = current_settings();
	struct connection *connection;
	struct bpf_fib_lookup route;
	struct packet *p;

	if (!w || !current || current->phase != PHASE_SERVING)
		return XDP_PASS;
	p = &w->packet;
	parse(ctx, p);
	if (p->kind != PACKET_FLOW || p->fragment != FRAGMENT_NONE || p->ttl <= 1 ||
	    is_multicast(&p->flow.destination) || is_loopback(&p->flow.destination) ||
	    seems_partial(ctx, p))
		return XDP_PASS; /* for what follows to judge */
	connection = find_connection(&p->flow);
	if (!connection)
		return xdp_begin(ctx, w);
	if (!(connection->flags & CONNECTION_TRANSLATED) || is_reopened(connection, p))
		return XDP_PASS;
	w->to = connection->to;
	w->tell = is_led_away(connection) && is_start(p);
	if (!leaves_here(ctx, w, &route))
		return XDP_PASS;
	touch(connection, p);
	return bounce(ctx, w, &route);
}
