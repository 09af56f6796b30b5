// SPDX-License-Identifier: Apache-2.0
/* Connect, one byte each way, close: the client prints the nanoseconds of each, one per line.
 *
 *   crr serve ADDRESS PORT             until killed
 *   crr ask ADDRESS PORT COUNT         COUNT connections, one after the other
 *   crr talk ADDRESS PORT COUNT        COUNT exchanges over one connection
 *   crr pour ADDRESS PORT SECONDS      prints bytes per second of one connection
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct sockaddr_in6 six;
static struct sockaddr_in four;
static struct sockaddr *target;
static socklen_t length;
static char buffer[1 << 17];

static void parse(const char *address, int port)
{
	if (strchr(address, ':')) {
		six.sin6_family = AF_INET6;
		six.sin6_port = htons(port);
		inet_pton(AF_INET6, address, &six.sin6_addr);
		target = (struct sockaddr *)&six;
		length = sizeof(six);
	} else {
		four.sin_family = AF_INET;
		four.sin_port = htons(port);
		inet_pton(AF_INET, address, &four.sin_addr);
		target = (struct sockaddr *)&four;
		length = sizeof(four);
	}
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static int dial(void)
{
	int fd = socket(target->sa_family, SOCK_STREAM, 0);

	if (connect(fd, target, length)) {
		perror("connect");
		exit(1);
	}
	return fd;
}

/* 'r': one byte back; 't': every byte back; 'p': swallow all. */
static int serve(void)
{
	int listener = socket(target->sa_family, SOCK_STREAM, 0), on = 1;

	signal(SIGCHLD, SIG_IGN);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, target, length) || listen(listener, 512))
		return 1;
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		char first;

		if (fd < 0 || read(fd, &first, 1) != 1) {
			close(fd);
			continue;
		}
		if (first == 'r') {
			if (write(fd, "x", 1) == 1)
				while (read(fd, &first, 1) > 0)
					;
		} else if (first == 't') {
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
			while (read(fd, &first, 1) == 1 && write(fd, &first, 1) == 1)
				;
		} else {
			while (read(fd, buffer, sizeof(buffer)) > 0)
				;
		}
		close(fd);
	}
}

static int ask(int count)
{
	struct linger reset = { 1, 0 };
	char byte;

	for (int i = 0; i < count; i++) {
		double start = now();
		int fd = dial();

		if (write(fd, "r", 1) != 1 || read(fd, &byte, 1) != 1)
			return 1;
		/* a reset leaves no TIME_WAIT to run out of ports with */
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(fd);
		printf("%.0f\n", now() - start);
	}
	return 0;
}

static int talk(int count)
{
	int fd = dial(), on = 1;
	char byte;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (write(fd, "t", 1) != 1)
		return 1;
	for (int i = 0; i < count; i++) {
		double start = now();

		if (write(fd, "x", 1) != 1 || read(fd, &byte, 1) != 1)
			return 1;
		printf("%.0f\n", now() - start);
	}
	return 0;
}

static int pour(double seconds)
{
	int fd = dial();
	double start = now(), sent = 0;

	if (write(fd, "p", 1) != 1)
		return 1;
	while (now() - start < seconds * 1e9) {
		ssize_t n = write(fd, buffer, sizeof(buffer));

		if (n < 0)
			return 1;
		sent += n;
	}
	printf("%.0f\n", sent / ((now() - start) / 1e9));
	return 0;
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	parse(argv[2], atoi(argv[3]));
	if (!strcmp(argv[1], "serve"))
		return serve();
	if (!strcmp(argv[1], "ask"))
		return ask(atoi(argv[4]));
	if (!strcmp(argv[1], "talk"))
		return talk(atoi(argv[4]));
	return pour(atof(argv[4]));
}
