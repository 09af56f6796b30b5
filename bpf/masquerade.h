/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Which traffic of pods leaves the cluster, and under which address of the node. */
#pragma once

#include "forward.h"
#include "service.h"

enum network_flag {
	NETWORK_OWN_PODS = 1, /* pods of this node */
	NETWORK_CLUSTER = 2, /* reached with the pod's own address */
	NETWORK_PODS = 4, /* pods of other nodes */
	NETWORK_NODE = 8, /* an address of a node */
};
#define NETWORK_MEMBER (NETWORK_NODE | NETWORK_PODS | NETWORK_OWN_PODS)

GROWING_MAP(networks, 1, BPF_MAP_TYPE_LPM_TRIE, struct prefix_key, __u32, BPF_F_NO_PREALLOC);

const volatile bool with_masquerade = false;

static __always_inline __u32 network_flags(const struct address *address)
{
	struct prefix_key key = { .length = 160, .address = *address };
	void *map = current_map(&networks);
	__u32 *flags = map ? bpf_map_lookup_elem(map, &key) : NULL;

	return flags ? *flags : 0;
}

static __always_inline bool leaves_cluster(const struct address *source, const struct address *destination)
{
	return with_masquerade && network_flags(source) & NETWORK_OWN_PODS &&
	       !(network_flags(destination) & NETWORK_CLUSTER) && !is_link_local(destination);
}

/* Put as the source of `to` what the kernel would: the address of the way out (Linux 6.7; of the
 * overlay, this node's inside), otherwise the node's own. False: there is none. */
static __always_inline bool masquerade(CONTEXT *ctx, struct flow *to, __u32 from)
{
	const struct settings *current = current_settings();
	bool ipv4 = is_ipv4(&to->destination);
	const struct address *node;
	struct bpf_fib_lookup route;
	long found = find_route(ctx, &route, to, from, FIB_LOOKUP_SKIP_NEIGH | FIB_LOOKUP_SRC);

	if (found == BPF_FIB_LKUP_RET_SUCCESS) {
		if (ipv4)
			set_ipv4(&to->source, route.ipv4_src);
		else
			__builtin_memcpy(&to->source, route.ipv6_src, 16);
		return true;
	}
#ifndef PODWIRE_XDP
	if (found == BPF_FIB_LKUP_RET_UNSUPP_LWT) {
		struct tunnel *tunnel = find_tunnel(&to->destination);

		if (tunnel && (tunnel->own.halves[0] || tunnel->own.halves[1])) {
			to->source = tunnel->own;
			return true;
		}
	}
#endif
	if (!current)
		return false;
	node = ipv4 ? &current->node[0] : &current->node[1];
	if (!node->halves[0] && !node->halves[1])
		return false;
	to->source = *node;
	return true;
}
