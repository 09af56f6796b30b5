/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services: which frontend a packet addresses, and which backend it gets.
 *
 * A frontend names two runs of slots in one array of backends, the cluster's and this node's, and the
 * Maglev table of one of them. User space writes a new run first and then points the frontend to it in
 * one update, so that no packet sees a half-written list; freed runs are reused only after a grace period.
 */
#pragma once

#include "address.h"
#include "events.h"

enum frontend_flag {
	FRONTEND_EXTERNAL = 1, /* NodePort, externalIP, load balancer IP: policy "external" holds */
	FRONTEND_LOCAL = 2, /* its traffic policy is Local */
	FRONTEND_RANGED = 4, /* loadBalancerSourceRanges hold */
	FRONTEND_MASQUERADE = 8, /* whoever asks */
	FRONTEND_HAS_ENDPOINTS = 16, /* somewhere: an empty list drops; without, it rejects */
	FRONTEND_ANY_ADDRESS = 32, /* its key has no address: a NodePort */
	FRONTEND_DSR = 64, /* backends on other nodes answer clients outside themselves */
};

struct frontend_key {
	struct address address; /* 0.0.0.0 or :: for every address that serves NodePorts */
	__be16 port;
	__u8 protocol;
	__u8 pad[5];
};

struct slots {
	__u32 first;
	__u32 count;
};

struct frontend {
	__u32 service; /* id of the Service port: affinity, ranges and members go by it */
	__u32 flags;
	__u32 affinity_s; /* 0: no session affinity */
	struct slots cluster;
	struct slots local;
	struct slots maglev; /* for the list that clients outside get; `count` entries. None: random */
};

/* Maglev tables are runs of these: where in the list of backends an entry points to. */
#define MAGLEV_ENTRIES 4
struct maglev {
	__u16 offsets[MAGLEV_ENTRIES];
};

struct backend {
	struct address address;
	__be16 port;
	__u16 flags;
	__u32 service; /* whose slot it is: a frontend that names another's is being replaced */
};
#define BACKEND_THIS_NODE 1 /* an address of this node: delivered here, never masqueraded */

enum address_flag {
	ADDRESS_CLUSTER_IP = 1, /* a port that is not defined is refused */
	ADDRESS_NODE = 2, /* an address of this node */
	ADDRESS_NODE_PORT = 4, /* serves NodePorts */
	ADDRESS_SERVICE = 8, /* has frontends of its own */
};

enum prefix_flag {
	PREFIX_LOCAL_PODS = 1, /* sources that count as pods (detect-local by CIDR) */
	PREFIX_SERVICES = 2, /* where ClusterIPs are allocated */
	PREFIX_CLUSTER = 4, /* inside the cluster: not masqueraded */
};

struct prefix_key {
	__u32 length; /* 32 and the prefix's */
	__u32 pad;
	struct address address;
};

struct range_key {
	__u32 length; /* 32 and the prefix's */
	__u32 service;
	struct address address;
};

struct member_key {
	struct address address;
	__u32 service;
	__be16 port;
	__u16 list;
};

enum member_list {
	MEMBER_CLUSTER,
	MEMBER_LOCAL, /* of this node's list */
	MEMBER_HERE, /* on this node, whatever policies and topology say: other nodes may lead to it */
	MEMBER_SERVING, /* of UDP, in none of the others: what was led there may stay */
};

struct affinity_key {
	struct address client;
	__u32 service;
	__u32 pad;
};

struct affinity {
	struct address address;
	__be16 port;
	__u16 pad;
	__u32 seen_s;
	__u32 timeout_s;
	__u32 pad2;
};

GROWING_MAP(frontends, 1, BPF_MAP_TYPE_HASH, struct frontend_key, struct frontend, BPF_F_NO_PREALLOC);
GROWING_MAP(backends, 1, BPF_MAP_TYPE_ARRAY, __u32, struct backend, BPF_F_INNER_MAP);
GROWING_MAP(tables, 1, BPF_MAP_TYPE_ARRAY, __u32, struct maglev, BPF_F_INNER_MAP);
GROWING_MAP(members, 1, BPF_MAP_TYPE_HASH, struct member_key, __u8, BPF_F_NO_PREALLOC);
GROWING_MAP(addresses, 1, BPF_MAP_TYPE_HASH, struct address, __u32, BPF_F_NO_PREALLOC);
GROWING_MAP(ranges, 1, BPF_MAP_TYPE_LPM_TRIE, struct range_key, __u8, BPF_F_NO_PREALLOC);

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct prefix_key);
	__type(value, __u32);
} prefixes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinities SEC(".maps");

