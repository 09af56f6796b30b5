// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Entries for the TCP connections that a namespace has open. Pods that no policy concerns have none, or
 * old ones (`find_plain_neighbour`); user space removes those and runs this in such a pod's namespace
 * when a policy begins to concern it, so that what is open is not judged again. */
#define PODWIRE_NO_PACKETS
#include "conntrack.h"

char _license[] SEC("license") = "Dual BSD/GPL";

struct sock_common {
	unsigned short skc_family;
	unsigned char skc_state;
	__be32 skc_daddr, skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	struct in6_addr skc_v6_daddr, skc_v6_rcv_saddr;
} __attribute__((preserve_access_index));

struct bpf_iter__tcp {
	void *meta;
	struct sock_common *sk_common;
} __attribute__((preserve_access_index));

/* Both ends have agreed, and are not done with each other. */
static __always_inline bool is_open(__u8 state)
{
	return state == BPF_TCP_ESTABLISHED || state == BPF_TCP_FIN_WAIT1 ||
	       state == BPF_TCP_FIN_WAIT2 || state == BPF_TCP_CLOSE_WAIT ||
	       state == BPF_TCP_LAST_ACK || state == BPF_TCP_CLOSING;
}

static __always_inline void read_socket(const struct sock_common *socket, struct flow *flow)
{
	if (socket->skc_family == AF_INET) {
		set_ipv4(&flow->source, socket->skc_rcv_saddr);
		set_ipv4(&flow->destination, socket->skc_daddr);
	} else {
		__builtin_memcpy(&flow->source, &socket->skc_v6_rcv_saddr, 16);
		__builtin_memcpy(&flow->destination, &socket->skc_v6_daddr, 16);
	}
	flow->source_port = bpf_htons(socket->skc_num);
	flow->destination_port = socket->skc_dport;
	flow->protocol = IPPROTO_TCP;
}

SEC("iter/tcp")
int adopt(struct bpf_iter__tcp *ctx)
{
	struct sock_common *socket = ctx->sk_common;
	void *map = current_map(&connections);
	struct flow flow = {};

	if (!socket || !map || !is_open(socket->skc_state))
		return 0;
	read_socket(socket, &flow);
	/* who began is not known: the lower port is the server's */
	note_plain(map, &flow, STATE_SEEN | STATE_DATA,
		   bpf_ntohs(flow.source_port) < bpf_ntohs(flow.destination_port));
	return 0;
}
