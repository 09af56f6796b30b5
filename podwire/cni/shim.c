// The program a container runtime executes as the CNI plugin.
//
// It carries the CNI environment, standard input and an open descriptor of the pod's namespace to
// the agent over a unix socket and prints the answer. It knows no JSON: starting an interpreter for
// each call costs more than wiring the pod.
//
// Frames (integers in network order), kept for ever so that shim and agent of different versions
// can at least say so to each other; podwire/cni/wire.py is the other side:
//
//   request  magic[4] "PWCN", version, length | plugin name \0 (NAME=value \0)* \0 standard input
//            with the first byte: SCM_RIGHTS descriptor of CNI_NETNS, where it can be opened
//   answer   magic[4] "PWCN", version, length | exit status, standard output
//
// No agent: DEL takes the pod's link away and is left in a folder beside the socket, where a starting
// agent looks before it serves anybody else, and succeeds, so that pods can be removed (the address
// stays reserved until then). STATUS says 50, everything else 11.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "disconnect.h"

#define WIRE_VERSION 1
#define DEFAULT_SOCKET "/run/podwire/cni.sock"
#define MAX_INPUT (4 << 20)
#define ANSWER_TIMEOUT_S 120

// Answered without an agent: VERSION must work before anything is set up.
#define VERSION_ANSWER                                                                             \
	"{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.1.0\",\"0.2.0\",\"0.3.0\",\"0.3.1\","      \
	"\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n"

enum { IO_FAILURE = 5, TRY_AGAIN = 11, NOT_AVAILABLE = 50 };

struct header {
	char magic[4];
	uint32_t version;
	uint32_t length;
};

struct buffer {
	char *data;
	size_t used, size;
};

static int fail(int code, const char *message, const char *details)
{
	printf("{\"cniVersion\":\"1.1.0\",\"code\":%d,\"msg\":\"%s\",\"details\":\"%s\"}\n", code, message,
	       details);
	return 1;
}

static void reserve(struct buffer *buffer, size_t more)
{
	if (buffer->used + more <= buffer->size)
		return;
	buffer->size = (buffer->used + more) * 2;
	buffer->data = realloc(buffer->data, buffer->size);
	if (!buffer->data)
		exit(fail(IO_FAILURE, "out of memory", ""));
}

static void append(struct buffer *buffer, const char *data, size_t length)
{
	reserve(buffer, length);
	memcpy(buffer->data + buffer->used, data, length);
	buffer->used += length;
}

static const char *variable(const char *name)
{
	const char *value = getenv(name);
	return value ? value : "";
}

// 0, or the errno of the read that failed.
static int append_input(struct buffer *buffer)
{
	size_t start = buffer->used;
	for (;;) {
		reserve(buffer, 65536);
		ssize_t got = read(0, buffer->data + buffer->used, 65536);
		if (got == 0)
			return 0;
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return errno;
		buffer->used += got;
		if (buffer->used - start > MAX_INPUT)
			return EFBIG;
	}
}

static int dial(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct timeval limit = {.tv_sec = ANSWER_TIMEOUT_S};
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) ||
	    connect(fd, (struct sockaddr *)&address, sizeof address)) {
		int error = errno;
		if (fd >= 0)
			close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static int send_all(int fd, const struct buffer *frame, int netns)
{
	size_t sent = 0;
	while (sent < frame->used) {
		struct iovec part = {frame->data + sent, frame->used - sent};
		union {
			struct cmsghdr header;
			char space[CMSG_SPACE(sizeof(int))];
		} control = {0};
		struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
		if (netns >= 0 && sent == 0) {
			message.msg_control = &control;
			message.msg_controllen = sizeof control.space;
			struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
			rights->cmsg_level = SOL_SOCKET;
			rights->cmsg_type = SCM_RIGHTS;
			rights->cmsg_len = CMSG_LEN(sizeof(int));
			memcpy(CMSG_DATA(rights), &netns, sizeof netns);
		}
		ssize_t count = sendmsg(fd, &message, MSG_NOSIGNAL);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0)
			return -1;
		sent += count;
	}
	return 0;
}

static int receive_all(int fd, void *data, size_t length)
{
	size_t got = 0;
	while (got < length) {
		ssize_t count = read(fd, (char *)data + got, length - got);
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			return -1;
		got += count;
	}
	return 0;
}

