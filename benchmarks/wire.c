/* A wire between two network namespaces, in user space: it carries IP packets after a delay and at a rate.
 *
 *     wire NEAR_DEVICE NAMESPACE FAR_DEVICE ONE_WAY_MS MBIT MTU
 *
 * Makes a TUN device here and one in a namespace made by `ip netns add`, says "ready", and carries packets both ways until
 * its standard input ends; a line there is another rate, in MBIT. Addresses are given to the devices by whoever started it,
 * see links.py. For kernels without netem. Each direction has a rate of MBIT and a queue of QUEUE_NS before it, whose tail
 * is dropped, as a router's is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define QUEUE_NS 250000000L
#define N_SLOTS 8192 /* holds 290 ms of packets of 9000 bytes at 2 Gbit/s; what does not fit is dropped */
#define SECOND_NS 1000000000L
#define TIMER_SLACK_NS 1000UL

struct packet {
    int64_t due_ns;
    size_t nbytes;
};

/* One direction. Slot i belongs to the reader from i = next_in on, to the writer from next_out to next_in. */
struct direction {
    int from_fd, to_fd;
    double ns_per_byte;
    int64_t delay_ns;
    size_t mtu;
    struct packet packets[N_SLOTS];
    char *bytes; /* N_SLOTS times mtu */
    pthread_mutex_t lock; /* guards the two counts and ns_per_byte */
    pthread_cond_t filled;
    uint64_t next_in, next_out;
};

static void fail(const char *what)
{
    fprintf(stderr, "wire: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

/* Put packets into slots as they come, each with the time at which its last bit has arrived. */
static void *take(void *argument)
{
    struct direction *way = argument;
    int64_t free_ns = 0; /* when the wire has sent all that it took */
    for (;;) {
        char *slot = way->bytes + way->next_in % N_SLOTS * way->mtu; /* only this thread changes next_in */
        ssize_t n = read(way->from_fd, slot, way->mtu);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            fail("cannot read a packet");
        int64_t now = now_ns();
        if (free_ns < now)
            free_ns = now;
        pthread_mutex_lock(&way->lock);
        /* The slot after this one must be free too: the next read fills it before anybody looks. */
        if (free_ns - now <= QUEUE_NS && way->next_in + 1 - way->next_out < N_SLOTS) {
            free_ns += (int64_t)((double)n * way->ns_per_byte);
            way->packets[way->next_in % N_SLOTS] = (struct packet){free_ns + way->delay_ns, (size_t)n};
            way->next_in++;
            pthread_cond_signal(&way->filled);
        }
        pthread_mutex_unlock(&way->lock);
    }
    return NULL;
}

static void *give(void *argument)
{
    struct direction *way = argument;
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS);
    for (;;) {
        pthread_mutex_lock(&way->lock);
        while (way->next_out == way->next_in)
            pthread_cond_wait(&way->filled, &way->lock);
        pthread_mutex_unlock(&way->lock);
        uint64_t at = way->next_out % N_SLOTS;
        struct packet packet = way->packets[at];
        struct timespec due = {packet.due_ns / SECOND_NS, packet.due_ns % SECOND_NS};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
            ;
        if (write(way->to_fd, way->bytes + at * way->mtu, packet.nbytes) < 0 && errno == EBADF)
            fail("cannot write a packet"); /* any other refusal is a lost packet, which TCP sends again */
        pthread_mutex_lock(&way->lock);
        way->next_out++;
        pthread_mutex_unlock(&way->lock);
    }
    return NULL;
}

static int make_device(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail("/dev/net/tun");
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (ioctl(fd, TUNSETIFF, &request))
        fail(name);
    return fd;
}

static int make_device_in(const char *namespace, const char *name)
{
    char path[PATH_MAX];
    int here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int there = open(path, O_RDONLY | O_CLOEXEC);
    if (here < 0 || there < 0 || setns(there, CLONE_NEWNET))
        fail(path);
    int fd = make_device(name);
    if (setns(here, CLONE_NEWNET))
        fail("cannot return to the own namespace");
    close(here);
    close(there);
    return fd;
}

static void set_rate(struct direction *way, double mbit)
{
    pthread_mutex_lock(&way->lock);
    way->ns_per_byte = 8e3 / mbit;
    pthread_mutex_unlock(&way->lock);
}

static void start(struct direction *way, int from_fd, int to_fd, double delay_ms, double mbit, size_t mtu)
{
    pthread_t thread;
    way->from_fd = from_fd;
    way->to_fd = to_fd;
    way->delay_ns = (int64_t)(delay_ms * 1e6);
    way->mtu = mtu;
    way->bytes = malloc(N_SLOTS * mtu);
    if (!way->bytes)
        fail("no memory");
    pthread_mutex_init(&way->lock, NULL);
    set_rate(way, mbit);
    pthread_cond_init(&way->filled, NULL);
    if ((errno = pthread_create(&thread, NULL, take, way)) || (errno = pthread_create(&thread, NULL, give, way)))
        fail("no thread");
}

int main(int n_arguments, char **arguments)
{
    static struct direction there, back;
    char line[64];
    if (n_arguments != 7) {
        fprintf(stderr, "usage: wire NEAR_DEVICE NAMESPACE FAR_DEVICE ONE_WAY_MS MBIT MTU\n");
        return 2;
    }
    double delay_ms = atof(arguments[4]), mbit = atof(arguments[5]);
    int mtu = atoi(arguments[6]);
    if (delay_ms < 0 || mbit <= 0 || mtu < 576 || mtu > 65535) {
        fprintf(stderr, "wire: expected a delay of 0 or more, a rate above 0, an MTU from 576 to 65535\n");
        return 2;
    }
    int near_fd = make_device(arguments[1]);
    int far_fd = make_device_in(arguments[2], arguments[3]);
    start(&there, near_fd, far_fd, delay_ms, mbit, (size_t)mtu);
    start(&back, far_fd, near_fd, delay_ms, mbit, (size_t)mtu);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if ((mbit = atof(line)) <= 0) {
            fprintf(stderr, "wire: expected a rate above 0, got %s", line);
            return 2;
        }
        set_rate(&there, mbit);
        set_rate(&back, mbit);
    }
    return 0;
}
