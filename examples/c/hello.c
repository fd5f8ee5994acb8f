/*
 * Hello answers with a greeting and says which commit is running and where.
 *
 * Configuration comes from the environment: PORT is set by Kari, GREETING by
 * the manifest. One process for each connection. On SIGTERM it takes no new
 * connections, waits for those that are open, and ends.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	CONNECTIONS = 64,	/* at once; above that a client waits */
	IDLE_SECONDS = 30,	/* a client that says nothing for this long is let go */
	DRAIN_SECONDS = 25,	/* below the manifest's terminationGracePeriodSeconds */
	LONGEST_SLOW = 10000,	/* milliseconds that a caller of /slow may ask for */
};

static volatile sig_atomic_t stopping;

static void stop(int signal)
{
	(void)signal;
	stopping = 1;
}

static const char *variable(const char *name, const char *fallback)
{
	const char *value = getenv(name);
	return value && *value ? value : fallback;
}

static void answer(FILE *out, const char *status, const char *type, const char *body)
{
	fprintf(out, "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s",
		status, type, strlen(body), body);
	fflush(out);
}

static void respond(FILE *out, const char *path)
{
	char body[1024];
	int milliseconds;

	if (strcmp(path, "/") == 0) {
		snprintf(body, sizeof body, "%.200s from C on %.200s, commit %.7s\n", variable("GREETING", "Hello"),
			 variable("KARI_NODE", "this machine"), variable("KARI_COMMIT", "unknown"));
		answer(out, "200 OK", "text/plain", body);
	} else if (strcmp(path, "/healthz") == 0) {
		answer(out, "200 OK", "text/plain", "ok\n");
	} else if (strcmp(path, "/version") == 0) {
		snprintf(body, sizeof body, "{\"commit\":\"%.64s\",\"node\":\"%.253s\"}\n",
			 variable("KARI_COMMIT", "unknown"), variable("KARI_NODE", "unknown"));
		answer(out, "200 OK", "application/json", body);
	} else if (sscanf(path, "/slow?milliseconds=%d", &milliseconds) == 1) {
		/* Stands for real work: a request that is in flight for a while. */
		if (milliseconds < 0 || milliseconds > LONGEST_SLOW) {
			answer(out, "400 Bad Request", "text/plain", "milliseconds must be a number from 0 to 10000\n");
			return;
		}
		struct timespec pause = { milliseconds / 1000, milliseconds % 1000 * 1000000L };
		nanosleep(&pause, NULL);
		answer(out, "200 OK", "text/plain", "done\n");
	} else {
		answer(out, "404 Not Found", "text/plain", "not found\n");
	}
}

/* Answers one request after the other until the client goes. */
static void serve(int connection)
{
	struct timeval idle = { .tv_sec = IDLE_SECONDS };
	char request[8192], header[8192], path[1024];
	FILE *in = fdopen(connection, "r"), *out = fdopen(dup(connection), "w");

	setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &idle, sizeof idle);
	while (in && out && fgets(request, sizeof request, in)) {
		do {
			if (!fgets(header, sizeof header, in))
				return;
		} while (strcmp(header, "\r\n") != 0);
		if (sscanf(request, "%*s %1023s", path) == 1)
			respond(out, path);
	}
}

static int listen_on(int port)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons((unsigned short)port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 128) < 0) {
		perror("listen");
		exit(1);
	}
	return listener;
}

int main(void)
{
	int port = atoi(variable("PORT", "0")), children = 0;
	if (port < 1 || port > 65535) {
		fprintf(stderr, "PORT is not set: run as PORT=8080 ./hello\n");
		return 2;
	}

	/* Without SA_RESTART, so that accept() ends when it is time to stop. */
	struct sigaction on_stop = { .sa_handler = stop };
	sigaction(SIGTERM, &on_stop, NULL);
	sigaction(SIGINT, &on_stop, NULL);
	signal(SIGPIPE, SIG_IGN);
	int listener = listen_on(port);
	printf("listening on 127.0.0.1:%d\n", port);
	fflush(stdout);

	while (!stopping) {
		while (children > 0 && waitpid(-1, NULL, children >= CONNECTIONS ? 0 : WNOHANG) > 0)
			children--;
		int connection = accept(listener, NULL, NULL);
		if (connection < 0)
			continue;
		pid_t child = fork();
		if (child == 0) {
			signal(SIGTERM, SIG_IGN); /* the parent waits for it */
			close(listener);
			serve(connection);
			_exit(0);
		}
		if (child > 0)
			children++;
		close(connection);
	}

	printf("stopping: finishing the requests in flight\n");
	fflush(stdout);
	close(listener);
	alarm(DRAIN_SECONDS);
	while (children > 0 && (waitpid(-1, NULL, 0) > 0 || errno == EINTR))
		children--;
	printf("stopped\n");
	return 0;
}
