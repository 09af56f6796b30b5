// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Housekeeping of the connection table, walked inside the kernel: half a million entries cost user
 * space one system call and no copy. User space runs it every few seconds, and after changes. */
#define PODWIRE_NO_PACKETS
#include "collect.h"
#include "conntrack.h"
#include "service.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* Backends whose UDP flows must end: packets of a flow would go on to an address that is gone. Service 0:
 * a frontend that is new, and flows that have gone past it until now. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct member_key);
	__type(value, __u8);
} doomed SEC(".maps");

/* Addresses of pods that left: another pod may have them next, and what was allowed or translated for the
 * one is nothing to the other. They stay here until their connections are forgotten. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct address);
	__type(value, __u8);
} departed SEC(".maps");

/* Pods whose own TCP is about to be read from their sockets (adopt.bpf.c). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, struct address);
	__type(value, __u8);
} adopted SEC(".maps");

struct walk {
	struct flow pair;
	struct flow back;
	__u32 now_s;
	__u32 established_s;
	__u32 datagram_s;
	__u32 pressure;
	__u32 removed;
	__u32 failed;
	__u32 local; /* entries left that are LOCAL and TRANSLATED */
};

/* Seconds of silence after which a connection is forgotten; those of TCP and UDP that is established come
 * from user space. Netfilter's, kube-proxy's or Cilium's, as docs/EBPF.md has them side by side. */
#define OPENING_S 60 /* TCP that is not answered, or not agreed on */
#define HALF_CLOSED_S 3600 /* one end sends on */
#define CLOSED_S 30 /* both have closed: a last FIN may be repeated */
#define RESET_S 10
#define LED_S 8000 /* with DSR nobody tells of the backend's end; longer than two hours of keepalive */
#define SCTP_S 210 /* beats of the heart included, which come every 30 s */
#define SCTP_CLOSED_S 10
#define UNANSWERED_S 30 /* anything else, also when it was one question and one answer */
#define OTHER_S 600 /* neither TCP, UDP, SCTP nor ICMP */

/* `here`, `there`: what either direction has sent. With DSR (`led`), answers go another way: what the
 * client sends is all there is to judge by. Verified by itself, or there are too many ways through. */
__noinline __u32 lifetime(const struct walk *w, __u8 protocol, __u8 here, __u8 there, bool led)
{
	bool reset = (here | there) & STATE_RST, closed = here & there & STATE_FIN;
	bool tcp = protocol == IPPROTO_TCP, sctp = protocol == IPPROTO_SCTP;

	if (!w)
		return 0;
	if (!tcp && !sctp && protocol != IPPROTO_UDP)
		return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6 ? UNANSWERED_S : OTHER_S;
	if (led) {
		there = here;
		here |= tcp || sctp ? 0 : STATE_DATA;
	}
	if (reset || (sctp && closed))
		return tcp ? RESET_S : SCTP_CLOSED_S;
	if (!(here & STATE_SEEN) || !(there & STATE_SEEN) || !((here | there) & STATE_DATA))
		return tcp ? OPENING_S : UNANSWERED_S;
	if (!tcp)
		return sctp ? SCTP_S : w->datagram_s;
	if ((here | there) & STATE_FIN)
		return closed ? CLOSED_S : led ? OPENING_S : HALF_CLOSED_S;
	return led ? LED_S : w->established_s;
}

/* A walk may still come to the pair, where both are in one bucket: what is gone counts only once. */
static __always_inline void remove_both(void *map, struct walk *w, const struct flow *key)
{
	w->removed += !bpf_map_delete_elem(map, &w->pair);
	w->removed += !bpf_map_delete_elem(map, key);
}

static long expire(void *map, const struct flow *key, struct connection *value, struct walk *w)
{
	struct connection *pair;
	__u32 seen_s = value->seen_s;
	__s32 silent, lives;
	__u8 state = 0;

	/* each pair is judged once, at its original direction; a half without the other goes too, and
	 * so does one whose other half has become another connection's */
	pair_of(&w->pair, key, value);
	pair = bpf_map_lookup_elem(map, &w->pair);
	if (pair) {
		pair_of(&w->back, &w->pair, pair);
		if (__builtin_memcmp(&w->back, key, sizeof(*key))) {
			pair = NULL;
			w->pair = *key;
		}
	}
	if (pair) {
		if (value->flags & CONNECTION_REPLY)
			return 0; /* and so is counted with the other */
		state = pair->state;
		if ((__s32)(pair->seen_s - seen_s) > 0)
			seen_s = pair->seen_s;
	}
	lives = lifetime(w, key->protocol, value->state, state, value->flags & CONNECTION_DSR);
	silent = w->now_s - seen_s; /* entries may be younger than this walk's idea of now */
	if (silent > lives >> w->pressure) {
		if (silent <= lives && !(value->flags & CONNECTION_REPLY))
			count(REASON_EVICTED);
		remove_both(map, w, key);
	} else if (is_local_translation(value->flags))
		w->local++;
	return 0;
}

