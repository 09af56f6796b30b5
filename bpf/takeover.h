/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* While one data path takes over from another: which packets are ours, and which are left alone.
 * User space walks through the phases (podwire/datapath/ebpf/takeover.py).
 */
#pragma once

#include "packet.h"
#include "service.h"

enum handling { HANDLE, LEAVE_TO_STACK, HOLD_BACK };

#ifndef PODWIRE_XDP

#define CURRENT_NETNS (-1) /* BPF_F_CURRENT_NETNS */

#define ENDED_FIRST 7 /* TCP_CONNTRACK_TIME_WAIT */
#define ENDED_LAST 8 /* TCP_CONNTRACK_CLOSE */

struct ip_ct_tcp {
	__u8 state;
} __attribute__((preserve_access_index));

union nf_conntrack_proto {
	struct ip_ct_tcp tcp;
} __attribute__((preserve_access_index));

struct nf_conn {
	union nf_conntrack_proto proto;
} __attribute__((preserve_access_index));

struct ct_opts { /* struct bpf_ct_opts as of Linux 5.18; later ones are longer and take this too */
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};

extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *ctx, struct bpf_sock_tuple *tuple, __u32 size,
					 struct ct_opts *opts, __u32 opts_size) __ksym __weak;
extern void bpf_ct_release(struct nf_conn *entry) __ksym __weak;

const volatile bool with_kernel_lookup = false; /* whether the kernel has these two */

enum kernel_view { KERNEL_KNOWS_NOTHING, KERNEL_CARRIES, KERNEL_IS_DONE };

/* What the kernel's own table says of the connection, in either direction; it is done when the packet
 * opens another one from the same port. Only TCP and UDP can be asked for; a kernel that cannot be asked
 * knows nothing. */
__noinline int ask_kernel(struct __sk_buff *ctx, const struct packet *p)
{
	struct ct_opts opts = { .netns_id = CURRENT_NETNS };
	struct bpf_sock_tuple tuple = {};
	struct nf_conn *entry;
	__u8 state;

	if (!p || !with_kernel_lookup)
		return KERNEL_KNOWS_NOTHING;
	opts.l4proto = p->flow.protocol;
	if (is_ipv4(&p->flow.source)) {
		tuple.ipv4.saddr = p->flow.source.words[3];
		tuple.ipv4.daddr = p->flow.destination.words[3];
		tuple.ipv4.sport = p->flow.source_port;
		tuple.ipv4.dport = p->flow.destination_port;
		entry = bpf_skb_ct_lookup(ctx, &tuple, sizeof(tuple.ipv4), &opts, sizeof(opts));
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &p->flow.source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &p->flow.destination, 16);
		tuple.ipv6.sport = p->flow.source_port;
		tuple.ipv6.dport = p->flow.destination_port;
		entry = bpf_skb_ct_lookup(ctx, &tuple, sizeof(tuple.ipv6), &opts, sizeof(opts));
	}
	if (!entry)
		return KERNEL_KNOWS_NOTHING;
	state = entry->proto.tcp.state;
	bpf_ct_release(entry);
	if (p->flow.protocol == IPPROTO_TCP && is_opening(p) && state >= ENDED_FIRST && state <= ENDED_LAST)
		return KERNEL_IS_DONE;
	return KERNEL_CARRIES;
}

/* What becomes of a packet that has no entry. */
static __always_inline enum handling handle_unknown(const struct packet *p, __u32 phase)
{
	if (phase == PHASE_MOVING && is_stream(p->flow.protocol) && !is_opening(p))
		return HOLD_BACK; /* the sender repeats it, and then we have the entry */
	return phase == PHASE_LEAVING ? LEAVE_TO_STACK : HANDLE;
}

#endif
