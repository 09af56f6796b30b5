// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Services at the socket: a process that connects to a frontend is connected to a backend instead, and
 * its packets need no translation at all. IPv4 and IPv6 (and IPv4 through IPv6 sockets) are one code.
 *
 * A socket of a pod is left to tcx when the translation would need masquerading, because only there
 * can the source be changed; for the node's own processes the kernel picks a node address anyway.
 * Programs here run in processes, where another may take the CPU: they keep all state on the stack.
 */
#define PODWIRE_NO_PACKETS
#include "conntrack.h"
#include "service.h"
#include "socket.h"

char _license[] SEC("license") = "Dual BSD/GPL";

const volatile __u64 node_netns_cookie = 0; /* which sockets are the node's own */

/* Namespaces of this node's pods, by cookie. Sockets elsewhere, on a machine that holds several nodes
 * of a lab, are none of ours. */
struct pod_namespace {
	struct address addresses[2]; /* the pod's, IPv4 and IPv6 */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct pod_namespace);
} namespaces SEC(".maps");

/* Unconnected UDP: per socket and remote, the other name of it. `outward`: from frontend to the backend
 * it got, so that one socket stays with one backend; otherwise back. The oldest go first: a socket may
 * have thousands of remotes. */
struct datagram_key {
	__u64 cookie;
	struct remote remote;
	__u32 outward;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct datagram_key);
	__type(value, struct remote);
} datagrams SEC(".maps");

static __always_inline void read_remote(const struct bpf_sock_addr *ctx, bool ipv4, struct remote *r)
{
	__builtin_memset(r, 0, sizeof(*r));
	if (ipv4) {
		set_ipv4(&r->address, ctx->user_ip4);
	} else {
		r->address.halves[0] = *(__u64 *)&ctx->user_ip6[0];
		r->address.halves[1] = *(__u64 *)&ctx->user_ip6[2];
	}
	r->port = ctx->user_port;
}

static __always_inline void write_remote(struct bpf_sock_addr *ctx, bool ipv4, const struct remote *r)
{
	if (ipv4) {
		ctx->user_ip4 = r->address.words[3];
	} else {
		*(__u64 *)&ctx->user_ip6[0] = r->address.halves[0];
		*(__u64 *)&ctx->user_ip6[2] = r->address.halves[1];
	}
	ctx->user_port = r->port;
}

/* Who asks, for session affinity: the address that packets of the same client would bear, though the
 * source is not chosen yet. A node without one is known by its namespace. */
static __always_inline void name_client(struct address *client, const struct pod_namespace *pod, bool ipv4,
					__u64 cookie)
{
	const struct settings *current = current_settings();

	if (pod)
		*client = pod->addresses[ipv4 ? 0 : 1];
	else if (current)
		*client = current->node[ipv4 ? 0 : 1];
	if (!client->halves[0] && !client->halves[1]) {
		client->halves[0] = cookie;
		client->halves[1] = ~0ULL;
	}
}

/* What `choose` says of a connection to `frontend`; `backend` is filled when it translates here. It is
 * counted as a connection if it is `new`. */
static __always_inline enum verdict choose_remote(struct bpf_sock_addr *ctx, const struct remote *frontend,
						  struct remote *backend, bool new)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	bool node = cookie == node_netns_cookie;
	struct pod_namespace *pod = node ? NULL : bpf_map_lookup_elem(&namespaces, &cookie);
	struct address client = {};
	struct flow flow = {};
	struct choice choice = {};
	struct frontend *found;
	enum verdict verdict;
	__u32 reason;

	flow.destination = frontend->address;
	flow.destination_port = frontend->port;
	flow.protocol = ctx->protocol;
	if (!node && !pod)
		return VERDICT_NONE;
	verdict = find_service(&flow, &found, &reason);
	if (verdict != VERDICT_TRANSLATE || !found)
		return verdict;
	name_client(&client, pod, is_ipv4(&flow.destination), cookie);
	verdict = choose(&flow, found, node ? ORIGIN_NODE : ORIGIN_POD, &client, &choice);
	if (new && verdict == VERDICT_REJECT && flow.protocol != IPPROTO_UDP)
		hit(&flow, found);
	if (verdict != VERDICT_TRANSLATE)
		return verdict;
	/* A pod that got itself must see the node as its client, and policies hold for it. */
	if (pod && (choice.masquerade || same_address(&choice.backend.address, &pod->addresses[0]) ||
		    same_address(&choice.backend.address, &pod->addresses[1])))
		return VERDICT_NONE;
	if (new) {
		hit(&flow, found);
		hit_backend(&choice, flow.protocol);
	}
	__builtin_memset(backend, 0, sizeof(*backend));
	backend->address = choice.backend.address;
	backend->port = choice.backend.port;
	return verdict;
}

