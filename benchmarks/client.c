/* A plain HTTP/1.1 client: what blocking sockets alone can receive, to hold better ones against.
 *
 * One thread a connection; each takes the next piece, asks for it, and receives its body where it belongs. Nothing is
 * verified but the answer's status and length. Built by compiling.py as a shared object and called through ctypes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEAD_NBYTES 16384

struct piece {
    const char *request; /* the whole head of a GET, its empty line included */
    size_t request_nbytes;
    char *target; /* owned by the caller, written by one thread alone */
    size_t nbytes;
};

struct work {
    struct sockaddr_in server;
    const struct piece *pieces;
    size_t n_pieces;
    atomic_size_t next;
    atomic_int error; /* the first errno; the other threads stop when they see it */
};

static int send_all(int fd, const char *bytes, size_t nbytes)
{
    while (nbytes) {
        ssize_t n = send(fd, bytes, nbytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        bytes += n;
        nbytes -= (size_t)n;
    }
    return 0;
}

/* Receive a head; what came behind it is left in `head` from *at to *stop. */
static int receive_head(int fd, char *head, size_t *at, size_t *stop)
{
    size_t held = 0;
    for (;;) {
        ssize_t n = recv(fd, head + held, HEAD_NBYTES - held, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : -ECONNRESET;
        held += (size_t)n;
        char *end = memmem(head, held, "\r\n\r\n", 4);
        if (end) {
            end[2] = 0; /* the last line still ends in a line end; the body begins behind it */
            *at = (size_t)(end - head) + 4;
            *stop = held;
            return 0;
        }
        if (held == HEAD_NBYTES)
            return -EMSGSIZE;
    }
}

static int check_head(const char *head, size_t nbytes)
{
    if (strncmp(head, "HTTP/1.1 206 ", 13) != 0)
        return -EPROTO;
    const char *length = strcasestr(head, "\r\nContent-Length:");
    if (!length || strtoull(length + strlen("\r\nContent-Length:"), NULL, 10) != nbytes)
        return -EPROTO;
    return 0;
}

static int receive_piece(int fd, const struct piece *piece, char *head)
{
    size_t at = 0, stop = 0;
    int result = send_all(fd, piece->request, piece->request_nbytes);
    if (!result)
        result = receive_head(fd, head, &at, &stop);
    if (!result)
        result = check_head(head, piece->nbytes);
    if (result)
        return result;
    size_t held = stop - at;
    if (held > piece->nbytes)
        return -EPROTO;
    memcpy(piece->target, head + at, held);
    while (held < piece->nbytes) {
        ssize_t n = recv(fd, piece->target + held, piece->nbytes - held, MSG_WAITALL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : -ECONNRESET;
        held += (size_t)n;
    }
    return 0;
}

static void *serve_connection(void *argument)
{
    struct work *work = argument;
    int on = 1, result = 0, none = 0;
    char *head = malloc(HEAD_NBYTES);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!head || fd < 0) {
        result = head ? -errno : -ENOMEM;
        goto out;
    }
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on)
        || connect(fd, (const struct sockaddr *)&work->server, sizeof work->server)) {
        result = -errno;
        goto out;
    }
    while (!atomic_load(&work->error)) {
        size_t number = atomic_fetch_add(&work->next, 1);
        if (number >= work->n_pieces)
            break;
        result = receive_piece(fd, &work->pieces[number], head);
        if (result)
            break;
    }
out:
    if (result)
        atomic_compare_exchange_strong(&work->error, &none, -result);
    if (fd >= 0)
        close(fd);
    free(head);
    return NULL;
}

/* Receive all pieces over n_connections connections to an IPv4 address.
 *
 * Returns 0, or -errno of the first failure (-EPROTO: not a 206 of the length asked for); then the targets' content is
 * undefined. Keeps nothing. */
int receive_pieces(const char *address, int port, const struct piece *pieces, size_t n_pieces, int n_connections)
{
    struct work work = {.pieces = pieces, .n_pieces = n_pieces};
    pthread_t *threads = calloc((size_t)n_connections, sizeof *threads);
    int n_started = 0, result = 0;
    if (!threads)
        return -ENOMEM;
    work.server.sin_family = AF_INET;
    work.server.sin_port = htons((uint16_t)port);
    if (inet_pton(AF_INET, address, &work.server.sin_addr) != 1) {
        result = -EINVAL;
        goto out;
    }
    while (n_started < n_connections) {
        result = -pthread_create(&threads[n_started], NULL, serve_connection, &work);
        if (result) {
            atomic_store(&work.error, -result);
            break;
        }
        n_started++;
    }
    for (int number = 0; number < n_started; number++)
        pthread_join(threads[number], NULL);
    result = -atomic_load(&work.error);
out:
    free(threads);
    return result;
}