static long expire_all(void *map, struct walk *w)
{
	__u32 *local = find_local_entries();
	long walked;

	if (!local)
		return 0;
	__sync_val_compare_and_swap(local, LOCAL_SOME, LOCAL_COUNTED);
	walked = bpf_for_each_map_elem(map, expire, w, 0);
	if (!w->local)
		__sync_val_compare_and_swap(local, LOCAL_COUNTED, LOCAL_NONE);
	return walked;
}

static long forget(void *map, const struct flow *key, struct connection *value, struct walk *w)
{
	/* by the backend, or by what it addresses: a Service has that no more, or (0 is none) only now */
	struct member_key backend = {
		.service = value->service,
		.address = value->to.destination,
		.port = value->to.destination_port,
	};
	struct member_key frontend = {
		.service = value->service,
		.address = key->destination,
		.port = key->destination_port,
	};

	if (key->protocol != IPPROTO_UDP || value->flags & CONNECTION_REPLY ||
	    (!bpf_map_lookup_elem(&doomed, &frontend) &&
	     (!value->service || !bpf_map_lookup_elem(&doomed, &backend))))
		return 0;
	pair_of(&w->pair, key, value);
	remove_both(map, w, key);
	return 0;
}

static long depart(void *map, const struct flow *key, struct connection *value, struct walk *w)
{
	/* the other direction has the same addresses, and goes when its turn comes */
	if (!bpf_map_lookup_elem(&departed, &key->source) &&
	    !bpf_map_lookup_elem(&departed, &key->destination) &&
	    !bpf_map_lookup_elem(&departed, &value->to.source) &&
	    !bpf_map_lookup_elem(&departed, &value->to.destination))
		return 0;
	bpf_map_delete_elem(map, key);
	w->removed++;
	return 0;
}

/* Of translated connections, and of other protocols, nobody knows but us: they stay. */
static long forget_plain(void *map, const struct flow *key, struct connection *value, struct walk *w)
{
	if (key->protocol != IPPROTO_TCP || value->flags & CONNECTION_TRANSLATED ||
	    (!bpf_map_lookup_elem(&adopted, &key->source) &&
	     !bpf_map_lookup_elem(&adopted, &key->destination)))
		return 0;
	bpf_map_delete_elem(map, key);
	w->removed++;
	return 0;
}

static long move(void *map, const struct flow *key, struct connection *value, struct walk *w)
{
	void *current = current_map(&connections);
	long error;

	if (!current)
		return 1;
	error = bpf_map_update_elem(current, key, value, BPF_NOEXIST);
	if (error && error != -ERROR_EXIST)
		w->failed++;
	else
		w->removed++;
	return 0;
}

SEC("syscall")
int collect(struct collect *args)
{
	struct walk w = {
		.now_s = now_seconds(),
		.established_s = args->established_s,
		.datagram_s = args->datagram_s,
		.pressure = args->pressure,
	};
	__u32 slot = args->mode == COLLECT_MOVE ? SLOT_RETIRING : SLOT_CURRENT;
	void *map = bpf_map_lookup_elem(&connections, &slot);
	long walked = 0;

	if (!map)
		return 0;
	switch (args->mode) {
	case COLLECT_EXPIRE:
		walked = expire_all(map, &w);
		break;
	case COLLECT_DOOMED:
		walked = bpf_for_each_map_elem(map, forget, &w, 0);
		break;
	case COLLECT_MOVE:
		walked = bpf_for_each_map_elem(map, move, &w, 0);
		break;
	case COLLECT_DEPARTED:
		walked = bpf_for_each_map_elem(map, depart, &w, 0);
		break;
	case COLLECT_PLAIN:
		walked = bpf_for_each_map_elem(map, forget_plain, &w, 0);
		break;
	}
	args->walked = walked;
	args->removed = w.removed;
	args->failed = w.failed;
	return 0;
}

static long forget_client(void *map, const struct affinity_key *key, struct affinity *value, __u32 *now_s)
{
	if ((__s32)(*now_s - value->seen_s) > (__s32)value->timeout_s)
		bpf_map_delete_elem(map, key);
	return 0;
}

SEC("syscall")
int collect_affinities(struct collect *args)
{
	__u32 now_s = now_seconds();

	args->walked = bpf_for_each_map_elem(&affinities, forget_client, &now_s, 0);
	return 0;
}
