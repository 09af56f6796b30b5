/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What every program needs from the kernel: types, helpers, and names that older UAPI headers lack.
 *
 * A file that includes the other headers first says what its packets are: tcx programs define
 * nothing, XDP programs define PODWIRE_XDP.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#ifdef PODWIRE_XDP
#define CONTEXT struct xdp_md
#else
#define CONTEXT struct __sk_buff
#endif

#define AF_INET 2
#define AF_INET6 10
#define LOOPBACK 1 /* the interface index of lo in every network namespace */

#define PACKET_HOST 0 /* of the link's packets, those for this node */
#define VLAN_ID 0xfff

#define TCX_NEXT (-1)
#define TCX_DROP 2

#define ERROR_EXIST 17
#define ERROR_INVALID 22
#define ERROR_REFUSED 111

#define FIB_LOOKUP_SKIP_NEIGH (1U << 2) /* BPF_FIB_LOOKUP_SKIP_NEIGH, Linux 6.4 */
#define FIB_LOOKUP_SRC (1U << 4) /* BPF_FIB_LOOKUP_SRC, Linux 6.7 */
#define FLAG_CHECKSUM_IPV6 (1ULL << 7) /* BPF_F_IPV6, Linux 6.16 */

#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12
#define ICMP_PORT_UNREACHABLE_CODE 3
#define ICMPV6_UNREACHABLE 1
#define ICMPV6_PARAMETER_PROBLEM 4
#define ICMPV6_ECHO 128
#define ICMPV6_ECHO_REPLY 129
#define ICMPV6_ROUTER_SOLICITATION 133
#define ICMPV6_ROUTER_ADVERTISEMENT 134
#define ICMPV6_REDIRECT 137
#define ICMPV6_PORT_UNREACHABLE_CODE 4

/* What programs may read of the kernel's own structures. */
struct net_device {
	unsigned long priv_flags : 32;
	unsigned short type;
} __attribute__((preserve_access_index));

struct sk_buff {
	struct net_device *dev;
	__u8 ip_summed : 2;
} __attribute__((preserve_access_index));

extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym;

/* A map that grows: an array of maps whose first slot is the map in force. Growing makes a larger
 * inner map, fills it, and replaces the slot; programs never see a half-filled one. */
#define GROWING_MAP(name, slots, kind, key_type, value_type, inner_flags)                          \
	struct name##_inner {                                                                      \
		__uint(type, kind);                                                                \
		__uint(key_size, sizeof(key_type));                                                \
		__uint(value_size, sizeof(value_type));                                            \
		__uint(max_entries, 1);                                                            \
		__uint(map_flags, inner_flags);                                                    \
	};                                                                                         \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);                                          \
		__uint(max_entries, slots);                                                        \
		__type(key, __u32);                                                                \
		__array(values, struct name##_inner);                                              \
	} name SEC(".maps")

static __always_inline void *current_map(void *outer)
{
	__u32 first = 0;

	return bpf_map_lookup_elem(outer, &first);
}

/* Seconds since boot: what ages are counted in. Programs that see packets read the coarse clock,
 * which others may not. */
static __always_inline __u32 now_seconds(void)
{
#ifdef PODWIRE_NO_PACKETS
	return bpf_ktime_get_ns() / 1000000000;
#else
	return bpf_ktime_get_coarse_ns() / 1000000000;
#endif
}
