// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Every packet of the node, at tcx: from and to pods, from and to the network.
 *
 * Ingress sees what comes out of a pod or in from the network; everything is decided there once, for
 * both ends, and kept in the connection table. Egress sees only what the node's own stack sends. The
 * kernel's conntrack is not used.
 */
#include "dsr.h"
#include "forward.h"
#include "fragment.h"
#include "icmp.h"
#include "masquerade.h"
#include "policy.h"
#include "reject.h"
#include "service.h"
#include "spoof.h"
#include "takeover.h"

char _license[] SEC("license") = "Dual BSD/GPL";

enum place { PLACE_POD, PLACE_NETWORK, PLACE_NODE };

/* More than the 512 bytes of stack that a program has. Ingress and egress never interrupt each other
 * on one CPU: both run with softirqs held off. */
struct work {
	struct packet packet;
	struct packet inner;
	struct flow to;
	struct flow service; /* with DSR, the connection as the client sees it */
	union dsr_head head;
	bool tell; /* the backend's node, of the Service */
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

static __always_inline enum origin find_origin(struct __sk_buff *ctx, const struct address *source,
					       enum place place)
{
	struct interface *interface = find_interface(ctx->ifindex);

	return origin_of(source, place != PLACE_NODE && interface && interface->flags & INTERFACE_POD);
}

/* Send the packet on: to a pod of this node, by our own look-up, or up the stack.
 *
 * The stack would take an answer that bears a Service's address, and a packet that bears one of the
 * node's own, for spoofed: what got a new source goes by our own look-up in any case. */
static __always_inline int send(struct __sk_buff *ctx, const struct packet *p, enum place place,
				bool new_source, bool new_destination)
{
	struct endpoint *endpoint;

	if (place == PLACE_NODE)
		return new_destination ? by_route(ctx, p, LOOPBACK, true) : TCX_NEXT;
	endpoint = find_endpoint(&p->flow.destination);
	if (endpoint)
		return to_pod(ctx, p, endpoint, new_source);
	if (new_source || (with_pods && place == PLACE_POD))
		return by_route(ctx, p, ctx->ifindex, new_source);
	return TCX_NEXT;
}

/* Make the packet look as `w->to` and send it on. */
__noinline int translate(struct __sk_buff *ctx, struct work *w, int place)
{
	bool source, destination;
	struct packet *p;

	if (!w)
		return TCX_DROP;
	p = &w->packet;
	source = !same_address(&p->flow.source, &w->to.source);
	destination = !same_address(&p->flow.destination, &w->to.destination);
	if (rewrite(ctx, p, &w->to))
		return drop(ctx, REASON_WRITE_FAILED, &p->flow);
	return send(ctx, p, place, source, destination);
}

/* Both ends' policies about the first packet, `w->to` being where it goes. The node itself may always
 * reach its pods. `tracked`: a pod of this node is concerned, so that the answers need an entry. */
static __always_inline bool is_permitted(struct __sk_buff *ctx, struct work *w, enum place place,
					 bool *tracked)
{
	__u32 slot = policy_slot();
	struct subject *from = place == PLACE_NODE ? NULL : find_subject(&slot, &w->to.source);
	struct subject *to = find_subject(&slot, &w->to.destination);
	__u32 concerned = from ? 1 : 0;

	asm volatile("" : "+r"(concerned)); /* or the compiler ors two pointers, which no verifier takes */
	if (to)
		concerned = 1;
	*tracked = concerned;
	if (from && from->egress &&
	    !is_allowed(ctx->ifindex, &slot, from->egress, find_identity(&slot, &w->to.destination), &w->to,
			true))
		return false;
	if (to && to->ingress && place != PLACE_NODE &&
	    !is_allowed(ctx->ifindex, &slot, to->ingress, find_sender(ctx, &w->to.source, slot), &w->to,
			false))
		return false;
	return true;
}

/* The same about a packet of a connection. Until there is an answer, policies judge each as the first,
 * for what they say may have changed (nf_conntrack calls such packets NEW). */
__noinline int is_still_permitted(struct __sk_buff *ctx, struct work *w, int place)
{
	struct connection *connection;
	bool tracked;

	if (!w)
		return false;
	connection = find_connection(&w->packet.flow);
	if (!connection)
		return true;
	if (opposite_state(&w->packet.flow, connection) & STATE_SEEN) {
		connection->flags |= CONNECTION_ANSWERED;
		return true;
	}
	w->to = connection->to;
	w->to.source = w->packet.flow.source; /* policies come before masquerading */
	return is_permitted(ctx, w, place, &tracked);
}

/* Whether answers to this packet, which needs no entry of its own, would be taken for those of another
 * connection: one from the same port to a Service that led to the same backend. */
static __always_inline bool is_shadowed(struct work *w)
{
	struct packet *p = &w->packet;

	if (!is_start(p))
		return false;
	reverse(&w->creation.key, &p->flow);
	return find_connection(&w->creation.key);
}

/* Neighbour discovery is for those on the link and for nobody behind it: what a pod sends further is
 * judged as any other packet. */
static __always_inline bool is_neighbour_discovery(struct __sk_buff *ctx, const struct packet *p,
						   enum place place)
{
	struct bpf_fib_lookup route;

