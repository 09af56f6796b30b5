/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connections: two entries each, one per direction, keyed by what the packets of that direction look
 * like when they arrive here, valued by what they become.
 *
 * The table grows by a second map: new entries go to slot 0, while those of the smaller table, in
 * slot 1, are moved by user space. Expiry is decided by collect.bpf.c.
 */
#pragma once

#include "events.h"
#include "packet.h"

enum connection_flag {
	CONNECTION_TRANSLATED = 1,
	CONNECTION_REPLY = 2, /* the direction of the answers */
	CONNECTION_STACK = 4, /* netfilter translates it: its packets go up the stack as they are */
	CONNECTION_LOCAL = 8, /* TCP between two pods of this node */
	CONNECTION_DSR = 16, /* led to another node, which answers the client itself */
	CONNECTION_LED = 32, /* led here by another node: its two keys mirror each other */
	CONNECTION_COPIED = 64, /* from the kernel's table, which may know better while PHASE_JOINING */
	CONNECTION_ANSWERED = 128, /* its client's packets are not judged any more */
};

enum connection_state { /* what this direction has sent */
	STATE_SEEN = 1,
	STATE_DATA = 2, /* anything beyond the handshake's first packet; without one: beyond one second */
	STATE_FIN = 4, /* SCTP: SHUTDOWN or its ACK */
	STATE_RST = 8, /* SCTP: ABORT, SHUTDOWN COMPLETE */
	STATE_AGAIN = 16, /* last of all what opens a connection, though this one was open */
};

struct connection {
	struct flow to;
	__u32 seen_s;
	__u32 service; /* the Service port that chose the backend, or 0 */
	__u8 state;
	__u8 flags;
	__u8 pad[6];
};

/* Whether any entry is both LOCAL and TRANSLATED. While none is, TCP between pods that no policy concerns
 * need not look for its own: in a table that is large and cold, this is most of a packet's cost.
 * Creating such an entry sets it; collect.bpf.c clears it when it finds none, unless one was created
 * while it counted. */
enum local_entries { LOCAL_NONE, LOCAL_SOME, LOCAL_COUNTED };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} local_entries SEC(".maps");

#define SLOT_CURRENT 0
#define SLOT_RETIRING 1

GROWING_MAP(connections, 2, BPF_MAP_TYPE_HASH, struct flow, struct connection, BPF_F_NO_PREALLOC);

/* Ports that masquerading hands out: outside of the node's own range of outgoing ports and of what is
 * usual for NodePorts. */
const volatile __u16 first_port = 10000;
const volatile __u16 port_count = 20000;

#define PORT_TRIES 32

static __always_inline struct connection *find_retiring(const struct flow *flow)
{
	__u32 slot = SLOT_RETIRING;
	void *map = bpf_map_lookup_elem(&connections, &slot);

	return map ? bpf_map_lookup_elem(map, flow) : NULL;
}

static __always_inline struct connection *find_connection(const struct flow *flow)
{
	__u32 slot = SLOT_CURRENT;
	struct connection *found = NULL;
	void *map = bpf_map_lookup_elem(&connections, &slot);

	if (map)
		found = bpf_map_lookup_elem(map, flow);
	return found ? found : find_retiring(flow);
}

static __always_inline bool is_local_translation(__u8 flags)
{
	return flags & CONNECTION_LOCAL && flags & CONNECTION_TRANSLATED;
}

static __always_inline __u32 *find_local_entries(void)
{
	__u32 first = 0;

	return bpf_map_lookup_elem(&local_entries, &first);
}

static __always_inline bool has_local_entries(void)
{
	__u32 *state = find_local_entries();

	return !state || *(volatile __u32 *)state != LOCAL_NONE;
}

/* After the entries are written, and before any packet that needs them is sent on. */
static __always_inline void note_local_entries(void)
{
	__u32 *state = find_local_entries();

	if (state && *(volatile __u32 *)state != LOCAL_SOME)
		*(volatile __u32 *)state = LOCAL_SOME;
}

