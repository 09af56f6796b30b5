// SPDX-License-Identifier: Apache-2.0
/* Send UDP packets as fast as one CPU can, from FLOWS source ports, straight to the driver.
 *
 *   flood INTERFACE TARGET-MAC SOURCE TARGET PORT FLOWS SECONDS     prints packets per second sent
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define BATCH 64
#define SIZE 60

static unsigned char frames[BATCH][SIZE];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static unsigned short checksum(const unsigned short *data, int words)
{
	unsigned int sum = 0;

	while (words--)
		sum += *data++;
	sum = (sum & 0xffff) + (sum >> 16);
	return ~((sum & 0xffff) + (sum >> 16));
}

static void build(unsigned char *frame, char **argv, int flow)
{
	struct ether_header *ethernet = (void *)frame;
	struct iphdr *ip = (void *)(frame + 14);
	struct udphdr *udp = (void *)(frame + 34);

	sscanf(argv[2], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &frame[0], &frame[1], &frame[2], &frame[3],
	       &frame[4], &frame[5]);
	frame[6] = 2;
	ethernet->ether_type = htons(ETHERTYPE_IP);
	ip->version = 4;
	ip->ihl = 5;
	ip->ttl = 64;
	ip->protocol = IPPROTO_UDP;
	ip->tot_len = htons(SIZE - 14);
	inet_pton(AF_INET, argv[3], &ip->saddr);
	inet_pton(AF_INET, argv[4], &ip->daddr);
	ip->check = checksum((void *)ip, 10);
	udp->source = htons(10000 + flow);
	udp->dest = htons(atoi(argv[5]));
	udp->len = htons(SIZE - 34);
}

int main(int argc, char **argv)
{
	int fd = socket(AF_PACKET, SOCK_RAW, 0), on = 1, flows, next = 0;
	struct sockaddr_ll to = { .sll_family = AF_PACKET };
	struct mmsghdr messages[BATCH] = {};
	struct iovec parts[BATCH];
	double start = now(), end, sent = 0;

	if (argc != 8 || fd < 0)
		return 2;
	to.sll_ifindex = if_nametoindex(argv[1]);
	flows = atoi(argv[6]);
	setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof(on));
	if (bind(fd, (struct sockaddr *)&to, sizeof(to)))
		return 1;
	for (int i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){ frames[i], SIZE };
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	end = start + atof(argv[7]);
	while (now() < end) {
		int done;

		for (int i = 0; i < BATCH; i++)
			build(frames[i], argv, next++ % flows);
		for (int again = 0; again < 64; again++) {
			done = sendmmsg(fd, messages, BATCH, 0);
			sent += done > 0 ? done : 0;
		}
	}
	printf("%.0f\n", sent / (now() - start));
	return 0;
}
