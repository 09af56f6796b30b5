/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ICMP errors about translated packets: what they quote, and whom they go to, is translated back. */
#pragma once

#include "forward.h"

enum quoted { QUOTED_UNKNOWN, QUOTED_UNCHANGED, QUOTED_TRANSLATED };

/* An error quotes a packet as it was on the wire here. The connection entry of the answers to that
 * packet says what answers become; the quoted packet becomes the reverse of it, and the error itself
 * goes where those answers go. One rule for both directions. */
static __always_inline enum quoted
translate_error(struct __sk_buff *ctx, struct packet *p, struct packet *inner, struct flow *scratch,
		int *error)
{
	struct connection *connection;
	__u16 sum = p->transport + 2;
	__u32 change = 0;

	parse_at(ctx, inner, p->transport + 8, p->ipv4);
	if ((inner->kind != PACKET_FLOW && inner->kind != PACKET_CUT && inner->kind != PACKET_OTHER) ||
	    inner->fragment == FRAGMENT_LATER)
		return QUOTED_UNKNOWN;
	reverse(scratch, &inner->flow);
	connection = find_connection(scratch);
	if (!connection)
		return QUOTED_UNKNOWN;
	if (!(connection->flags & CONNECTION_TRANSLATED))
		return QUOTED_UNCHANGED;
	*error = 0;
	/* the sender is named as the answers' sender is, as netfilter does */
	*error |= rewrite_address(ctx, p, true, &connection->to.source);
	*error |= rewrite_address(ctx, p, false, &connection->to.destination);
	reverse(scratch, &connection->to);

	/* Inside, IPv4's own header checksum makes up for its addresses; nothing else does. */
	if (!p->ipv4) {
		change = fold(bpf_csum_diff(inner->flow.source.words, 32, scratch->source.words, 32, 0));
	}
	change += port_difference(inner->flow.source_port, scratch->source_port);
	if (inner->flow.protocol != IPPROTO_ICMP && inner->flow.protocol != IPPROTO_ICMPV6)
		change += port_difference(inner->flow.destination_port, scratch->destination_port);
	*error |= fix_payload_sum(ctx, sum, change, false);
	inner->checksum = 0; /* the quoted transport checksum stays: few quotes are long enough */
	*error |= rewrite_address(ctx, inner, true, &scratch->source);
	*error |= rewrite_address(ctx, inner, false, &scratch->destination);
	if (inner->kind == PACKET_OTHER)
		return QUOTED_TRANSLATED; /* no ports */
	if (inner->flow.protocol == IPPROTO_ICMP || inner->flow.protocol == IPPROTO_ICMPV6)
		*error |= store_bytes(ctx, inner->transport + 4, &scratch->source_port, 2);
	else
		*error |= store_bytes(ctx, inner->transport, &scratch->source_port, 4);
	return QUOTED_TRANSLATED;
}
