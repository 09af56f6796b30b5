/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What user space hands to the housekeeping program, and gets back. */
#pragma once

#include "kernel.h"

enum collect_mode { COLLECT_EXPIRE, COLLECT_DOOMED, COLLECT_MOVE, COLLECT_DEPARTED, COLLECT_PLAIN };

struct collect {
	__u32 mode;
	__u32 established_s; /* how long a silent TCP connection lives */
	__u32 datagram_s; /* and an answered UDP flow */
	__u32 pressure; /* not 0: there is no more room; divide all lifetimes by 2 so many times */
	__u32 walked; /* out: entries */
	__u32 removed; /* out: entries expired, forgotten or moved */
	__u32 failed; /* out: entries that could not be moved */
};
