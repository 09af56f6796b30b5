/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The overlay: one collect-metadata device (VXLAN, Geneve) to and from all nodes.
 *
 * The tunnel's id says who sent a packet: the tag of the sender's identity, which all nodes compute
 * alike, while identity numbers belong to one node. So a pod is known by what its own node knows of
 * it, also before this node has heard of it or of who had its address before.
 */
#pragma once

#include "packet.h"
#include "policy.h"
#include "service.h"

/* Ids below say nothing of the sender, who is then known by its address: this one is what nodes on
 * other data paths send, and this node for whoever is not one of its pods. */
#define TAG_FIRST 8192
#define TAG_NONE 4096


#define TUNNELLED 0x7078 /* tc_index: has its tunnel's key */

/* A node's pods, and that node's underlay address: where they are. */
struct tunnel {
	struct address remote, local; /* underlay addresses of that node and of this one */
	struct address own; /* what this node is called inside; zero: nothing of that family */
	struct mac mac, own_mac; /* of the two devices */
	__u8 pad[4];
};

GROWING_MAP(tunnels, 1, BPF_MAP_TYPE_LPM_TRIE, struct prefix_key, struct tunnel, BPF_F_NO_PREALLOC);
GROWING_MAP(tags, 2, BPF_MAP_TYPE_HASH, __u32, __u32, BPF_F_NO_PREALLOC);

/* Where keys are made and look-ups spelled: the stack is full. */
struct tunnel_scratch {
	struct bpf_tunnel_key key;
	struct prefix_key prefix;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tunnel_scratch);
} tunnel_scratch SEC(".maps");

const volatile bool with_overlay = false;

static __always_inline struct tunnel_scratch *current_scratch(void)
{
	__u32 first = 0;

	return with_overlay ? bpf_map_lookup_elem(&tunnel_scratch, &first) : NULL;
}

static __always_inline struct tunnel *find_tunnel(const struct address *address)
{
	struct tunnel_scratch *s = current_scratch();
	void *map = s ? current_map(&tunnels) : NULL;

	if (!map)
		return NULL;
	s->prefix.length = 160;
	s->prefix.address = *address;
	return bpf_map_lookup_elem(map, &s->prefix);
}

/* Whether a packet is for the tunnel's end on some node. What a pod sends there, or a Service leads there,
 * would be its node's once it is masqueraded, and say of whoever it likes that he sent it. */
static __always_inline bool is_for_tunnel(const struct flow *to)
{
	struct tunnel *tunnel;

	if (!has_tunnel_port(to))
		return false;
	tunnel = find_tunnel(&to->destination);
	return tunnel && same_address(&tunnel->remote, &to->destination);
}

/* The device's index, once it is known who is behind it; 0 before. */
static __always_inline __u32 overlay_device(void)
{
	const struct settings *current = with_overlay ? current_settings() : NULL;

	return current ? current->overlay : 0;
}

/* Say where the packet travels and who sends it. Not 0: it cannot be said. */
static __always_inline long set_key(struct __sk_buff *ctx, const struct tunnel *tunnel,
				    const struct address *source)
{
	__u32 slot = policy_slot();
	struct subject *sender = find_subject(&slot, source);
	struct tunnel_scratch *s = current_scratch();

	if (!s)
		return -ERROR_INVALID;
	__builtin_memset(&s->key, 0, sizeof(s->key));
	s->key.tunnel_id = sender && sender->tag ? sender->tag : TAG_NONE;
	ctx->tc_index = TUNNELLED;
	if (!is_ipv4(&tunnel->remote)) {
		__builtin_memcpy(s->key.remote_ipv6, &tunnel->remote, 16);
		__builtin_memcpy(s->key.local_ipv6, &tunnel->local, 16);
		return bpf_skb_set_tunnel_key(ctx, &s->key, sizeof(s->key), BPF_F_TUNINFO_IPV6);
	}
	s->key.remote_ipv4 = bpf_ntohl(tunnel->remote.words[3]);
	s->key.local_ipv4 = bpf_ntohl(tunnel->local.words[3]);
	return bpf_skb_set_tunnel_key(ctx, &s->key, sizeof(s->key), BPF_F_ZERO_CSUM_TX);
}