struct hit_key {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 pad;
	__u32 service; /* of a backend; 0: of a frontend, whose key this is */
};

/* New connections by frontend, and by backend. Programs make the entries, user space removes them. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct hit_key);
	__type(value, __u64);
} hits SEC(".maps");

enum origin { ORIGIN_POD, ORIGIN_NODE, ORIGIN_OUTSIDE };

enum detect_local { DETECT_NONE, DETECT_CIDR, DETECT_INTERFACE }; /* how pods are told */

enum phase { /* of taking over from another data path, or handing over to one: see takeover.h */
	PHASE_SERVING, /* every packet is ours */
	PHASE_WAITING, /* none is */
	PHASE_JOINING, /* all but those of connections that only netfilter knows */
	PHASE_LEAVING, /* only those of connections that we know */
	PHASE_MOVING, /* all, but entries are still on their way here */
};

struct settings {
	struct address node[2]; /* what masquerading puts as source: IPv4, IPv6; zero: none */
	__u32 detect_local;
	__u32 overlay; /* index of the device between nodes; 0: none, or not ready */
	__u32 phase;
	__u32 policies; /* the slot of the policy maps in force */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

const volatile bool with_services = true;

enum verdict { VERDICT_NONE, VERDICT_TRANSLATE, VERDICT_REJECT, VERDICT_DROP };

struct choice {
	struct backend backend;
	__u32 service;
	__u32 reason; /* of VERDICT_DROP */
	bool masquerade;
	bool dsr; /* unless something forbids it, instead of masquerading */
};

static __always_inline const struct settings *current_settings(void)
{
	__u32 first = 0;

	return bpf_map_lookup_elem(&settings, &first);
}

static __always_inline __u32 address_flags(const struct address *address)
{
	void *map = current_map(&addresses);
	__u32 *flags = map ? bpf_map_lookup_elem(map, address) : NULL;

	return flags ? *flags : 0;
}

static __always_inline __u32 prefix_flags(const struct address *address)
{
	struct prefix_key key = { .length = 160, .address = *address };
	__u32 *flags = bpf_map_lookup_elem(&prefixes, &key);

	return flags ? *flags : 0;
}

/* `pod_link`: it came by an interface that stands for pods. */
static __always_inline enum origin origin_of(const struct address *source, bool pod_link)
{
	const struct settings *current = current_settings();

	if (current && (current->detect_local == DETECT_CIDR ? prefix_flags(source) & PREFIX_LOCAL_PODS :
				current->detect_local == DETECT_INTERFACE && pod_link))
		return ORIGIN_POD;
	return is_loopback(source) || address_flags(source) & ADDRESS_NODE ? ORIGIN_NODE : ORIGIN_OUTSIDE;
}

static __always_inline void set_any(struct address *address)
{
	if (is_ipv4(address))
		address->words[3] = 0;
	else
		__builtin_memset(address, 0, sizeof(*address));
}

static __always_inline struct frontend *find_frontend(const struct flow *flow, __u32 flags)
{
	struct frontend_key key = {
		.address = flow->destination,
		.port = flow->destination_port,
		.protocol = flow->protocol,
	};
	void *map = current_map(&frontends);
	struct frontend *found;

	if (!map)
		return NULL;
	found = bpf_map_lookup_elem(map, &key);
	if (found || !(flags & ADDRESS_NODE_PORT))
		return found;
	set_any(&key.address);
	return bpf_map_lookup_elem(map, &key);
}

/* What the map has no room for is not counted. */
__noinline int count_hit(const struct hit_key *key)
{
	__u64 *connections, one = 1;

	if (!key)
		return 0;
	connections = bpf_map_lookup_elem(&hits, key);
	if (!connections && bpf_map_update_elem(&hits, key, &one, BPF_NOEXIST))
		connections = bpf_map_lookup_elem(&hits, key); /* another CPU was first */
	if (connections)
		*connections += 1;
	return 0;
}

/* Count a new connection. */
static __always_inline void hit(const struct flow *flow, const struct frontend *frontend)
{
	struct hit_key key = {
		.address = flow->destination,
		.port = flow->destination_port,
		.protocol = flow->protocol,
	};

	if (frontend->flags & FRONTEND_ANY_ADDRESS)
		set_any(&key.address);
	count_hit(&key);
}

static __always_inline void hit_backend(const struct choice *choice, __u8 protocol)
{
	struct hit_key key = {
		.address = choice->backend.address,
		.port = choice->backend.port,
		.protocol = protocol,
		.service = choice->service,
	};

	count_hit(&key);
}

static __always_inline bool in_ranges(const struct frontend *frontend, const struct address *source)
{
	struct range_key key = { .length = 160, .service = frontend->service, .address = *source };
	void *map = current_map(&ranges);

	return map && bpf_map_lookup_elem(map, &key);
}

static __always_inline bool is_member(__u32 service, enum member_list list,
				      const struct address *address, __be16 port)
{
	struct member_key key = {
		.service = service, .address = *address, .port = port, .list = list
	};
	void *map = current_map(&members);

	return map && bpf_map_lookup_elem(map, &key);
}

/* Whether UDP to `address` is led to the backend, or may stay there. */
static __always_inline bool still_leads(const struct address *address, __be16 port,
					const struct address *backend, __be16 backend_port)
{
	struct flow flow = {
		.destination = *address, .destination_port = port, .protocol = IPPROTO_UDP
	};
	struct frontend *found = find_frontend(&flow, address_flags(address));

	return found && (is_member(found->service, MEMBER_CLUSTER, backend, backend_port) ||
			 is_member(found->service, MEMBER_LOCAL, backend, backend_port) ||
			 is_member(found->service, MEMBER_SERVING, backend, backend_port));
}

static __always_inline __u64 mix(__u64 value)
{
	value = (value ^ value >> 32) * 0xd6e8feb86659fd93ULL;
	return value ^ value >> 32;
}

/* A number that is the same for the same client on every node, whichever address of the Service it
 * uses: a balancer before the nodes may change that. `with_port`: for each of its connections. */
static __always_inline __u32 client_hash(const struct flow *flow, bool with_port)
{
	__u64 hash = mix(flow->source.halves[0]) ^ flow->source.halves[1];

	hash = mix(hash) ^ (__u64)flow->destination_port << 16 ^ (__u64)flow->protocol << 32;
	return mix(with_port ? hash ^ flow->source_port : hash);
}

/* Which of the `count` backends of a list. For what comes from outside, XDP and tcx must choose the same:
 * what the one passes on, the other decides anew. */
static __always_inline __u32 pick_number(const struct flow *flow, const struct frontend *frontend,
					 enum origin origin, __u32 count)
{
	void *map = current_map(&tables);
	__u32 entry, slot;
	struct maglev *found;

