// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Connected UDP sockets whose backend is gone would send into the void for good: no packet of theirs is
 * translated any more. Those of an address that leads there no more would never know. Closed, their
 * process gets ECONNABORTED and connects anew. Run by user space in each namespace, after a backend left
 * (Linux 6.5).
 */
#define PODWIRE_NO_PACKETS
#include "service.h"
#include "socket.h"

char _license[] SEC("license") = "Dual BSD/GPL";

struct sock_common {
	unsigned short skc_family;
	volatile unsigned char skc_state;
} __attribute__((preserve_access_index));

struct udp_sock; /* begins with a sock_common */

struct bpf_iter__udp {
	void *meta;
	struct udp_sock *udp_sk;
} __attribute__((preserve_access_index));

extern int bpf_sock_destroy(struct sock_common *sk) __ksym;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct remote);
	__type(value, __u8);
} gone SEC(".maps");

SEC("iter/udp")
int terminate(struct bpf_iter__udp *ctx)
{
	struct udp_sock *socket = ctx->udp_sk;
	struct origin_of_socket *origin;

	if (!socket)
		return 0;
	/* only those that a Service led there, and that have not gone elsewhere since; who chose the
	 * address himself may wait for it */
	if (((struct sock_common *)socket)->skc_state != BPF_TCP_ESTABLISHED)
		return 0;
	origin = bpf_sk_storage_get(&socket_origins, socket, NULL, 0);
	if (origin && bpf_map_lookup_elem(&gone, &origin->backend) &&
	    !still_leads(&origin->frontend.address, origin->frontend.port, &origin->backend.address,
			 origin->backend.port))
		bpf_sock_destroy((struct sock_common *)socket);
	return 0;
}
