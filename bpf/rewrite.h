/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Changing addresses and ports of a packet, checksums included. */
#pragma once

#include "crc32c.h"
#include "packet.h"

/* Bring the first bytes of a packet to where plain stores reach them. Not 0: they cannot be. */
static __always_inline long pull(CONTEXT *ctx, __u32 size)
{
	if ((void *)(long)ctx->data + size <= (void *)(long)ctx->data_end)
		return 0;
#ifdef PODWIRE_XDP
	return -1;
#else
	return bpf_skb_pull_data(ctx, size);
#endif
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The one's complement difference between two 16-bit fields. */
static __always_inline __u32 port_difference(__be16 from, __be16 to)
{
	return (__u32)to + (__u16)~from;
}

#ifdef PODWIRE_XDP

static __always_inline int fix_sum(CONTEXT *ctx, __u16 at, __u32 difference, bool zero_is_none)
{
	__u16 sum;

	if (load_bytes(ctx, at, &sum, 2))
		return -1;
	if (zero_is_none && !sum)
		return 0;
	sum = ~fold((__u32)(__u16)~sum + fold(difference));
	if (zero_is_none && !sum)
		sum = 0xffff;
	return store_bytes(ctx, at, &sum, 2);
}

#define fix_ip_sum(ctx, at, difference) fix_sum(ctx, at, difference, false)
#define fix_address_sum(ctx, p, difference)                                                        \
	fix_sum(ctx, (p)->checksum, difference, (p)->flow.protocol == IPPROTO_UDP)
#define fix_payload_sum(ctx, at, difference, udp) fix_sum(ctx, at, difference, udp)

#else

static __always_inline int fix_ip_sum(CONTEXT *ctx, __u16 at, __u32 difference)
{
	return bpf_l3_csum_replace(ctx, at, 0, difference, 0);
}

/* For a change of what the pseudo header holds. */
static __always_inline int fix_address_sum(CONTEXT *ctx, const struct packet *p, __u32 difference)
{
	__u64 flags = BPF_F_PSEUDO_HDR;

	if (p->flow.protocol == IPPROTO_UDP)
		flags |= BPF_F_MARK_MANGLED_0;
	/* Without the IPv6 flag, which older kernels refuse, a sum that the card computed over the
	 * whole packet goes wrong: IPv6 has no header checksum that would make up for the change. */
	if (!p->ipv4 && !bpf_l4_csum_replace(ctx, p->checksum, 0, difference, flags | FLAG_CHECKSUM_IPV6))
		return 0;
	return bpf_l4_csum_replace(ctx, p->checksum, 0, difference, flags);
}

/* For a change of what the checksum covers as payload. */
static __always_inline int fix_payload_sum(CONTEXT *ctx, __u16 at, __u32 difference, bool udp)
{
	return bpf_l4_csum_replace(ctx, at, 0, difference, udp ? BPF_F_MARK_MANGLED_0 : 0);
}

#endif

static __always_inline int rewrite_address(CONTEXT *ctx, struct packet *p, bool source,
					   const struct address *new)
{
	struct address *old = source ? &p->flow.source : &p->flow.destination;
	__u16 at = p->network + (p->ipv4 ? (source ? 12 : 16) : (source ? 8 : 24));
	__s64 difference;
	int error;

	if (same_address(old, new))
		return 0;
	if (p->ipv4) {
		difference = bpf_csum_diff(&old->words[3], 4, (__be32 *)&new->words[3], 4, 0);
		error = fix_ip_sum(ctx, p->network + 10, difference);
	} else {
		difference = bpf_csum_diff(old->words, 16, (__be32 *)new->words, 16, 0);
		error = 0;
	}
	if (p->checksum && p->fragment != FRAGMENT_LATER)
		error |= fix_address_sum(ctx, p, difference);
	if (p->ipv4)
		error |= store_bytes(ctx, at, &new->words[3], 4);
	else
		error |= store_bytes(ctx, at, new->words, 16);
	*old = *new;
	return error;
}

static __always_inline int rewrite_sctp(CONTEXT *ctx, struct packet *p, const struct flow *to)
{
	__u32 difference, sum;

	/* the checksum of a fragment covers bytes that are elsewhere */
	if (p->fragment != FRAGMENT_NONE || load_bytes(ctx, p->transport + 8, &sum, 4))
		return -1;
	if (!sum)
		return 0; /* of a local socket: whoever sends it on the wire fills it in */
	difference = (__u32)(p->flow.source_port ^ to->source_port) |
		     (__u32)(p->flow.destination_port ^ to->destination_port) << 16;
	sum ^= crc32c_change(difference, p->length);
	return store_bytes(ctx, p->transport + 8, &sum, 4);
}

static __always_inline int rewrite_ports(CONTEXT *ctx, struct packet *p, const struct flow *to)
{
	bool changed = p->flow.source_port != to->source_port ||
		       p->flow.destination_port != to->destination_port;
	struct { __be16 source, destination; } ports = { to->source_port, to->destination_port };
	__u8 protocol = p->flow.protocol;
	int error = 0;

	if (!changed || p->fragment == FRAGMENT_LATER || p->kind != PACKET_FLOW)
		return 0;
	if (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6) {
		error = fix_payload_sum(ctx, p->transport + 2,
					port_difference(p->flow.source_port, to->source_port), false);
		error |= store_bytes(ctx, p->transport + 4, &ports.source, 2);
	} else {
		if (protocol == IPPROTO_SCTP)
			error = rewrite_sctp(ctx, p, to);
		else
			error = fix_payload_sum(
				ctx, p->checksum,
				port_difference(p->flow.source_port, to->source_port) +
				port_difference(p->flow.destination_port, to->destination_port),
				protocol == IPPROTO_UDP);
		error |= store_bytes(ctx, p->transport, &ports, 4);
	}
	p->flow.source_port = to->source_port;
	p->flow.destination_port = to->destination_port;
	return error;
}

/* Make the packet look as `to`; its family and protocol stay. Not 0: a write failed, drop it. */
static __always_inline int rewrite(CONTEXT *ctx, struct packet *p, const struct flow *to)
{
	return rewrite_address(ctx, p, true, &to->source) |
	       rewrite_address(ctx, p, false, &to->destination) | rewrite_ports(ctx, p, to);
}

/* One hop less. TTL is the high byte of its word, so the checksum grows by 0x0100 (RFC 1624). */
static __always_inline int decrement_ttl(CONTEXT *ctx, const struct packet *p)
{
	__u32 end = ETH_HLEN + (p->ipv4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	struct ipv6hdr *ipv6;
	struct iphdr *ip;
	__u32 sum;

	if (p->network != ETH_HLEN || pull(ctx, end))
		return -1;
	ip = (void *)(long)ctx->data + ETH_HLEN;
	ipv6 = (void *)ip;
	if (!p->ipv4) {
		if ((void *)(ipv6 + 1) > (void *)(long)ctx->data_end)
			return -1;
		ipv6->hop_limit--;
		return 0;
	}
	if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
		return -1;
	ip->ttl--;
	sum = ip->check + bpf_htons(0x0100);
	ip->check = sum + (sum >= 0xffff);
	return 0;
}

static __always_inline int set_macs(CONTEXT *ctx, const struct mac *destination,
				    const struct mac *source)
{
	struct ethernet *ethernet = (void *)(long)ctx->data;

	if ((void *)(ethernet + 1) > (void *)(long)ctx->data_end)
		return -1;
	ethernet->destination = *destination;
	ethernet->source = *source;
	return 0;
}