	if (p->ipv4 || p->icmp_type < ICMPV6_ROUTER_SOLICITATION || p->icmp_type > ICMPV6_REDIRECT)
		return false;
	return place != PLACE_POD || is_link_local(&p->flow.destination) ||
	       find_route(ctx, &route, &p->flow, ctx->ifindex, FIB_LOOKUP_SKIP_NEIGH) ==
		       BPF_FIB_LKUP_RET_NOT_FWDED;
}

/* Tell the client that its packet is refused; never about a reset or a later fragment (RFC 1122). */
__noinline int reject(struct __sk_buff *ctx, struct work *w, int place)
{
	if (!w)
		return TCX_DROP;
	if (w->packet.tcp_flags & TCP_RST || w->packet.fragment == FRAGMENT_LATER)
		return drop(ctx, REASON_REJECTED, &w->packet.flow);
	return refuse(ctx, &w->packet, &w->refusal, place == PLACE_NODE);
}

/* An ICMP error: what it says of a translated packet is translated back. One that quotes a packet of no
 * connection is judged as any other packet, here or by netfilter: it could carry anything. */
__noinline int pass_error(struct __sk_buff *ctx, struct work *w, int place, __u32 phase)
{
	bool tracked;
	int error = 0;

	if (!w)
		return TCX_DROP;
	switch (translate_error(ctx, &w->packet, &w->inner, &w->to, &error)) {
	case QUOTED_UNKNOWN:
		if (phase == PHASE_JOINING || phase == PHASE_LEAVING)
			return TCX_NEXT;
		w->to = w->packet.flow;
		return with_policy && !is_permitted(ctx, w, place, &tracked) ? TCX_DROP : TCX_NEXT;
	case QUOTED_UNCHANGED:
		return TCX_NEXT;
	case QUOTED_TRANSLATED:
		break;
	}
	if (error)
		return drop(ctx, REASON_WRITE_FAILED, &w->packet.flow);
	return send(ctx, &w->packet, place, true, true);
}

/* Whether both ends are pods of this node, and the rest of the connection goes by `find_plain_neighbour`
 * unless that is told. */
static __always_inline bool is_local(const struct flow *to, enum place place)
{
	return place == PLACE_POD && to->protocol == IPPROTO_TCP && find_endpoint(&to->destination);
}

/* Send a client's packet on to the node of its backend. */
__noinline int lead(struct __sk_buff *ctx, struct work *w)
{
	struct packet *p;

	if (!w)
		return TCX_DROP;
	p = &w->packet;
	w->service = p->flow;
	if (rewrite(ctx, p, &w->to) || (w->tell && push_option(ctx, p, &w->head, &w->service)))
		return drop(ctx, REASON_WRITE_FAILED, &p->flow);
	return by_route(ctx, p, ctx->ifindex, false);
}

#define LEAD (-2) /* instead of a verdict: `lead` is to follow */
#define MASQUERADE (-3)

/* The first packet of a connection whose backend is to answer the client itself: LEAD. MASQUERADE: there
 * is no room for the option, or the client uses this port for another connection to the same backend. */
__noinline int begin_led(struct __sk_buff *ctx, struct work *w)
{
	struct packet *p;
	int error;

	if (!w)
		return TCX_DROP;
	p = &w->packet;
	w->tell = has_room(ctx, p, &w->to);
	if (!w->tell && is_start(p))
		return MASQUERADE;
	error = create_leading(&w->creation, p, &w->to, w->choice.service);
	if (error)
		return error == -ERROR_EXIST ? MASQUERADE : drop(ctx, REASON_CONNECTIONS_FULL, &p->flow);
	count(REASON_TRANSLATED);
	return LEAD;
}

/* A packet with extensions: another node may have led it here by DSR. Then the option comes off, and
 * the packet goes on as any of its connection. Not 0: it ends here. */
__noinline int take(struct __sk_buff *ctx, struct work *w)
{
	bool tracked, taken;
	enum reason reason;
	struct packet *p;
	__u32 service;

	if (!w)
		return TCX_DROP;
	p = &w->packet;
	if (p->kind != PACKET_FLOW || !read_option(ctx, p, &w->service))
		return 0;
	if (!is_believed(p, &w->service, &service))
		return drop(ctx, REASON_LED_ASTRAY, &p->flow);
	if (pop_option(ctx, p))
		return drop(ctx, REASON_WRITE_FAILED, &p->flow);
	if (is_remembered(&w->to, p, &w->service, &taken))
		return 0;
	if (taken)
		return drop(ctx, REASON_PORTS_EXHAUSTED, &p->flow);
	w->to = p->flow;
	if (with_policy && !is_permitted(ctx, w, PLACE_NETWORK, &tracked))
		return TCX_DROP;
	reason = create_led(&w->creation, p, &w->service, service);
	return reason ? drop(ctx, reason, &p->flow) : 0;
}

/* The first packet of a connection, or one that needs no entry. */
__noinline int begin(struct __sk_buff *ctx, struct work *w, int place)
{
	enum verdict verdict = VERDICT_NONE;
	struct frontend *frontend = NULL;
	bool tracked = false, ports = false;
	enum reason reason;
	struct packet *p;
	__u32 why;

	if (!w)
		return TCX_DROP;
	p = &w->packet;
	if (place != PLACE_NODE && (is_loopback(&p->flow.source) || is_multicast(&p->flow.source)))
		return drop(ctx, REASON_SPOOFED, &p->flow);
	w->to = p->flow;
	w->choice.masquerade = w->choice.dsr = false;
	w->choice.service = 0;
	if (with_services && !find_endpoint(&p->flow.destination)) {
		verdict = find_service(&p->flow, &frontend, &why);
		if (verdict == VERDICT_TRANSLATE && frontend) {
			hit(&p->flow, frontend);
			verdict = choose(&p->flow, frontend, find_origin(ctx, &p->flow.source, place),
					 &p->flow.source, &w->choice);
			why = w->choice.reason;
		}
		if (verdict == VERDICT_REJECT)
			return reject(ctx, w, place);
		if (verdict == VERDICT_DROP)
			return drop(ctx, why, &p->flow);
		if (verdict == VERDICT_TRANSLATE) {
			hit_backend(&w->choice, p->flow.protocol);
			w->to.destination = w->choice.backend.address;
			w->to.destination_port = w->choice.backend.port;
		}
	}
	if (place != PLACE_NODE && is_for_tunnel(&w->to))
		return drop(ctx, REASON_SPOOFED, &p->flow);
	if (with_policy && !is_permitted(ctx, w, place, &tracked))
		return TCX_DROP;
	if (place == PLACE_NETWORK && may_lead(&p->flow, &w->choice)) {
		int led = begin_led(ctx, w);

		if (led != MASQUERADE)
			return led;
	}
	/* the answers to who comes from outside, or from an address that the node has just got, must not be
	 * taken for traffic that leaves */
	if (place != PLACE_POD && leaves_cluster(&w->to.destination, &w->to.source))
		tracked = true;
	if (place == PLACE_POD && leaves_cluster(&w->to.source, &w->to.destination))
		w->choice.masquerade = true;
	if (w->choice.masquerade && masquerade(ctx, &w->to, place == PLACE_NODE ? LOOPBACK : ctx->ifindex))
		ports = !same_address(&w->to.source, &p->flow.source);
	if (!ports && !tracked && verdict == VERDICT_NONE && !is_shadowed(w))
		return send(ctx, p, place, false, false);

	reason = create_connection(&w->creation, p, &w->to, w->choice.service,
				   (ports || verdict == VERDICT_TRANSLATE ? CONNECTION_TRANSLATED : 0) |
				   (is_local(&w->to, place) ? CONNECTION_LOCAL : 0),
				   ports);
	if (reason)
		return drop(ctx, reason, &p->flow);
	if (!ports && verdict == VERDICT_NONE && w->to.source_port == p->flow.source_port)
		return send(ctx, p, place, false, false);
	count(REASON_TRANSLATED);
	return translate(ctx, w, place);
}

/* The pod of this node that the packet is for, when there is nothing to decide or to remember: the
 * common case, TCP between pods that no policy concerns. A policy that comes later finds what is open
 * then among the sockets (adopt.bpf.c), which know nothing of other protocols. */
static __always_inline struct endpoint *find_plain_neighbour(const struct packet *p,
							     const struct interface *pod)
{
	struct endpoint *neighbour;

	if (p->flow.protocol != IPPROTO_TCP || (with_policy && !(pod->flags & INTERFACE_PLAIN)))
		return NULL;
	neighbour = find_endpoint(&p->flow.destination);
	if (neighbour && with_policy && !(neighbour->flags & ENDPOINT_PLAIN))
		return NULL;
	return neighbour;
}

static __always_inline int walk(struct __sk_buff *ctx, enum place place)
{
	__u32 key = 0;
	struct work *w = bpf_map_lookup_elem(&scratch, &key);
	const struct settings *current = current_settings();
	struct interface *pod = place == PLACE_POD ? find_interface(ctx->ifindex) : NULL;
	struct connection *connection;
	struct endpoint *neighbour;
	bool reopened = false;
	struct packet *p;
	__u32 phase;

	if (!w || !current || (phase = current->phase) == PHASE_WAITING)
		return TCX_NEXT;
	p = &w->packet;
	parse(ctx, p);
	if (p->kind == PACKET_BROKEN || p->kind == PACKET_CUT)
		return drop(ctx, REASON_BROKEN, &p->flow);
	if (place == PLACE_POD && (with_pods || with_policy) && !is_honest(ctx, p, pod))
		return drop(ctx, REASON_SPOOFED, &p->flow);
	if (p->kind == PACKET_FOREIGN || is_multicast(&p->flow.destination))
		return TCX_NEXT;
	/* nobody but the node itself reaches what is served on 127.0.0.1 and ::1 (CVE-2020-8558) */
	if (place != PLACE_NODE && is_loopback(&p->flow.destination))
		return drop(ctx, REASON_SPOOFED, &p->flow);
	if (is_neighbour_discovery(ctx, p, place))
		return TCX_NEXT;
	if (p->fragment != FRAGMENT_NONE && p->kind == PACKET_FLOW && !complete_fragment(p))
		return address_flags(&p->flow.destination) & ~ADDRESS_NODE || with_policy ?
			       drop(ctx, REASON_FRAGMENT_LOST, &p->flow) : TCX_NEXT;

	if (place == PLACE_NETWORK && is_for_tunnel(&p->flow))
		return TCX_NEXT; /* what is inside is looked at when it is out */
	if (p->kind == PACKET_ICMP_ERROR)
		return pass_error(ctx, w, place, phase);
	if (place == PLACE_NETWORK && p->transport != p->network + plain_head(p)) {
		int taken = take(ctx, w);

		if (taken)
			return taken;
	}
	neighbour = pod ? find_plain_neighbour(p, pod) : NULL;
	if (neighbour && phase == PHASE_SERVING && !has_local_entries())
		return to_pod(ctx, p, neighbour, false);
	connection = find_connection(&p->flow);
	if (phase == PHASE_JOINING && (!connection || connection->flags & CONNECTION_COPIED)) {
		enum kernel_view view = ask_kernel(ctx, p);

		if (view == KERNEL_CARRIES) {
			if (connection)
				touch(connection, p);
			return TCX_NEXT;
		}
		reopened = view == KERNEL_IS_DONE;
	}
	if (connection && (reopened || is_reopened(connection, p))) {
		pair_of(&w->to, &p->flow, connection);
		forget_connection(&w->to);
		forget_connection(&p->flow);
		connection = NULL;
	}
	if (!connection) {
		enum handling handling = handle_unknown(p, phase);
		int verdict;

		if (handling != HANDLE)
			return handling == HOLD_BACK ? TCX_DROP : TCX_NEXT;
		if (neighbour && !is_shadowed(w))
			return to_pod(ctx, p, neighbour, false);
		verdict = begin(ctx, w, place);
		return place == PLACE_NETWORK && verdict == LEAD ? lead(ctx, w) : verdict;
	}
	touch(connection, p);
	if (connection->flags & CONNECTION_STACK)
		return TCX_NEXT;
	if (with_policy && may_be_unanswered(connection, p) && !is_still_permitted(ctx, w, place))
		return TCX_DROP;
	if (!(connection->flags & CONNECTION_TRANSLATED))
		return send(ctx, p, place, false, false);
	w->to = connection->to;
	if (place == PLACE_NETWORK && is_led_away(connection)) {
		w->tell = is_start(p) && has_room(ctx, p, &w->to);
		return lead(ctx, w);
	}
	return translate(ctx, w, place);
}

SEC("tc")
int from_pod(struct __sk_buff *ctx)
{
	return walk(ctx, PLACE_POD);
}

#define IFF_BRIDGE_PORT (1 << 9)

static __always_inline struct net_device *device_of(struct __sk_buff *ctx)
{
	struct sk_buff *skb = bpf_cast_to_kern_ctx(ctx);

	return skb->dev;
}

static __always_inline bool is_bridge_port(struct __sk_buff *ctx)
{
	struct net_device *device = device_of(ctx);

	return device && BPF_CORE_READ_BITFIELD(device, priv_flags) & IFF_BRIDGE_PORT;
}

/* Tunnels and the like carry bare IP packets. Other links with headers of their own are not understood. */
static __always_inline bool is_bare(struct __sk_buff *ctx)
{
	struct net_device *device = device_of(ctx);

	switch (device ? device->type : 0) {
	case 0xfffe: /* ARPHRD_NONE: tun, WireGuard */
	case 768: /* ARPHRD_TUNNEL, as below */
	case 769: /* TUNNEL6 */
	case 776: /* SIT */
	case 778: /* IPGRE */
	case 823: /* IP6GRE */
	case 512: /* PPP */
	case 519: /* RAWIP */
		return true;
	}
	return false;
}

/* Such packets get an Ethernet header, so that all is where it always is; the kernel takes it off again
 * where it sends on a packet that we redirect. */
static __always_inline long wrap(struct __sk_buff *ctx)
{
	__u16 protocol = ctx->protocol;

	return bpf_skb_change_head(ctx, ETH_HLEN, 0) || store_bytes(ctx, 12, &protocol, 2);
}

/* What the link carries for others (a capture makes it promiscuous), and what belongs to a VLAN of the
 * interface, whose own device sees it next, is not for us. A bridge has an address of its own, and its
 * packets are seen at its ports only. */
SEC("tc")
int from_network(struct __sk_buff *ctx)
{
	if ((ctx->pkt_type != PACKET_HOST && !is_bridge_port(ctx)) ||
	    (ctx->vlan_present && ctx->vlan_tci & VLAN_ID))
		return TCX_NEXT;
	if (is_bare(ctx) && wrap(ctx))
		return TCX_DROP;
	return walk(ctx, PLACE_NETWORK);
}

#define WALKED 0x7077

/* On the way out of every interface, lo included: only what the node itself sends, and only once,
 * though a packet that is redirected from here leaves by a second interface. */
SEC("tc")
int from_node(struct __sk_buff *ctx)
{
	int verdict;

	if (ctx->ingress_ifindex || ctx->tc_index == WALKED || ctx->tc_index == TUNNELLED)
		return TCX_NEXT;
	ctx->tc_index = WALKED;
	if (!is_bare(ctx))
		return walk(ctx, PLACE_NODE);
	if (wrap(ctx))
		return TCX_DROP;
	verdict = walk(ctx, PLACE_NODE);
	return verdict == TCX_NEXT ? bpf_redirect(ctx->ifindex, 0) : verdict;
}

/* Ahead of from_network on the device between nodes. */
SEC("tc")
int from_overlay(struct __sk_buff *ctx)
{
	struct flow flow;

	ctx->tc_index = 0;
	if (ctx->ifindex != overlay_device())
		return TCX_NEXT; /* nobody has said yet who is behind it */
	read_ends(ctx, &flow);
	return is_from_its_node(ctx, &flow) ? TCX_NEXT : drop(ctx, REASON_SPOOFED, &flow);
}

/* Behind from_node on that device: what has no key from our own look-up gets it here. */
SEC("tc")
int to_overlay(struct __sk_buff *ctx)
{
	struct tunnel *tunnel;
	struct flow flow;

	if (ctx->tc_index == TUNNELLED || !read_ends(ctx, &flow))
		return TCX_NEXT;
	tunnel = find_tunnel(&flow.destination);
	if (tunnel && set_key(ctx, tunnel, &flow.source))
		return drop(ctx, REASON_WRITE_FAILED, &flow);
	return TCX_NEXT; /* not known here: by the route's key, or nowhere */
}