	if (origin != ORIGIN_OUTSIDE)
		return bpf_get_prandom_u32() % count;
	if (!frontend->maglev.count || !map)
		return mix(client_hash(flow, true) ^ now_seconds()) % count;
	entry = client_hash(flow, !frontend->affinity_s) % frontend->maglev.count;
	slot = frontend->maglev.first + entry / MAGLEV_ENTRIES;
	found = bpf_map_lookup_elem(map, &slot);
	return found ? found->offsets[entry % MAGLEV_ENTRIES] % count : 0;
}

static __always_inline bool pick(const struct flow *flow, const struct frontend *frontend,
				 const struct slots *list, enum origin origin, struct backend *out)
{
	void *map = current_map(&backends);
	struct backend *found;
	__u32 slot;

	if (!map || !list->count)
		return false;
	slot = list->first + pick_number(flow, frontend, origin, list->count);
	found = bpf_map_lookup_elem(map, &slot);
	if (!found || found->service != frontend->service)
		return false;
	*out = *found;
	return true;
}

/* The backend that `client` had, when it is young enough and still there. */
static __always_inline bool recall(const struct frontend *frontend, bool local,
				   const struct affinity_key *key, struct backend *out)
{
	struct affinity *last = bpf_map_lookup_elem(&affinities, key);
	__u32 now = now_seconds();

	if (!last || now - last->seen_s > frontend->affinity_s ||
	    !is_member(key->service, local ? MEMBER_LOCAL : MEMBER_CLUSTER, &last->address, last->port))
		return false;
	last->seen_s = now;
	out->address = last->address;
	out->port = last->port;
	out->flags = address_flags(&out->address) & ADDRESS_NODE ? BACKEND_THIS_NODE : 0;
	return true;
}

static __always_inline void remember(const struct affinity_key *key, const struct backend *chosen,
				     __u32 timeout_s)
{
	struct affinity value = {
		.address = chosen->address,
		.port = chosen->port,
		.seen_s = now_seconds(),
		.timeout_s = timeout_s,
	};

	/* a full table still balances; it is counted and shown */
	if (bpf_map_update_elem(&affinities, key, &value, BPF_ANY))
		count(REASON_AFFINITY_FULL);
}

/* Whether policy Local binds this packet: pods and the node itself use the whole cluster's list. */
static __always_inline bool uses_local_list(const struct frontend *frontend, enum origin origin)
{
	if (!(frontend->flags & FRONTEND_LOCAL))
		return false;
	return !(frontend->flags & FRONTEND_EXTERNAL) || origin == ORIGIN_OUTSIDE;
}

static __always_inline bool is_masqueraded(const struct frontend *frontend, enum origin origin)
{
	const struct settings *current = current_settings();

	if (frontend->flags & FRONTEND_MASQUERADE)
		return true;
	if (!(frontend->flags & FRONTEND_EXTERNAL))
		return origin != ORIGIN_POD && current && current->detect_local != DETECT_NONE;
	return !(frontend->flags & FRONTEND_LOCAL) || origin == ORIGIN_NODE;
}

/* Whether the first packet of `flow` addresses a Service; if so, `frontend` is set. */
static __always_inline enum verdict find_service(const struct flow *flow, struct frontend **frontend,
						 __u32 *reason)
{
	__u32 flags = address_flags(&flow->destination);

	*frontend = NULL;
	*reason = REASON_UNALLOCATED;
	if (flags)
		*frontend = find_frontend(flow, flags);
	if (!*frontend) { /* an address of the service range that serves other ports only is no exception */
		if (flags & ADDRESS_CLUSTER_IP)
			return VERDICT_REJECT;
		return prefix_flags(&flow->destination) & PREFIX_SERVICES ? VERDICT_DROP : VERDICT_NONE;
	}
	*reason = REASON_SOURCE_RANGE;
	if ((*frontend)->flags & FRONTEND_RANGED && !in_ranges(*frontend, &flow->source))
		return VERDICT_DROP;
	return VERDICT_TRANSLATE;
}

/* The backend for the first packet of `flow`. `client` stands for the sender in affinity. */
static __always_inline enum verdict choose(const struct flow *flow, const struct frontend *frontend,
					   enum origin origin, const struct address *client,
					   struct choice *out)
{
	bool local = uses_local_list(frontend, origin);
	const struct slots *list = local ? &frontend->local : &frontend->cluster;
	struct affinity_key key = { .service = frontend->service, .client = *client };

	out->service = frontend->service;
	if (!list->count) {
		out->reason = REASON_NO_LOCAL_ENDPOINT;
		return frontend->flags & FRONTEND_HAS_ENDPOINTS ? VERDICT_DROP : VERDICT_REJECT;
	}
	if (!frontend->affinity_s || !recall(frontend, local, &key, &out->backend)) {
		out->reason = REASON_REPLACED;
		if (!pick(flow, frontend, list, origin, &out->backend))
			return VERDICT_DROP;
		if (frontend->affinity_s)
			remember(&key, &out->backend, frontend->affinity_s);
	}
	out->masquerade = !(out->backend.flags & BACKEND_THIS_NODE) &&
			  (is_masqueraded(frontend, origin) ||
			   same_address(&out->backend.address, &flow->source));
	out->dsr = out->masquerade && origin == ORIGIN_OUTSIDE && frontend->flags & FRONTEND_DSR;
	return VERDICT_TRANSLATE;
}