static __always_inline void forget_connection(const struct flow *flow)
{
	for (__u32 slot = SLOT_CURRENT; slot <= SLOT_RETIRING; slot++) {
		__u32 key = slot;
		void *map = bpf_map_lookup_elem(&connections, &key);

		if (map)
			bpf_map_delete_elem(map, flow);
	}
}

static __always_inline __u8 packet_state(const struct packet *p)
{
	__u8 state = STATE_SEEN;

	if (!is_stream(p->flow.protocol))
		return state;
	if (!(p->tcp_flags & TCP_SYN))
		state |= STATE_DATA;
	if (p->tcp_flags & TCP_FIN)
		state |= STATE_FIN;
	if (p->tcp_flags & TCP_RST)
		state |= STATE_RST;
	return state;
}

/* Note a packet. Writes only what changed: the entry is shared between CPUs. Who goes on after a reset
 * has not sent it: it was forged, and the other end did not believe it either (RFC 5961). */
static __always_inline void touch(struct connection *connection, const struct packet *p)
{
	__u8 state = (connection->state & ~(STATE_RST | STATE_AGAIN)) | packet_state(p);
	__u32 now = now_seconds();

	if (is_opening(p) && state & STATE_DATA)
		state |= STATE_AGAIN;

	if (!is_stream(p->flow.protocol) && connection->seen_s != now)
		state |= STATE_DATA;
	if (connection->state != state)
		connection->state = state;
	if (connection->seen_s != now)
		connection->seen_s = now;
}

static __always_inline bool is_closed(const struct connection *connection)
{
	return connection->state & (STATE_FIN | STATE_RST);
}

/* The key of the other direction's entry. */
static __always_inline void pair_of(struct flow *pair, const struct flow *key,
				    const struct connection *connection)
{
	reverse(pair, connection->flags & CONNECTION_LED ? key : &connection->to);
}

/* What the other direction has sent. */
static __always_inline __u8 opposite_state(const struct flow *key, const struct connection *connection)
{
	struct connection *pair;
	struct flow other;

	pair_of(&other, key, connection);
	pair = find_connection(&other);
	return pair ? pair->state : STATE_RST; /* half a connection is none */
}

/* A SYN on a connection that either end has closed: the client uses its port again, for a new one. Or he
 * repeats one on a connection that seemed open: its backend is silent, and may have left the Service. */
static __always_inline bool is_reopened(const struct connection *connection, const struct packet *p)
{
	if (!is_opening(p))
		return false;
	return is_closed(connection) || opposite_state(&p->flow, connection) & (STATE_FIN | STATE_RST) ||
	       (connection->state & STATE_AGAIN && connection->seen_s != now_seconds());
}

/* Whether neither end sends any more; one that has only closed its own direction may still. */
static __always_inline bool is_over(const struct flow *key, const struct connection *connection)
{
	__u8 other = opposite_state(key, connection);

	return (connection->state | other) & STATE_RST || connection->state & other & STATE_FIN;
}

/* Whether this may be a client's packet to which no answer has been seen. Of TCP only what opens a
 * connection: all else comes of an answer. */
static __always_inline bool may_be_unanswered(const struct connection *connection,
					      const struct packet *p)
{
	return !(connection->flags & (CONNECTION_REPLY | CONNECTION_ANSWERED)) &&
	       (!is_stream(p->flow.protocol) || is_opening(p));
}

/* Record a connection that is not translated, `flow` being the answers' direction if `reply`. Entries that
 * packets have made know more: they stay. */
static __always_inline void note_plain(void *map, const struct flow *flow, __u8 state, bool reply)
{
	struct connection value = { .to = *flow, .seen_s = now_seconds(), .state = state };

	value.flags = reply ? CONNECTION_REPLY : 0;
	bpf_map_update_elem(map, &value.to, &value, BPF_NOEXIST);
	reverse(&value.to, flow);
	value.flags = reply ? 0 : CONNECTION_REPLY;
	bpf_map_update_elem(map, &value.to, &value, BPF_NOEXIST);
}

