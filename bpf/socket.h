/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What a socket was connected to, and where it was led instead. */
#pragma once

#include "address.h"

struct remote {
	struct address address;
	__be16 port;
	__u8 pad[6];
};

/* What a connected socket was meant to reach. Lives and dies with the socket. */
struct origin_of_socket {
	struct remote frontend;
	struct remote backend;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin_of_socket);
} socket_origins SEC(".maps");

static __always_inline bool same_remote(const struct remote *a, const struct remote *b)
{
	return same_address(&a->address, &b->address) && a->port == b->port;
}