static __always_inline int on_connect(struct bpf_sock_addr *ctx, bool ipv4)
{
	struct origin_of_socket origin, *kept;

	if (!ctx->sk)
		return 1;
	bpf_sk_storage_delete(&socket_origins, ctx->sk);
	read_remote(ctx, ipv4, &origin.frontend);
	if (!address_flags(&origin.frontend.address))
		return 1; /* of no Service */
	switch (choose_remote(ctx, &origin.frontend, &origin.backend, true)) {
	case VERDICT_TRANSLATE:
		break;
	case VERDICT_REJECT:
		if (ctx->protocol == IPPROTO_UDP)
			return 1; /* nothing is sent yet; what will be is refused by tcx */
		count(REASON_REJECTED);
		bpf_set_retval(-ERROR_REFUSED);
		return 0;
	default:
		return 1;
	}
	kept = bpf_sk_storage_get(&socket_origins, ctx->sk, &origin, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return 1; /* no memory: tcx translates instead */
	write_remote(ctx, ipv4, &origin.backend);
	return 1;
}

/* Answers of one backend to two frontends look alike. So that packets to the second get another port
 * (tcx), there is an entry of the socket's flow to the backend, which has that of the first. */
static __always_inline void keep_apart(const struct bpf_sock_addr *ctx, bool ipv4,
				       const struct remote *backend)
{
	__u64 cookie = bpf_get_netns_cookie((void *)ctx);
	struct pod_namespace *pod = bpf_map_lookup_elem(&namespaces, &cookie);
	void *map = current_map(&connections);
	struct flow flow = { .protocol = IPPROTO_UDP };

	if (!pod || !map || !ctx->sk)
		return;
	flow.source = pod->addresses[ipv4 ? 0 : 1];
	flow.source_port = bpf_htons(ctx->sk->src_port);
	flow.destination = backend->address;
	flow.destination_port = backend->port;
	note_plain(map, &flow, STATE_SEEN, false);
}

static __always_inline int on_sendmsg(struct bpf_sock_addr *ctx, bool ipv4)
{
	struct datagram_key key = { .cookie = bpf_get_socket_cookie(ctx), .outward = 1 };
	struct remote backend, frontend, *last, *named;

	read_remote(ctx, ipv4, &key.remote);
	frontend = key.remote;
	if (!address_flags(&frontend.address))
		return 1;
	last = bpf_map_lookup_elem(&datagrams, &key);
	if (choose_remote(ctx, &frontend, &backend, !last) != VERDICT_TRANSLATE)
		return 1;
	if (last && still_leads(&frontend.address, frontend.port, &last->address, last->port))
		backend = *last;
	bpf_map_update_elem(&datagrams, &key, &backend, BPF_ANY);
	key.outward = 0;
	key.remote = backend;
	named = bpf_map_lookup_elem(&datagrams, &key);
	if (named && !same_remote(named, &frontend)) {
		keep_apart(ctx, ipv4, &backend);
		return 1;
	}
	if (bpf_map_update_elem(&datagrams, &key, &frontend, BPF_ANY))
		return 1;
	write_remote(ctx, ipv4, &backend);
	return 1;
}

/* The sender of a datagram is named as the process knows it. */
static __always_inline int on_recvmsg(struct bpf_sock_addr *ctx, bool ipv4)
{
	struct datagram_key key = { .cookie = bpf_get_socket_cookie(ctx) };
	struct origin_of_socket *origin;
	struct remote *frontend;

	read_remote(ctx, ipv4, &key.remote);
	/* one that was disconnected (AF_UNSPEC) is no longer what it was led to */
	origin = ctx->sk && ctx->sk->state == BPF_TCP_ESTABLISHED ?
			 bpf_sk_storage_get(&socket_origins, ctx->sk, NULL, 0) : NULL;
	if (origin && same_remote(&origin->backend, &key.remote)) {
		write_remote(ctx, ipv4, &origin->frontend);
		return 1;
	}
	frontend = bpf_map_lookup_elem(&datagrams, &key);
	if (frontend)
		write_remote(ctx, ipv4, frontend);
	return 1;
}

static __always_inline int on_getpeername(struct bpf_sock_addr *ctx, bool ipv4)
{
	struct origin_of_socket *origin;
	struct remote peer;

	read_remote(ctx, ipv4, &peer);
	origin = ctx->sk ? bpf_sk_storage_get(&socket_origins, ctx->sk, NULL, 0) : NULL;
	if (origin && same_remote(&origin->backend, &peer))
		write_remote(ctx, ipv4, &origin->frontend);
	return 1;
}

#define HOOK(name, section)                                                                        \
	SEC("cgroup/" section "4")                                                                 \
	int name##4(struct bpf_sock_addr * ctx)                                                    \
	{                                                                                          \
		return on_##name(ctx, true);                                                       \
	}                                                                                          \
	SEC("cgroup/" section "6")                                                                 \
	int name##6(struct bpf_sock_addr * ctx)                                                    \
	{                                                                                          \
		return on_##name(ctx, false);                                                      \
	}

HOOK(connect, "connect")
HOOK(sendmsg, "sendmsg")
HOOK(recvmsg, "recvmsg")
HOOK(getpeername, "getpeername")
