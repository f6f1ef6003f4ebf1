// Answers each datagram to a UDP port by the same one: argv[1] is the port. Of one that says
// "burst N", by N datagrams, each of which is its number.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
	static char data[65536];
	struct sockaddr_in address = {.sin_family = AF_INET};
	struct sockaddr_in peer;
	if (argc != 2)
		return 2;
	address.sin_port = htons(atoi(argv[1]));
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
		return 1;
	if (write(1, "\n", 1) != 1)
		return 1;
	for (;;) {
		socklen_t length = sizeof peer;
		ssize_t size = recvfrom(fd, data, sizeof data - 1, 0, (struct sockaddr *)&peer, &length);
		if (size < 0)
			return 1;
		data[size] = 0;
		int burst = 0;
		if (sscanf(data, "burst %d", &burst) == 1) {
			for (int i = 0; i < burst; i++) {
				int n = snprintf(data, sizeof data, "%d", i);
				sendto(fd, data, n, 0, (struct sockaddr *)&peer, length);
			}
		} else {
			sendto(fd, data, size, 0, (struct sockaddr *)&peer, length);
		}
	}
}