// The exit status, or -1 when no whole answer came.
static int print_answer(int fd)
{
	struct header header;
	uint32_t status;
	if (receive_all(fd, &header, sizeof header) || memcmp(header.magic, "PWCN", 4))
		return -1;
	uint32_t length = ntohl(header.length);
	if (length < sizeof status || length > MAX_INPUT || receive_all(fd, &status, sizeof status))
		return -1;
	length -= sizeof status;
	char *output = malloc(length + 1);
	if (!output || receive_all(fd, output, length))
		return -1;
	if (fwrite(output, 1, length, stdout) != length)
		return -1;
	return ntohl(status) & 0xff;
}

// Leave a DEL for the next agent; 0 when it is safely there.
static int leave(const char *socket_path, const struct buffer *frame)
{
	char copy[108], folder[128], draft[256], name[256];
	struct timespec now;
	if (strlen(socket_path) >= sizeof copy)
		return -1;
	strcpy(copy, socket_path);
	clock_gettime(CLOCK_REALTIME, &now);
	snprintf(folder, sizeof folder, "%s/cni-deletes", dirname(copy));
	snprintf(name, sizeof name, "%s/%lld-%09ld-%d", folder, (long long)now.tv_sec, now.tv_nsec,
	         getpid());
	snprintf(draft, sizeof draft, "%s/.%d", folder, getpid());
	int fd = open(draft, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		return -1; // no agent has run since boot: nothing is known about where to leave it
	int failed = write(fd, frame->data, frame->used) != (ssize_t)frame->used;
	failed |= close(fd);
	if (failed || rename(draft, name)) {
		unlink(draft);
		return -1;
	}
	// An agent may have begun to serve since: it looks after it listens, so one of the two sees it.
	fd = dial(socket_path);
	if (fd >= 0) {
		close(fd);
		if (unlink(name) == 0)
			return 1;
	}
	return 0;
}

// Under its other names the program works on a link of somebody else, or on none.
static int makes_links(const char *plugin)
{
	return strncmp(plugin, "podwire-", 8) || strcmp(plugin, "podwire-ptp") == 0;
}

static int no_answer(const char *command, const char *details)
{
	if (strcmp(command, "STATUS") == 0)
		return fail(NOT_AVAILABLE, "the podwire agent is not available", details);
	return fail(TRY_AGAIN, "the podwire agent is not available, try again later", details);
}

int main(int argc, char **argv)
{
	const char *command = variable("CNI_COMMAND");
	if (strcmp(command, "VERSION") == 0) {
		fputs(VERSION_ANSWER, stdout);
		return 0;
	}

	struct header header = {{'P', 'W', 'C', 'N'}, htonl(WIRE_VERSION), 0};
	struct buffer frame = {0};
	append(&frame, (char *)&header, sizeof header);
	const char *plugin = argc ? basename(argv[0]) : "podwire";
	append(&frame, plugin, strlen(plugin) + 1);
	for (char **entry = environ; *entry; entry++)
		if (strncmp(*entry, "CNI_", 4) == 0)
			append(&frame, *entry, strlen(*entry) + 1);
	append(&frame, "", 1);
	int error = append_input(&frame);
	if (error)
		return fail(IO_FAILURE, "cannot read the network configuration from standard input",
		            strerror(error));
	header.length = htonl(frame.used - sizeof header);
	memcpy(frame.data, &header, sizeof header);

	const char *path = variable("PODWIRE_CNI_SOCKET");
	if (!*path)
		path = DEFAULT_SOCKET;
	int fd = dial(path);
	if (fd < 0 && strcmp(command, "DEL") == 0) {
		error = errno;
		switch (leave(path, &frame)) {
		case 0:
			if (makes_links(plugin))
				disconnect(variable("CNI_NETNS"), variable("CNI_IFNAME"));
			return 0;
		case 1:
			fd = dial(path);
			break;
		default:
			errno = error;
		}
	}
	if (fd < 0)
		return no_answer(command, strerror(errno));

	int netns = open(variable("CNI_NETNS"), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	int status = send_all(fd, &frame, netns) ? -1 : print_answer(fd);
	if (status < 0)
		return no_answer(command, "the connection ended without an answer");
	return status;
}
