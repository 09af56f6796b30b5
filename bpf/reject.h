/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Telling a client that its packet is refused: a reset for TCP, ICMP port unreachable for the rest
 * (RFC 9293, RFC 792, RFC 4443).
 *
 * kube-proxy sends ICMP for TCP, too; but a kernel that is still inside connect() takes ICMP only as a
 * hint and the client waits for a second, while a reset is acted on at once.
 */
#pragma once

#include <linux/tcp.h>

#include "forward.h"

#define ICMP_HEAD 8
#define QUOTE_MAX 128 /* of the packet that is refused: headers, and some of what follows */

struct refusal {
	union {
		struct iphdr ipv4;
		struct ipv6hdr ipv6;
	};
	union {
		struct tcphdr tcp;
		struct {
			__u8 type, code;
			__be16 checksum;
			__be32 rest;
			__u8 quote[QUOTE_MAX];
		} icmp;
	};
};

#define CHECKSUM_PARTIAL 3

/* Whether the transport checksum is still to be made, by the card or whoever comes last: from the sum
 * that stands in its place, and from what the packet is by then. Local senders leave it so. */
static __always_inline bool is_partial(struct __sk_buff *ctx)
{
	struct sk_buff *skb = bpf_cast_to_kern_ctx(ctx);

	return BPF_CORE_READ_BITFIELD(skb, ip_summed) == CHECKSUM_PARTIAL;
}

/* The IP header, and the sum that its addresses add to a transport checksum. */
static __always_inline __u32 refusal_head(struct refusal *r, const struct packet *p, __u8 protocol,
					  __u16 length)
{
	if (!p->ipv4) {
		r->ipv6.version = 6;
		r->ipv6.payload_len = bpf_htons(length);
		r->ipv6.nexthdr = protocol;
		r->ipv6.hop_limit = 64;
		__builtin_memcpy(&r->ipv6.saddr, &p->flow.destination, 16);
		__builtin_memcpy(&r->ipv6.daddr, &p->flow.source, 16);
		return bpf_csum_diff(NULL, 0, (__be32 *)&r->ipv6.saddr, 32, bpf_htonl(length + protocol));
	}
	r->ipv4.version = 4;
	r->ipv4.ihl = 5;
	r->ipv4.tot_len = bpf_htons(sizeof(r->ipv4) + length);
	r->ipv4.ttl = 64;
	r->ipv4.protocol = protocol;
	r->ipv4.saddr = p->flow.destination.words[3];
	r->ipv4.daddr = p->flow.source.words[3];
	r->ipv4.check = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)&r->ipv4, sizeof(r->ipv4), 0));
	return bpf_csum_diff(NULL, 0, &r->ipv4.saddr, 8, bpf_htonl(length + protocol));
}

/* Cut the packet to a reset. */
static __always_inline int make_reset(struct __sk_buff *ctx, const struct packet *p, struct refusal *r)
{
	__u32 addresses = refusal_head(r, p, IPPROTO_TCP, sizeof(r->tcp));
	struct tcphdr old;

	if (load_bytes(ctx, p->transport, &old, sizeof(old)) ||
	    bpf_skb_change_tail(ctx, p->transport + sizeof(old), 0))
		return -1;
	r->tcp.source = old.dest;
	r->tcp.dest = old.source;
	r->tcp.doff = 5;
	r->tcp.rst = 1;
	if (old.ack) {
		r->tcp.seq = old.ack_seq;
	} else {
		r->tcp.ack = 1;
		r->tcp.ack_seq = bpf_htonl(bpf_ntohl(old.seq) + old.syn);
	}
	if (is_partial(ctx))
		r->tcp.check = fold(addresses);
	else
		r->tcp.check = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)&r->tcp, sizeof(r->tcp), addresses));
	return store_bytes(ctx, p->transport, &r->tcp, sizeof(r->tcp));
}

/* The quoted datagram's checksum as it will be once somebody makes it. */
static __always_inline void complete_quote(struct refusal *r, bool ipv4)
{
	__u32 head = ipv4 ? sizeof(r->ipv4) : sizeof(r->ipv6);
	__u8 *datagram = r->icmp.quote + (ipv4 ? sizeof(r->ipv4) : sizeof(r->ipv6));
	__u16 sum;

	sum = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)datagram, QUOTE_MAX - head, 0));
	*(__u16 *)(datagram + 6) = sum ? sum : 0xffff;
}

