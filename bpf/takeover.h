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

struct nf_conn {};

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

/* Whether the kernel's own table has this flow, in either direction. Only TCP and UDP can be asked
 * for; a kernel that cannot be asked knows nothing. */
__noinline bool is_known_to_kernel(struct __sk_buff *ctx, const struct flow *flow)
{
	struct ct_opts opts = { .netns_id = CURRENT_NETNS };
	struct bpf_sock_tuple tuple = {};
	struct nf_conn *entry;
	bool ipv4;

	if (!flow || !with_kernel_lookup)
		return false;
	opts.l4proto = flow->protocol;
	ipv4 = is_ipv4(&flow->source);
	if (ipv4) {
		tuple.ipv4.saddr = flow->source.words[3];
		tuple.ipv4.daddr = flow->destination.words[3];
		tuple.ipv4.sport = flow->source_port;
		tuple.ipv4.dport = flow->destination_port;
		entry = bpf_skb_ct_lookup(ctx, &tuple, sizeof(tuple.ipv4), &opts, sizeof(opts));
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &flow->source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &flow->destination, 16);
		tuple.ipv6.sport = flow->source_port;
		tuple.ipv6.dport = flow->destination_port;
		entry = bpf_skb_ct_lookup(ctx, &tuple, sizeof(tuple.ipv6), &opts, sizeof(opts));
	}
	if (!entry)
		return false;
	bpf_ct_release(entry);
	return true;
}

/* What becomes of a packet that has no entry, in any phase but the normal one. */
static __always_inline enum handling handle_unknown(struct __sk_buff *ctx, const struct packet *p, __u32 phase)
{
	bool opens = is_opening(p) || !is_stream(p->flow.protocol);

	if (phase == PHASE_JOINING)
		return is_known_to_kernel(ctx, &p->flow) ? LEAVE_TO_STACK : HANDLE;
	if (phase == PHASE_MOVING)
		return opens ? HANDLE : HOLD_BACK; /* the sender repeats it, and then we have the entry */
	return phase == PHASE_SERVING ? HANDLE : LEAVE_TO_STACK;
}

#endif
