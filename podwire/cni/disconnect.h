// DEL without an agent: take the pod's link away and the rules that name its addresses, so that
// nothing of it stays on the network until an agent comes back and puts its books in order.
//
// Routes and neighbours go with the link; rules do not, so its addresses are read before. Only a
// link whose host end has one of podwire's names is touched.

#pragma once
#include <fcntl.h>
#include <linux/fib_rules.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

// podwire/wiring/routed.py has the same numbers.
enum { TO_POD_PRIORITY = 512, FROM_POD_PRIORITY = 1536, KERNEL_PROTOCOL = 112, MOST_ADDRESSES = 16 };

struct request {
	struct nlmsghdr header;
	union {
		struct ifinfomsg link;
		struct ifaddrmsg address;
		struct fib_rule_hdr rule;
	};
	char attributes[128];
};

struct pod_address {
	unsigned char family, bytes[16];
};

static size_t address_size(unsigned char family)
{
	return family == AF_INET ? 4 : 16;
}

static void start_request(struct request *request, int type, int flags, size_t body)
{
	memset(request, 0, sizeof *request);
	request->header.nlmsg_len = NLMSG_LENGTH(body);
	request->header.nlmsg_type = type;
	request->header.nlmsg_flags = NLM_F_REQUEST | flags;
}

static void put(struct request *request, int type, const void *data, size_t length)
{
	struct rtattr *at = (void *)((char *)request + NLMSG_ALIGN(request->header.nlmsg_len));
	at->rta_type = type;
	at->rta_len = RTA_LENGTH(length);
	memcpy(RTA_DATA(at), data, length);
	request->header.nlmsg_len = NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(at->rta_len);
}

// Bytes of the first answer, or -1.
static ssize_t ask(int sock, struct request *request, void *answer, size_t size)
{
	if (send(sock, request, request->header.nlmsg_len, 0) < 0)
		return -1;
	return recv(sock, answer, size, 0);
}

static int netlink_socket(void)
{
	int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	struct timeval limit = {.tv_sec = 5};
	if (sock >= 0)
		setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	return sock;
}

static const struct rtattr *find(const struct nlmsghdr *message, size_t body, int type)
{
	const struct rtattr *at = (const void *)((const char *)NLMSG_DATA(message) + NLMSG_ALIGN(body));
	int left = message->nlmsg_len - NLMSG_SPACE(body);
	for (; RTA_OK(at, left); at = RTA_NEXT(at, left))
		if (at->rta_type == type)
			return at;
	return NULL;
}

// The index of the link's other end in the host's namespace, 0 if it has none.
static unsigned peer_of(int sock, unsigned index)
{
	struct request request;
	char answer[16384] __attribute__((aligned(8)));
	start_request(&request, RTM_GETLINK, 0, sizeof request.link);
	request.link.ifi_index = index;
	ssize_t got = ask(sock, &request, answer, sizeof answer);
	const struct nlmsghdr *message = (const void *)answer;
	if (got < 0 || !NLMSG_OK(message, (size_t)got) || message->nlmsg_type != RTM_NEWLINK)
		return 0;
	const struct rtattr *peer = find(message, sizeof(struct ifinfomsg), IFLA_LINK);
	return peer ? *(const unsigned *)RTA_DATA(peer) : 0;
}

static int addresses_of(int sock, unsigned index, struct pod_address *found)
{
	struct request request;
	char answer[32768] __attribute__((aligned(8)));
	int count = 0;
	start_request(&request, RTM_GETADDR, NLM_F_DUMP, sizeof request.address);
	ssize_t got = ask(sock, &request, answer, sizeof answer);
	for (; got > 0; got = recv(sock, answer, sizeof answer, 0)) {
		const struct nlmsghdr *message = (const void *)answer;
		for (size_t left = got; NLMSG_OK(message, left); message = NLMSG_NEXT(message, left)) {
			if (message->nlmsg_type != RTM_NEWADDR)
				return count; // the end, or an error
			const struct ifaddrmsg *head = NLMSG_DATA(message);
			const struct rtattr *own = find(message, sizeof *head, IFA_LOCAL);
			own = own ? own : find(message, sizeof *head, IFA_ADDRESS);
			if (!own || head->ifa_index != index || head->ifa_scope != RT_SCOPE_UNIVERSE ||
			    count == MOST_ADDRESSES)
				continue;
			found[count].family = head->ifa_family;
			memcpy(found[count++].bytes, RTA_DATA(own), address_size(head->ifa_family));
		}
	}
	return count;
}

static void delete_rule(int sock, const struct pod_address *of, int to_pod)
{
	struct request request;
	char answer[1024];
	uint32_t priority = to_pod ? TO_POD_PRIORITY : FROM_POD_PRIORITY;
	uint8_t protocol = KERNEL_PROTOCOL, size = address_size(of->family);
	start_request(&request, RTM_DELRULE, NLM_F_ACK, sizeof request.rule);
	request.rule.family = of->family;
	*(to_pod ? &request.rule.dst_len : &request.rule.src_len) = size * 8;
	put(&request, to_pod ? FRA_DST : FRA_SRC, of->bytes, size);
	put(&request, FRA_PRIORITY, &priority, sizeof priority);
	put(&request, FRA_PROTOCOL, &protocol, sizeof protocol);
	ask(sock, &request, answer, sizeof answer); // most pods have none
}

static int is_ours(unsigned host_index)
{
	char name[IF_NAMESIZE];
	return host_index && if_indextoname(host_index, name) &&
	       (!strncmp(name, "pw", 2) || !strncmp(name, "eni", 3));
}

// A socket in the namespace and the index of the interface there; -1 when it has none of that name.
static int enter_for_socket(int netns, const char *ifname, unsigned *index)
{
	struct stat here, there;
	int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	if (home < 0 || fstat(home, &here) || fstat(netns, &there) || here.st_ino == there.st_ino ||
	    setns(netns, CLONE_NEWNET))
		return -1;
	*index = if_nametoindex(ifname);
	int sock = *index ? netlink_socket() : -1;
	if (setns(home, CLONE_NEWNET)) // whatever follows would happen in the wrong place
		_exit(1);
	close(home);
	return sock;
}

static void disconnect(const char *netns_path, const char *ifname)
{
	struct pod_address addresses[MOST_ADDRESSES];
	struct request request;
	char answer[1024];
	unsigned index = 0;
	int netns = open(netns_path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	int host = netlink_socket();
	int pod = netns >= 0 ? enter_for_socket(netns, ifname, &index) : -1;
	if (host < 0 || pod < 0 || !is_ours(peer_of(pod, index)))
		return;
	int count = addresses_of(pod, index, addresses);
	start_request(&request, RTM_DELLINK, NLM_F_ACK, sizeof request.link);
	request.link.ifi_index = index;
	ask(pod, &request, answer, sizeof answer);
	for (int i = 0; i < count; i++) {
		delete_rule(host, &addresses[i], 1);
		delete_rule(host, &addresses[i], 0);
	}
}
