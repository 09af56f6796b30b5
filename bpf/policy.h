/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Policy: who the peer is, and what a pod's rule set says about it.
 *
 * The table is flattened to disjoint boxes before it comes here, so tiers, order and exceptions are no
 * matter any more: the longest match is the only one. An identity that a rule set does not name falls
 * to the default's entries, those of identity 0. Two look-ups at most.
 */
#pragma once

#include "address.h"
#include "events.h"
#include "service.h"

struct identity_key {
	__u32 length; /* 32 and the prefix's */
	__u32 pad;
	struct address address;
};

struct rule_key {
	__u32 length; /* 64: all protocols; 80 to 96: one protocol, the rest is the port's prefix */
	__u32 rule_set;
	__u32 identity;
	__u8 protocol;
	__u8 pad;
	__be16 port;
};

enum rule_verdict { RULE_ALLOW, RULE_DENY, RULE_AUDIT };

/* `ruling` numbers the verdict, the direction and the policies whose doing it is: a hash of their
 * names, so that it means the same to every process, whatever has happened in between. */
struct rule {
	__u64 ruling;
	__u32 verdict;
	__u32 pad;
};

/* A pod of this node, by its address: its rule sets (0: none, everything passes), and what other nodes
 * are told of its identity (0: nothing). */
struct subject {
	__u32 ingress;
	__u32 egress;
	__u32 tag;
};

/* Rule sets and identities have numbers that an agent that starts gives out anew. It writes all of these
 * maps into their other slot and then changes `settings.policies`; a packet is judged by one slot. */
GROWING_MAP(identities, 2, BPF_MAP_TYPE_LPM_TRIE, struct identity_key, __u32, BPF_F_NO_PREALLOC);
GROWING_MAP(rules, 2, BPF_MAP_TYPE_LPM_TRIE, struct rule_key, struct rule, BPF_F_NO_PREALLOC);
GROWING_MAP(subjects, 2, BPF_MAP_TYPE_HASH, struct address, struct subject, BPF_F_NO_PREALLOC);

/* First packets of connections by ruling. User space makes the entries. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, __u64);
} rulings SEC(".maps");

const volatile bool with_policy = false;

static __always_inline __u32 policy_slot(void)
{
	const struct settings *current = current_settings();

	return current ? current->policies : 0;
}

static __always_inline struct subject *find_subject(const __u32 *slot, const struct address *address)
{
	void *map = bpf_map_lookup_elem(&subjects, slot);

	return map ? bpf_map_lookup_elem(map, address) : NULL;
}

static __always_inline __u32 find_identity(const __u32 *slot, const struct address *address)
{
	struct identity_key key = { .length = 160, .address = *address };
	void *map = bpf_map_lookup_elem(&identities, slot);
	__u32 *found = map ? bpf_map_lookup_elem(map, &key) : NULL;

	return found ? *found : 0;
}

/* What `rule_set` says; NULL: nothing is known of it, which denies. */
static __always_inline struct rule *find_rule(const __u32 *slot, __u32 rule_set, __u32 identity,
					      const struct flow *flow)
{
	bool ports = flow->protocol != IPPROTO_ICMP && flow->protocol != IPPROTO_ICMPV6;
	struct rule_key key = {
		.length = 96,
		.rule_set = rule_set,
		.identity = identity,
		.protocol = flow->protocol,
		.port = ports ? flow->destination_port : 0,
	};
	void *map = bpf_map_lookup_elem(&rules, slot);
	struct rule *found;

	if (!map)
		return NULL;
	found = bpf_map_lookup_elem(map, &key);
	if (found || !identity)
		return found;
	key.identity = 0;
	return bpf_map_lookup_elem(map, &key);
}

static __always_inline void count_ruling(__u64 ruling)
{
	__u64 *packets = bpf_map_lookup_elem(&rulings, &ruling);

	if (packets)
		*packets += 1;
}

/* Whether one direction lets the first packet of `flow` pass, the other end being `identity`; what it
 * refuses is reported. */
static __always_inline bool is_allowed(__u32 interface, const __u32 *slot, __u32 rule_set, __u32 identity,
				       const struct flow *flow, bool egress)
{
	struct rule *rule = find_rule(slot, rule_set, identity, flow);
	enum reason reason;
	struct event *event;

	if (rule)
		count_ruling(rule->ruling);
	if (rule && rule->verdict == RULE_ALLOW)
		return true;
	reason = rule && rule->verdict == RULE_AUDIT ? REASON_POLICY_AUDIT : REASON_POLICY;
	count(reason);
	event = begin_event(reason, interface, flow);
	if (event) {
		event->ruling = rule ? rule->ruling : 0;
		event->egress = egress;
		event->peer_identity = identity;
		bpf_ringbuf_submit(event, 0);
	}
	return reason == REASON_POLICY_AUDIT;
}