struct creation {
	struct flow key; /* of the direction being written */
	struct connection value;
};

/* Write the entry of the answers. -ERROR_EXIST: another connection has this key. `take`: one that is
 * over gives way, though the backend may remember it for a while (TIME_WAIT). */
__noinline int claim_answers(struct creation *c, const struct flow *original, const struct flow *to,
			     bool take)
{
	void *map = current_map(&connections);
	struct connection *other;
	struct flow old;
	int error;

	if (!c || !original || !to || !map)
		return -ERROR_INVALID;
	reverse(&c->key, to);
	reverse(&c->value.to, original);
	c->value.flags |= CONNECTION_REPLY;
	c->value.state = 0;
	other = find_retiring(&c->key);
	if (other && !is_closed(other))
		return -ERROR_EXIST;
	error = bpf_map_update_elem(map, &c->key, &c->value, BPF_NOEXIST);
	if (error != -ERROR_EXIST)
		return error;
	other = bpf_map_lookup_elem(map, &c->key);
	if (!other)
		return -ERROR_EXIST;
	if (__builtin_memcmp(&other->to, &c->value.to, sizeof(other->to))) {
		if (!take || !is_over(&c->key, other))
			return -ERROR_EXIST;
		pair_of(&old, &c->key, other);
		bpf_map_delete_elem(map, &old);
	}
	return bpf_map_update_elem(map, &c->key, &c->value, BPF_ANY);
}

static __always_inline void begin_creation(struct creation *c, __u32 service, __u8 flags)
{
	__builtin_memset(c, 0, sizeof(*c));
	c->value.seen_s = now_seconds();
	c->value.service = service;
	c->value.flags = flags;
}

/* Write the other entry, once that of the answers is there. 0, or the reason why it cannot be. */
static __always_inline enum reason create_original(struct creation *c, const struct packet *p,
						   const struct flow *to)
{
	void *map = current_map(&connections);

	c->value.to = *to;
	c->value.flags &= ~CONNECTION_REPLY;
	c->value.state = packet_state(p);
	if (!map || bpf_map_update_elem(map, &p->flow, &c->value, BPF_ANY)) {
		forget_connection(&c->key);
		return REASON_CONNECTIONS_FULL;
	}
	if (is_local_translation(c->value.flags))
		note_local_entries();
	return 0;
}

/* Record that packets like `p` become `to` and answers the reverse. When `ports`, or when another
 * connection is in the way, `to` gets a source port of ours; what has none must do without. 0, or the
 * reason why it cannot be. */
static __always_inline enum reason create_connection(struct creation *c, const struct packet *p,
						     struct flow *to, __u32 service, __u8 flags,
						     bool ports)
{
	__u32 start = bpf_get_prandom_u32();
	int error = -ERROR_EXIST;
	__u32 tries = 0;

	begin_creation(c, service, flags);
	if (!ports || p->kind != PACKET_FLOW)
		error = claim_answers(c, &p->flow, to, false);
	while (error == -ERROR_EXIST && tries < PORT_TRIES && p->kind == PACKET_FLOW) {
		to->source_port = bpf_htons(first_port + (start + tries * 7) % port_count);
		if (to->protocol == IPPROTO_ICMP || to->protocol == IPPROTO_ICMPV6)
			to->destination_port = to->source_port;
		c->value.flags |= CONNECTION_TRANSLATED;
		error = claim_answers(c, &p->flow, to, tries >= PORT_TRIES / 2);
		tries++;
	}
	if (error)
		return error == -ERROR_EXIST ? REASON_PORTS_EXHAUSTED : REASON_CONNECTIONS_FULL;
	return create_original(c, p, to);
}