/* What the tunnel says of the packet: the node it came from, and the id. */
static __always_inline bool read_key(struct __sk_buff *ctx, struct address *node, __u32 *id)
{
	struct tunnel_scratch *s = current_scratch();

	if (!s)
		return false;
	if (!bpf_skb_get_tunnel_key(ctx, &s->key, sizeof(s->key), 0))
		set_ipv4(node, bpf_htonl(s->key.remote_ipv4));
	else if (!bpf_skb_get_tunnel_key(ctx, &s->key, sizeof(s->key), BPF_F_TUNINFO_IPV6))
		__builtin_memcpy(node, s->key.remote_ipv6, 16);
	else
		return false;
	*id = s->key.tunnel_id;
	return true;
}

/* Where the kernel's look-up stops at a route into a tunnel: answer as it would, and set the key. */
static __always_inline long find_tunnel_route(struct __sk_buff *ctx, struct bpf_fib_lookup *route,
					      const struct flow *flow)
{
	struct tunnel *tunnel = find_tunnel(&flow->destination);
	__u32 device = overlay_device(), mtu = 0;

	if (!tunnel || !device)
		return BPF_FIB_LKUP_RET_UNSUPP_LWT;
	if (bpf_check_mtu(ctx, device, &mtu, 0, BPF_MTU_CHK_SEGS))
		return BPF_FIB_LKUP_RET_FRAG_NEEDED;
	if (set_key(ctx, tunnel, &flow->source))
		return BPF_FIB_LKUP_RET_UNSUPP_LWT;
	route->ifindex = device;
	__builtin_memcpy(route->dmac, &tunnel->mac, sizeof(tunnel->mac));
	__builtin_memcpy(route->smac, &tunnel->own_mac, sizeof(tunnel->own_mac));
	return BPF_FIB_LKUP_RET_SUCCESS;
}

/* The identity of who sent the packet: by what its own node says, otherwise by its address. */
__noinline int find_sender(struct __sk_buff *ctx, const struct address *source, __u32 slot)
{
	struct address node;
	__u32 tag, *found;
	void *map;

	if (!source)
		return 0;
	if (with_overlay && ctx->ifindex == overlay_device() && read_key(ctx, &node, &tag) &&
	    tag >= TAG_FIRST) {
		map = bpf_map_lookup_elem(&tags, &slot);
		found = map ? bpf_map_lookup_elem(map, &tag) : NULL;
		if (found)
			return *found;
	}
	return find_identity(&slot, source);
}

/* Source, destination and protocol, all of the packet that the overlay looks at. */
static __always_inline bool read_ends(struct __sk_buff *ctx, struct flow *flow)
{
	struct ipv6hdr ipv6;
	struct iphdr ipv4;

	__builtin_memset(flow, 0, sizeof(*flow));
	if (ctx->protocol == bpf_htons(ETH_P_IP)) {
		if (load(ctx, ETH_HLEN, &ipv4))
			return false;
		set_ipv4(&flow->source, ipv4.saddr);
		set_ipv4(&flow->destination, ipv4.daddr);
		flow->protocol = ipv4.protocol;
		return true;
	}
	if (ctx->protocol != bpf_htons(ETH_P_IPV6) || load(ctx, ETH_HLEN, &ipv6))
		return false;
	__builtin_memcpy(&flow->source, &ipv6.saddr, 16);
	__builtin_memcpy(&flow->destination, &ipv6.daddr, 16);
	flow->protocol = ipv6.nexthdr;
	return true;
}

/* Whether the packet came from a node that we know and, if a pod's, from that pod's own. */
static __always_inline bool is_from_its_node(struct __sk_buff *ctx, const struct flow *flow)
{
	struct tunnel *tunnel;
	struct address node;
	__u32 id;

	if (!read_key(ctx, &node, &id))
		return false;
	tunnel = find_tunnel(&flow->source);
	if (!tunnel)
		tunnel = find_tunnel(&node);
	return tunnel && same_address(&tunnel->remote, &node);
}
