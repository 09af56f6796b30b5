/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* SCTP's checksum after a change of ports, without reading the packet.
 *
 * CRC32c is linear: crc(new) ^ crc(old) is the CRC (start and end value 0) of the difference, which is
 * four bytes of changed ports followed by zeros up to the packet's length. Appending n zero bytes is a
 * multiplication by x^(8n) modulo the polynomial, made of the squares below (RFC 9260, appendix A).
 */
#pragma once

#include "kernel.h"

/* x^(8 * 2^k) modulo the Castagnoli polynomial, bit-reversed. */
static const __u32 crc32c_zeros[16] = {
	0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a, 0xb82be955, 0xb8fdb1e7,
	0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a, 0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
};

/* The product of two polynomials modulo Castagnoli's, both bit-reversed. */
__noinline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;

	for (int i = 0; i < 32; i++) {
		if (a & 0x80000000)
			product ^= b;
		a <<= 1;
		b = b & 1 ? (b >> 1) ^ 0x82f63b78 : b >> 1;
	}
	return product;
}

/* What to xor into the checksum field (little-endian on the wire) of a packet of `length` bytes
 * whose first four bytes change by `difference` (read as a little-endian number). */
static __always_inline __u32 crc32c_change(__u32 difference, __u16 length)
{
	for (int k = 0; k < 16; k++)
		if (length & 1 << k)
			difference = crc32c_multiply(difference, crc32c_zeros[k]);
	return difference;
}