/* Put the ICMP error in front of the start of the packet. */
static __always_inline int make_icmp(struct __sk_buff *ctx, const struct packet *p, struct refusal *r)
{
	__u32 head = p->transport - p->network;
	__u64 quote = head + p->length;
	__u32 sum;

	asm volatile("" : "+r"(quote)); /* one register for check and use */
	if (quote > QUOTE_MAX)
		quote = QUOTE_MAX;
	if (quote < sizeof(r->ipv4) || load_bytes(ctx, p->network, r->icmp.quote, quote) ||
	    bpf_skb_change_tail(ctx, p->network + quote, 0) ||
	    bpf_skb_adjust_room(ctx, head + ICMP_HEAD, BPF_ADJ_ROOM_MAC, 0))
		return -1;
	sum = refusal_head(r, p, p->ipv4 ? IPPROTO_ICMP : IPPROTO_ICMPV6, ICMP_HEAD + quote);
	r->icmp.type = p->ipv4 ? ICMP_UNREACHABLE : ICMPV6_UNREACHABLE;
	if (p->flow.protocol == IPPROTO_UDP && is_partial(ctx))
		complete_quote(r, p->ipv4);
	r->icmp.code = p->ipv4 ? ICMP_PORT_UNREACHABLE_CODE : ICMPV6_PORT_UNREACHABLE_CODE;
	r->icmp.checksum = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)&r->icmp, ICMP_HEAD + QUOTE_MAX,
					       p->ipv4 ? 0 : sum));
	return store_bytes(ctx, p->transport, &r->icmp, ICMP_HEAD);
}

/* Take IP options and extensions off: neither a refusal nor what it quotes has any. Not 0: it cannot be
 * done. */
static __always_inline int strip(struct __sk_buff *ctx, struct packet *p)
{
	__u32 plain = p->ipv4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	int more = p->transport - p->network - plain;
	struct ipv6hdr v6;
	struct iphdr v4;

	if (!more)
		return 0;
	if ((p->ipv4 ? load(ctx, p->network, &v4) : load(ctx, p->network, &v6)) ||
	    bpf_skb_adjust_room(ctx, -more, BPF_ADJ_ROOM_NET, 0))
		return -1;
	p->transport -= more;
	if (!p->ipv4) {
		v6.nexthdr = p->flow.protocol;
		v6.payload_len = bpf_htons(p->length);
		return store_bytes(ctx, p->network, &v6, sizeof(v6));
	}
	v4.ihl = 5;
	v4.tot_len = bpf_htons(sizeof(v4) + p->length);
	v4.check = 0;
	v4.check = ~fold(bpf_csum_diff(NULL, 0, (__be32 *)&v4, sizeof(v4), 0));
	return store_bytes(ctx, p->network, &v4, sizeof(v4));
}

/* Turn the packet into its refusal and send it back. `egress`: it came from this node's own stack. */
static __always_inline int refuse(struct __sk_buff *ctx, struct packet *p, struct refusal *r, bool egress)
{
	struct ethernet ethernet;
	int error;

	report(REASON_REJECTED, ctx->ifindex, &p->flow);
	if (load(ctx, 0, &ethernet) || strip(ctx, p))
		return TCX_DROP;
	__builtin_memset(r, 0, sizeof(*r));
	error = p->flow.protocol == IPPROTO_TCP ? make_reset(ctx, p, r) : make_icmp(ctx, p, r);
	error |= set_macs(ctx, &ethernet.source, &ethernet.destination);
	if (p->ipv4)
		error |= store_bytes(ctx, p->network, &r->ipv4, sizeof(r->ipv4));
	else
		error |= store_bytes(ctx, p->network, &r->ipv6, sizeof(r->ipv6));
	if (error)
		return TCX_DROP;
	return bpf_redirect(ctx->ifindex, egress ? BPF_F_INGRESS : 0);
}
