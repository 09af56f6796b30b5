/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What user space hears of: counters of every outcome, and a ring buffer of refused packets.
 *
 * Counters are exact. Events are a sample: so many of each reason in a second, that a flood costs the
 * node no more than its drops; what is not told is counted, too.
 */
#pragma once

#include "address.h"

/* Why a packet ended here, or what was done to it. Names are those of `podwire bpf status`. */
enum reason {
	REASON_FORWARDED, /* left by our own look-up */
	REASON_TRANSLATED, /* new connections that a Service or masquerade changed */
	REASON_REJECTED, /* no endpoints, or a port that its ClusterIP lacks: the client is told */
	REASON_NO_LOCAL_ENDPOINT,
	REASON_UNALLOCATED, /* an address of a Service range that no Service has */
	REASON_SOURCE_RANGE, /* outside loadBalancerSourceRanges */
	REASON_SPOOFED,
	REASON_POLICY,
	REASON_POLICY_AUDIT, /* policy would have refused it */
	REASON_CONNECTIONS_FULL,
	REASON_PORTS_EXHAUSTED,
	REASON_FRAGMENT_LOST, /* its first fragment was not seen */
	REASON_BROKEN,
	REASON_WRITE_FAILED,
	REASON_NO_ROUTE,
	REASON_TOO_BIG, /* for the way out: left to the stack, which cuts it or tells the sender */
	REASON_AFFINITY_FULL,
	REASON_EVENTS_LOST,
	REASON_REPLACED, /* a list of backends that gave way to another at this moment */
	REASON_LED_ASTRAY, /* by an option of DSR that names no Service with this backend here */
	REASON_EVICTED, /* connections forgotten before their time: the table was nearly full */
	REASON_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} events SEC(".maps");

const volatile __u32 events_per_second = 0; /* of each reason, and object file */

struct event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 reason;
	__u32 interface; /* where the packet was seen */
	__u64 ruling; /* of policies (policy.h), or 0 */
	__u32 peer_identity; /* as policies see the other end */
	__u32 egress; /* whether the sender's side decided */
	struct flow flow; /* after translation of the destination */
};

struct budget {
	__u32 second;
	__u32 used;
};

static struct budget budgets[REASON_MAX];

static __always_inline void count(enum reason reason)
{
	__u32 key = reason;
	__u64 *counter = bpf_map_lookup_elem(&counters, &key);

	if (counter)
		*counter += 1;
}

/* Whether this second has an event left for `reason`. CPUs that meet here may tell a few more. */
static __always_inline bool may_tell(enum reason reason)
{
	__u32 now_s = now_seconds();
	struct budget *budget;

	if (reason >= REASON_MAX)
		return false;
	budget = &budgets[reason];
	if (budget->second != now_s) {
		budget->second = now_s;
		budget->used = 0;
	}
	if (budget->used >= events_per_second)
		return false;
	budget->used++;
	return true;
}

static __always_inline struct event *begin_event(enum reason reason, __u32 interface,
						 const struct flow *flow)
{
	struct event *event = NULL;

	if (may_tell(reason))
		event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		count(REASON_EVENTS_LOST);
		return NULL;
	}
	event->time_ns = bpf_ktime_get_ns();
	event->reason = reason;
	event->interface = interface;
	event->ruling = event->peer_identity = event->egress = 0;
	event->flow = *flow;
	return event;
}

static __always_inline void report(enum reason reason, __u32 interface, const struct flow *flow)
{
	struct event *event = begin_event(reason, interface, flow);

	count(reason);
	if (event)
		bpf_ringbuf_submit(event, 0);
}
